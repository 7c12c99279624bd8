"""A page of results: tables in their places, and sentences that the results account for."""

import re
from collections.abc import Iterable
from pathlib import Path


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
