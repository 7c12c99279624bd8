"""A study's page: tables in their places, numbers as they are written, and sentences that the runs account for."""

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from study_statistics import Difference, mean_interval

from trl_promptkd.intervals import holm


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
    """Differences of a whole table; bold are those with p < 0.05 after Holm's correction over all of them."""
    corrected = iter(holm([found.p for row in rows for _, found in row]))
    return [
        [
            f"**{shown_difference(found, measure)}**" if next(corrected) < 0.05 else shown_difference(found, measure)
            for measure, found in row
        ]
        for row in rows
    ]


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(f"| {line} |" for line in lines)


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


def prose(page: str) -> str:
    """A page without code blocks, drawn tables, comments, and addresses of links, on one line."""
    page = re.sub(r"```.*?```|<!-- table.*?<!-- end -->|<!--.*?-->", "", page, flags=re.DOTALL)
    page = re.sub(r"^(?:> )?(?:\d\.|-) |^>|(?<=\])\([^)]*\)", "", page, flags=re.MULTILINE)
    return " ".join(page.split())


def missing(page: str, sentences: Iterable[str]) -> list[str]:
    """Those that the page does not say."""
    text = prose(page)
    return [sentence for sentence in sentences if sentence not in text]


def unaccounted(page: str, known: Iterable[str]) -> str:
    """What is left of the page's prose around digits that nothing `known` accounts for."""
    text = prose(page)
    for piece in sorted(known, key=len, reverse=True):
        text = text.replace(piece, "…")
    return " | ".join(re.findall(r".{0,40}\d.{0,40}", text))
