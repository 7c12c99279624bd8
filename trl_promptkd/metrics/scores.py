"""Scores of answers: ROUGE-L and exact match of instruction following, accuracy of word problems."""

import math
import string
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from .answers import RULES, extract_answer, extract_final_number, gold_number


__all__ = [
    "gsm8k_accuracy",
    "gsm8k_row_scores",
    "instruction_row_scores",
    "instruction_scores",
    "normalized",
    "reference_number",
    "rouge_scorer",
]


def instruction_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """ROUGE-L and exact match, as the PromptKD paper (and MiniLLM, and Natural Instructions before them) takes them.

    `rougeL` is the F-measure of `rouge_score` with its stemmer, `exact_match` whether both texts are equal once they are
    [`normalized`]; of each the maximum over a row's references, then the mean over rows.

    Args:
        predictions: One answer a row; it may be empty, which scores 0 unless a reference is empty too once normalized.
        references: One list of right answers a row, none of the lists empty.

    Returns:
        `{"rougeL": ..., "exact_match": ...}`, both in percent.

    Raises:
        TypeError, ValueError: for rows of other kinds, of unequal numbers, or without references, naming the row.
        ImportError: where `rouge_score` is not installed.
    """
    rows = instruction_row_scores(predictions, references)
    return {name: sum(row[name] for row in rows) / len(rows) for name in ("rougeL", "exact_match")}


def instruction_row_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[dict[str, float]]:
    """[`instruction_scores`] of each row by itself, in percent."""
    _check_rows(predictions, references)
    for row, texts in enumerate(references):
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise TypeError(
                f"`references[{row}]` is {_shown(texts)}, a {type(texts).__name__}; it must be a list of texts. Write [text] for a "
                "single one."
            )
        if not texts:
            raise ValueError(
                f"`references[{row}]` is an empty list. Give at least one right answer, or leave the row away."
            )
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(
                    f"`references[{row}]` holds {_shown(text)}; it must be texts only. Write them as texts."
                )
    scorer = rouge_scorer()
    return [
        {
            "rougeL": 100 * max(scorer.score(text, prediction)["rougeL"].fmeasure for text in texts),
            "exact_match": 100.0 * any(normalized(text) == normalized(prediction) for text in texts),
        }
        for prediction, texts in zip(predictions, references, strict=True)
    ]


def normalized(text: str) -> str:
    """In lower case, without punctuation, with single spaces."""
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@lru_cache(maxsize=1)
def rouge_scorer() -> Any:
    """`rouge_score`'s scorer of ROUGE-L.

    Raises:
        ImportError: where it is not installed, saying how to install it.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError(
            'ROUGE-L needs the package rouge_score, which is not installed. Run `pip install "trl_promptkd[evaluate]"`.'
        ) from error
    return RougeScorer(["rougeL"], use_stemmer=True)


def gsm8k_accuracy(predictions: Sequence[str], references: Sequence[str | float]) -> dict[str, Any]:
    r"""The share of answers whose final number is the right one; see [`extract_final_number`].

    Args:
        predictions: One answer a row.
        references: One right answer a row: a number, or a text that is one, with its unit or without, or that marks it as GSM8K does (`#### 18`) or
            by `\boxed{}`.

    Returns:
        `{"accuracy": ..., "rules": {rule: {"rows": ..., "correct": ...}}}`: in percent; and how many answers each rule of the extraction read,
        and how many of these are right. An answer without a number is wrong (rule `"none"`).

    Raises:
        TypeError, ValueError: for rows of other kinds, of unequal numbers, or whose reference has no number, naming the row.
    """
    rows = gsm8k_row_scores(predictions, references)
    rules = {
        rule: {
            "rows": sum(row["rule"] == rule for row in rows),
            "correct": sum(row["rule"] == rule and row["correct"] for row in rows),
        }
        for rule in RULES
    }
    return {
        "accuracy": 100 * sum(row["correct"] for row in rows) / len(rows),
        "rules": {rule: counts for rule, counts in rules.items() if counts["rows"]},
    }


def gsm8k_row_scores(predictions: Sequence[str], references: Sequence[str | float]) -> list[dict[str, Any]]:
    """Of each row: the number found (`value`), the `rule` that found it, and whether it is `correct`."""
    _check_rows(predictions, references)
    rows = []
    for row, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        right = reference_number(reference, f"`references[{row}]`")
        value, rule = extract_answer(prediction)
        correct = value is not None and math.isclose(value, right, rel_tol=1e-9, abs_tol=1e-6)
        rows.append({"value": value, "rule": rule, "correct": correct})
    return rows


def reference_number(reference: Any, name: str) -> float:
    """The right answer that a reference states, see [`gsm8k_accuracy`]. Nothing is guessed: a wrong gold would spoil the score unseen.

    Args:
        name: What it is called in messages.

    Raises:
        TypeError, ValueError: for what is neither a number nor a text with a single or marked one.
    """
    is_number = isinstance(reference, int | float) and not isinstance(reference, bool)
    if not is_number and not isinstance(reference, str):
        raise TypeError(
            f"{name} is {_shown(reference)}, a {type(reference).__name__}; it must be a number or a text with one."
        )
    number = gold_number(reference) if isinstance(reference, str) else float(reference)
    if number is None and extract_final_number(reference) is not None:
        raise ValueError(
            f"{name} is {_shown(reference)}, which does not say which of its numbers is the right answer. Give that alone, or behind #### or "
            "in \\boxed{}."
        )
    if number is None or not math.isfinite(number):
        raise ValueError(
            f"{name} is {_shown(reference)}, which holds no finite number to compare with. Give the right answer as a number, or as a text "
            "that ends with it (#### 18)."
        )
    return number


def _check_rows(predictions: Any, references: Any) -> None:
    for name, rows in (("predictions", predictions), ("references", references)):
        if isinstance(rows, str) or not isinstance(rows, Sequence):
            raise TypeError(
                f"`{name}` is {_shown(rows)}, a {type(rows).__name__}; it must be a list with one entry a row."
            )
    if len(predictions) != len(references):
        raise ValueError(
            f"There are {len(predictions)} `predictions` and {len(references)} `references`. Give one of each a row, in one order."
        )
    if not predictions:
        raise ValueError("`predictions` and `references` are empty. Give at least one row.")
    for row, text in enumerate(predictions):
        if not isinstance(text, str):
            raise TypeError(
                f"`predictions[{row}]` is {_shown(text)}, a {type(text).__name__}; it must be a text. Decode token ids first."
            )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
