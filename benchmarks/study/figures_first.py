"""Figures of docs/study_first.md: each is written over what was there."""

from pathlib import Path

import numpy as np
from pages import DOCS
from runs_first import (
    METHODS,
    NAMES,
    REAL_NAMES,
    Results,
    at,
    gain_share,
    pairs,
    value,
    values,
)
from study_statistics import mean_interval

from trl_promptkd.analysis.plot_style import (
    HIGHER,
    LIGHT,
    LOWER,
    new_figure,
    plot_style,
    save_figure,
    whole_numbers,
    written_out,
)


BLUE, ORANGE, GREEN = LIGHT.lines[:3]
TITLES = {
    "accuracy": f"right, greedy,\npoints\n{HIGHER}",
    "reverse_kl": f"KL(q || p),\nnats per token\n{LOWER}",
    "reverse_kl_answer": f"KL(q || p),\nnats per answer\n{LOWER}",
    "forward_kl": f"KL(p || q),\nnats per token\n{LOWER}",
    "brief_share": "short answers,\npoints",
}


def named_rows(panel, names: list[str]) -> None:
    """The last name is the lowest."""
    panel.set_yticks(range(len(names)), names[::-1])
    panel.grid(axis="x")
    panel.set_axisbelow(True)


def draw_interval(panel, place: float, values: list[float], color: str, label: str | None = None) -> None:
    """The runs as dots, and their mean with its interval."""
    mean, half, _ = mean_interval(values)
    panel.plot(values, [place] * len(values), ".", color=color, alpha=0.35, markersize=5)
    panel.errorbar(mean, place, xerr=half, fmt="o", color=color, capsize=3, label=label)


@plot_style()
def draw_methods(results: Results, path: Path) -> None:
    """What each method changed, at equal steps and at equal time."""
    columns = ("accuracy", "reverse_kl", "reverse_kl_answer", "brief_share")
    figure = new_figure(9, 7.4)
    panels = figure.subplots(2, 4, sharey=True, sharex="col")
    for row, when in zip(panels, ("steps", "time"), strict=True):
        row[0].set_ylabel(f"change, equal {when}")
        for panel, column in zip(row, columns, strict=True):
            panel.axvline(0, color=LIGHT.muted, linestyle=":")
            for shift, data, color in ((0.14, "finite", BLUE), (-0.14, "fresh", ORANGE)):
                for place, name in enumerate(METHODS[::-1]):
                    changes = [at(run, when, column) - at(run, "start", column) for run in results[data][name]]
                    label = {"finite": "800 problems", "fresh": "fresh problems"}[data] if place == 0 else None
                    draw_interval(panel, place + shift, changes, color, label)
            named_rows(panel, METHODS)
    for panel, column in zip(panels[0], columns, strict=True):
        panel.set_title(TITLES[column])
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    save_figure(figure, path)


@plot_style()
def draw_grid(results: Results, path: Path) -> None:
    """What the prompt's learning rate does, by regulariser and warm start, beside GKD."""
    measures = [
        (f"right, greedy (%)\n{HIGHER}", lambda run: at(run, "end", "accuracy")),
        (f"KL(q || p), nats per token\n{LOWER}", lambda run: at(run, "end", "reverse_kl")),
        (f"KL(q || p), nats per answer\n{LOWER}", lambda run: at(run, "end", "reverse_kl_answer")),
        (f"KL(p || q), nats per token\n{LOWER}", lambda run: at(run, "end", "forward_kl")),
        ("KL(pP || p), nats per token", lambda run: at(run, "end", "prompted_plain")),
        ("prompt gain / KL(q || p)", gain_share),
    ]
    colors = {"none": ORANGE, "linear": BLUE, "constant": GREEN}
    figure = new_figure(9, 6.8)
    panels = figure.subplots(2, 3, sharex=True)
    for panel, (title, measure) in zip(panels.flat, measures, strict=True):
        for warm, style in (("full", "-"), ("short", "--")):
            for regularizer, color in colors.items():
                points = {
                    float(name.split(", ")[0]): np.mean(list(map(measure, runs)))
                    for name, runs in results["grid"].items()
                    if name.endswith(f"{regularizer}, {warm}")
                }
                if not points:  # a short warm start was only tried with the linear regulariser
                    continue
                rates = sorted(points)
                label = f"regulariser {regularizer}, {warm} warm start"
                means = [points[rate] for rate in rates]
                panel.plot(rates, means, f"o{style}", color=color, markersize=4, label=label)
            if "prompt" not in title and "pP" not in title:
                gkd = np.mean(list(map(measure, results["grid"][f"GKD, {warm}"])))
                panel.axhline(gkd, color=LIGHT.muted, linestyle=style, label=f"GKD, {warm} warm start")
        panel.set(title=title, xscale="log", xticks=rates, xticklabels=[f"{rate:g}" for rate in rates])
        panel.minorticks_off()
        if title.startswith("KL"):
            panel.set_yscale("log")
            written_out(panel.yaxis)
        panel.grid()
    for panel in panels[1]:
        panel.set_xlabel("prompt's lr / student's")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    save_figure(figure, path)


@plot_style()
def draw_ablations(results: Results, path: Path) -> None:
    """Differences of each ablation to the paper's settings, paired by seed."""
    names = [name for name in results["ablations"] if name != "paper"]
    paper = results["ablations"]["paper"]
    columns = ("accuracy", "reverse_kl", "reverse_kl_answer", "forward_kl")
    figure = new_figure(9, 4.4)
    for panel, column in zip(figure.subplots(1, 4, sharey=True), columns, strict=True):
        panel.axvline(0, color=LIGHT.muted, linestyle=":")
        for place, name in enumerate(names[::-1]):
            draw_interval(panel, place, np.subtract(*pairs(results["ablations"][name], paper, "end", column)), BLUE)
        named_rows(panel, names)
        panel.set_title(TITLES[column])
    save_figure(figure, path)


@plot_style()
def draw_priming(results: Results, path: Path) -> None:
    """What a line before the teacher's question does to the student."""
    figure = new_figure(9, 3.4)
    panels = figure.subplots(1, 2, sharey=True)
    lines = [("no line", LIGHT.muted), ("careful", BLUE), ("pupil", ORANGE)]
    for panel, column in zip(panels, ("accuracy", "sampled_accuracy"), strict=True):
        for row, source in enumerate(("teacher", "dataset")):
            for shift, (line, color) in zip((0.2, 0.0, -0.2), lines, strict=True):
                found = values(results["priming"][f"{line}, {source}"], "end", column)
                draw_interval(panel, row + shift, found, color, f"teacher after: {line}" if row == 0 else None)
        named_rows(panel, ["the data's\nanswers", "the teacher's\nanswers"])
        panel.set_title(f"{NAMES[column]}\n{HIGHER}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    save_figure(figure, path)


@plot_style()
def draw_real(real: dict, path: Path) -> None:
    """KLs of the real model's students, and what the soft prompts did while they learned."""
    names = [name for name in REAL_NAMES if name != "teacher"]
    figure = new_figure(9, 6)
    above, below = figure.subfigures(2, 1, height_ratios=[1.1, 1])
    columns = ("reverse_kl", "reverse_kl_answer", "forward_kl")
    colors = {"promptkd": BLUE, "promptkd_lr1e-3": GREEN, "promptkd_lr1e-2": ORANGE}
    of_bars = [colors.get(name, LIGHT.muted) for name in names[::-1]]
    for panel, column in zip(above.subplots(1, 3, sharey=True), columns, strict=True):
        panel.barh(range(len(names)), [value(real[name], column) for name in names[::-1]], height=0.6, color=of_bars)
        named_rows(panel, [REAL_NAMES[name].strip("*") for name in names])
        panel.set_title(TITLES[column])
    panels = below.subplots(1, 2)
    titles = {"kl/prompted_plain": "KL(pP || p), nats per token", "kl/prompt_gain": "prompt gain, nats per token"}
    for panel, (column, title) in zip(panels, titles.items(), strict=True):
        for name, color in colors.items():
            log = [entry for entry in real[name]["log"] if column in entry]
            steps, line = [entry["step"] for entry in log], [entry[column] for entry in log]
            panel.plot(steps, line, color=color, label=REAL_NAMES[name])
        panel.set_title(title)
    whole_numbers(panels, "step")
    panels[0].legend(loc="upper left")
    save_figure(figure, path)


def draw(results: Results, real: dict, folder: Path = DOCS / "images" / "plots") -> None:
    draw_methods(results, folder / "study_first_methods.svg")
    draw_grid(results, folder / "study_first_grid.svg")
    draw_ablations(results, folder / "study_first_ablations.svg")
    draw_priming(results, folder / "study_first_priming.svg")
    draw_real(real, folder / "study_first_real.svg")
