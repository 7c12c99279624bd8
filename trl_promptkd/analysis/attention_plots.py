"""Pictures of attention: the measures of each layer, and the heads in which models differ most."""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from .attention import MEASURES, SHARE_ABOVE, AttentionReport, HeadVariance
from .figures import line_colors, new_figure, save_figure


__all__ = ["plot_heads", "plot_measures"]

_TITLES = {
    "entropy": ("Entropy of a query's attention", "nats"),
    "self_focus": ("Attention to itself", "weight on the diagonal"),
    "sparsity": (f"Weights above {SHARE_ABOVE}", "share of the visible ones"),
    "similarity": ("Likeness to the layer before", "cosine"),
}
_MARKERS = "osD^vPX"
_MAX_NAMED_TOKENS = 36  # as many as there is room for


def plot_measures(report: AttentionReport, path: str) -> None:
    """The four measures, a line a model, over the layers; over relative depth if models have different numbers of them."""
    same = len({len(values["entropy"]) for values in report.measures.values()}) == 1
    figure = new_figure(9, 6)
    panels, colors = figure.subplots(2, 2), line_colors(len(report.measures))
    for axes, measure in zip(panels.flat, MEASURES, strict=True):
        for index, (name, values) in enumerate(report.measures.items()):
            numbers = np.array(values[measure], dtype=float)  # None, of the first layer's similarity, is NaN
            layers = np.arange(len(numbers)) / (1 if same else max(len(numbers) - 1, 1))
            look = {"color": colors[index], "marker": _MARKERS[index % len(_MARKERS)], "markersize": 4}
            axes.plot(layers, numbers, label=name, **look)
        title, unit = _TITLES[measure]
        axes.set(title=title, ylabel=unit, xlabel="layer" if same else "depth (0: first layer, 1: last)")
        axes.xaxis.get_major_locator().set_params(integer=same)
        axes.grid(alpha=0.3, linewidth=0.5)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    save_figure(figure, path)


def plot_heads(
    matrices: Mapping[str, Sequence[Tensor]], heads: Sequence[HeadVariance], tokens: Sequence[str], path: str
) -> None:
    """Heat maps of some heads on one row: a line of maps a model, a column a head.

    Args:
        matrices, heads: Of [`head_matrices`]; each matrix `(num_queries, tokens)`, the queries being the row's last tokens.
        tokens: The row's, as texts; up to 36 of them are written at the axes, of longer rows their numbers.
    """
    lines, columns = len(matrices), len(heads)
    figure = new_figure(1 + 3.4 * columns, 0.9 + 3.2 * lines)
    from matplotlib.colors import PowerNorm

    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for line, (name, of_model) in zip(panels, matrices.items(), strict=True):
        for axes, head, matrix in zip(line, heads, of_model, strict=True):
            first = len(tokens) - len(matrix)  # number of the first query
            numbers = matrix.numpy()
            future = np.triu(np.ones_like(numbers, dtype=bool), k=first + 1)
            image = axes.imshow(
                np.ma.masked_array(numbers, future),
                cmap="viridis",
                norm=PowerNorm(0.5, vmin=0, vmax=1),
                aspect="auto",
                interpolation="nearest",
                extent=(-0.5, len(tokens) - 0.5, len(tokens) - 0.5, first - 0.5),
            )
            axes.set_title(f"{name}\nlayer {head.layers[name]}, head {head.head}", fontsize=9)
            if len(tokens) <= _MAX_NAMED_TOKENS:
                axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=6, parse_math=False)
                axes.set_yticks(range(first, len(tokens)), tokens[first:], fontsize=6, parse_math=False)
            else:
                axes.xaxis.get_major_locator().set_params(integer=True)
                axes.yaxis.get_major_locator().set_params(integer=True)
        line[0].set_ylabel("from token")
    for axes in panels[-1]:
        axes.set_xlabel("to token")
    figure.colorbar(image, ax=panels, label="attention weight (square-root scale)", shrink=0.8, aspect=30)
    save_figure(figure, path)
