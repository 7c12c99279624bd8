"""What users get wrong, and the errors they get: the cases of test_bad_inputs.py. docs/errors.md is written from them:

make errors
"""

import os


os.environ.setdefault("CI", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import contextlib
import re
import sys
import tempfile
from pathlib import Path

import bad_arguments
import bad_commands
import bad_files
import bad_models
import bad_rows
import bad_settings
import bad_teachers
from case import Case
from paths import ROOT


GROUPS = {
    "Settings": bad_settings.CASES,
    "Arguments": bad_arguments.CASES,
    "Data": bad_rows.CASES,
    "Several teachers": bad_teachers.CASES,
    "Models": bad_models.CASES,
    "Files": bad_files.CASES,
    "Commands": bad_commands.CASES,
}
CASES = {case.name: case for cases in GROUPS.values() for case in cases}
PAGE = ROOT / "docs" / "errors.md"
HEAD = """---
search:
  boost: 0.3
---

# Errors

The messages that you may read, and what leads to each. This page has {number} bad inputs, and every one of them is
tested. Inputs whose messages differ only in the field share a row, which shows the first one's message.

All but {late} of the messages come before weights are loaded.

<div data-filter="a field, or words of the message"></div>
"""
# A field at the start of a message, and its value. Rows that differ in nothing else are one
_FIELD = re.compile(r"^(`\w+`|exit code 2: trl-promptkd): `[\w-]+` is ('[^']*'|[^\s,:;]+)(, an? \w+)?(?=[;:,])")


def kind(cell: str) -> str:
    """What inputs of one row have in common."""
    return _FIELD.sub(r"\1: FIELD is VALUE", cell)


def page(cells: dict[str, str]) -> str:
    """docs/errors.md, from what is read in each case, by the case's name."""
    parts = [HEAD.format(number=len(CASES), late=sum(case.needs_weights for case in CASES.values()))]
    for title, cases in GROUPS.items():
        rows: dict[str, list[Case]] = {}
        for case in cases:
            rows.setdefault(kind(cells[case.name]), []).append(case)
        table = [f"| {'<br>'.join(case.does for case in alike)} | {cells[alike[0].name]} |" for alike in rows.values()]
        parts.append("\n".join([f"## {title}\n", "| what you do | what you read |", "| --- | --- |", *table, ""]))
    return "\n".join(parts)


def cells_of(text: str) -> dict[str, str]:
    """What the page says is read, by the name of the case. Of inputs that share a row it is the first one's."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| what", "| ---"))]
    rows = [re.split(r"(?<!\\) \| ", line[2:-2], maxsplit=1) for line in lines]
    shown = {does: cell for left, cell in rows for does in left.split("<br>")}
    return {name: shown[case.does] for name, case in CASES.items() if case.does in shown}


def write_page() -> None:
    cells = {}
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            cells[name] = case.cell(case.message(Path(folder)))
    PAGE.write_text(page(cells), encoding="utf-8")


if __name__ == "__main__":
    write_page()
