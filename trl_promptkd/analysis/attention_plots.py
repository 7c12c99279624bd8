"""Pictures of attention: the measures of each layer, and the heads in which models differ most."""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from .attention import MEASURES, SHARE_ABOVE, AttentionReport, HeadVariance
from .figures import finish_axes, line_colors, new_figure, save_figure


__all__ = ["plot_heads", "plot_measures"]

_TITLES = {
    "entropy": ("Entropy of a query's attention", "nats"),
    "self_focus": ("Attention to itself", "weight on the diagonal"),
    "sparsity": (f"Weights above {SHARE_ABOVE}", "share of the visible ones"),
    "similarity": ("Likeness to the layer before", "cosine"),
}
_MAX_NAMED_TOKENS = 36  # as many as there is room for


def plot_measures(report: AttentionReport, path: str) -> None:
    """The four measures, a line per model, over the layers; over relative depth if models have different numbers of them."""
    same = len({len(values["entropy"]) for values in report.measures.values()}) == 1
    figure = new_figure(9, 6)
    panels, colors = figure.subplots(2, 2), line_colors(len(report.measures))
    for axes, measure in zip(panels.flat, MEASURES, strict=True):
        for color, (name, values) in zip(colors, report.measures.items(), strict=True):
            numbers = np.array(values[measure], dtype=float)  # None, of the first layer's similarity, is NaN
            layers = np.arange(len(numbers)) / (1 if same else max(len(numbers) - 1, 1))
            axes.plot(layers, numbers, label=name, color=color, marker="o", markersize=4)
        title, unit = _TITLES[measure]
        axes.set(title=title, ylabel=unit)
    finish_axes(panels.flat, "layer" if same else "depth (0: first layer, 1: last)")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    save_figure(figure, path)


def plot_heads(
    matrices: Mapping[str, Sequence[Tensor]], heads: Sequence[HeadVariance], tokens: Sequence[str], path: str
) -> None:
    """Heat maps of some heads on one row: a line of maps per model, a column per head.

    Args:
        matrices, heads: Of [`head_matrices`]; each matrix `(num_queries, tokens)`, the queries being the row's last tokens.
        tokens: The row's, as texts; up to 36 of them are written at the axes, of longer rows their numbers.
    """
    figure = new_figure(1 + 3.4 * len(heads), 0.9 + 3.2 * len(matrices))
    panels = figure.subplots(len(matrices), len(heads), squeeze=False, sharex=True, sharey=True)
    for line, (name, of_model) in zip(panels, matrices.items(), strict=True):
        for axes, head, matrix in zip(line, heads, of_model, strict=True):
            first = len(tokens) - len(matrix)  # number of the first query
            extent = (-0.5, len(tokens) - 0.5, len(tokens) - 0.5, first - 0.5)
            image = axes.imshow(matrix.sqrt(), vmin=0, vmax=1, aspect="auto", interpolation="nearest", extent=extent)
            axes.set_title(f"{name}\nlayer {head.layers[name]}, head {head.head}", fontsize=9)
            if len(tokens) <= _MAX_NAMED_TOKENS:
                axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=6, parse_math=False)
                axes.set_yticks(range(first, len(tokens)), tokens[first:], fontsize=6, parse_math=False)
        line[0].set_ylabel("from token")
    for axes in panels[-1]:
        axes.set_xlabel("to token")
    figure.colorbar(image, ax=panels, label="square root of the attention weight", shrink=0.8, aspect=30)
    save_figure(figure, path)
