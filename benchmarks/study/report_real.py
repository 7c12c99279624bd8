"""Tables of the real model's runs, for `report.py`. Intervals and tests are over held-out rows: there is one seed."""

import json
from pathlib import Path
from statistics import fmean

from pages import number, shown_difference, table, with_holm
from study_statistics import Difference, paired_difference

from trl_promptkd.analysis.plot_style import HIGHER, LIGHT, LOWER, new_figure, plot_style, save_figure


RESULTS = Path(__file__).parent / "results_real.jsonl"
SET, START = "dolly", "*the start*"
COLUMNS = {
    "rougeL": "ROUGE-L",
    "gold_nll": "NLL of gold per answer",
    "reverse_kl": "KL(q || p) per answer",
    "forward_kl": "KL(p || q) per answer",
}


class RealRuns:
    """The lines of results_real.jsonl."""

    def __init__(self, path: Path = RESULTS):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        self.known = {line["record"]: line for line in lines if line["record"] != "run"}
        self.methods = {line["settings"]["method"]: line for line in lines if line["record"] == "run"}

    def students(self) -> dict[str, dict]:
        """The warm student, and each method's; what was measured of them on every set."""
        trained = {name: line["measures"] for name, line in self.methods.items()}
        return {START: self.known["warm student"]["measures"], **trained}

    def difference(self, name: str, other: str, measure: str) -> Difference:
        """Of the values of the same rows."""
        students = self.students()
        return paired_difference(*(students[one][SET][measure]["rows"] for one in (name, other)))


def measure_name(measure: str) -> str:
    """For the number of digits."""
    return "accuracy" if measure == "rougeL" else f"{measure}_per_answer"


def real_table(runs: RealRuns) -> str:
    """What each student is like on Dolly's held-out rows."""
    rows = []
    for name, sets in {"*the teacher*": runs.known["teacher"]["measures"], **runs.students()}.items():
        of = sets[SET]
        cells = [number(fmean(of[one]["rows"]), measure_name(one)) if one in of else "" for one in COLUMNS]
        cells.append(f"{of['reverse_kl']['per_token']:.2f}" if "reverse_kl" in of else "")
        line = runs.methods.get(name)
        seconds = f"{sum(line['seconds'].values()):,.0f}" if line else ""
        rows.append([name, *cells, f"{of['mean_length']:.0f}", f"{100 * of['ended']:.0f}", seconds])
    header = [
        "method",
        *COLUMNS.values(),
        "KL(q || p) per token",
        "mean length",
        "ended by itself (%)",
        "seconds of a core",
    ]
    return table(header, rows)


def real_against_table(runs: RealRuns, other: str) -> str:
    """Differences on the same rows; bold after Holm's correction over the whole table."""
    names = [name for name in runs.methods if name != other]
    found = [[(measure_name(one), runs.difference(name, other, one)) for one in COLUMNS] for name in names]
    rows = [[name, *cells] for name, cells in zip(names, with_holm(found), strict=True)]
    return table([f"minus {other}", *COLUMNS.values()], rows)


def real_texts_table(runs: RealRuns) -> str:
    """What ordinary instructions did to the teacher's ROUGE-L on training rows."""
    known = runs.known["texts"]
    rows = [
        [one["text"].strip(), one["placement"], _with_half(one["rougeL"]), _with_half(one["minus_plain"], "+")]
        for one in known["texts"]
    ]
    rows.append(["none", "", _with_half(known["plain"]), ""])
    return table(["text", "placement", "ROUGE-L of the teacher", "minus none"], rows)


BLUE, ORANGE, GREEN = LIGHT.lines[:3]
DRAWN = {
    "rougeL": f"ROUGE-L, points\n{HIGHER}",
    "gold_nll": f"NLL of gold answers,\nnats, {LOWER}",
    "forward_kl": f"KL(teacher || student),\nnats, {LOWER}",
}


def color_of(name: str) -> str:
    return ORANGE if "PromptKD" in name else GREEN if "fixed text" in name else BLUE


@plot_style()
def draw_real(runs: RealRuns, path: Path) -> None:
    """What each method changed: means over held-out rows with their intervals."""
    names = sorted(runs.methods, key=lambda name: runs.difference(name, START, "rougeL").mean)
    figure = new_figure(9, 0.45 * len(names) + 1.2)
    for axis, (measure, title) in zip(figure.subplots(1, len(DRAWN), sharey=True), DRAWN.items(), strict=True):
        axis.axvline(0, color=LIGHT.muted, linestyle=":")
        for place, name in enumerate(names):
            found = runs.difference(name, START, measure)
            axis.errorbar(found.mean, place, xerr=found.half, fmt="o", color=color_of(name), capsize=3)
        axis.set_yticks(range(len(names)), names)
        axis.grid(axis="x")
        axis.set_title(title)
    save_figure(figure, path)


def real_tables(runs: RealRuns) -> dict[str, str]:
    return {
        "real": real_table(runs),
        "real minus GKD": real_against_table(runs, "GKD"),
        "real texts": real_texts_table(runs),
    }


def _with_half(found: list[float], sign: str = "") -> str:
    return f"{found[0]:{sign}.1f} ± {found[1]:.1f}"


def real_sentences(runs: RealRuns) -> list[str]:
    """Pieces of the page's sentences, worked out from the runs."""

    def gap(name: str, measure: str, other: str = "GKD") -> str:
        return shown_difference(runs.difference(name, other, measure), measure_name(measure))

    text, prompt, teacher = "GKD, fixed text", "PromptKD", runs.known["teacher"]["measures"]
    ended = {name: f"{100 * sets[SET]['ended']:.0f} %" for name, sets in runs.students().items()}
    seconds = {name: f"{line['seconds']['training']:,.0f}" for name, line in runs.methods.items()}
    settings = runs.methods["GKD"]["settings"]
    return [
        f"Then each method had {settings['steps']} steps. All steps have {settings['batch']} rows.",
        f"{settings['student_layers']} of its 30 layers, and SFT on Dolly warmed it up for "
        f"{runs.known['warm student']['curves']['student'][-1]['step']} steps",
        f"Measured on {settings['rows']} held-out rows of Dolly",
        f"had {gap(text, 'rougeL')} points of ROUGE-L and {gap(text, 'gold_nll')} nats of NLL per gold answer against",
        f"ends {ended[text]} of its answers by itself, and GKD's {ended['GKD']}",
        f"To choose the text took {runs.known['texts']['seconds']:.0f} s more",
        f"{gap(prompt, 'rougeL')} points of ROUGE-L and {gap(prompt, 'gold_nll')} nats of NLL",
        f"It had {gap('SFT', 'rougeL')} points of ROUGE-L against GKD",
        f"with {gap('SeqKD', 'forward_kl')} nats of KL(p || q) per answer against GKD, in less",
        f"had {gap('SeqKD then GKD, fixed text', 'gold_nll')} nats of NLL per gold answer against GKD alone",
        f"took {seconds[prompt]} s, where GKD took {seconds['GKD']}",
        f"ROUGE-L was {runs.students()[START][SET]['rougeL']['mean']:.1f}, and its teacher's "
        f"{teacher[SET]['rougeL']['mean']:.1f}",
        f"GKD changed it by {gap('GKD', 'rougeL', START)} points",
    ]
