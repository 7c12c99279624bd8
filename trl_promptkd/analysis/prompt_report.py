"""The analysis of a soft prompt for a reader: plots, and a page of the places where it changed what the teacher says next."""

import html
from collections.abc import Sequence

from pandas import DataFrame, option_context
from torch import Tensor

from .figures import finish_axes, line_colors, new_figure, save_figure
from .prompt import Drift


__all__ = ["changes_page", "plot_classes", "plot_drift", "plot_similarity"]


def plot_classes(classes: DataFrame, path: str) -> None:
    """Mean KL divergences by token class, of [`~trl_promptkd.analysis.prompt.by_class`]."""
    titles = {"prompted_plain": "KL(prompted || plain teacher)", "prompted_student": "KL(prompted teacher || student)"}
    keys = [key for key in titles if key in classes]
    figure = new_figure(5 * len(keys), 1 + 0.36 * len(classes))
    panels = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    names = [f"{name} ({tokens:,})" for name, tokens in classes.tokens.items()]
    for panel, key, color in zip(panels, keys, line_colors(2), strict=False):
        bars = panel.barh(names, classes[key], color=color, height=0.7)
        panel.bar_label(bars, fmt="%#.3g", padding=3, fontsize=9)
        panel.set(title=titles[key], xlabel="mean, nats per token")
        panel.margins(x=0.16)
    panels[0].invert_yaxis()
    panels[0].set_ylabel("class of the token (tokens)")
    save_figure(figure, path)


def plot_drift(drifts: Sequence[tuple[str, int | None, Drift]], path: str, start: int = 0) -> None:
    """How far each virtual token has come, over checkpoints.

    Args:
        drifts: Name, step and drift of each checkpoint, the oldest first. A prompt without a step, saved after its run, stands last.
        start (`int`): The step of what the drift is taken from.
    """
    figure = new_figure(9, 4)
    panels = figure.subplots(1, 2)
    steps = [start, *(step for _, step, _ in drifts if step is not None)]
    positions = [*steps, *[steps[-1] + 1] * (len(drifts) + 1 - len(steps))]
    tokens = len(drifts[0][2].relative)
    for key, panel, at_start in zip(("relative", "cosine"), panels, (0.0, 1.0), strict=True):
        for token, color in enumerate(line_colors(tokens)):
            values = [at_start, *(getattr(drift, key)[token] for _, _, drift in drifts)]
            panel.plot(positions, values, color=color, marker="o", markersize=2, label=str(token + 1))
    overall = [0.0, *(drift.overall for _, _, drift in drifts)]
    panels[0].plot(positions, overall, color="dimgray", linewidth=2.6, linestyle="--", label="all together")
    panels[0].set(title="Distance from the start (share of its norm)", ylim=(0, None))
    panels[1].set(title="Cosine with the start")
    finish_axes(panels, "step" if len(steps) > len(drifts) else "step (the last point: saved after the run)")
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=11, fontsize=8, title="virtual token")
    save_figure(figure, path)


def plot_similarity(cosines: Tensor, path: str) -> None:
    """The cosine between each two virtual tokens, `(num_virtual_tokens, num_virtual_tokens)`, as a heat map."""
    figure = new_figure(5.2, 4.4)
    axes = figure.subplots()
    end = len(cosines) + 0.5
    image = axes.imshow(cosines, cmap="PuOr_r", vmin=-1, vmax=1, extent=(0.5, end, end, 0.5))
    axes.set(title="Cosine between virtual tokens", xlabel="virtual token", ylabel="virtual token")
    figure.colorbar(image, label="cosine")
    save_figure(figure, path)


def changes_page(changes: DataFrame, title: str, summary: str) -> str:
    """An HTML page of the places where the teacher's likeliest next token changed, of [`~trl_promptkd.analysis.prompt.prompt_effect`].

    All text is escaped: it comes from data and models. Line breaks and tabs are written as `\\n` and `\\t`.
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
