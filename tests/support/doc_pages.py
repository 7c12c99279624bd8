"""The code blocks of the documentation's pages."""

import re
import textwrap
from typing import NamedTuple


class Block(NamedTuple):
    language: str
    line: int  # its first, from 0
    text: str
    not_run: str | None  # why


def blocks_of(page: str) -> list[Block]:
    """The code blocks of a page's text, in their order."""
    lines = page.splitlines()
    found, start = [], None
    for number, line in enumerate(lines):
        if start is None and (opened := re.match(r"( *)```(\w*)", line)):
            start, indent, language = number, opened[1], opened[2]
        elif start is not None and line == indent + "```":
            reason = re.fullmatch(r"\s*<!-- not run:(.*)-->\s*", lines[start - 1]) if start else None
            text = textwrap.dedent("\n".join(lines[start + 1 : number]))
            found.append(Block(language, start + 1, text, reason and reason[1].strip()))
            start = None
    assert start is None, "there is a block that does not end"
    return found
