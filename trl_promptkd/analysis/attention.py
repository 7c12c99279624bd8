"""Where models look: four measures of each layer's attention, and the heads in which models differ most.

Of each model only one layer's matrices, and those of the layer before, exist at a time. The models themselves must all fit into memory.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
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
    """
    if not models:
        raise ValueError("`models` is empty; it must hold at least one model by its name.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}; it must be above 0.")
    _check_rows(rows, queries)
    prompts = soft_prompts or {}
    # The largest matrices first, and rows of like length beside each other
    rows = sorted(rows, key=lambda row: -len(row["prompt_ids"]) - len(row["completion_ids"]))
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(eager_attention(model))
        shapes = {name: _layers_and_heads(name, model) for name, model in models.items()}
        depths = {name: layers for name, (layers, _) in shapes.items()}
        sums = {name: torch.zeros(layers, len(MEASURES), dtype=torch.float64) for name, layers in depths.items()}
        shares = {name: torch.zeros(layers, dtype=torch.float64) for name, layers in depths.items()}
        heads = min(number for _, number in shapes.values())
        variances = torch.zeros(min(depths.values()), heads, dtype=torch.float64)
        num_queries = num_entries = 0
        bar = stack.enter_context(tqdm(total=len(rows), desc="Attention", unit="row"))
        for start in range(0, len(rows), batch_size):
            batch = _Batch.of(rows[start : start + batch_size], queries)
            of_models = {name: _text_layers(model, batch, prompts.get(name)) for name, model in models.items()}
            for name, layers in of_models.items():
                before = None
                for index, layer in enumerate(layers):
                    attention, share = layer()
                    sums[name][index] += layer_sums(attention, before)
                    shares[name][index] += share.double().mean(dim=1).sum().cpu()
                    before = attention
            entries = visible_entries(batch.attention_mask, batch.queries).sum(dim=(1, 2))  # (batch)
            if len(models) > 1:
                variances += _variances(list(of_models.values()), len(variances), heads, entries)
            num_queries += int(batch.queries.sum())
            num_entries += int(entries.sum())
            bar.update(len(entries))
    counts = torch.tensor([num_queries, num_queries, num_entries, len(rows)])
    return AttentionReport(
        measures={name: _means(name, of_model / counts) for name, of_model in sums.items()},
        soft_prompt_share={name: (shares[name] / num_queries).tolist() for name in models if name in prompts},
        heads=_ranked(variances / len(rows), depths) if len(models) > 1 else [],
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
    found = {}
    for name, model in models.items():
        with eager_attention(model):
            layers = _text_layers(model, batch, (soft_prompts or {}).get(name))
            found[name] = [
                layers[head.layers[name]]()[0][0, head.head].cpu()[batch.queries[0].cpu()] for head in heads
            ]
    return found


class _Batch(NamedTuple):
    """Some rows: ids, mask and queries, each `(batch, seq)`."""

    input_ids: Tensor
    attention_mask: Tensor
    queries: Tensor

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], queries: str) -> "_Batch":
        padded = pad_rows([row["prompt_ids"] for row in rows], [row["completion_ids"] for row in rows], 0)
        mask = padded["attention_mask"]
        return cls(padded["input_ids"], mask, padded["labels"] != -100 if queries == "completion" else mask.bool())


def _text_layers(model: Any, batch: _Batch, soft_prompt: Tensor | None) -> list[Callable[[], tuple[Tensor, Tensor]]]:
    """[`text_attention`] of each layer, computed when it is called for."""
    ids, mask, queries = (values.to(model_device(model)) for values in batch)

    def measured(layer: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        weights = layer()
        return text_attention(weights, mask.to(weights.device), queries.to(weights.device))

    return [partial(measured, layer) for layer in attention_layers(model, ids, mask, soft_prompt)]


def _layers_and_heads(name: str, model: Any) -> tuple[int, int]:
    two = torch.ones(1, 2, dtype=torch.long, device=model_device(model))
    heads = [layer().size(1) for layer in attention_layers(model, two, two)]
    if not heads:
        raise ValueError(
            f"The layers of {name!r} ({type(model).__name__}) give away no attention weights, also with "
            "`attn_implementation='eager'`. Leave this model out."
        )
    return len(heads), min(heads)


def _variances(
    models: Sequence[Sequence[Callable[[], tuple[Tensor, Tensor]]]], depth: int, heads: int, num_entries: Tensor
) -> Tensor:
    """`(depth, heads)`: the variance of a head's entries over the models, a mean over a row's, summed over rows."""
    found = torch.zeros(depth, heads, dtype=torch.float64)
    for layer in range(depth):
        matrices = [layers[same_depth(layer, depth, len(layers))]()[0][:, :heads] for layers in models]
        stacked = torch.stack([matrix.to(matrices[0].device) for matrix in matrices])
        # Entries that do not count are 0 in all models, and so is their variance
        sums = stacked.var(dim=0, correction=0).sum(dim=(2, 3)).cpu().double()  # (batch, heads)
        found[layer] = (sums / num_entries.unsqueeze(1)).sum(dim=0)
    return found


def _means(name: str, means: Tensor) -> dict[str, list[float | None]]:
    """Measure -> a mean a layer, of `means`, `(layers, measures)`."""
    broken = (~means[:, 0].isfinite()).nonzero()
    if len(broken):
        raise ValueError(
            f"The attention of {name!r} is not finite from layer {int(broken[0])} on. Check the weights for NaN. If they are "
            "float16, load them in float32."
        )
    columns = [[None if math.isnan(value) else value for value in values] for values in means.T.tolist()]
    return dict(zip(MEASURES, columns, strict=True))


def _ranked(variances: Tensor, depths: Mapping[str, int]) -> list[HeadVariance]:
    found = [
        HeadVariance(head, {name: same_depth(layer, len(variances), depth) for name, depth in depths.items()}, value)
        for layer, of_layer in enumerate(variances.tolist())
        for head, value in enumerate(of_layer)
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
