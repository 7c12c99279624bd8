"""Where models look: four measures of each layer's attention, and the heads in which models differ most.

All models walk through their layers side by side, so that of each only one layer's matrices, and those of the layer before, exist
at a time. The models themselves must all fit into memory.
"""

import math
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..data import pad_rows
from .attention_layers import attention_layers, eager_attention, model_device


__all__ = ["MEASURES", "AttentionReport", "HeadVariance", "head_matrices", "measure_attention"]

MEASURES = ("entropy", "self_focus", "sparsity", "similarity")
SHARE_ABOVE = 0.1
QUERIES = ("completion", "all")


@dataclass(frozen=True)
class HeadVariance:
    """
    How much models differ in one head.

    Args:
        head (`int`): Its number in the layer, the same in all models.
        layers (`dict[str, int]`): The layer that it is in, of each model; see [`measure_attention`].
        variance (`float`): Over the models, of an entry of its matrix, on average.
    """

    head: int
    layers: dict[str, int]
    variance: float


@dataclass(frozen=True)
class AttentionReport:
    """
    What [`measure_attention`] found.

    Args:
        measures: Model -> measure -> a number a layer. `similarity` is `None` in the first layer, which has none before it.
        soft_prompt_share: Model -> a number a layer, for models behind a soft prompt: how much attention goes to it.
        heads: Those that the models have in common, by falling variance; empty for one model.
        num_rows, num_queries: How much was measured.
    """

    measures: dict[str, dict[str, list[float | None]]]
    soft_prompt_share: dict[str, list[float]]
    heads: list[HeadVariance]
    num_rows: int
    num_queries: int


def text_attention(weights: Tensor, attention_mask: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Attention among the tokens of the text: of those in `queries`, to themselves and to what is before them.

    Padding is neither query nor key. A soft prompt is no query, and no key either: a row's attention to it is taken out, and the rest
    scaled to add up to 1, so that rows are distributions over the same tokens in all models. What was taken out is given back
    beside it.

    Args:
        weights (`Tensor` of shape `(batch, heads, num_virtual_tokens + seq, num_virtual_tokens + seq)`): Of [`attention_layers`].
        attention_mask (`Tensor` of shape `(batch, seq)`): 1 for tokens, 0 for padding.
        queries (`Tensor` of shape `(batch, seq)`): True where a token's attention counts.

    Returns:
        `Tensor` of shape `(batch, heads, seq, seq)` in float32, zero outside of [`visible_entries`]; and of shape `(batch, heads, seq)`, the share
        of each query's attention that is not on the text.
    """
    virtual = weights.size(-1) - attention_mask.size(1)
    visible = visible_entries(attention_mask, queries).unsqueeze(1)  # (batch, 1, seq, seq)
    text = weights[..., virtual:, virtual:].float().where(visible, 0.0)
    total = text.sum(dim=-1, keepdim=True)  # (batch, heads, seq, 1)
    share = (1 - total.squeeze(-1)).where(queries.unsqueeze(1), 0.0)
    return text / total.clamp(min=torch.finfo(total.dtype).tiny), share


def visible_entries(attention_mask: Tensor, queries: Tensor) -> Tensor:
    """The entries of an attention matrix that count, `(batch, seq, seq)`: from a query to itself and to the tokens before it.

    Entries beyond a sliding window are among them, with a weight of 0: so all layers and models have the same ones.
    """
    seq = attention_mask.size(1)
    causal = torch.ones(seq, seq, dtype=torch.bool, device=attention_mask.device).tril()
    return queries.unsqueeze(2) & attention_mask.bool().unsqueeze(1) & causal


def layer_sums(attention: Tensor, before: Tensor | None) -> Tensor:
    """The four measures of one layer, summed over rows and their queries or entries, and averaged over heads.

    Source: the measures of response priming (arXiv 2412.17846), which are named there without formulas.

    Args:
        attention (`Tensor` of shape `(batch, heads, seq, seq)`): Of [`text_attention`].
        before (`Tensor` of the same shape, *optional*): That of the layer before.

    Returns:
        `Tensor` of shape `(4,)` in float64, in the order of `MEASURES`:

        - entropy: of each query's attention, `-sum_j a_j log a_j`, in nats;
        - self_focus: the entries on the diagonal;
        - sparsity: the number of entries above 0.1;
        - similarity: of each row, the cosine between a head's matrix and that of the same head in the layer before; NaN without one.
    """
    nothing_before = attention.new_full(attention.shape[:2], torch.nan)
    sums = (
        torch.special.entr(attention).sum(dim=(2, 3)),
        attention.diagonal(dim1=2, dim2=3).sum(dim=2),
        (attention > SHARE_ABOVE).sum(dim=(2, 3)),
        nothing_before if before is None else F.cosine_similarity(attention.flatten(2), before.flatten(2), dim=2),
    )  # of shape (batch, heads) each
    return torch.stack([values.double().mean(dim=1).sum().cpu() for values in sums])


class RunningVariance:
    """The variance over tensors that come one after the other, of which none is kept (Welford's algorithm)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Any = 0.0
        self.squares: Any = 0.0

    def add(self, values: Tensor) -> None:
        self.count += 1
        change = values - self.mean
        self.mean = self.mean + change / self.count
        self.squares = self.squares + change * (values - self.mean)

    def variance(self) -> Tensor:
        """The mean squared distance from the mean (divided by their number, not by one less)."""
        return self.squares / self.count


def same_depth(layer: int, num_layers: int, other_num_layers: int) -> int:
    """The layer of a model with `other_num_layers` that is as deep as `layer` of one with `num_layers`: the first for the first, the
    last for the last, the nearest for those between."""
    return round(layer * (other_num_layers - 1) / max(num_layers - 1, 1))


def measure_attention(
    models: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    soft_prompts: Mapping[str, Tensor] | None = None,
    queries: str = "completion",
    batch_size: int = 4,
) -> AttentionReport:
    """Measure each layer's attention in models of one tokenizer, and rank the heads by how much the models differ in them.

    Of a layer, `entropy` and `self_focus` are means over heads and over the queries of all rows, `sparsity` is the share of
    the [`visible_entries`] above 0.1, and `similarity` a mean over heads and rows.

    The variance of a head: of each entry of its matrix, over the models; the mean of that over a row's visible entries; the
    mean of that over rows. Models of different depth are compared at the same relative depth, those of different numbers of
    heads in the first ones. It means something where the models come from one: heads of unrelated models have nothing in common but a number.

    Args:
        models: By name, plain or PEFT. One may come twice, with and without a soft prompt. All are in memory at once.
        rows: With `prompt_ids` and `completion_ids`, of `tokenize_dataset`.
        soft_prompts: By the name of the model that they stand before, each `(num_virtual_tokens, hidden)`.
        queries (`str`): `"completion"`: the attention of the completion's tokens counts, to themselves and to all of the text
            before them. `"all"`: that of the prompt's tokens, too.
        batch_size (`int`): Rows at a time; it changes no result.

    Raises:
        ValueError: for no models or rows, a batch size below 1, other `queries`, a row without any, a model that gives away no weights,
            and weights that are not finite.
    """
    if not models:
        raise ValueError("`models` is empty; it must hold at least one model by its name.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}; it must be above 0.")
    _check_rows(rows, queries)
    prompts = soft_prompts or {}
    rows = sorted(rows, key=lambda row: -_length(row))  # padded to their likes; the largest matrices first
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(eager_attention(model))
        walkers = [_Walker(name, model, prompts.get(name)) for name, model in models.items()]
        depth, heads = min(w.num_layers for w in walkers), min(w.num_heads for w in walkers)
        variances = torch.zeros(depth, heads, dtype=torch.float64)
        num_queries = num_entries = 0
        bar = stack.enter_context(tqdm(total=len(rows), desc="Attention", unit="row"))
        for start in range(0, len(rows), batch_size):
            batch = _Batch.of(rows[start : start + batch_size], queries)
            variances += _walk_together(walkers, batch, depth, heads)
            num_queries += int(batch.queries.sum())
            num_entries += int(batch.num_entries().sum())
            bar.update(len(batch.queries))
    counts = torch.tensor([num_queries, num_queries, num_entries, len(rows)])
    return AttentionReport(
        measures={walker.name: walker.measures(counts) for walker in walkers},
        soft_prompt_share={w.name: (w.shares / num_queries).tolist() for w in walkers if w.soft_prompt is not None},
        heads=_ranked(variances / len(rows), walkers) if len(walkers) > 1 else [],
        num_rows=len(rows),
        num_queries=num_queries,
    )


def head_matrices(
    models: Mapping[str, Any],
    row: Mapping[str, Any],
    heads: Sequence[HeadVariance],
    soft_prompts: Mapping[str, Tensor] | None = None,
    queries: str = "completion",
) -> dict[str, list[Tensor]]:
    """The matrices of some heads on one row: model -> `(num_queries, tokens)` in float32 of each of `heads`.

    Args:
        models, row, soft_prompts, queries: As for [`measure_attention`].
        heads: Of its report.
    """
    _check_rows([row], queries)
    batch = _Batch.of([row], queries)
    found: dict[str, list[Tensor]] = {}
    for name, model in models.items():
        matrices: dict[int, Tensor] = {}
        with eager_attention(model), closing(_text_layers(model, batch, (soft_prompts or {}).get(name))) as layers:
            for layer, (attention, _) in enumerate(layers):
                for index, head in enumerate(heads):
                    if head.layers[name] == layer:
                        matrices[index] = attention[0, head.head].cpu()[batch.queries[0]]
        found[name] = [matrices[index] for index in range(len(heads))]
    return found


@dataclass
class _Batch:
    """Some rows: ids, mask and queries, each `(batch, seq)`."""

    input_ids: Tensor
    attention_mask: Tensor
    queries: Tensor

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], queries: str) -> "_Batch":
        padded = pad_rows([row["prompt_ids"] for row in rows], [row["completion_ids"] for row in rows], 0)
        mask = padded["attention_mask"]
        return cls(padded["input_ids"], mask, padded["labels"] != -100 if queries == "completion" else mask.bool())

    def num_entries(self) -> Tensor:
        """How many entries count, of each row: `(batch)`."""
        return visible_entries(self.attention_mask, self.queries).sum(dim=(1, 2))


class _Walker:
    """A model on its way through its layers, and what was measured in them."""

    def __init__(self, name: str, model: nn.Module, soft_prompt: Tensor | None):
        self.name, self.model, self.soft_prompt = name, model, soft_prompt
        two = torch.ones(1, 2, dtype=torch.long, device=model_device(model))
        heads = [weights.size(1) for weights in attention_layers(model, two, two)]
        if not heads:
            raise ValueError(
                f"The layers of {name!r} ({type(model).__name__}) give away no attention weights, also with `attn_implementation='eager'`. "
                "Leave this model out."
            )
        self.num_layers, self.num_heads = len(heads), min(heads)
        self.sums = torch.zeros(self.num_layers, len(MEASURES), dtype=torch.float64)
        self.shares = torch.zeros(self.num_layers, dtype=torch.float64)

    def walk(self, batch: _Batch) -> Generator[Tensor, None, None]:
        """Yields the attention of layer after layer, `(batch, heads, seq, seq)`, having added up its measures."""
        before = None
        with closing(_text_layers(self.model, batch, self.soft_prompt)) as layers:
            for layer, (attention, share) in enumerate(layers):
                self.sums[layer] += layer_sums(attention, before)
                self.shares[layer] += share.double().mean(dim=1).sum().cpu()
                before = attention
                yield attention
                del attention

    def measures(self, counts: Tensor) -> dict[str, list[float | None]]:
        """Measure -> a mean a layer, of the sums divided by `counts`, one a measure.

        Raises:
            ValueError: where attention is not finite.
        """
        broken = (~self.sums[:, 0].isfinite()).nonzero()
        if len(broken):
            raise ValueError(
                f"The attention of {self.name!r} is not finite from layer {int(broken[0])} on. Check the weights for NaN; where they are float16, "
                "load them in float32."
            )
        means = (self.sums / counts).T.tolist()
        return {
            measure: [None if math.isnan(value) else value for value in values]
            for measure, values in zip(MEASURES, means, strict=True)
        }


def _text_layers(
    model: nn.Module, batch: _Batch, soft_prompt: Tensor | None
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """[`text_attention`] of layer after layer."""
    ids, mask, queries = (x.to(model_device(model)) for x in (batch.input_ids, batch.attention_mask, batch.queries))
    with closing(attention_layers(model, ids, mask, soft_prompt)) as layers:
        for weights in layers:
            attention = text_attention(weights, mask.to(weights.device), queries.to(weights.device))
            del weights
            yield attention
            del attention


def _walk_together(walkers: Sequence[_Walker], batch: _Batch, depth: int, heads: int) -> Tensor:
    """All models through all layers, side by side.

    Returns:
        `Tensor` of shape `(depth, heads)`: the variance of a head's entries over the models, a mean over a row's, summed over rows.
    """
    variances = torch.zeros(depth, heads, dtype=torch.float64)
    num_entries = batch.num_entries().unsqueeze(1)  # (batch, 1)
    with ExitStack() as stack:
        walks = [stack.enter_context(closing(walker.walk(batch))) for walker in walkers]
        reached = [-1] * len(walkers)
        for layer in range(depth):
            over_models = RunningVariance()
            for index, (walker, walk) in enumerate(zip(walkers, walks, strict=True)):
                steps = same_depth(layer, depth, walker.num_layers) - reached[index]
                reached[index] += steps
                attention = next(islice(walk, steps - 1, None))
                over_models.add(attention[:, :heads].to(model_device(walkers[0].model)))
                del attention
            # Entries that do not count are 0 in all models, and so is their variance
            sums = over_models.variance().sum(dim=(2, 3)).cpu().double()  # (batch, heads)
            variances[layer] = (sums / num_entries).sum(dim=0)
        for walk in walks:
            deque(walk, maxlen=0)  # to the end, where the shallowest model has one layer and another more
    return variances


def _ranked(variances: Tensor, walkers: Sequence[_Walker]) -> list[HeadVariance]:
    depth, heads = variances.shape
    found = [
        HeadVariance(
            head=head,
            layers={walker.name: same_depth(layer, depth, walker.num_layers) for walker in walkers},
            variance=float(variances[layer, head]),
        )
        for layer in range(depth)
        for head in range(heads)
    ]
    return sorted(found, key=lambda head: -head.variance)


def _check_rows(rows: Sequence[Mapping[str, Any]], queries: str) -> None:
    if queries not in QUERIES:
        raise ValueError(f"`queries` is {queries!r}; it must be 'completion' or 'all'.")
    if not len(rows):
        raise ValueError("`rows` is empty: there is nothing to measure. Check the data's path, split and filters.")
    for index, row in enumerate(rows):
        if queries == "completion" and not row["completion_ids"]:
            raise ValueError(
                f"Row {index} of `rows` has no completion, whose attention is to be measured. Filter such rows out, or set "
                "`queries='all'` to measure that of the prompt's tokens, too."
            )


def _length(row: Mapping[str, Any]) -> int:
    return len(row["prompt_ids"]) + len(row["completion_ids"])
