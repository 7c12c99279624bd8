"""The ranges of versions that `pyproject.toml` states are those that pages and tools go by."""

import importlib.metadata
import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from paths import ROOT


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
REQUIRED = {r.name: str(r.specifier) for r in map(Requirement, PROJECT["project"]["dependencies"])}
EXTRAS = PROJECT["project"]["optional-dependencies"]
INSTALL = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
OLDEST_PYTHON = re.fullmatch(r">=3\.(\d+)", PROJECT["project"]["requires-python"])[1]


class TestPages:
    @pytest.mark.parametrize("page", ["README.md", "docs/install.md"])
    def test_python(self, page):
        named = re.findall(r"Python 3\.(\d+) or newer", (ROOT / page).read_text(encoding="utf-8"))
        assert set(named) == {OLDEST_PYTHON}

    def test_packages(self):
        table = dict(re.findall(r"^\| (\S+) \| `([^`]*)` \|", INSTALL, re.M))
        bounded = {name for name, specifier in REQUIRED.items() if "<" in specifier} | {"torch"}
        assert table.keys() == bounded
        for name in bounded:
            assert set(table[name].split(",")) == set(REQUIRED[name].split(",")), name

    def test_vllm(self):
        (vllm,) = map(Requirement, EXTRAS["vllm"])
        assert set(re.search(r"vLLM `([^`]*)`", INSTALL)[1].split(",")) == set(str(vllm.specifier).split(","))

    def test_extras(self):
        assert set(re.findall(r'`pip install "\.\[(\w+)\]"`', INSTALL)) == EXTRAS.keys() - {"demo"}  # for the scripts


@pytest.mark.parametrize("name", REQUIRED)
def test_what_is_installed_is_in_the_range(name):
    assert SpecifierSet(REQUIRED[name]).contains(importlib.metadata.version(name))


class TestTools:
    def test_they_go_by_the_oldest_python(self):
        assert PROJECT["tool"]["ruff"]["target-version"] == f"py3{OLDEST_PYTHON}"
        assert PROJECT["tool"]["mypy"]["python_version"] == f"3.{OLDEST_PYTHON}"
