"""`trl-promptkd analyze exposure | prompt | attention`."""

from typing import Any

from .analyze_attention import add_attention
from .analyze_exposure import add_exposure
from .analyze_prompt import add_prompt


def add_analyze(tools: Any) -> None:
    analyze = tools.add_parser("analyze", help="measure what students, teachers and soft prompts do on your rows")
    commands = analyze.add_subparsers(dest="analysis", required=True)
    add_exposure(commands)
    add_prompt(commands)
    add_attention(commands)
