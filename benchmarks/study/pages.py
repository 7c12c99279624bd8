"""A study's page: numbers as they are written, beside what `page_text.py` does for every page."""

import math
from collections.abc import Sequence
from pathlib import Path

from page_text import fill, missing, prose, table, unaccounted
from study_statistics import Difference, mean_interval

from trl_promptkd.intervals import holm


__all__ = [
    "DOCS",
    "digits",
    "fill",
    "is_percent",
    "missing",
    "number",
    "prose",
    "shown",
    "shown_difference",
    "shown_p",
    "table",
    "unaccounted",
    "with_holm",
]

DOCS = Path(__file__).parent.parent.parent / "docs"


def is_percent(measure: str) -> bool:
    """Whether it is a share of 1 in the runs, and percent on the page."""
    return measure.endswith(("accuracy", "_share"))


def digits(measure: str) -> int:
    return 1 if is_percent(measure) else 2 if measure.endswith("_answer") else 3


def number(mean: float, measure: str, sign: str = "") -> str:
    text = f"{mean:{sign}.{digits(measure)}f}"
    return f"{0:{sign}.{digits(measure)}f}" if float(text) == 0 else text  # no "-0.0"


def shown(some: Sequence[float], measure: str) -> str:
    """Mean ± half the width of its interval."""
    mean, half, num = mean_interval(some)
    return number(mean, measure) + (f" ± {half:.{digits(measure)}f}" if num > 1 else "")


def shown_difference(found: Difference, measure: str) -> str:
    mean = number(found.mean, measure, "+")
    return mean if math.isnan(found.half) else f"{mean} ± {found.half:.{digits(measure)}f}"


def shown_p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def with_holm(rows: list[list[tuple[str, Difference]]]) -> list[list[str]]:
    """Differences of a whole table. Those with p < 0.05 after Holm's correction over all of them are bold."""
    corrected = iter(holm([found.p for row in rows for _, found in row]))
    return [
        [
            f"**{shown_difference(found, measure)}**" if next(corrected) < 0.05 else shown_difference(found, measure)
            for measure, found in row
        ]
        for row in rows
    ]
