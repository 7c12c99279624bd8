"""Redraws tables and figures of docs/study_first.md from results_first.jsonl and results_real_first.json, and prints
what the runs say and the page's sentences do not.

python benchmarks/study/report_first.py
"""

import json

import numpy as np
from pages import DOCS, fill, missing, shown, shown_difference, shown_p, table, with_holm
from runs_first import (
    METHODS,
    NAMES,
    REAL_NAMES,
    REAL_RESULTS,
    WARNING,
    Results,
    at,
    both_shares,
    difference,
    gain_share,
    pairs,
    starts_from_text,
    value,
    values,
)
from study_statistics import Difference, smallest_seen

from trl_promptkd.intervals import holm


DATA = {"finite": "800", "fresh": "fresh"}


GKD_MEASURES = ["accuracy", "sampled_accuracy", "reverse_kl", "reverse_kl_answer", "forward_kl", "brief_share"]


def gkd_tests(results: Results) -> dict[tuple[str, str, str], tuple[Difference, float, float]]:
    """PromptKD minus GKD by (measure, data, at equal): the difference, its p value after Holm, and the smallest
    difference that could have been seen."""
    found, seen = {}, {}
    for measure in GKD_MEASURES:
        for data in DATA:
            for when in ("steps", "time"):
                runs, others = results[data]["PromptKD"], results[data]["GKD"]
                key = measure, data, when
                found[key] = difference(runs, others, when, measure)
                seen[key] = smallest_seen(np.subtract(*pairs(runs, others, when, measure)))
    corrected = holm([one.p for one in found.values()])
    return {key: (found[key], p, seen[key]) for key, p in zip(found, corrected, strict=True)}


def gkd_table(results: Results) -> str:
    rows = []
    for (measure, data, when), (found, p, seen) in gkd_tests(results).items():
        cells = [shown(values(results[data][name], when, measure), measure) for name in ("GKD", "PromptKD")]
        cells += [shown_difference(found, measure), shown_p(found.p), f"**{shown_p(p)}**" if p < 0.05 else shown_p(p)]
        rows.append([NAMES[measure], DATA[data], when, *cells, shown([seen], measure)])
    header = ["measure", "problems", "at equal", "GKD", "PromptKD", "difference", "p", "p, Holm", "smallest seen"]
    return table(header, rows)


def methods_table(results: Results, when: str) -> str:
    columns = ["accuracy", "reverse_kl", "reverse_kl_answer", "forward_kl", "brief_share"]
    starts = results["finite"]["PromptKD"]
    taken = {"steps": "seconds", "time": "step"}[when]
    rows = [["", "*the start*", *(shown(values(starts, "start", c), c) for c in columns), "0"]]
    for data in DATA:
        for name in METHODS:
            runs = results[data][name]
            cells = [shown(values(runs, when, c), c) for c in columns]
            rows.append([DATA[data], name, *cells, f"{np.mean(values(runs, when, taken)):.0f}"])
    return table(["problems", "method", *(NAMES[c] for c in columns), taken.removesuffix("s") + "s"], rows)


OTHERS = ["SFT", "KD, reverse", "KD, forward", "SeqKD"]
OTHERS_COLUMNS = ["accuracy", "reverse_kl_answer", "forward_kl"]


def others_table(results: Results) -> str:
    keys = [(data, other, when) for data in DATA for other in OTHERS for when in ("steps", "time")]
    found = [
        [(c, difference(results[data]["PromptKD"], results[data][other], when, c)) for c in OTHERS_COLUMNS]
        for data, other, when in keys
    ]
    rows = [[DATA[key[0]], *key[1:], *cells] for key, cells in zip(keys, with_holm(found), strict=True)]
    return table(["problems", "PromptKD minus", "at equal", *(NAMES[c] for c in OTHERS_COLUMNS)], rows)


def modes_settings(results: Results) -> dict[str, list[dict]]:
    paper = {"paper": results["finite"]["PromptKD"], "paper, fresh problems": results["fresh"]["PromptKD"]}
    return paper | {name: runs for name, runs in results["ablations"].items() if name != "paper"}


def modes_table(results: Results) -> str:
    rows = []
    for name, runs in modes_settings(results).items():
        last = [run["measures"][-1] for run in runs]
        rows.append(
            [
                name,
                shown([value(entry, "brief_share") for entry in last], "brief_share"),
                shown([max(value(entry, "brief_share") for entry in last)], "brief_share"),
                shown(values(runs, "start", "prompted_plain"), "prompted_plain"),
                shown([value(entry, "prompted_plain") for entry in last], "prompted_plain"),
                shown([value(entry, "prompted_plain_answer") for entry in last], "prompted_plain_answer"),
                shown(values(runs, "start", "prompted_forward_kl"), "prompted_forward_kl"),
                shown([value(entry, "prompted_forward_kl") for entry in last], "prompted_forward_kl"),
            ]
        )
    header = [
        "PromptKD",
        "short answers (%)",
        "most in any run (%)",
        "KL(pP || p) at first",
        "in the end",
        "per answer",
    ]
    return table([*header, "KL(p || pP) at first", "in the end"], rows)


def weak_table(results: Results) -> str:
    rows = []
    for seed in sorted(run["settings"]["seed"] for run in results["finite"]["PromptKD"]):
        runs = [next(r for r in results[data]["PromptKD"] if r["settings"]["seed"] == seed) for data in DATA]
        cells = [f"{100 * gain_share(run):.1f}" for run in runs]
        moved = [f"{100 * at(run, 'end', 'prompted_plain') / at(run, 'end', 'reverse_kl'):.1f}" for run in runs]
        start = [shown([at(runs[0], "start", c)], c) for c in ("accuracy", "reverse_kl")]
        rows.append([str(seed), *start, *cells, *moved])
    header = ["student", "right at the start (%)", "KL(q || p) at the start", "gain, 800 (%)", "gain, fresh (%)"]
    return table([*header, "KL(pP || p), 800 (%)", "KL(pP || p), fresh (%)"], rows)


def is_ruined(run: dict) -> bool:
    """Whether a student gives most questions the number alone."""
    return at(run, "end", "brief_share") > 50


def random_runs(results: Results) -> list[dict]:
    """Those whose prompts did not start from a text."""
    return [run for name in ("init vocab", "init random") for run in results["ablations"][name]]


def random_table(results: Results) -> str:
    columns = ["accuracy", "brief_share", "prompted_plain", "prompted_forward_kl"]
    rows = []
    for run in random_runs(results):
        length = f"{at(run, 'end', 'mean_length'):.1f}"
        largest = max(both_shares(run["log"])[1:])
        mark = "**" if is_ruined(run) else ""
        cells = [shown([at(run, "end", c)], c) for c in columns]
        first = shown([at(run, "start", "accuracy")], "accuracy")
        name = run["name"].removeprefix("init ")
        rows.append([name, str(run["settings"]["seed"]), first, *cells[:2], length, *cells[2:]])
        rows[-1].append(f"{mark}{largest:.2f}{mark}")
    header = ["start of the prompt", "student", "right at first (%)", "right (%)", "short answers (%)", "tokens"]
    return table([*header, "KL(pP || p)", "KL(p || pP)", "both shares"], rows)


def grid_table(results: Results) -> str:
    rows = []
    for name, runs in results["grid"].items():

        def mean(measure: str, runs=runs) -> float:
            return float(np.mean(values(runs, "end", measure)))

        measures = ("accuracy", "reverse_kl", "reverse_kl_answer", "brief_share")
        cells = [shown([mean(c)], c) for c in measures]
        if "GKD" in name:
            rows.append(["GKD", "", name.split(", ")[1], *cells, "—", "—"])
        else:
            gain = 1 - mean("reverse_kl_prompted") / mean("reverse_kl")
            cells += [f"{mean('prompted_plain'):.3f}", f"{100 * gain:.0f}"]
            rows.append([*name.split(", "), *cells])
    header = ["prompt lr", "regulariser", "warm start", *(NAMES[c] for c in measures)]
    return table([*header, "KL(pP || p)", "gain (%)"], rows)


ABLATION_COLUMNS = ["accuracy", "reverse_kl", "reverse_kl_answer", "forward_kl"]


def ablation_table(results: Results) -> str:
    paper = results["ablations"]["paper"]
    others = {name: runs for name, runs in results["ablations"].items() if name != "paper"}
    found = [[(c, difference(runs, paper, "end", c)) for c in ABLATION_COLUMNS] for runs in others.values()]
    rows = [["paper", *(shown(values(paper, "end", c), c) for c in ABLATION_COLUMNS)]]
    rows += [[name, *cells] for name, cells in zip(others, with_holm(found), strict=True)]
    return table(["PromptKD", *(NAMES[c] for c in ABLATION_COLUMNS)], rows)


def warning_groups(results: Results, real: dict) -> dict[str, list[list[float]]]:
    """Both shares over the logs of each run, by kind of run."""
    kinds: dict[str, list[list[float]]] = {
        "the prompt started from a text": [],
        "the prompt started from random embeddings or tokens, and came back": [],
        "the prompt started from random embeddings or tokens, and the student was ruined": [],
        "learning rates of 0.01, a collapse": [],
        "real model, the prompt at the student's rate and at ten times it": [],
        "real model, the prompt at a hundred times the student's rate": [],
    }
    text, back, ruined, collapse, slow, fast = kinds.values()
    for run in results.promptkd():
        shares = both_shares(run["log"])
        if run["settings"]["learning_rate"] == 0.01:
            collapse.append(shares)
        elif starts_from_text(run):
            text.append(shares)
        else:
            (ruined if is_ruined(run) else back).append(shares)
    for name in ("promptkd", "promptkd_lr1e-3"):
        slow.append(both_shares(real[name]["log"]))
    fast.append(both_shares(real["promptkd_lr1e-2"]["log"]))
    return kinds


def warning_table(results: Results, real: dict) -> str:
    rows = []
    for kind, runs in warning_groups(results, real).items():
        largest = sorted(max(shares[1:]) for shares in runs)
        reached = sorted(first for shares in runs if (first := first_warning(shares)))
        spread = f"at most {largest[-1]:.2f}"
        when = "never"
        if reached:
            spread = f"{largest[0]:.2f} to {largest[-1]:.2f}" if len(runs) > 1 else f"{largest[0]:.2f}"
            when = f"{reached[0]} to {reached[-1]}" if len(runs) > 1 else f"{reached[0]}"
            when += f" of {len(runs[0])}"
        rows.append([kind, str(len(runs)), spread, when])
    return table(["runs", "number", "largest in a run's log", "reached 0.3 at log"], rows)


def first_warning(shares: list[float]) -> int | None:
    """The first log entry, counted from one, at which the trainer would have warned. It ignores the first entry."""
    return next((place for place, share in enumerate(shares, 1) if place > 1 and share >= WARNING), None)


PRIMING_COLUMNS = ["accuracy", "sampled_accuracy", "reverse_kl_answer", "forward_kl", "brief_share"]


def priming_differences(results: Results) -> dict[tuple[str, str], list[tuple[str, Difference]]]:
    return {
        (line, source): [
            (
                c,
                difference(
                    results["priming"][f"{line}, {source}"], results["priming"][f"no line, {source}"], "end", c
                ),
            )
            for c in PRIMING_COLUMNS
        ]
        for source in ("dataset", "teacher")
        for line in ("careful", "pupil")
    }


def priming_table(results: Results) -> str:
    """What no line gives, and the differences to it."""
    found = priming_differences(results)
    cells = dict(zip(found, with_holm(list(found.values())), strict=True))
    rows = []
    for source in ("dataset", "teacher"):
        plain = results["priming"][f"no line, {source}"]
        rows.append(["no line", source, *(shown(values(plain, "end", c), c) for c in PRIMING_COLUMNS)])
        rows += [[f"{line}: difference", source, *cells[line, source]] for line in ("careful", "pupil")]
    return table(["teacher's line", "answers by", *(NAMES[c] for c in PRIMING_COLUMNS)], rows)


def real_rouge_table(real: dict) -> str:
    sets = list(real["teacher"]["gold"])
    rows = []
    for name, label in REAL_NAMES.items():
        cells = [
            f"{real[name][reference][one]['mean']['rougeL']:.1f}" if reference in real[name] else "—"
            for reference in ("gold", "teacher")
            for one in sets
        ]
        rows.append([label, *cells])
    titles = {"gold": "gold", "teacher": "the teacher's"}
    return table(["ROUGE-L against", *(f"{one}, {titles[r]}" for r in titles for one in sets)], rows)


def real_kl_table(real: dict) -> str:
    rows = []
    for name, label in REAL_NAMES.items():
        if name == "teacher":
            continue
        run = real[name]
        cells = [f"{run['reverse_kl']:.3f}", f"{value(run, 'reverse_kl_answer'):.1f}", f"{run['mean_length']:.1f}"]
        cells += [f"{run[c]:.3f}" for c in ("forward_kl", "student_entropy")]
        if "reverse_kl_prompted" in run:
            gain = run["reverse_kl"] - run["reverse_kl_prompted"]
            cells += [f"{run['prompted_plain']:.3f}", f"{gain:.3f}", f"{run['prompted_entropy']:.3f}"]
        else:
            cells += ["—"] * 3
        cells += [f"{run['cpu_seconds'] / 60:.1f}", f"{run['cpu_seconds'] / real['gkd']['cpu_seconds']:.2f}"]
        rows.append([label, *cells])
    header = ["method", "KL(q || p) per token", "per answer", "tokens", "KL(p || q) per token", "entropy of q"]
    header += ["KL(pP || p)", "prompt gain", "entropy of pP", "minutes of one core", "of GKD"]
    return table(header, rows)


def all_tables(results: Results, real: dict) -> dict[str, str]:
    """By the names that docs/study_first.md has for them."""
    return {
        "gkd": gkd_table(results),
        "methods, equal steps": methods_table(results, "steps"),
        "methods, equal time": methods_table(results, "time"),
        "others": others_table(results),
        "modes": modes_table(results),
        "weak": weak_table(results),
        "grid": grid_table(results),
        "ablations": ablation_table(results),
        "random": random_table(results),
        "warning": warning_table(results, real),
        "priming": priming_table(results),
        "real, rouge": real_rouge_table(real),
        "real, kl": real_kl_table(real),
    }


def main() -> None:
    from figures_first import draw
    from sentences_first import sentences

    results, real = Results(), json.loads(REAL_RESULTS.read_text())
    page = DOCS / "study_first.md"
    fill(page, all_tables(results, real))
    draw(results, real)
    for sentence in missing(page.read_text(), sentences(results, real)):
        print(f"{page} does not say: {sentence}")


if __name__ == "__main__":
    main()
