"""docs/recipes.md names every recipe, and no other."""

import re

from paths import ROOT


ROOT = ROOT


def test_every_recipe_is_named_and_started():
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    started = set(re.findall(r"--config examples/configs/([\w.]+\.yaml)", page))
    assert started == {path.name for path in (ROOT / "examples" / "configs").glob("*.yaml")}
