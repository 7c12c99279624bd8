"""Where models attend: four measures of each layer's attention, and the heads in which models differ most.

Rows go through a model one at a time, so that nothing is padded.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from pandas import DataFrame, concat
from torch import Tensor
from tqdm.auto import tqdm

from ..models.forward import input_embeddings
from ..models.side_effects import flags_restored


__all__ = ["MEASURES", "head_matrices", "measure_attention"]

MEASURES = ("entropy", "self_focus", "sparsity", "similarity")
SHARE_ABOVE = 0.1
QUERIES = ("completion", "all")


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """Inside, the model is in evaluation mode and computes attention eagerly, so that the weights exist."""
    before = model.config._attn_implementation
    with flags_restored(model):
        try:
            model.set_attn_implementation("eager")
            yield model.eval()
        finally:
            model.set_attn_implementation(before)


@torch.no_grad()
def text_attention(
    model: Any, row: Mapping[str, Any], soft_prompt: Tensor | None = None, queries: str = "completion"
) -> tuple[list[Tensor], Tensor]:
    """Each layer's attention among the tokens of a row's text.

    A soft prompt, or a sink outside of the text, is neither query nor key. Attention to it is removed, and the rest is
    scaled to sum to 1. Rows are then distributions over the same tokens in all models.

    Returns:
        For each layer a `Tensor` of shape `(heads, num_queries, tokens)` in float32, whose queries are the row's last
        tokens. In addition a `Tensor` of shape `(layers)`: the share of attention outside the text, summed over
        queries, mean over heads.
    """
    ids = torch.tensor([[*row["prompt_ids"], *row["completion_ids"]]], device=model.device)
    inputs: dict[str, Tensor] = {"input_ids": ids}
    if soft_prompt is not None:
        embeds = input_embeddings(model)(ids)
        inputs = {"inputs_embeds": torch.cat([soft_prompt.to(embeds).unsqueeze(0), embeds], dim=1)}
    with eager_attention(model):
        output = model(**inputs, output_attentions=True, use_cache=False)
    weights = [layer for layer in output.get("attentions") or () if layer is not None]
    if not weights:
        raise ValueError(
            f"The layers of {model.name_or_path or type(model).__name__} give no attention weights, not even with "
            "`attn_implementation='eager'`. Leave this model out."
        )
    # Queries and keys end with the text's: a soft prompt stands before it
    number, size = num_queries(row, queries), ids.size(1)
    layers = [layer[0, :, -number:, -size:].float().cpu() for layer in weights]
    totals = [layer.sum(dim=-1, keepdim=True) for layer in layers]  # (heads, num_queries, 1)
    outside = torch.stack([(1 - total).double().mean(dim=0).sum() for total in totals])
    return [layer / total.clamp(min=1e-30) for layer, total in zip(layers, totals, strict=True)], outside


def num_queries(row: Mapping[str, Any], queries: str) -> int:
    """How many tokens of a row are queries: those of the completion, or of the whole text."""
    return len(row["completion_ids"]) + (len(row["prompt_ids"]) if queries == "all" else 0)


def visible_entries(number: int, size: int) -> int:
    """How many visible entries a matrix has: from each of the last `number` tokens to itself and to those before it.

    Entries beyond a sliding window count, with a weight of 0, so that all layers and models have the same ones.
    """
    return sum(range(size - number + 1, size + 1))


def layer_sums(attention: Tensor, before: Tensor | None) -> Tensor:
    """The four measures of one layer on one row, summed over queries or entries, mean over heads.

    Source: the measures of response priming (arXiv 2412.17846), which names them without formulas.

    Args:
        attention (`Tensor` of shape `(heads, num_queries, tokens)`): From [`text_attention`].
        before (`Tensor` of the same shape, *optional*): That of the layer before.

    Returns:
        `Tensor` of shape `(4,)` in float64, in the order of `MEASURES`:

        - entropy: of each query's attention, `-sum_j a_j log a_j`, in nats.
        - self_focus: the entries on the diagonal.
        - sparsity: the number of entries above 0.1.
        - similarity: the cosine between a head's matrix and that of the same head in the layer before. NaN without a
            layer before.
    """
    similarity = torch.tensor(torch.nan)
    if before is not None:
        similarity = F.cosine_similarity(attention.flatten(1), before.flatten(1), dim=1)
    of_heads = (
        torch.special.entr(attention).sum(dim=(1, 2)),
        attention.diagonal(attention.size(2) - attention.size(1), dim1=1, dim2=2).sum(dim=1),
        (attention > SHARE_ABOVE).sum(dim=(1, 2)),
        similarity,
    )
    return torch.stack([values.double().mean() for values in of_heads])


def same_depth(layer: int, num_layers: int, other_num_layers: int) -> int:
    """The layer of a model with `other_num_layers` that is as deep as `layer` of one with `num_layers`.

    The first belongs to the first, the last to the last, and those between to the nearest.
    """
    return round(layer * (other_num_layers - 1) / max(num_layers - 1, 1))


def measure_attention(
    models: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    soft_prompts: Mapping[str, Tensor] | None = None,
    queries: str = "completion",
) -> tuple[DataFrame, DataFrame]:
    """Measure each layer's attention in models of one tokenizer, and rank the heads by how much the models differ.

    A layer's `entropy` and `self_focus` are means over heads and over the queries of all rows. `sparsity` is the share
    of the [`visible_entries`] above 0.1. `similarity` is a mean over heads and rows.

    The variance of a head is taken over the models at each entry of its matrix. It is then averaged over a row's
    visible entries and over rows. Models of different depth are compared at the same relative depth. If they have
    different numbers of heads, only the first heads, which all have, are compared. The variance is meaningful if the
    models come from one: heads of unrelated models have nothing in common.

    Args:
        models: By name, plain or PEFT. One may come twice, with and without a soft prompt. All are in memory at once.
        rows: With `prompt_ids` and `completion_ids`, as `tokenize_dataset` makes them.
        soft_prompts: By the name of the model whose input they precede, each `(num_virtual_tokens, hidden)`.
        queries (`str`): `"completion"` measures the attention of the completion's tokens, to themselves and to all of
            the text before them. `"all"` adds the attention of the prompt's tokens.

    Returns:
        Two `DataFrame`s. The first has a row for each `model` and `layer` (its index), and a column for each measure.
        `similarity` is NaN in the first layer, which has none before it. The column `soft_prompt_share` is how much
        attention goes to the soft prompt, NaN for models without one. The second holds the heads that the models have
        in common, by falling `variance`. `head` is its number in the layer, and `layers` a `dict` of each model's
        layer. It is empty for one model.

    Raises:
        ValueError: if rows have nothing to measure, a model gives no attention weights, or weights are not finite.
    """
    _check_rows(rows, queries)
    prompts = soft_prompts or {}
    sums: dict[str, Any] = dict.fromkeys(models, 0.0)  # each (layers, measures and soft prompt's share)
    variances: Any = 0.0  # (layers, heads)
    counts = torch.zeros(len(MEASURES) + 1, dtype=torch.float64)
    for row in tqdm(rows, desc="Attention", unit="row"):
        found = {name: text_attention(model, row, prompts.get(name), queries) for name, model in models.items()}
        for name, (layers, outside) in found.items():
            of_layers = torch.stack(list(map(layer_sums, layers, [None, *layers[:-1]])))
            sums[name] = sums[name] + torch.column_stack([of_layers, outside])
        number = num_queries(row, queries)
        entries = visible_entries(number, len(row["prompt_ids"]) + len(row["completion_ids"]))
        variances = variances + _variance_sums([layers for layers, _ in found.values()]) / entries
        counts += torch.tensor([number, number, entries, 1, number])
    measures = {name: _means(name, of_model / counts, name in prompts) for name, of_model in sums.items()}
    heads = [
        {
            "head": head,
            "layers": {name: same_depth(layer, len(variances), len(found)) for name, found in measures.items()},
            "variance": variance,
        }
        for layer, of_layer in enumerate((variances / len(rows)).tolist())
        for head, variance in enumerate(of_layer)
        if len(models) > 1
    ]
    ranked = DataFrame(heads, columns=["head", "layers", "variance"]).sort_values("variance", ascending=False)
    return concat(measures, names=["model", "layer"]), ranked


def head_matrices(
    models: Mapping[str, Any],
    row: Mapping[str, Any],
    heads: DataFrame,
    soft_prompts: Mapping[str, Tensor] | None = None,
    queries: str = "completion",
) -> dict[str, list[Tensor]]:
    """The attention matrices of some heads on one row. Maps each model to one `(num_queries, tokens)` in float32 for
    each of `heads`.

    Args:
        models, row, soft_prompts, queries: As for [`measure_attention`].
        heads: Rows of its second result.
    """
    _check_rows([row], queries)
    found = {}
    for name, model in models.items():
        layers, _ = text_attention(model, row, (soft_prompts or {}).get(name), queries)
        found[name] = [layers[head.layers[name]][head.head] for head in heads.itertuples()]
    return found


def _variance_sums(models: Sequence[Sequence[Tensor]]) -> Tensor:
    """The variance over the models of each head's entries, summed over one row. Shape `(layers, heads)`, of those that
    all models have."""
    depth, heads = min(map(len, models)), min(layer.size(0) for layers in models for layer in layers)
    sums = torch.zeros(depth, heads, dtype=torch.float64)
    for layer in range(depth):
        matrices = [layers[same_depth(layer, depth, len(layers))][:heads] for layers in models]
        sums[layer] = torch.stack(matrices).var(dim=0, correction=0).sum(dim=(1, 2))
    return sums


def _means(name: str, means: Tensor, is_prompted: bool) -> DataFrame:
    """The table of `means` of shape `(layers, measures and soft prompt's share)`."""
    broken = (~means[:, 0].isfinite()).nonzero()
    if len(broken):
        raise ValueError(
            f"The attention of {name!r} is not finite from layer {int(broken[0])} on. Check the weights for NaN. If "
            "they are float16, load them in float32."
        )
    found = DataFrame(means.numpy(), columns=[*MEASURES, "soft_prompt_share"])
    return found if is_prompted else found.assign(soft_prompt_share=float("nan"))


def _check_rows(rows: Sequence[Mapping[str, Any]], queries: str) -> None:
    if queries not in QUERIES:
        raise ValueError(f"`queries` is {queries!r}; it must be 'completion' or 'all'.")
    for index, row in enumerate(rows):
        if queries == "completion" and not row["completion_ids"]:
            raise ValueError(
                f"Row {index} of `rows` has no completion, whose attention is to be measured. Filter such rows out, "
                "or set `queries='all'` to measure that of the prompt's tokens, too."
            )
