"""Scores of answers to a data set: the metrics of its task, over all rows or row by row."""

from collections.abc import Sequence
from typing import Any

from ..metrics import RULES, gsm8k_row_scores, instruction_row_scores


__all__ = ["TASKS", "row_scores"]

TASKS = ("instruct", "gsm8k")


def row_scores(task: str, answers: Sequence[str], references: Sequence[Sequence[Any]]) -> dict[str, list[float]]:
    """The task's metrics of each row in percent: `rougeL` and `exact_match`, or `strict`, `flexible` and `paper`."""
    if task == "instruct":
        found = instruction_row_scores(answers, references)
        return {name: [row[name] for row in found] for name in ("rougeL", "exact_match")}
    # An answer is right if any of its row's right answers is
    owners = [row for row in range(len(answers)) for _ in references[row]]
    correct = {rule: [0.0] * len(answers) for rule in RULES}
    scores = gsm8k_row_scores([answers[row] for row in owners], [right for row in references for right in row])
    for row, score in zip(owners, scores, strict=True):
        for rule in RULES:
            correct[rule][row] = max(correct[rule][row], 100.0 * score[rule])
    return correct
