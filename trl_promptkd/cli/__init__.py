"""The command `trl-promptkd`. A tool's module is imported only when the tool is named. `--help` and a typo therefore
load neither torch nor transformers."""

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from .. import __version__


__all__ = ["main", "parse_args"]

# A training command's name -> what it is for. Its module has `parse`, as its flags are TRL's
_TRAININGS = {
    "promptkd": "train a student with a prompted teacher (PromptKD)",
    "primed": "train a student with a primed teacher (response priming)",
}
# A tool's name -> what it is for. Its module has `add_arguments`, which says what to run
_TOOLS = {
    "quickstart": "PromptKD on a real model that comes in a wheel, in minutes on two CPU cores",
    "doctor": "check models and rows for faults that raise no error (exit code 1 if a check fails)",
    "cache": "the offline teacher",
    "eval": "generate a model's answers and score them",
    "rank-priming": "run a teacher with each of several priming texts, score its answers, and rank the texts",
    "report": "a run on one HTML page: both KLs, samples, settings, and what looks wrong",
}
_ANALYSES = {
    "exposure": "how much faster a student's errors add up on its own prefixes than on its teacher's (ExAccErr)",
    "prompt": "what a soft prompt has become, and what it does to the teacher",
    "attention": "where several models attend, layer by layer, and the heads in which they differ most",
}


def parse_args(argv: Sequence[str], launch: bool = False) -> argparse.Namespace:
    """The arguments of a command. Their `run` is the function that takes them and returns an exit code.

    Args:
        launch: Whether a training command may start processes.
    """
    # It warns of a kernel that this package does not use
    logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)  # TRL's and transformers', on their own names
    if argv and argv[0] in _TRAININGS:
        return import_module(f".{argv[0]}", __name__).parse(argv[1:], launch)
    return make_parser([word for word in argv if not word.startswith("-")][:2]).parse_args(argv)


def make_parser(named: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser of the command.

    Args:
        named: The words of the tool that is called, such as `["analyze", "prompt"]`. Only its flags are added.
    """
    parser = argparse.ArgumentParser(prog="trl-promptkd", description="Training and tools of trl_promptkd.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    tools = parser.add_subparsers(dest="command", required=True)
    for name, text in _TRAININGS.items():
        tools.add_parser(name, help=text)
    for name, text in _TOOLS.items():
        _add(tools, name, text, name.replace("-", "_"), named[:1])
    analyze = tools.add_parser("analyze", help="measure what students, teachers and soft prompts do on your rows")
    analyses = analyze.add_subparsers(dest="analysis", required=True)
    for name, text in _ANALYSES.items():
        _add(analyses, name, text, f"analyze_{name}", named[1:] if named[:1] == ["analyze"] else [])
    return parser


def _add(tools: Any, name: str, text: str, module: str, named: Sequence[str]) -> None:
    parser = tools.add_parser(name, help=text)
    if list(named) == [name]:
        import_module(f".{module}", __name__).add_arguments(parser)


def main(argv: Sequence[str] | None = None, launch: bool = True) -> int:
    """Run a command, and return its exit code.

    Args:
        launch: Whether a training command starts a process for each GPU. `python -m trl_promptkd.cli` does not, as a
            launcher has done so.
    """
    args = parse_args(sys.argv[1:] if argv is None else argv, launch)
    from datasets.exceptions import DatasetsError

    try:
        return args.run(args)
    except (ValueError, OSError, ImportError, DatasetsError) as error:  # they say what to do
        print(f"trl-promptkd: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
