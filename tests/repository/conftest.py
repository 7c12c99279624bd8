import importlib
import sys

import pytest
from paths import ROOT


@pytest.fixture(scope="module")
def study():
    """Import a module of the study, whose scripts import each other by their bare names."""
    folder = str(ROOT / "benchmarks" / "study")
    known = set(sys.modules)
    sys.path.insert(0, folder)
    yield importlib.import_module
    sys.path.remove(folder)
    for name in set(sys.modules) - known:
        if folder in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture(scope="module")
def pages(study):
    pytest.importorskip("scipy")
    return study("pages")
