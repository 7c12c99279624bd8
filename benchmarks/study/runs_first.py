"""The runs of the first study as tables, figures and sentences read them, and how a number is written.

They were made by the scripts of commit 114aca1, which have the same names of groups, methods and settings.
"""

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from pages import is_percent
from study_statistics import Difference, paired_difference


HERE = Path(__file__).parent
RESULTS, REAL_RESULTS = HERE / "results_first.jsonl", HERE / "results_real_first.json"
STEPS, HALF, SECONDS = 200, 100, 30.0  # methods are compared at equal steps and at equal seconds of one core
METHODS = ["SFT", "KD, forward", "KD, reverse", "SeqKD", "GKD", "PromptKD"]
WARNING = 0.3  # of KL(q || p): the share at which the trainer warned
NAMES = {
    "accuracy": "right, greedy (%)",
    "sampled_accuracy": "right, sampled (%)",
    "reverse_kl": "KL(q || p) per token",
    "reverse_kl_answer": "KL(q || p) per answer",
    "forward_kl": "KL(p || q) per token",
    "student_entropy": "entropy of q",
    "brief_share": "short answers (%)",
}
REAL_NAMES = {
    "teacher": "the teacher",
    "warm": "*the start*",
    "sft": "SFT",
    "gkd": "GKD",
    "promptkd": "PromptKD",
    "promptkd_lr1e-3": "PromptKD, prompt lr x 10",
    "promptkd_lr1e-2": "PromptKD, prompt lr x 100",
}


class Results:
    """The runs by group and name, each a list with one entry a seed."""

    def __init__(self, path: Path = RESULTS):
        self.groups: dict[str, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
        for line in path.read_text().splitlines():
            run = json.loads(line)
            self.groups[run["group"]][run["name"]].append(run)
        # The same runs: PromptKD with the paper's settings
        self.groups["ablations"] = {"paper": self.groups["finite"]["PromptKD"], **self.groups["ablations"]}

    def __getitem__(self, group: str) -> dict[str, list[dict]]:
        return self.groups[group]

    def promptkd(self) -> list[dict]:
        """Every run of PromptKD once."""
        named = [(group, run) for group, names in self.groups.items() for runs in names.values() for run in runs]
        return [
            run
            for group, run in named
            if run.get("settings", {}).get("method") == "promptkd" and run["group"] == group  # not "paper" again
        ]


def value(entry: dict, measure: str) -> float:
    """A measure of one student, with shares in percent.

    `..._answer` is the measure per token times the mean length of the samples that it was measured on. That is the
    mean over answers.
    """
    if measure.endswith("_answer"):
        return entry[measure.removesuffix("_answer")] * entry["mean_length"]
    return entry[measure] * (100 if is_percent(measure) else 1)


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
    return value(entry, measure)


def values(runs: Iterable[dict], when: str, measure: str) -> list[float]:
    return [at(run, when, measure) for run in runs]


def pairs(runs: list[dict], others: list[dict], when: str, measure: str) -> tuple[list[float], list[float]]:
    """The values of both, in the order of the seeds that both have."""
    mine, theirs = ({run["settings"]["seed"]: at(run, when, measure) for run in some} for some in (runs, others))
    shared = sorted(mine.keys() & theirs.keys())
    return [mine[seed] for seed in shared], [theirs[seed] for seed in shared]


def difference(runs: list[dict], others: list[dict], when: str, measure: str) -> Difference:
    return paired_difference(*pairs(runs, others, when, measure))


def gain_share(run: dict) -> float:
    """Of KL(q || p) at a run's end, what the prompt takes away: 1 - KL(q || pP) / KL(q || p)."""
    return 1 - at(run, "end", "reverse_kl_prompted") / at(run, "end", "reverse_kl")


def both_shares(log: list[dict]) -> list[float]:
    """Of each log entry, the smaller of prompt gain and KL(pP || p), as shares of KL(q || p). The trainer warns by
    it."""
    return [
        min(entry["kl/prompt_gain"], entry["kl/prompted_plain"]) / entry["kl/student_plain"]
        for entry in log
        if "kl/prompt_gain" in entry
    ]


def starts_from_text(run: dict) -> bool:
    return run["settings"]["prompt"].get("prompt_init", "text") == "text"
