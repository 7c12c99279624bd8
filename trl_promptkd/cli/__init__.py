"""The command `trl-promptkd`."""

import argparse
import sys

from datasets.exceptions import DatasetsError

from .. import __version__
from .analyze_attention import add_attention
from .analyze_exposure import add_exposure
from .analyze_prompt import add_prompt
from .cache import add_cache
from .doctor import add_doctor
from .eval import add_eval


__all__ = ["main"]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trl-promptkd", description="Tools of trl_promptkd.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    tools = parser.add_subparsers(dest="command", required=True)
    for add_tool in (add_doctor, add_cache, add_eval):
        add_tool(tools)
    analyze = tools.add_parser("analyze", help="measure what students, teachers and soft prompts do on your rows")
    commands = analyze.add_subparsers(dest="analysis", required=True)
    for add_analysis in (add_exposure, add_prompt, add_attention):
        add_analysis(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError, ImportError, DatasetsError) as error:  # they say what to do
        print(f"trl-promptkd: {error}", file=sys.stderr)
        return 2
