"""What predictions and references must be, whatever scores them."""

from collections.abc import Sequence
from typing import Any

from ..data.rows import shortened


__all__ = ["check_rows"]


def check_rows(predictions: Any, references: Any) -> None:
    """Reject anything but two lists of the same length, the first of texts."""
    for name, rows in (("predictions", predictions), ("references", references)):
        if isinstance(rows, str) or not isinstance(rows, Sequence):
            raise TypeError(
                f"`{name}` is {shortened(rows)}, a {type(rows).__name__}; it must be a list with one entry per row."
            )
    if len(predictions) != len(references) or not predictions:
        raise ValueError(
            f"There are {len(predictions)} `predictions` and {len(references)} `references`. Give one of each per row, in one "
            "order, for at least one row."
        )
    for row, text in enumerate(predictions):
        if not isinstance(text, str):
            raise TypeError(
                f"`predictions[{row}]` is {shortened(text)}, a {type(text).__name__}; it must be a text. Decode token ids "
                "first."
            )
