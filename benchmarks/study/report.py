"""Redraws tables and figures of docs/study.md from results.jsonl, and prints what the runs say and the
page's sentences do not.

    python benchmarks/study/report.py
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pages import DOCS, fill, is_percent, missing, number, shown, shown_difference, shown_p, table, with_holm
from report_real import RealRuns, color_of, draw_real, real_sentences, real_tables
from run import CAREFUL, FROZEN, GKD_CAREFUL, GKD_PUPIL, LINES, MODES, PUPIL, RESULTS, SCORE, SHARE
from study_statistics import Difference, held_out_r2, mean_interval, paired_difference, smallest_seen
from world import WRITERS

from trl_promptkd.analysis.plot_style import HIGHER, LIGHT, LOWER, new_figure, plot_style, save_figure


NAMES = {
    "sampled_accuracy": "right, sampled (%)",
    "accuracy": "right, greedy (%)",
    "reverse_kl_per_answer": "KL(q || p) per answer",
    "forward_kl_per_answer": "KL(p || q) per answer",
    "gold_nll_per_answer": "NLL of gold per answer",
    "careful_share": "careful (%)",
    "brief_share": "short (%)",
}
COLUMNS = ["sampled_accuracy", "accuracy", "reverse_kl_per_answer", "forward_kl_per_answer", "gold_nll_per_answer"]


class Runs:
    """By group and name; each a list of runs, one a seed, in the order of seeds."""

    def __init__(self, path: Path = RESULTS):
        self.groups: dict[str, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
        for line in path.read_text().splitlines():
            run = json.loads(line)
            self.groups[run["group"]][run["name"]].append(run)
        for names in self.groups.values():
            for runs in names.values():
                runs.sort(key=lambda run: run["settings"]["seed"])

    def __getitem__(self, group: str) -> dict[str, list[dict]]:
        return self.groups[group]


def teacher_lines(runs: Runs) -> dict[str, dict[str, dict[str, float]]]:
    """What each group's plain teacher samples after each line."""
    lines = json.loads(LINES.read_text())
    return {group: lines[runs[group]["GKD"][0]["teacher"]] for group in ("first", "main")}


class Text(NamedTuple):
    """A line before the teacher's questions: its teacher, and the students that GKD trained with it."""

    line: str
    teacher: dict[str, float]
    students: list[dict]


def texts(runs: Runs) -> list[Text]:
    """The best teacher first."""
    students = {**runs["texts"], CAREFUL.strip(): runs["main"]["GKD, fixed text"]}
    lines = teacher_lines(runs)["main"]
    found = [Text(line, lines[line], of_line) for line, of_line in students.items()]
    return sorted(found, key=lambda text: -text.teacher[SCORE])


def gains(runs: Runs, some: list[Text]) -> tuple[list[float], list[float]]:
    """Points of right samples over no line: each line's teacher, and the mean of its students."""
    plain = teacher_lines(runs)["main"][""][SCORE]
    of_teachers = [100 * (text.teacher[SCORE] - plain) for text in some]
    return of_teachers, [difference(text.students, runs["main"]["GKD"], SCORE).mean for text in some]


def steps_shown(some: list[Text]) -> list[Text]:
    """Without the lines after which the teacher gives the number alone."""
    return [text for text in some if text.line not in WRITERS["brief"]]


def of_writers_lines(some: list[Text], writer: str) -> np.ndarray:
    """Each student's score in percent, as the mean over one writer's lines."""
    return np.mean([values(text.students, SCORE) for text in some if text.line in WRITERS[writer]], axis=0)


def by_mode(runs: Runs) -> dict[str, dict[str, list[dict]]]:
    """Who answered the rows of the students' SFT -> methods."""
    mixed = {
        "GKD": runs["main"]["GKD"],
        GKD_CAREFUL: runs["main"]["GKD, fixed text"],
        GKD_PUPIL: runs["texts"][PUPIL.strip()],
        "PromptKD": runs["main"]["PromptKD"],
        FROZEN: [run for run in runs["modes"][FROZEN] if run["settings"]["writer"] == "gold"],
    }
    others = {
        writer: {
            name: [run for run in of_name if run["settings"]["writer"] == writer]
            for name, of_name in runs["modes"].items()
        }
        for writer in MODES
    }
    return {"mixed": mixed, **others}


def over_modes(runs: Runs, name: str, other: str = "GKD") -> Difference:
    """Difference in right samples over seeds, each seed's as the mean over the modes."""
    mine, theirs = (
        np.mean([values(named[one], SCORE) for named in by_mode(runs).values()], axis=0) for one in (name, other)
    )
    return paired_difference(mine, theirs)


def compared(runs: Runs) -> dict[str, list[dict]]:
    """The methods on the students of both teachers."""
    return {name: [*runs["first"][name], *of_name] for name, of_name in runs["main"].items()}


def values(runs: list[dict], measure: str, when: str = "end") -> list[float]:
    """Shares in percent."""
    scale = 100 if is_percent(measure) else 1
    return [run[when][measure] * scale for run in runs]


def pairs(runs: list[dict], others: list[dict], measure: str) -> tuple[list[float], list[float]]:
    """Of the seeds that both have."""
    mine, theirs = (
        dict(zip([run["settings"]["seed"] for run in some], values(some, measure), strict=True))
        for some in (runs, others)
    )
    shared = sorted(mine.keys() & theirs.keys())
    return [mine[seed] for seed in shared], [theirs[seed] for seed in shared]


def difference(runs: list[dict], others: list[dict], measure: str) -> Difference:
    return paired_difference(*pairs(runs, others, measure))


def steps(run: dict) -> str:
    return " + ".join(f"{stage['steps']:,}" for stage in run["settings"]["stages"])


def ranked(named: dict[str, list[dict]]) -> list[str]:
    """The best score first."""
    return sorted(named, key=lambda name: -np.mean(values(named[name], SCORE)))


def methods_table(named: dict[str, list[dict]], columns=(*COLUMNS, "careful_share", "brief_share")) -> str:
    """What each method's students are like in the end, the best score first."""
    start = max(named.values(), key=len)
    rows = [["*the start*", *(shown(values(start, c, "start"), c) for c in columns), "0", str(len(start))]]
    for name in ranked(named):
        of_name = named[name]
        cells = [shown(values(of_name, c), c) for c in columns]
        rows.append([name, *cells, steps(of_name[0]), str(len(of_name))])
    return table(["method", *(NAMES[c] for c in columns), "steps", "seeds"], rows)


def against_table(named: dict[str, list[dict]], other: str) -> str:
    """Differences to one method on the same students; bold after Holm's correction over the whole table."""
    keys = [name for name in ranked(named) if name != other]
    found = [[(c, difference(named[name], named[other], c)) for c in COLUMNS] for name in keys]
    rows = [[name, *cells] for name, cells in zip(keys, with_holm(found), strict=True)]
    return table([f"minus {other}", *(NAMES[c] for c in COLUMNS)], rows)


def seen_table(named: dict[str, list[dict]], other: str) -> str:
    """What the runs could have shown: the true difference that would have been found four times in five."""
    rows = []
    for name in named:
        if name != other:
            gaps = [np.subtract(*pairs(named[name], named[other], c)) for c in COLUMNS]
            rows.append([name, *(number(smallest_seen(gap), c) for c, gap in zip(COLUMNS, gaps, strict=True))])
    return table([f"minus {other}", *(NAMES[c] for c in COLUMNS)], rows)


def candidates_table(named: dict[str, list[dict]]) -> str:
    """Each candidate's score, and its difference to two methods on the same students."""
    others = [name for name in ("GKD", "PromptKD") if name in named]
    header = ["method", *(NAMES[c] for c in COLUMNS[:4]), *(f"minus {other}" for other in others), "steps", "students"]
    rows = []
    for name in ranked(named):
        of_name = named[name]
        cells = [shown(values(of_name, c), c) for c in COLUMNS[:4]]
        gaps = ["" if name == o else shown_difference(difference(of_name, named[o], SCORE), SCORE) for o in others]
        rows.append([name, *cells, *gaps, steps(of_name[0]), str(len(of_name))])
    return table(header, rows)


def texts_table(runs: Runs) -> str:
    """Each line's teacher, and its students in the end and against those of GKD without a line."""
    columns = [SCORE, "accuracy", "reverse_kl_per_answer", "forward_kl_per_answer"]
    header = ["line before the teacher's question", "teacher right (%)", *(NAMES[c] for c in columns), "minus no line"]
    rows = []
    for text in texts(runs):
        cells = [shown(values(text.students, c), c) for c in columns]
        gap = shown_difference(difference(text.students, runs["main"]["GKD"], SCORE), SCORE)
        rows.append([text.line, number(100 * text.teacher[SCORE], SCORE), *cells, gap])
    plain = runs["main"]["GKD"]
    cells = [shown(values(plain, c), c) for c in columns]
    rows.append(["none", number(100 * teacher_lines(runs)["main"][""][SCORE], SCORE), *cells, ""])
    return table(header, rows)


def modes_table(runs: Runs) -> str:
    """Methods on students whose SFT had answers of one writer, or of the data's two."""
    columns = [SCORE, "accuracy", "reverse_kl_per_answer", "forward_kl_per_answer", "careful_share"]
    rows = []
    for mode, named in by_mode(runs).items():
        start = named["GKD"]
        rows.append([mode, "*the start*", *(shown(values(start, c, "start"), c) for c in columns), ""])
        for name, of_name in named.items():
            cells = [shown(values(of_name, c), c) for c in columns]
            gap = "" if name == "GKD" else shown_difference(difference(of_name, named["GKD"], SCORE), SCORE)
            rows.append([mode, name, *cells, gap])
    return table(["students", "method", *(NAMES[c] for c in columns), "minus GKD"], rows)


TEACHER_COLUMNS = {
    "teacher_sampled_accuracy": "its samples right (%)",
    "teacher_careful_share": "careful (%)",
    "teacher_brief_share": "short (%)",
    "teacher_gold_nll_per_answer": "its NLL of gold per answer",
    "prompted_plain_per_answer": "KL(pP || p) per answer",
    "teacher_plain_prompted_per_answer": "KL(p || pP) per answer",
}


def teachers_table(named: dict[str, list[dict]]) -> str:
    """Where the text or the soft prompt had taken the teacher in the end."""
    rows = [
        [name, *(shown(values(of_name, c), c) for c in TEACHER_COLUMNS)]
        for name, of_name in named.items()
        if "teacher_sampled_accuracy" in of_name[0]["end"]
    ]
    return table(["the teacher of", *TEACHER_COLUMNS.values()], rows)


def lines_table(lines: dict[str, dict[str, float]]) -> str:
    """What the plain teacher samples with each line."""
    columns = ["sampled_accuracy", "careful_share", "brief_share", "pupil_share"]
    header = ["line before the question", "right, sampled (%)", "careful (%)", "short (%)", "slips (%)"]
    rows = [[line or "none", *(number(found[c] * 100, c) for c in columns)] for line, found in lines.items()]
    return table(header, rows)


def tune_table(tuned: dict[str, list[dict]]) -> str:
    """The score of each learning rate."""
    rows = [
        [name.split(", ")[0], name.split(", ")[1], shown(values(of_name, SCORE), SCORE), str(len(of_name))]
        for name, of_name in tuned.items()
    ]
    return table(["method", "learning rate", NAMES[SCORE], "students"], rows)


GREEN = LIGHT.lines[2]
DRAWN = {
    "sampled_accuracy": f"right samples, points\n{HIGHER}",
    "reverse_kl_per_answer": f"KL(student || teacher),\nnats, {LOWER}",
    "forward_kl_per_answer": f"KL(teacher || student),\nnats, {LOWER}",
}


@plot_style()
def draw_methods(runs: Runs, path: Path) -> None:
    """What each method changed in an equal time: students as dots, means with their intervals."""
    named = compared(runs)
    names = ranked(named)[::-1]
    figure = new_figure(9, 0.45 * len(names) + 1.2)
    for axis, (measure, title) in zip(figure.subplots(1, len(DRAWN), sharey=True), DRAWN.items(), strict=True):
        axis.axvline(0, color=LIGHT.muted, linestyle=":")
        for place, name in enumerate(names):
            changes = np.subtract(values(named[name], measure), values(named[name], measure, "start"))
            mean, half, _ = mean_interval(changes)
            axis.plot(changes, [place] * len(changes), ".", color=color_of(name), alpha=0.35)
            axis.errorbar(mean, place, xerr=half, fmt="o", color=color_of(name), capsize=3)
        axis.set_yticks(range(len(names)), names)
        axis.grid(axis="x")
        axis.set_title(title)
    save_figure(figure, path)


@plot_style()
def draw_texts(runs: Runs, path: Path) -> None:
    """A line's gain for the teacher against its gain for the students: a mark for each student, and their mean."""
    plain = runs["main"]["GKD"]
    figure = new_figure(6, 4)
    axis = figure.subplots()
    axis.axhline(0, color=LIGHT.muted, linestyle=":")
    axis.axvline(0, color=LIGHT.muted, linestyle=":")
    some = texts(runs)
    for text, x, y in zip(some, *gains(runs, some), strict=True):
        of_students = np.subtract(*pairs(text.students, plain, SCORE))
        axis.plot([x] * len(of_students), of_students, ".", color=GREEN, alpha=0.35)
        axis.plot(x, y, "o", color=GREEN)
    axis.set_xlabel("the teacher's gain, points of right samples")
    axis.set_ylabel("the students' gain over plain GKD,\npoints of right samples")
    save_figure(figure, path)


def all_tables(runs: Runs) -> dict[str, str]:
    named = compared(runs)
    return {
        "methods": methods_table(named),
        "minus GKD": against_table(named, "GKD"),
        "minus PromptKD": against_table(named, "PromptKD"),
        "seen": seen_table(named, "GKD"),
        "lines": lines_table(teacher_lines(runs)["main"]),
        "teachers": teachers_table(named),
        "candidates": candidates_table(runs["explore"]),
        "share": candidates_table(runs["share"]),
        "texts": texts_table(runs),
        "modes": modes_table(runs),
        "tune": tune_table(runs["tune"]),
    }


# What the page's sentences say of the set-up: run.py, models.py, world.py, measure.py
SET_UP = [
    "27 apples . then ann buys 15 . then ann loses 8",
    "27 + 15 = 42 . 42 - 8 = 34 . so 34",
    "so 34",
    "1.0 M parameters",
    "70 % of the answers are careful, 15 % brief and 15 % a pupil's",
    "170,000 parameters",
    "SFT on 800 problems",
    "for 1,000 steps",
    "the 800 questions",
    "Batches have 16 rows",
    "learning rate is 0.01",
    "greedy answers to 1,000 of them",
    "samples at temperature 1 for 500",
    "95 % intervals",
    "below 0.05",
    "SmolLM2-135M-Instruct",
    "prompt lr 0.01",
    "for 60 steps",
    "budget of 0.2 nats",
    "at 0.2 nats per answer",
    "*beta 0.5* and *beta 0*",
    "`prompt_share=0.25`",
    "1 is the reverse KL, 0 the forward KL",
    "an R² of at least 0.5",
    "prompt lr 0* has",
    "on 40 training rows",
    "with two samples each, cut after 64 tokens",
]


def sentences(runs: Runs) -> list[str]:
    """Pieces of the page's sentences, worked out from the runs."""
    named = compared(runs)
    promptkd, gkd = (named[name][0] for name in ("PromptKD", "GKD"))
    text = difference(named["GKD, fixed text"], named["GKD"], SCORE)
    shared, kl = runs["share"], "reverse_kl_per_answer"
    part = [difference(shared[SHARE], shared["PromptKD"], measure) for measure in (SCORE, kl)]
    paper = [difference(shared["PromptKD"], shared["GKD"], measure) for measure in (SCORE, kl)]
    slips = values(named["PromptKD"], "teacher_pupil_share")
    modes = {name: shown_difference(over_modes(runs, name), SCORE) for name in by_mode(runs)["mixed"] if name != "GKD"}
    careful, mixed = (values(by_mode(runs)[mode]["GKD"], "accuracy", "start") for mode in ("careful", "mixed"))
    warm = shown_difference(paired_difference(careful, mixed), "accuracy")
    all_texts = texts(runs)
    slipping = paired_difference(*(of_writers_lines(all_texts, writer) for writer in ("pupil", "careful")))
    pupils = [text.teacher[SCORE] * 100 for text in all_texts if text.line in WRITERS["pupil"]]
    plain = " and ".join(f"{lines['']['pupil_share'] * 100:.1f}" for lines in teacher_lines(runs).values())
    return [
        f"from {min(map(len, named.values()))} students and two teachers",
        f"A fixed text** is worth {shown_difference(text, SCORE)} points of right samples over GKD",
        f"slip in {shown(slips, SCORE)} % of its samples, where the plain teachers have {plain} %",
        f"Over all eleven lines, R² is {held_out_r2(*gains(runs, all_texts)):.2f}",
        f"Without them, R² is {held_out_r2(*gains(runs, steps_shown(all_texts))):.2f}",
        f"its students had {shown_difference(slipping, SCORE)} points against those of the two careful lines",
        f"right in {pupils[1]:.1f} and {pupils[0]:.1f} % of its samples only",
        f"PromptKD had {modes['PromptKD']} points of right samples against GKD",
        f"With a prompt that never learns, it was {modes[FROZEN]}.",
        f"The pupil's text had {modes[GKD_PUPIL]} points against GKD, and the careful text {modes[GKD_CAREFUL]}.",
        f"had {warm} points of right greedy answers against mixed ones",
        f"so it has {steps(runs['modes'][FROZEN][0])} of them",
        f"Both kinds of PromptKD had {steps(shared['PromptKD'][0])} steps",
        f"changes {shown_difference(part[0], SCORE)} points of right samples and {shown_difference(part[1], kl)} nats",
        f"has {shown_difference(paper[0], SCORE)} points of right samples against GKD (p = {shown_p(paper[0].p)})",
        f"and {shown_difference(paper[1], kl)} nats of KL",
        f"the time of {steps(promptkd)} steps of PromptKD",
        f"it takes {steps(promptkd)} where GKD takes {steps(gkd)}",
    ]


def main() -> None:
    runs = Runs()
    page = DOCS / "study.md"
    fill(page, all_tables(runs))
    fill(page, real_tables(RealRuns()))
    draw_real(RealRuns(), DOCS / "images" / "plots" / "study_real.svg")
    draw_methods(runs, DOCS / "images" / "plots" / "study_methods.svg")
    draw_texts(runs, DOCS / "images" / "plots" / "study_texts.svg")
    for sentence in missing(page.read_text(), [*sentences(runs), *real_sentences(RealRuns())]):
        print(f"{page} does not say: {sentence}")


if __name__ == "__main__":
    main()
