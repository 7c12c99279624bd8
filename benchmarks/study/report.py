"""Tables and figures of docs/study.md, from the runs in `--folder` or, without it, from those that results.jsonl
keeps.

python benchmarks/study/report.py                 # redraws everything
python benchmarks/study/report.py --folder study  # takes new runs into results.jsonl first
"""

import argparse
import json
import math
import re
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib
from run import ABLATIONS, HALF, METHODS, SECONDS, STEPS

from trl_promptkd.trainer.logged_metrics import CollusionCallback


matplotlib.use("Agg")
from matplotlib import pyplot


HERE = Path(__file__).parent
DOCS = HERE.parent.parent / "docs"
RESULTS, REAL_RESULTS = HERE / "results.jsonl", HERE / "results_real.json"
# Two-sided 95 % of Student's t, by the number of seeds
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
COLORS = {"finite": "#0072b2", "fresh": "#d55e00"}
REGULARIZER_COLORS = {"none": "#d55e00", "linear": "#0072b2", "constant": "#009e73"}
SCALES = {"accuracy": 100, "sampled_accuracy": 100}
NAMES = {
    "accuracy": "right, greedy (%)",
    "sampled_accuracy": "right, sampled (%)",
    "reverse_kl": "KL(q || p)",
    "forward_kl": "KL(p || q)",
    "student_entropy": "entropy of q",
    "two_samples_differ": "samples differ",
}


def collect(folder: Path) -> None:
    """Write the runs of `folder` to results.jsonl: figures rounded to five digits, logs, what soft prompts did."""
    runs = [json.loads(path.read_text()) for path in sorted((folder / "runs").glob("*.json"))]
    for run in runs:
        entries = [entry for entry in run.pop("log", []) if "kl/prompt_gain" in entry]
        if entries:
            run["log"] = [
                {key: entry[key] for key in entry if key.startswith(("kl/", "entropy/", "step"))} for entry in entries
            ]
    order = [*METHODS, *ABLATIONS]

    def place(run: dict) -> tuple:
        name = run["name"]
        known = order.index(name) if name in order else len(order)
        return run["group"], known, name.split(", ")[::-1], run.get("settings", {}).get("seed", 0)

    runs.sort(key=place)
    RESULTS.write_text("".join(json.dumps(_rounded(run)) + "\n" for run in runs))


def _rounded(value):
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list) else value


class Results:
    """The runs by group and name, each a list with one entry a seed."""

    def __init__(self, path: Path):
        self.groups: dict[str, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
        for line in path.read_text().splitlines():
            run = json.loads(line)
            self.groups[run["group"]][run["name"]].append(run)
        # The same runs: PromptKD with the paper's settings
        self.groups["ablations"] = {"paper": self.groups["finite"].get("PromptKD", []), **self.groups["ablations"]}

    def __getitem__(self, group: str) -> dict[str, list[dict]]:
        return self.groups[group]


def at(run: dict, when: str, measure: str) -> float:
    """A measure at the `start`, after the same number of `steps`, after the same `time`, or at the `end` of a run."""
    entries = run["measures"]
    if when == "steps":
        entry = next(entry for entry in entries if entry["step"] == STEPS)
    elif when == "time" and run["name"] == "PromptKD":
        entry = next(entry for entry in entries if entry["step"] == HALF)
    elif when == "time":  # a slow core runs out of it before STEPS, and goes on until then
        entry = next(entry for entry in entries if entry["seconds"] >= SECONDS)
    else:
        entry = entries[0 if when == "start" else -1]
    return entry[measure] * SCALES.get(measure, 1)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % confidence interval; nan where there are too few values."""
    if len(values) < 2:
        return (values[0] if values else math.nan), math.nan
    mean = statistics.fmean(values)
    return mean, T95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def shown(values: list[float], measure: str, signed: bool = False) -> str:
    mean, half = interval(values)
    digits = 1 if measure in SCALES else 3
    sign = "+" if signed else ""
    return f"{mean:{sign}.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def paired(runs: list[dict], others: list[dict], when: str, measure: str) -> list[float]:
    """Differences between runs of the same seed."""
    by_seed = {run["settings"]["seed"]: run for run in others}
    return [
        at(run, when, measure) - at(by_seed[run["settings"]["seed"]], when, measure)
        for run in runs
        if run["settings"]["seed"] in by_seed
    ]


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(f"| {line} |" for line in lines)


def methods_table(results: Results, data: str, when: str) -> str:
    columns = ["accuracy", "sampled_accuracy", "reverse_kl", "forward_kl", "student_entropy"]
    starts = results[data].get("PromptKD", [])
    rows = [
        [
            "*the start*",
            *(shown([at(run, "start", c) for run in starts], c) for c in columns),
            "0",
            "0",
            str(len(starts)),
        ]
    ]
    for name, runs in results[data].items():
        steps, seconds = (
            f"{statistics.fmean(at(run, when, measure) for run in runs):.0f}" for measure in ("step", "seconds")
        )
        cells = (shown([at(run, when, c) for run in runs], c) for c in columns)
        rows.append([name, *cells, steps, seconds, str(len(runs))])
    return table(["method", *(NAMES[c] for c in columns), "steps", "seconds", "seeds"], rows)


def difference_table(results: Results) -> str:
    columns = ["accuracy", "sampled_accuracy", "reverse_kl", "forward_kl"]
    rows = []
    for data in ("finite", "fresh"):
        for other in ("GKD", "SFT", "KD, reverse", "KD, forward", "SeqKD"):
            for when in ("steps", "time"):
                runs, others = results[data].get("PromptKD", []), results[data].get(other, [])
                if runs and others:
                    rows.append(
                        [data, other, when, *(shown(paired(runs, others, when, c), c, signed=True) for c in columns)]
                    )
    return table(["data", "PromptKD minus", "at equal", *(NAMES[c] for c in columns)], rows)


def tuning_table(results: Results) -> str:
    by_method = results["tune"]
    rates = sorted({run["settings"]["learning_rate"] for runs in by_method.values() for run in runs})
    rows = []
    for name, runs in by_method.items():
        scores = {run["settings"]["learning_rate"]: at(run, "end", "accuracy") for run in runs}
        best = max(scores, key=scores.get)
        rows.append(
            [
                name,
                *(
                    f"**{scores[rate]:.1f}**" if rate == best else f"{scores[rate]:.1f}" if rate in scores else "—"
                    for rate in rates
                ),
            ]
        )
    return table(["validation, right (%)", *(f"{rate:g}" for rate in rates)], rows)


def ablation_table(results: Results) -> str:
    columns = ["accuracy", "reverse_kl", "forward_kl"]
    prompt = ["prompted_plain", "prompt_gain"]
    rows = []
    paper = results["ablations"].get("paper", [])
    for name, runs in results["ablations"].items():
        gains = [
            at(run, "end", "reverse_kl") - at(run, "end", "reverse_kl_prompted")
            for run in runs
            if "reverse_kl_prompted" in run["measures"][-1]
        ]
        moved = [at(run, "end", "prompted_plain") for run in runs if "prompted_plain" in run["measures"][-1]]
        differences = (
            [shown([at(run, "end", c) for run in runs], c) for c in columns]
            if name == "paper"
            else [shown(paired(runs, paper, "end", c), c, signed=True) for c in columns]
        )
        rows.append([name, *differences, shown(moved, prompt[0]), shown(gains, prompt[1]), str(len(runs))])
    return table(
        ["PromptKD", *(NAMES[c] for c in columns), "KL(pP || p)", "prompt gain", "seeds"],
        rows,
    )


def warned(run: dict) -> bool:
    """Whether the trainer's warning would have come, from what was logged."""
    share = CollusionCallback().share
    return any(
        min(entry["kl/prompt_gain"], entry["kl/prompted_plain"]) >= share * entry["kl/student_plain"]
        for entry in run["log"][1:]
    )


def grid_table(results: Results) -> str:
    rows = []
    for name, runs in results["grid"].items():
        last = [run["measures"][-1] for run in runs]
        cells = [
            f"{statistics.fmean(at(run, 'end', 'accuracy') for run in runs):.1f}",
            *(
                f"{statistics.fmean(entry[c] for entry in last):.3f}"
                for c in ("reverse_kl", "forward_kl", "student_entropy", "two_samples_differ")
            ),
        ]
        if "prompted_plain" in last[0]:
            gain = statistics.fmean(entry["reverse_kl"] - entry["reverse_kl_prompted"] for entry in last)
            cells += [
                f"{statistics.fmean(entry['prompted_plain'] for entry in last):.3f}",
                f"{gain:.3f}",
                f"{gain / statistics.fmean(entry['reverse_kl'] for entry in last):.0%}",
                f"{statistics.fmean(entry['prompted_entropy'] for entry in last):.3f}",
                f"{sum(map(warned, runs))} of {len(runs)}",
            ]
        else:
            cells += ["—"] * 5
        rows.append(
            [*([*name.split(", "), ""][:3] if "GKD" not in name else ["GKD", "", name.split(", ")[1]]), *cells]
        )
    header = ["prompt lr", "regulariser", "warm start", "right (%)", "KL(q || p)", "KL(p || q)", "entropy of q"]
    header += ["samples differ", "KL(pP || p)", "gain", "of KL(q || p)", "entropy of pP", "warned"]
    return table(header, rows)


def priming_table(results: Results) -> str:
    columns = ["accuracy", "sampled_accuracy", "forward_kl", "student_entropy"]
    rows = []
    for name, runs in results["priming"].items():
        line, source = name.split(", ")
        rows.append([line, source, *(shown([at(run, "end", c) for run in runs], c) for c in columns), str(len(runs))])
    return table(["teacher's line", "answers by", *(NAMES[c] for c in columns), "seeds"], rows)


def priming_differences_table(results: Results) -> str:
    columns = ["accuracy", "sampled_accuracy", "forward_kl", "student_entropy"]
    rows = []
    for source in ("dataset", "teacher"):
        plain = results["priming"].get(f"no line, {source}", [])
        for line in ("careful", "pupil"):
            runs = results["priming"].get(f"{line}, {source}", [])
            rows.append([line, source, *(shown(paired(runs, plain, "end", c), c, signed=True) for c in columns)])
    return table(["line minus no line", "answers by", *(NAMES[c] for c in columns)], rows)


def teacher_table(results: Results) -> str:
    rows = [
        [run["name"], *(f"{100 * run[c]:.1f}" for c in ("accuracy", "sampled_accuracy"))]
        for runs in results["teacher"].values()
        for run in runs
    ]
    return table(["line before the question", "right, greedy (%)", "right, sampled (%)"], rows)


def draw_methods(results: Results, path: Path) -> None:
    """What each method changed, of accuracy and both KLs, at equal steps and at equal time."""
    names = list(METHODS)[::-1]
    figure, axes = pyplot.subplots(2, 3, figsize=(11, 6), sharey=True, sharex="col")
    for row, when in zip(axes, ("steps", "time"), strict=True):
        for axis, column in zip(row, ("accuracy", "reverse_kl", "forward_kl"), strict=True):
            for shift, (data, color) in zip((0.14, -0.14), COLORS.items(), strict=True):
                for place, name in enumerate(names):
                    runs = results[data].get(name, [])
                    changes = [at(run, when, column) - at(run, "start", column) for run in runs]
                    mean, half = interval(changes)
                    axis.plot(changes, [place + shift] * len(changes), ".", color=color, alpha=0.35, markersize=5)
                    label = (
                        {"finite": "800 problems", "fresh": "fresh problems"}[data] if place == 0 and runs else None
                    )
                    axis.errorbar(mean, place + shift, xerr=half, fmt="o", color=color, capsize=3, label=label)
            axis.axvline(0, color="#999999", linestyle=":")
            axis.set_yticks(range(len(names)), names)
            axis.grid(axis="x", color="#eeeeee")
            axis.set_title(f"change of {NAMES[column]}, equal {when}", fontsize=10)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=3, frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=110)


def draw_grid(results: Results, path: Path) -> None:
    """What the prompt's learning rate does, by regulariser and warm start, beside GKD."""
    measures = [
        ("right, greedy (%)", lambda run: at(run, "end", "accuracy")),
        ("KL(q || p), student's samples", lambda run: at(run, "end", "reverse_kl")),
        ("KL(p || q), teacher's samples", lambda run: at(run, "end", "forward_kl")),
        ("KL(pP || p): how far the prompt went", lambda run: at(run, "end", "prompted_plain")),
        (
            "prompt gain / KL(q || p)",
            lambda run: 1 - at(run, "end", "reverse_kl_prompted") / at(run, "end", "reverse_kl"),
        ),
        ("entropy of the student", lambda run: at(run, "end", "student_entropy")),
    ]
    figure, axes = pyplot.subplots(2, 3, figsize=(11, 6.2), sharex=True)
    for axis, (title, value) in zip(axes.flat, measures, strict=True):
        for warm, style in (("full", "-"), ("short", "--")):
            for regularizer, color in REGULARIZER_COLORS.items():
                points = {
                    float(name.split(", ")[0]): statistics.fmean(map(value, runs))
                    for name, runs in results["grid"].items()
                    if name.endswith(f"{regularizer}, {warm}") and runs
                }
                if not points:
                    continue
                rates = sorted(points)
                label = f"regulariser {regularizer}, {warm} warm start"
                axis.plot(rates, [points[rate] for rate in rates], f"o{style}", color=color, markersize=4, label=label)
            gkd = results["grid"].get(f"GKD, {warm}", [])
            if gkd and "prompt" not in title.lower():
                axis.axhline(
                    statistics.fmean(map(value, gkd)),
                    color="#555555",
                    linestyle=style,
                    linewidth=1,
                    label=f"GKD, {warm} warm start",
                )
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
    paper = results["ablations"].get("paper", [])
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.6), sharey=True)
    for axis, column in zip(axes, ("accuracy", "reverse_kl", "forward_kl"), strict=True):
        for index, name in enumerate(names):
            differences = paired(results["ablations"][name], paper, "end", column)
            mean, half = interval(differences)
            axis.plot(differences, [len(names) - 1 - index] * len(differences), ".", color="#bbbbbb", markersize=5)
            axis.errorbar(mean, len(names) - 1 - index, xerr=half, fmt="o", color="#0072b2", capsize=3, markersize=5)
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
                runs = results["priming"].get(f"{line}, {source}", [])
                if runs:
                    mean, half = interval([at(run, "end", column) for run in runs])
                    label = f"teacher behind: {line}" if row == 0 else None
                    axis.errorbar(mean, row + shift, xerr=half, fmt="o", color=color, capsize=3, label=label)
        axis.set_yticks([0, 1], ["the teacher's\nanswers", "the data's\nanswers"])
        axis.set_title(f"student: {NAMES[column]}", fontsize=10)
        axis.grid(axis="x", color="#eeeeee")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=3, frameon=False)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.savefig(path, dpi=110)


REAL_NAMES = {
    "teacher": "the teacher",
    "warm": "*the start*",
    "sft": "SFT",
    "seqkd": "SeqKD",
    "gkd": "GKD",
    "promptkd": "PromptKD",
    "promptkd_lr1e-3": "PromptKD, prompt lr x 10",
    "promptkd_lr1e-2": "PromptKD, prompt lr x 100",
}


def real_rouge_table(real: dict) -> str:
    sets = list(real["teacher"]["gold"])
    rows = []
    for name, label in REAL_NAMES.items():
        if name in real:
            cells = [
                f"{real[name][reference][one]['mean']['rougeL']:.1f}" if reference in real[name] else "—"
                for reference in ("gold", "teacher")
                for one in sets
            ]
            rows.append([label, *cells])
    titles = {"gold": "gold", "teacher": "the teacher's"}
    return table(["ROUGE-L against", *(f"{one}, {titles[r]}" for r in titles for one in sets)], rows)


def real_kl_table(real: dict) -> str:
    columns = ["reverse_kl", "forward_kl", "student_entropy", "prompted_plain", "prompted_entropy"]
    rows = []
    for name, label in REAL_NAMES.items():
        if name in real and "reverse_kl" in real[name]:
            run = real[name]
            gain = f"{run['reverse_kl'] - run['reverse_kl_prompted']:.3f}" if "reverse_kl_prompted" in run else "—"
            cells = [f"{run[c]:.3f}" if c in run else "—" for c in columns]
            rows.append([label, *cells[:4], gain, cells[4], f"{run['cpu_seconds'] / 60:.0f}"])
    header = ["method", "KL(q || p)", "KL(p || q)", "entropy of q", "KL(pP || p)", "prompt gain", "entropy of pP"]
    return table([*header, "minutes of one core"], rows)


def draw_real(real: dict, path: Path) -> None:
    """Both KLs of the real model's students, and what the soft prompts did while they learned."""
    names = [name for name in REAL_NAMES if name in real and "reverse_kl" in real[name]]
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.6))
    for shift, column, color in ((0.15, "reverse_kl", "#0072b2"), (-0.15, "forward_kl", "#d55e00")):
        places = [len(names) - 1 - index + shift for index in range(len(names))]
        label = {"reverse_kl": "KL(q || p), student's samples", "forward_kl": "KL(p || q), teacher's samples"}[column]
        axes[0].barh(places, [real[name][column] for name in names], height=0.28, color=color, label=label)
    axes[0].set_yticks(range(len(names)), [REAL_NAMES[name].strip("*") for name in names][::-1])
    axes[0].set_xlabel("nats a token")
    axes[0].legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.4, -0.18), frameon=False)
    colors = {"promptkd": "#0072b2", "promptkd_lr1e-3": "#009e73", "promptkd_lr1e-2": "#d55e00"}
    for axis, column in zip(axes[1:], ("kl/prompted_plain", "kl/prompt_gain"), strict=True):
        for name, color in colors.items():
            if name in real:
                log = [entry for entry in real[name]["log"] if column in entry]
                axis.plot(
                    [entry["step"] for entry in log],
                    [entry[column] for entry in log],
                    color=color,
                    label=REAL_NAMES[name],
                )
        axis.set(xlabel="step", title={"kl/prompted_plain": "KL(pP || p)", "kl/prompt_gain": "prompt gain"}[column])
        axis.grid(color="#eeeeee")
    axes[1].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def fill(page: Path, tables: dict[str, str]) -> None:
    """Put each table between its two comments."""
    text = page.read_text()
    for name, content in tables.items():
        begin, end = f"<!-- table: {name} -->", "<!-- end -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"{page} has no place for the table {name!r}: write `{begin}` and `{end}` there.")
        text = pattern.sub(lambda _, new=f"{begin}\n{content}\n{end}": new, text)
    page.write_text(text)


def all_tables(results: Results, real: dict) -> dict[str, str]:
    """By the names that docs/study.md has for them."""
    return {
        "tuning": tuning_table(results),
        "finite, equal steps": methods_table(results, "finite", "steps"),
        "finite, equal time": methods_table(results, "finite", "time"),
        "fresh, equal steps": methods_table(results, "fresh", "steps"),
        "fresh, equal time": methods_table(results, "fresh", "time"),
        "differences": difference_table(results),
        "grid": grid_table(results),
        "ablations": ablation_table(results),
        "teacher": teacher_table(results),
        "priming": priming_table(results),
        "priming, differences": priming_differences_table(results),
        "real, rouge": real_rouge_table(real),
        "real, kl": real_kl_table(real),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, help="where run.py keeps its runs")
    parser.add_argument("--real_folder", type=Path, help="where real_measure.py keeps its measures")
    args = parser.parse_args()
    if args.folder:
        collect(args.folder)
    if args.real_folder:
        REAL_RESULTS.write_text(json.dumps(_rounded(json.loads((args.real_folder / "measures.json").read_text()))))
    results, real = Results(RESULTS), json.loads(REAL_RESULTS.read_text())
    images = DOCS / "images"
    draw_methods(results, images / "study_methods.png")
    draw_grid(results, images / "study_grid.png")
    draw_ablations(results, images / "study_ablations.png")
    draw_priming(results, images / "study_priming.png")
    draw_real(real, images / "study_real.png")
    fill(DOCS / "study.md", all_tables(results, real))


if __name__ == "__main__":
    main()
