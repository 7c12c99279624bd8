r"""The final number of an answer to a word problem, by three published sets of rules.

- `strict` and `flexible` are the filters of lm-evaluation-harness's task `gsm8k` (version 3). `strict` takes the
  number of the first `#### 18`. `flexible` takes the last run of digits, commas, points and dollar signs. Both compare
  texts, without commas, dollar signs and one point at the end.
- `paper` is the response priming paper's evaluation (arXiv 2412.17846). It takes the first of these, and compares
  numbers:
    1. The number in `\boxed{}`, from the first box that has one.
    2. The numbers of the first line, if they are all equal.
    3. The number after the first "the [final/correct] answer is".
    4. The last number.

  A number is digits with an optional sign, currency sign, thousands commas and decimals. Within a box it may be a
  fraction. Differences from the released code: signs count, a box may hold more than its number
  (`\boxed{18\text{ eggs}}`), and capital letters do not matter.

Thoughts are cut off first, see [`without_thoughts`].
"""

import math
import numbers
import re
from collections.abc import Sequence
from typing import Any

from ..data.rows import shortened
from .predictions import check_rows, without_thoughts


__all__ = ["RULES", "extract_final_number", "gsm8k_accuracy", "gsm8k_row_scores", "reference_number"]

RULES = ("strict", "flexible", "paper")

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")

_SIGN = r"(?<![\w)}\]])[-\u2212]"  # but not in 16-7
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<!\w)\.[0-9]+"
_NUMBER = re.compile(rf"(?P<minus>{_SIGN})?(?:\\?[$€£¥₹] ?)?(?P<inner_minus>{_SIGN})?(?P<digits>{_DIGITS})")
_BOX = re.compile(r"boxed\s*\{")
_BRACE = re.compile(r"[{}]")
_FRACTION = re.compile(r"(?<![0-9])\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
_STATEMENT = re.compile(r"\bthe\s+(?:(?:final|correct)\s+)?answer\s+is\b", re.IGNORECASE)
_MARKER = re.compile(r"(?<!#)####(?!#)\s*")
_UNIT = re.compile(r"\s?[%€$£]?(?:\s?[^\W\d_]{1,20}){0,3}\.?\s*")


def extract_final_number(text: str, rule: str = "paper") -> float | None:
    """The number that an answer ends up with, or `None` if the rule finds none.

    Args:
        text: One answer.
        rule: `"strict"`, `"flexible"` or `"paper"`, as the module describes them.

    Raises:
        TypeError: if the answer is not a text.
        ValueError: for another rule.
    """
    if not isinstance(text, str):
        raise TypeError(f"An answer is {shortened(text)}, a {type(text).__name__}; it must be a text.")
    if rule not in RULES:
        raise ValueError(f"`rule` is {rule!r}; it must be {' or '.join(map(repr, RULES))}.")
    text = without_thoughts(text)
    if rule == "paper":
        return _paper_number(text)
    found = _harness_text(text, rule)
    try:
        value = math.inf if found is None else float(found)
    except ValueError:  # `flexible` also takes "$.", and "1.2.3"
        return None
    return value if math.isfinite(value) else None


def gsm8k_accuracy(predictions: Sequence[str], references: Sequence[str | float]) -> dict[str, float]:
    r"""The share of answers whose final number is right, by each of the three rules.

    Args:
        predictions: One answer per row.
        references: One right answer per row: a number, a text that is one (`18`, `18 eggs`), or a text that marks it
            by `#### 18` or `\boxed{18}`.

    Returns:
        `{"strict": ..., "flexible": ..., "paper": ...}` in percent. An answer in which a rule finds no number is wrong
        by that rule.

    Raises:
        TypeError, ValueError: for other rows, lists of different lengths, or a reference without a number. The message
            names the row.
    """
    rows = gsm8k_row_scores(predictions, references)
    return {rule: 100 * sum(row[rule] for row in rows) / len(rows) for rule in RULES}


def gsm8k_row_scores(predictions: Sequence[str], references: Sequence[str | float]) -> list[dict[str, Any]]:
    """Whether each row is right by `strict`, `flexible` and `paper`. `values` has the numbers that they found."""
    check_rows(predictions, references)
    rows: list[dict[str, Any]] = []
    for row, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        right, written = _gold(reference, f"`references[{row}]`")
        values = {rule: extract_final_number(prediction, rule) for rule in RULES}
        answer = without_thoughts(prediction)
        correct = {rule: _harness_text(answer, rule) == written for rule in ("strict", "flexible")}
        rows.append({**correct, "paper": values["paper"] == right, "values": values})
    return rows


def reference_number(reference: Any, name: str) -> float:
    """The right answer that a reference states, see [`gsm8k_accuracy`].

    Nothing is guessed, as a wrong guess would spoil the score unnoticed.

    Args:
        name: Name of the reference in messages.

    Raises:
        TypeError, ValueError: for anything that is not a number or a text with a single or marked one.
    """
    return _gold(reference, name)[0]


def _gold(reference: Any, name: str) -> tuple[float, str]:
    """The right number, and its text in the harness's style."""
    if isinstance(reference, str):
        value, written = _gold_in_text(reference, name)
    elif isinstance(reference, numbers.Real) and not isinstance(reference, bool):
        value = math.inf if isinstance(reference, int) and abs(reference) > 1e308 else float(reference)
        written = str(int(value)) if value.is_integer() else repr(value)
    else:
        raise TypeError(
            f"{name} is {shortened(reference)}, a {type(reference).__name__}; it must be a number or a text with one."
        )
    if not math.isfinite(value):
        raise ValueError(
            f"{name} is {shortened(reference)}, which holds no finite number to compare with. Give the right answer "
            "as a number, or as a text that ends with it (#### 18)."
        )
    return value, written


def _gold_in_text(text: str, name: str) -> tuple[float, str]:
    marked = [_NUMBER.match(text, marker.end()) for marker in _MARKER.finditer(text)]
    match = next((match for match in reversed(marked) if match), None)
    boxed = _boxed_number(text)
    if match is None and boxed is not None:
        return _gold(boxed, name)
    if match is None:
        match = _NUMBER.match(text.strip())
        if match is None or not _UNIT.fullmatch(match.string, match.end()):
            if not _NUMBER.search(text):
                return math.nan, ""
            raise ValueError(
                f"{name} is {shortened(text)}, which does not say which of its numbers is the right answer. Give that "
                "alone, or after #### or in \\boxed{}."
            )
    return _value(match), _written(match)


def _harness_text(text: str, rule: str) -> str | None:
    matches = list((_STRICT if rule == "strict" else _FLEXIBLE).finditer(text))
    if not matches:
        return None
    match = matches[0 if rule == "strict" else -1]
    return match[0].removeprefix("#### ").replace(",", "").replace("$", "").removesuffix(".")


def _paper_number(text: str) -> float | None:
    boxed = _boxed_number(text)
    if boxed is not None:
        return boxed
    text = text.strip()
    first_line = {_value(match) for match in _NUMBER.finditer(text.partition("\n")[0])}
    if len(first_line) == 1:
        value = first_line.pop()
    else:
        statement = _STATEMENT.search(text)
        stated = _NUMBER.search(text, statement.end()) if statement else None
        found = [stated] if stated else [*_NUMBER.finditer(text)][-1:]
        value = _value(found[0]) if found else math.nan
    return value if math.isfinite(value) else None


def _boxed_number(text: str) -> float | None:
    """The number in the first box that has one. A box that is never closed was cut off and ends with the text."""
    box = _BOX.search(text)
    while box:
        depth, end = 1, len(text)
        for brace in _BRACE.finditer(text, box.end()):
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                end = brace.start()
                break
        inside = _FRACTION.sub(r"\1/\2", text[box.end() : end])
        match = _NUMBER.search(inside)
        if match:
            below = _NUMBER.match(inside, match.end() + 1) if inside.startswith("/", match.end()) else None
            divisor = _value(below) if below else 1.0
            value = _value(match) / divisor if divisor else math.nan
            if math.isfinite(value):
                return value
        box = _BOX.search(text, end)
    return None


def _value(match: re.Match[str]) -> float:
    return float(_written(match))


def _written(match: re.Match[str]) -> str:
    sign = "-" if match["minus"] or match["inner_minus"] else ""
    return sign + match["digits"].replace(",", "")
