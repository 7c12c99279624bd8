"""Folders of the repository."""

from pathlib import Path


ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "tests" / "scripts"
SUPPORT = ROOT / "tests" / "support"
