"""What predictions must be, and which part of them counts, for all scores."""

from collections.abc import Sequence
from typing import Any

from ..data.rows import shortened


__all__ = ["check_rows", "without_thoughts"]


def check_rows(predictions: Any, references: Any) -> None:
    """Reject anything but two lists of the same length, the first of texts."""
    for name, rows in (("predictions", predictions), ("references", references)):
        if isinstance(rows, str) or not isinstance(rows, Sequence):
            raise TypeError(
                f"`{name}` is {shortened(rows)}, a {type(rows).__name__}; it must be a list with one entry per row."
            )
    if len(predictions) != len(references) or not predictions:
        raise ValueError(
            f"There are {len(predictions)} `predictions` and {len(references)} `references`. Give one of each per "
            "row, in one order, for at least one row."
        )
    for row, text in enumerate(predictions):
        if not isinstance(text, str):
            raise TypeError(
                f"`predictions[{row}]` is {shortened(text)}, a {type(text).__name__}; it must be a text. Decode token "
                "ids first."
            )


def without_thoughts(text: str) -> str:
    """A prediction without its `<think>...</think>` blocks.

    Text before a `</think>` that no `<think>` opens is a thought too: the chat template opened it in the prompt. So is
    the rest of a text whose `<think>` is never closed, as it was cut at `max_new_tokens`.
    """
    *closed, last = text.split("</think>")
    answer: list[str] = []
    for part in closed:
        before, opened, _ = part.partition("<think>")
        answer = [*answer, before] if opened else []
    return " ".join([*answer, last.partition("<think>")[0]])
