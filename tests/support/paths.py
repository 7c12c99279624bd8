"""Folders of the repository, and its scripts as modules."""

import importlib.util
from pathlib import Path
from types import ModuleType


ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "tests" / "scripts"
SUPPORT = ROOT / "tests" / "support"


def load_module(path: str) -> ModuleType:
    """A file of the repository that is not to be found on the path."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
