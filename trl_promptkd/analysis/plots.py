"""The analyses for a reader: plots, and a page of examples."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pandas import DataFrame, option_context
from torch import Tensor

from .attention import MEASURES, SHARE_ABOVE
from .plot_style import LIGHT, LOWER, new_figure, plot_style, save_figure, whole_numbers


__all__ = [
    "changes_page",
    "plot_classes",
    "plot_drift",
    "plot_exposure",
    "plot_heads",
    "plot_measures",
    "plot_similarity",
]

_SHADED = 4  # lines whose intervals can be told apart
_TITLES = {
    "entropy": ("Entropy of a query's attention", "nats"),
    "self_focus": ("Attention to itself", "weight on the diagonal"),
    "sparsity": (f"Weights above {SHARE_ABOVE}", "share of the visible ones"),
    "similarity": ("Likeness to the layer before", "cosine"),
}
_NAMES_PER_INCH = 7.5  # of tokens beside each other


def _line_colors(number: int) -> Sequence[Any]:
    """`number` colours, all different: from a colour-blind-safe palette, or from viridis if it has too few."""
    if number <= len(LIGHT.lines):
        return LIGHT.lines[:number]
    import matplotlib

    shades = matplotlib.colormaps["viridis"]
    return [shades(0.92 * index / (number - 1)) for index in range(number)]


def well_covered(found: DataFrame) -> DataFrame:
    """The positions that a tenth of the rows, and at least two, have on both sides. The rest is mostly chance."""
    rows = found[["rows_on_student", "rows_on_teacher"]]
    enough = rows.min(axis=1) >= max(0.1 * rows.max(axis=None), 2)
    return found[: enough.sum()] if enough.any() else found


@plot_style()
def plot_exposure(results: Mapping[tuple[str, str], DataFrame], path: str) -> None:
    """Plot ExAccErr over positions for each student and teacher. Below it KL(p || q) on both kinds of prefixes.

    Args:
        results: Tables of [`exposure_bias`], by student and teacher.
        path: Path of a PNG or SVG file.
    """
    students, teachers = (list(dict.fromkeys(names)) for names in zip(*results, strict=True))
    colors = dict(zip(students, _line_colors(len(students)), strict=True))
    styles = dict(zip(teachers, ("-", "--"), strict=False))
    figure = new_figure(9, 6.6 + 0.1 * len(results))
    axes = figure.subplot_mosaic([["error", "error"], ["student", "teacher"]], height_ratios=[1.25, 1])
    for (student, teacher), result in results.items():
        shown, color = well_covered(result), colors[student]
        look = {"color": color, "linestyle": styles[teacher], "marker": "o" if len(shown) == 1 else None}
        axes["error"].plot(shown.ex_acc_err, label=f"{student}, {teacher} teacher", **look)
        axes["student"].plot(shown.kl_on_student, **look)
        axes["teacher"].plot(shown.kl_on_teacher, **look)
        if len(results) <= _SHADED:
            axes["error"].fill_between(shown.index, shown.low, shown.high, color=color, alpha=0.1)
    told = " (shaded: 95 % interval over rows)" if len(results) <= _SHADED else ""
    axes["error"].set(title=f"Exposure bias{told}", ylabel=f"ExAccErr(l), % ({LOWER})")
    axes["error"].axhline(0, color=LIGHT.muted, linewidth=0.8)
    axes["student"].set(
        title="On the student's prefixes", ylabel=f"KL(teacher || student),\nnats ({LOWER})", ylim=(0, None)
    )
    axes["teacher"].set(title="On the teacher's prefixes")
    axes["teacher"].sharey(axes["student"])
    whole_numbers(axes.values(), "position l")
    figure.legend(loc="outside lower center", ncols=2)
    save_figure(figure, path)


@plot_style()
def plot_measures(measures: DataFrame, path: str) -> None:
    """Plot the four measures over the layers, a line per model.

    If the models have different numbers of layers, plot them over relative depth.
    """
    models = dict(list(measures.groupby(level="model", sort=False)))
    same = len(set(map(len, models.values()))) == 1
    figure = new_figure(9, 6)
    panels = figure.subplots(2, 2)
    for axes, measure in zip(panels.flat, MEASURES, strict=True):
        for color, (name, values) in zip(_line_colors(len(models)), models.items(), strict=True):
            layers = np.arange(len(values)) / (1 if same else max(len(values) - 1, 1))
            axes.plot(layers, values[measure], label=name, color=color, marker="o", markersize=4)
        title, unit = _TITLES[measure]
        axes.set(title=title, ylabel=unit)
    if same:
        whole_numbers(panels.flat, "layer")
    else:
        for axes in panels.flat:
            axes.set_xlabel("depth (0: first layer, 1: last)")
            axes.grid()
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    save_figure(figure, path)


@plot_style()
def plot_heads(matrices: Mapping[str, Sequence[Tensor]], heads: DataFrame, tokens: Sequence[str], path: str) -> None:
    """Plot heat maps of some heads on one row of data: a row of maps per model, a column per head.

    Args:
        matrices, heads: As in [`head_matrices`]. Each matrix is `(num_queries, tokens)`. The queries are the row's
            last tokens.
        tokens: The row's tokens, as texts. The axes show them if there is room, which is 20 tokens for three heads.
            Otherwise they show their numbers.
    """
    side = min(2.7, 8 / len(heads))
    figure = new_figure(1 + side * len(heads), 0.7 + (side + 0.3) * len(matrices))
    panels = figure.subplots(len(matrices), len(heads), squeeze=False, sharex=True, sharey=True)
    for line, (name, of_model) in zip(panels, matrices.items(), strict=True):
        for axes, head, matrix in zip(line, heads.itertuples(), of_model, strict=True):
            first = len(tokens) - len(matrix)  # number of the first query
            extent = (-0.5, len(tokens) - 0.5, len(tokens) - 0.5, first - 0.5)
            image = axes.imshow(matrix.sqrt(), vmin=0, vmax=1, aspect="auto", interpolation="none", extent=extent)
            axes.set_title(f"{name}\nlayer {head.layers[name]}, head {head.head}")
            if len(tokens) <= _NAMES_PER_INCH * side:
                axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=9, parse_math=False)
                axes.set_yticks(range(first, len(tokens)), tokens[first:], fontsize=9, parse_math=False)
        line[0].set_ylabel("from token")
    for axes in panels[-1]:
        axes.set_xlabel("to token")
    figure.colorbar(
        image, ax=panels, label="square root of the attention weight", shrink=0.8, aspect=40, fraction=0.03
    )
    save_figure(figure, path)


@plot_style()
def plot_classes(classes: DataFrame, path: str) -> None:
    """Plot mean KL divergences by token class, from [`~trl_promptkd.analysis.prompt.by_class`]."""
    titles = {"prompted_plain": "KL(prompted || plain teacher)", "prompted_student": "KL(prompted teacher || student)"}
    keys = [key for key in titles if key in classes]
    figure = new_figure(4.5 * len(keys), 1 + 0.36 * len(classes))
    panels = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    names = [f"{name} ({tokens:,})" for name, tokens in classes.tokens.items()]
    for panel, key, color in zip(panels, keys, _line_colors(2), strict=False):
        bars = panel.barh(names, classes[key], color=color, height=0.7)
        panel.bar_label(bars, fmt="%#.3g", padding=3)
        panel.set(title=titles[key], xlabel="mean, nats per token")
        panel.margins(x=0.16)
    panels[0].invert_yaxis()
    panels[0].set_ylabel("class of the token (tokens)")
    save_figure(figure, path)


@plot_style()
def plot_drift(drifts: Sequence[Mapping[str, Any]], path: str, start: int = 0) -> None:
    """Plot how far each virtual token has moved, over checkpoints.

    Args:
        drifts: Results of [`~trl_promptkd.analysis.prompt.prompt_drift`], with the `step` of each checkpoint, the
            oldest first. A prompt that was saved after its run has the step `None` and comes last.
        start (`int`): The step that the drift is measured from.
    """
    figure = new_figure(9, 4)
    panels = figure.subplots(1, 2)
    steps = [start, *(drift["step"] for drift in drifts if drift["step"] is not None)]
    positions = [*steps, *[steps[-1] + 1] * (len(drifts) + 1 - len(steps))]
    colors = _line_colors(len(drifts[0]["relative"]))
    for key, panel, at_start in zip(("relative", "cosine"), panels, (0.0, 1.0), strict=True):
        for token, color in enumerate(colors):
            values = [at_start, *(drift[key][token] for drift in drifts)]
            panel.plot(positions, values, color=color, marker="o", markersize=2, label=str(token + 1))
    overall = [0.0, *(drift["overall"] for drift in drifts)]
    panels[0].plot(positions, overall, color=LIGHT.muted, linewidth=2.6, linestyle="--", label="all together")
    panels[0].set(title="Distance from the start (share of its norm)", ylim=(0, None))
    panels[1].set(title="Cosine with the start")
    whole_numbers(panels, "step" if len(steps) > len(drifts) else "step (the last point: saved after the run)")
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=8, title="virtual token")
    save_figure(figure, path)


@plot_style()
def plot_similarity(cosines: Tensor, path: str) -> None:
    """Plot the cosine between each two virtual tokens, `(num_virtual_tokens, num_virtual_tokens)`, as a heat map."""
    figure = new_figure(5.2, 4.4)
    axes = figure.subplots()
    end = len(cosines) + 0.5
    image = axes.imshow(cosines, cmap="PuOr_r", vmin=-1, vmax=1, extent=(0.5, end, end, 0.5))
    axes.set(title="Cosine between virtual tokens", xlabel="virtual token", ylabel="virtual token")
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, label="cosine")
    save_figure(figure, path)


def changes_page(changes: DataFrame, title: str, summary: str) -> str:
    """An HTML page of the places where the teacher's likeliest next token changed.

    `changes` is from [`~trl_promptkd.analysis.prompt.prompt_effect`]. All text is escaped, as it comes from data and
    models. Line breaks and tabs are written as `\\n` and `\\t`.
    """
    formats = {name: _probabilities for name in ("prompted", "plain", "student") if name in changes}
    names = {
        "row": "row (from 0)",
        "place": "token (from 0)",
        "kl": "KL(prompted || plain), nats",
        "context": "text before",
    }
    with option_context("display.max_colwidth", None):
        table = changes.to_html(
            header=[names.get(name, name) for name in changes.columns],
            index=False,
            formatters={"kl": "{:.3f}".format, "token": repr, **formats},
        )
    head = f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
    style = "<style>td { white-space: pre-wrap; vertical-align: top }</style>\n"
    return f"{head}{style}<h1>{html.escape(title)}</h1>\n<p>{html.escape(summary)}</p>\n{table}\n</html>\n"


def _probabilities(tokens: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{text!r} {probability:.3f}" for text, probability in tokens)
