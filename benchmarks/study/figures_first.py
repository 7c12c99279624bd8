"""Figures of docs/study_first.md: each is written over what was there."""

from pathlib import Path

import matplotlib
import numpy as np
from pages import DOCS
from runs_first import (
    METHODS,
    NAMES,
    REAL_NAMES,
    Results,
    at,
    difference,
    gain_share,
    pairs,
    value,
    values,
)
from study_statistics import mean_interval


matplotlib.use("Agg")
from matplotlib import pyplot


COLORS = {"finite": "#0072b2", "fresh": "#d55e00"}
REGULARIZER_COLORS = {"none": "#d55e00", "linear": "#0072b2", "constant": "#009e73"}


def draw_methods(results: Results, path: Path) -> None:
    """What each method changed, at equal steps and at equal time."""
    names = METHODS[::-1]
    columns = ("accuracy", "reverse_kl", "reverse_kl_answer", "brief_share")
    figure, axes = pyplot.subplots(2, 4, figsize=(13, 6), sharey=True, sharex="col")
    for row, when in zip(axes, ("steps", "time"), strict=True):
        for axis, column in zip(row, columns, strict=True):
            for shift, (data, color) in zip((0.14, -0.14), COLORS.items(), strict=True):
                for place, name in enumerate(names):
                    runs = results[data][name]
                    changes = [at(run, when, column) - at(run, "start", column) for run in runs]
                    mean, half, _ = mean_interval(changes)
                    axis.plot(changes, [place + shift] * len(changes), ".", color=color, alpha=0.35, markersize=5)
                    label = {"finite": "800 problems", "fresh": "fresh problems"}[data] if place == 0 else None
                    axis.errorbar(mean, place + shift, xerr=half, fmt="o", color=color, capsize=3, label=label)
            axis.axvline(0, color="#999999", linestyle=":")
            axis.set_yticks(range(len(names)), names)
            axis.grid(axis="x", color="#eeeeee")
            axis.set_title(f"{NAMES[column]}: change, equal {when}", fontsize=9)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=3, frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=110)


def draw_grid(results: Results, path: Path) -> None:
    """What the prompt's learning rate does, by regulariser and warm start, beside GKD."""
    measures = [
        ("right, greedy (%)", lambda run: at(run, "end", "accuracy")),
        ("KL(q || p) per token, student's samples", lambda run: at(run, "end", "reverse_kl")),
        ("KL(q || p) per answer", lambda run: at(run, "end", "reverse_kl_answer")),
        ("KL(p || q) per token, teacher's samples", lambda run: at(run, "end", "forward_kl")),
        ("KL(pP || p): how far the prompt went", lambda run: at(run, "end", "prompted_plain")),
        ("prompt gain / KL(q || p)", gain_share),
    ]
    figure, axes = pyplot.subplots(2, 3, figsize=(11, 6.2), sharex=True)
    for axis, (title, measure) in zip(axes.flat, measures, strict=True):
        for warm, style in (("full", "-"), ("short", "--")):
            for regularizer, color in REGULARIZER_COLORS.items():
                points = {
                    float(name.split(", ")[0]): np.mean(list(map(measure, runs)))
                    for name, runs in results["grid"].items()
                    if name.endswith(f"{regularizer}, {warm}")
                }
                if not points:  # a short warm start was only tried with the linear regulariser
                    continue
                rates = sorted(points)
                label = f"regulariser {regularizer}, {warm} warm start"
                axis.plot(rates, [points[rate] for rate in rates], f"o{style}", color=color, markersize=4, label=label)
            if "prompt" not in title:
                gkd = np.mean(list(map(measure, results["grid"][f"GKD, {warm}"])))
                axis.axhline(gkd, color="#555555", linestyle=style, linewidth=1, label=f"GKD, {warm} warm start")
        axis.set(xscale="log", yscale="log" if "KL(" in title and "gain" not in title else "linear", title=title)
        axis.title.set_fontsize(10)
        axis.grid(color="#eeeeee")
    for axis in axes[1]:
        axis.set_xlabel("prompt learning rate / student's")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=4, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.savefig(path, dpi=110)


def draw_ablations(results: Results, path: Path) -> None:
    """Differences of each ablation to the paper's settings, paired by seed."""
    names = [name for name in results["ablations"] if name != "paper"]
    paper = results["ablations"]["paper"]
    columns = ("accuracy", "reverse_kl", "reverse_kl_answer", "forward_kl")
    figure, axes = pyplot.subplots(1, 4, figsize=(13, 3.6), sharey=True)
    for axis, column in zip(axes, columns, strict=True):
        for index, name in enumerate(names):
            runs = results["ablations"][name]
            scattered = np.subtract(*pairs(runs, paper, "end", column))
            found = difference(runs, paper, "end", column)
            place = len(names) - 1 - index
            axis.plot(scattered, [place] * len(scattered), ".", color="#bbbbbb", markersize=5)
            axis.errorbar(found.mean, place, xerr=found.half, fmt="o", color="#0072b2", capsize=3, markersize=5)
        axis.axvline(0, color="#999999", linestyle=":")
        axis.set_yticks(range(len(names)), names[::-1])
        axis.set_title(f"{NAMES[column]}: difference", fontsize=10)
        axis.grid(axis="x", color="#eeeeee")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def draw_priming(results: Results, path: Path) -> None:
    """What a line before the teacher's question does to the student."""
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    lines = [("no line", "#555555"), ("careful", "#0072b2"), ("pupil", "#d55e00")]
    for axis, column in zip(axes, ("accuracy", "sampled_accuracy"), strict=True):
        for row, source in enumerate(("teacher", "dataset")):
            for shift, (line, color) in zip((0.2, 0.0, -0.2), lines, strict=True):
                mean, half, _ = mean_interval(values(results["priming"][f"{line}, {source}"], "end", column))
                label = f"teacher after: {line}" if row == 0 else None
                axis.errorbar(mean, row + shift, xerr=half, fmt="o", color=color, capsize=3, label=label)
        axis.set_yticks([0, 1], ["the teacher's\nanswers", "the data's\nanswers"])
        axis.set_title(f"student: {NAMES[column]}", fontsize=10)
        axis.grid(axis="x", color="#eeeeee")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=3, frameon=False)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.savefig(path, dpi=110)


def draw_real(real: dict, path: Path) -> None:
    """KLs of the real model's students, and what the soft prompts did while they learned."""
    names = [name for name in REAL_NAMES if name != "teacher"]
    figure, axes = pyplot.subplots(1, 4, figsize=(13, 3.6))
    places = range(len(names))[::-1]
    for shift, column, color in ((0.15, "reverse_kl", "#0072b2"), (-0.15, "forward_kl", "#d55e00")):
        label = {"reverse_kl": "KL(q || p), student's samples", "forward_kl": "KL(p || q), teacher's samples"}[column]
        heights = [place + shift for place in places]
        axes[0].barh(heights, [real[name][column] for name in names], height=0.28, color=color, label=label)
    axes[0].set_xlabel("nats per token")
    axes[0].legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.3, -0.18), frameon=False)
    axes[1].barh(places, [value(real[name], "reverse_kl_answer") for name in names], height=0.4, color="#0072b2")
    axes[1].set_xlabel("KL(q || p), nats per answer")
    axes[0].set_yticks(places, [REAL_NAMES[name].strip("*") for name in names])
    axes[1].set_yticks(places, [""] * len(names))
    colors = {"promptkd": "#0072b2", "promptkd_lr1e-3": "#009e73", "promptkd_lr1e-2": "#d55e00"}
    for axis, column in zip(axes[2:], ("kl/prompted_plain", "kl/prompt_gain"), strict=True):
        for name, color in colors.items():
            log = [entry for entry in real[name]["log"] if column in entry]
            steps, line = [entry["step"] for entry in log], [entry[column] for entry in log]
            axis.plot(steps, line, color=color, label=REAL_NAMES[name])
        axis.set(xlabel="step", title={"kl/prompted_plain": "KL(pP || p)", "kl/prompt_gain": "prompt gain"}[column])
        axis.grid(color="#eeeeee")
    axes[2].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def draw(results: Results, real: dict, folder: Path = DOCS / "images") -> None:
    draw_methods(results, folder / "study_first_methods.png")
    draw_grid(results, folder / "study_first_grid.png")
    draw_ablations(results, folder / "study_first_ablations.png")
    draw_priming(results, folder / "study_first_priming.png")
    draw_real(real, folder / "study_first_real.png")
