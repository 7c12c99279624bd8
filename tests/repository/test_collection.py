"""That pytest finds the tests that stand here."""

import ast

import pytest
from paths import ROOT


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("test_*.py")), ids=lambda path: path.stem)
def test_no_decorator_hides_a_class_of_tests(path):
    """`torch.no_grad()` makes a function of a class, and pytest then finds none of its tests."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            hiding = [ast.unparse(decorator) for decorator in node.decorator_list]
            assert all(name.startswith("pytest.mark.") for name in hiding), f"{node.name} is behind {hiding}"
