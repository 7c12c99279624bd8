"""Scores of instruction following: ROUGE-L and exact match."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from ..data.rows import shortened
from .predictions import check_rows, without_thoughts
from .tokens import ScriptTokenizer, is_foreign, normalized


__all__ = ["instruction_row_scores", "instruction_scores", "rouge_scorer"]


def instruction_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """ROUGE-L and exact match, as the PromptKD paper (and MiniLLM, and Natural Instructions before them) takes them.

    `rougeL` is the F-measure of `rouge_score` with its stemmer. `exact_match` is whether both texts are equal after
    [`normalized`]. Each is the maximum over a row's references, then the mean over rows. Thoughts in predictions do
    not count ([`without_thoughts`]).

    `rouge_score` finds no tokens in scripts other than Latin. If the prediction or the reference is in another script
    ([`is_foreign`]), both are split by [`ScriptTokenizer`]. English text scores as with `rouge_score` and with
    MiniLLM's code.

    Args:
        predictions: One answer per row. An empty one scores 0, but matches a reference that is empty once normalized.
        references: One list of right answers per row, none of them empty.

    Returns:
        `{"rougeL": ..., "exact_match": ...}`, both in percent.

    Raises:
        TypeError, ValueError: for rows of other types, lists of different lengths, or rows without references. The
            message names the row.
        ImportError: if `rouge_score` is not installed.
    """
    rows = instruction_row_scores(predictions, references)
    return {name: sum(row[name] for row in rows) / len(rows) for name in ("rougeL", "exact_match")}


def instruction_row_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[dict[str, float]]:
    """[`instruction_scores`] of each single row, in percent."""
    check_rows(predictions, references)
    for row, texts in enumerate(references):
        is_list = isinstance(texts, Sequence) and not isinstance(texts, str)
        if not is_list or not all(isinstance(text, str) for text in texts):
            raise TypeError(
                f"`references[{row}]` is {shortened(texts)}, a {type(texts).__name__}; it must be a list of texts. "
                "Write [text] for a single one."
            )
        if not texts:
            raise ValueError(f"`references[{row}]` is empty. Give at least one right answer, or omit the row.")
    scorer = rouge_scorer()
    predictions = [without_thoughts(prediction) for prediction in predictions]
    return [
        {
            "rougeL": 100 * max(scorer.score(text, prediction)["rougeL"].fmeasure for text in texts),
            "exact_match": 100.0 * any(normalized(text) == normalized(prediction) for text in texts),
        }
        for prediction, texts in zip(predictions, references, strict=True)
    ]


@lru_cache(maxsize=1)
def rouge_scorer() -> Any:
    """`rouge_score`'s scorer of ROUGE-L, with the tokens of [`ScriptTokenizer`] for other scripts than Latin.

    Raises:
        ImportError: if it is not installed. The message says how to install it.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError(
            "ROUGE-L needs the package rouge_score, which is not installed. Run "
            '`pip install "trl_promptkd[evaluate]"`.'
        ) from error

    class AnyScriptScorer(RougeScorer):
        other_scripts = RougeScorer(["rougeL"], tokenizer=ScriptTokenizer())

        def score(self, target, prediction):
            if is_foreign(target) or is_foreign(prediction):
                return self.other_scripts.score(target, prediction)
            return super().score(target, prediction)

    return AnyScriptScorer(["rougeL"], use_stemmer=True)
