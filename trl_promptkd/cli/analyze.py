"""`trl-promptkd analyze`."""

from typing import Any

from .analyze_attention import add_attention


def add_analyze(tools: Any) -> None:
    analyze = tools.add_parser("analyze", help="what distillation did to a model, beyond its scores")
    commands = analyze.add_subparsers(dest="analysis", required=True)
    add_attention(commands)
