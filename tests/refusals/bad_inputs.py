"""What users get wrong, and the errors they get: the cases of test_bad_inputs.py. docs/errors.md is written from them:

make errors
"""

import os


os.environ.setdefault("CI", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import contextlib
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
HEAD = """# Errors

What goes wrong most easily, and what you then read: {number} inputs, each of them a case in
`tests/refusals/`, whose tests also keep this page true. It is written by `make errors`.

All but {late} of them come before weights are loaded, which those need to be seen.
"""


def page(rows: dict[str, str]) -> str:
    """docs/errors.md, from each case's row by its name."""
    parts = [HEAD.format(number=len(CASES), late=sum(case.needs_weights for case in CASES.values()))]
    for title, cases in GROUPS.items():
        table = [rows[case.name] for case in cases]
        parts.append("\n".join([f"## {title}\n", "| what you do | what you read |", "| --- | --- |", *table, ""]))
    return "\n".join(parts)


def write_page() -> None:
    rows = {}
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            rows[name] = case.row(case.message(Path(folder)))
    PAGE.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    write_page()
