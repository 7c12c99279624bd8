"""What answers to a data set are worth: the metrics of its task, of all rows or row by row."""

from collections.abc import Sequence
from typing import Any

from ..metrics import gsm8k_accuracy, gsm8k_row_scores, instruction_row_scores, instruction_scores


__all__ = ["TASKS", "row_scores", "score_answers"]

TASKS = ("instruct", "gsm8k")


def score_answers(task: str, answers: Sequence[str], references: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """The task's metrics: `rougeL` and `exact_match`, or `accuracy` and `rules`."""
    if task == "instruct":
        return dict(instruction_scores(answers, references))
    return gsm8k_accuracy(answers, _nearest_numbers(answers, references))


def row_scores(task: str, answers: Sequence[str], references: Sequence[Sequence[Any]]) -> dict[str, list[float]]:
    """The task's metrics of each row in percent, whose means are those of [`score_answers`]: `rougeL` and `exact_match`, or `accuracy`."""
    if task == "instruct":
        found = instruction_row_scores(answers, references)
        return {name: [row[name] for row in found] for name in ("rougeL", "exact_match")}
    rows = gsm8k_row_scores(answers, _nearest_numbers(answers, references))
    return {"accuracy": [100.0 * row["correct"] for row in rows]}


def _nearest_numbers(answers: Sequence[str], references: Sequence[Sequence[float]]) -> list[float]:
    """Of each row's right numbers the one nearest to its answer: it is right if any of them is."""
    first = [numbers[0] for numbers in references]
    if all(len(numbers) == 1 for numbers in references):
        return first
    found = [row["value"] for row in gsm8k_row_scores(answers, first)]
    return [
        numbers[0] if value is None else min(numbers, key=lambda number: abs(number - value))
        for numbers, value in zip(references, found, strict=True)
    ]
