"""What the documentation says of the tests is true of them."""

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
NAMED = re.findall(r"`(test_\w+\.py)::(\w+)`", (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("file", "name"), sorted(set(NAMED)))
def test_what_holds_a_promise_is_there(file, name):
    source = (ROOT / "tests" / file).read_text(encoding="utf-8")
    assert re.search(rf"^ *(def|class) {name}\b", source, re.MULTILINE), f"{file} has no {name}"


def test_promises_name_tests():
    assert len(NAMED) > 30
