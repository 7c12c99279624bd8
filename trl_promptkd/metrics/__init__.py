"""Scores of answers: ROUGE-L and exact match of instruction following, and the accuracy of final numbers (GSM8K).

They are functions, and local modules for `evaluate`. `evaluate.load("rouge")` would fetch a script from the Hub.
"""

import os
from typing import Any

from .final_numbers import RULES, extract_final_number, gsm8k_accuracy, gsm8k_row_scores, reference_number
from .predictions import without_thoughts
from .scores import instruction_row_scores, instruction_scores, rouge_scorer
from .tokens import ScriptTokenizer, is_foreign, normalized


__all__ = [
    "RULES",
    "ScriptTokenizer",
    "extract_final_number",
    "gsm8k_accuracy",
    "gsm8k_row_scores",
    "instruction_row_scores",
    "instruction_scores",
    "is_foreign",
    "load",
    "module_path",
    "normalized",
    "reference_number",
    "rouge_scorer",
    "without_thoughts",
]

_MODULES = ("gsm8k", "instruction_scores")


def module_path(name: str) -> str:
    """The file of the local `evaluate` module `"instruction_scores"` or `"gsm8k"`, for `evaluate.load`.

    Raises:
        ValueError: for another name.
    """
    if name not in _MODULES:
        raise ValueError(f"The metric is {name!r}; it must be {' or '.join(map(repr, _MODULES))}.")
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), "modules", f"{name}.py")


def load(name: str) -> Any:
    """The metric `"instruction_scores"` or `"gsm8k"` as an `evaluate.EvaluationModule`. Nothing is downloaded.

    Raises:
        ImportError: if `evaluate` is not installed.
        ValueError: for another name.
    """
    path = module_path(name)
    try:
        import evaluate
    except ImportError as error:
        raise ImportError(
            "A metric's module needs the package evaluate, which is not installed. Run "
            '`pip install "trl_promptkd[evaluate]"`, or use the functions of trl_promptkd.metrics.'
        ) from error
    return evaluate.load(path)
