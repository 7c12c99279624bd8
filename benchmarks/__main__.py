"""Runs a benchmark and keeps its result: `python -m benchmarks NAME [flags]`.

A benchmark is a module in this folder. The first line of its docstring describes it in the list. It has these names:

- `PAGE`: the page of docs/ that has its tables.
- `add_arguments(parser)`: adds its flags.
- `measure(args)`: returns its result, for JSON.
- `tables(result)`: returns Markdown by name, each for a place `<!-- table: NAME name -->` of its page. It includes the
  sentences with figures.
- `sentences(result)`: if other files have such sentences, returns what each must say, word for word.
- `draw(result, path)`: if there is a plot, draws docs/images/plots/NAME.svg.
- `failed(result)`: if it is a check, returns whether the exit code is 1.

`python -m benchmarks pages` writes tables and plots again from all kept results.
"""

import argparse
import ast
import importlib
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CI", "1")  # nobody is asked anything

HERE = Path(__file__).parent
DOCS, RESULTS = HERE.parent / "docs", HERE / "results"
NAMES = (
    "step-time",
    "divergence-memory",
    "scaling",
    "padding-free",
    "memory-table",
    "teacher-cache",
    "cache-students",
    "cache-memory",
    "teacher-server",
    "gpu-check",
)


def load(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.{name.replace('-', '_')}")


def first_line(name: str) -> str:
    """The first line of a module's docstring, without importing the module."""
    tree = ast.parse((HERE / f"{name.replace('-', '_')}.py").read_text(encoding="utf-8"))
    return (ast.get_docstring(tree) or "").splitlines()[0]


def make_parser() -> argparse.ArgumentParser:
    lines = [f"  {name:18} {first_line(name)}" for name in NAMES]
    lines.append(f"  {'pages':18} Writes tables and plots of docs/ from benchmarks/results.")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures time and memory. `NAME --help` lists a benchmark's flags.\n\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", choices=[*NAMES, "pages"], help="one of the names above")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="flags of the benchmark")
    return parser


def parse(flags: list[str] | None = None) -> tuple[ModuleType | None, argparse.Namespace]:
    """The benchmark and its settings. The benchmark is `None` for `pages`."""
    given = make_parser().parse_args(flags)
    module = None if given.name == "pages" else load(given.name)
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {given.name}",
        description=module and module.__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    if module is not None:
        module.add_arguments(parser)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        parser.add_argument("--threads", type=int, default=cores, help="threads of a computation on the CPU")
        parser.add_argument(
            "--output", type=Path, help="result file. By default benchmarks/results/NAME.json (NAME-cuda on a GPU)"
        )
    return module, parser.parse_args(given.flags, argparse.Namespace(name=given.name))


def run(module: ModuleType, args: argparse.Namespace) -> dict[str, Any]:
    """Measure, save the result, and print its tables."""
    import torch
    from rich.console import Console
    from rich.markdown import Markdown

    from benchmarks.common import machine

    torch.set_num_threads(args.threads)
    suffix = "-cuda" if torch.cuda.is_available() else ""
    output = args.output or RESULTS / f"{args.name}{suffix}.json"
    settings = {
        key: Path(value).name
        if isinstance(value, str) and Path(value).exists()
        else value  # no folders of this machine
        for key, value in vars(args).items()
        if key not in ("name", "output")
    }
    result = {"benchmark": args.name, "settings": settings, "machine": machine(), **module.measure(args)}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for table in module.tables(result).values():
        Console().print(Markdown(table))
    print(f"\n{output}")
    return result


def kept_results() -> dict[str, dict[str, Any]]:
    """Results by the names of their files."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}


def tables_of(name: str, result: dict[str, Any]) -> dict[str, str]:
    """Tables by the names of their places on the page."""
    return {f"{name} {part}": table for part, table in load(result["benchmark"]).tables(result).items()}


def sentences_of_all() -> dict[str, list[str]]:
    """Required sentences by file."""
    found: dict[str, list[str]] = {}
    for result in kept_results().values():
        module = load(result["benchmark"])
        for file, sentences in module.sentences(result).items() if hasattr(module, "sentences") else ():
            found.setdefault(file, []).extend(sentences)
    return found


def write_pages() -> None:
    """Put tables into their places, draw plots, and print sentences that are missing in files."""
    from benchmarks.study.page_text import fill, missing

    for name, result in kept_results().items():
        module = load(result["benchmark"])
        page = DOCS / module.PAGE
        fill(page, tables_of(name, result))
        if hasattr(module, "draw"):
            module.draw(result, DOCS / "images" / "plots" / f"{name.replace('-', '_')}.svg")
    for file, sentences in sentences_of_all().items():
        for sentence in missing((HERE.parent / file).read_text(encoding="utf-8"), sentences):
            print(f"{file} does not say: {sentence}")


def main(flags: list[str] | None = None) -> None:
    module, args = parse(flags)
    if module is None:
        write_pages()
        return
    result = run(module, args)
    if hasattr(module, "failed") and module.failed(result):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
