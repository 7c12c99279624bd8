"""The analysis of a soft prompt for a reader: plots, and a page of the places where it changed what the teacher says next."""

import html
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from .figures import add_scale, line_colors, new_figure, save_figure
from .prompt import Change, Drift


__all__ = ["changes_page", "plot_classes", "plot_drift", "plot_similarity"]


def plot_classes(by_class: Mapping[str, Mapping[str, float]], path: str) -> None:
    """Mean KL divergences by token class, with the number of tokens.

    Args:
        by_class: Of [`~trl_promptkd.analysis.prompt.PromptEffect.by_class`].
    """
    titles = {"prompted_plain": "KL(prompted || plain teacher)", "prompted_student": "KL(prompted teacher || student)"}
    keys = [key for key in titles if key in by_class["all tokens"]]
    names = list(by_class)
    figure = new_figure(9 if len(keys) > 1 else 6, 1 + 0.36 * len(names))
    panels = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    for panel, key, color in zip(panels, keys, line_colors(2), strict=False):
        colors = ["dimgray" if name == "all tokens" else color for name in names]
        bars = panel.barh(range(len(names)), [by_class[name][key] for name in names], color=colors, height=0.7)
        panel.bar_label(bars, fmt="%#.3g", padding=3, fontsize=9)
        panel.set(title=titles[key], xlabel="mean, nats a token")
        panel.margins(x=0.16)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), [f"{name} ({by_class[name]['tokens']:,})" for name in names])
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
    left, right = figure.subplots(1, 2)
    steps = [step for _, step, _ in drifts if step is not None]
    after = steps[-1] * 1.15 + 1 if steps else 1  # where a prompt without a step stands
    positions = [start, *(after if step is None else step for _, step, _ in drifts)]
    tokens = len(drifts[0][2].relative)
    named = tokens <= 12  # more lines have no room for names, and are told apart by a scale
    colors = line_colors(tokens)
    for token, color in enumerate(colors):
        look = {"color": color, "marker": "o" if len(positions) <= 20 else None, "markersize": 3, "linewidth": 1.2}
        relative, cosine = zip(*((drift.relative[token], drift.cosine[token]) for _, _, drift in drifts), strict=True)
        left.plot(positions, [0.0, *relative], label=str(token + 1) if named else None, **look)
        right.plot(positions, [1.0, *cosine], **look)
    overall = [0.0, *(drift.overall for _, _, drift in drifts)]
    left.plot(positions, overall, color="dimgray", linewidth=2.6, linestyle="--", label="all together")
    left.set(title="Distance from the start (share of its norm)", ylim=(0, None))
    right.set(title="Cosine with the start")
    for panel in (left, right):
        panel.set_xlabel("step" if len(steps) == len(drifts) else "step (the last point: saved after the run)")
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.xaxis.get_major_locator().set_params(integer=True)
    title = "virtual token" if named else None
    figure.legend(loc="outside lower center", ncols=min(tokens + 1, 13), fontsize=9, frameon=False, title=title)
    if not named:
        add_scale(figure, right, colors, "virtual token")
    save_figure(figure, path)


def plot_similarity(cosines: Tensor, path: str) -> None:
    """The cosine between each two virtual tokens, `(num_virtual_tokens, num_virtual_tokens)`, as a heat map."""
    size = len(cosines)
    figure = new_figure(5.2, 4.4)
    axes = figure.subplots()
    image = axes.imshow(cosines, cmap="PuOr_r", vmin=-1, vmax=1)
    shown = range(0, size, -(-size // 12))
    axes.set_xticks(shown, [index + 1 for index in shown])
    axes.set_yticks(shown, [index + 1 for index in shown])
    axes.set(title="Cosine between virtual tokens", xlabel="virtual token", ylabel="virtual token")
    if size <= 10:
        for (row, column), value in np.ndenumerate(cosines.numpy()):
            look = {"ha": "center", "va": "center", "fontsize": 8, "color": "white" if abs(value) > 0.65 else "black"}
            axes.text(column, row, f"{round(float(value), 2) + 0.0:.2f}", **look)  # no minus before a zero
    figure.colorbar(image, label="cosine")
    save_figure(figure, path)


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #f4f4f4; padding: 0.6em; }}
mark {{ background: #ffd27f; }}
th, td {{ text-align: left; padding: 0.15em 1.2em 0.15em 0; }}
</style>
<h1>{title}</h1>
<p>{summary}</p>
{examples}
</html>
"""


def changes_page(changes: Sequence[Change], title: str, summary: str) -> str:
    """An HTML page of the places where the teacher's likeliest next token changed, the largest KL(prompted || plain) first.

    All text is escaped: it comes from data and models.
    """
    examples = "\n".join(map(_example, changes))
    return _PAGE.format(title=html.escape(title), summary=html.escape(summary), examples=examples)


def _example(change: Change) -> str:
    columns = {"plain teacher": change.plain, "prompted teacher": change.prompted, "student": change.student}
    columns = {name: top for name, top in columns.items() if top}
    head = "".join(f"<th>{name}</th>" for name in columns)
    rows = "".join(
        "<tr>" + "".join(f"<td>{_token(text)} {probability:.3f}</td>" for text, probability in line) + "</tr>\n"
        for line in zip(*columns.values(), strict=True)
    )
    place = f"Row {change.row} (of those looked at, from 0), token {change.place + 1} of the answer"
    return (
        f"<hr>\n<p>{place}; KL(prompted || plain) {change.kl:.3f} nats</p>\n"
        f"<pre>{html.escape(change.context)}<mark>{html.escape(change.token)}</mark></pre>\n"
        f"<table>\n<thead><tr>{head}</tr></thead>\n{rows}</table>"
    )


def _token(text: str) -> str:
    """With line breaks and tabs to be seen."""
    shown = text.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}").replace(
        "\t", "\N{RIGHTWARDS ARROW TO BAR}"
    )
    return f"<code>{html.escape(shown)}</code>"
