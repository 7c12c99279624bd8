"""Imports of the package go down one list of layers only, as CONTRIBUTING draws them."""

import ast
from pathlib import Path

import pytest

import trl_promptkd


PACKAGE = Path(trl_promptkd.__file__).parent
LAYERS = [
    {"_trl", "divergences", "files", "field_checks", "intervals"},
    {"data"},
    {"models"},
    {"losses", "generation"},
    {"metrics"},
    {"evaluation", "teacher_cache"},
    {"trainer"},
    {"analysis", "doctor"},
    {"cli"},
]
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem != "__init__")


def name_of(path: Path) -> str:
    """The dotted name below the package; a folder's `__init__` has the folder's."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_by(path: Path) -> set[str]:
    """Dotted names below the package that a module imports, also inside functions."""
    folder = path.relative_to(PACKAGE).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = folder[: len(folder) - node.level + 1]
            module = [*above, *(node.module.split(".") if node.module else [])]
            modules = {alias.name for alias in node.names if PACKAGE.joinpath(*module, f"{alias.name}.py").is_file()}
            found |= {".".join([*module, name]) for name in modules}
            if len(modules) < len(node.names):
                found.add(".".join(module))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trl_promptkd"):
            found.add(node.module.removeprefix("trl_promptkd").lstrip("."))
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("trl_promptkd.")]
            found |= {name.removeprefix("trl_promptkd.") for name in names}
    return found


def layer_of(name: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if name.split(".")[0] in layer)


def test_every_module_has_a_layer():
    there = {name_of(path).split(".")[0] for path in MODULES}
    assert there == set().union(*LAYERS)
    assert len(list(PACKAGE.glob("*.py"))) <= 6


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_down(path):
    own = name_of(path)
    for name in imported_by(path) - {""}:
        same_part = name.split(".")[0] == own.split(".")[0]
        assert same_part or layer_of(name) < layer_of(own), f"{own} imports {name}"
    # `__version__` is all that the package itself is asked for
    assert "" not in imported_by(path) or "__version__" in path.read_text(encoding="utf-8")


def test_there_is_no_cycle():
    files = {name_of(path): path for path in MODULES}
    waiting = {name: {other for other in imported_by(path) if other in files} for name, path in files.items()}
    for name, needed in waiting.items():
        needed.discard(name)
        # A module of a folder imports its siblings, not the folder. `python -m` and `evaluate` start from there
        starts = name.endswith(".__main__") or ".modules." in name
        assert name.split(".")[0] not in needed or "." not in name or starts, f"{name} imports its own folder"
    while waiting:
        free = [name for name, needed in waiting.items() if not needed & waiting.keys()]
        assert free, f"a cycle among {sorted(waiting)}"
        for name in free:
            del waiting[name]
