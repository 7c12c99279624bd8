"""Which priming text? A teacher answers a few rows with each text and with none, and its answers are scored.

The answers are samples, as a student learns from samples. A row's answer is drawn from the same random state for each
text, and texts are compared row by row.
"""

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import plain_rows
from ..data.priming import PRIMING_TEMPLATES, PrimingTemplate, resolve_priming
from ..data.rows import shortened
from ..generation.teacher_answers import sampling_source
from ..intervals import difference, holm, mean_interval, sign_flip_p, smallest_seen
from ..models.limits import check_positions
from .answers import (
    answers_path,
    evaluation_config,
    evaluation_seeds,
    hash_of,
    judged_texts,
    model_source,
    write_answers,
)
from .rows import EvaluationRows, evaluation_rows, row_scores
from .settings import check_evaluation_settings


__all__ = ["SCORERS", "PrimedRows", "Scorer", "primed_rows", "rank_priming"]

Scorer = Callable[[str, dict[str, Any]], float]

# Scorer -> the task that it belongs to, and which of the task's metrics it is
SCORERS = {"gsm8k": ("gsm8k", "paper"), "exact_match": ("instruct", "exact_match"), "rougeL": ("instruct", "rougeL")}
_MARKED_NUMBER = re.compile(r"####\s*[-$]?[0-9][0-9,.]*\s*$")  # as right answers of GSM8K end
NO_TEXT = "no text"


@dataclass(frozen=True)
class PrimedRows:
    """
    Rows to compare priming texts on.

    Args:
        sets: For each text the rows with that text in their prompts. `None`, no text, comes first.
        rows: The unchanged rows of the data set.
        scorer: A name, or a function of an answer and its row.
        template: Template of instructions and questions.
    """

    sets: dict[PrimingTemplate | None, EvaluationRows]
    rows: list[dict[str, Any]]
    scorer: str | Scorer
    template: str


def primed_rows(
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset | IterableDataset,
    texts: Sequence[str | PrimingTemplate] | None = None,
    scorer: str | Scorer | None = None,
    template: str | None = None,
    num_rows: int = 100,
    max_prompt_length: int | None = None,
    samples: int = 1,
    seed: int = 10,
    **settings: Any,
) -> PrimedRows:
    """Prepare the rows of [`rank_priming`], which has the same arguments. Checks everything that needs no weights."""
    if scorer is not None and not callable(scorer) and scorer not in SCORERS:
        raise ValueError(
            f"`scorer` is {scorer!r}; it must be {', '.join(map(repr, SCORERS))} or a function of an answer and its "
            "row (on the command line: package.module:function)."
        )
    found = PRIMING_TEMPLATES.values() if texts is None else map(resolve_priming, texts)
    templates = [None, *dict.fromkeys(text for text in found if text is not None)]
    if len(templates) == 1:
        raise ValueError(
            "`texts` are empty. Give at least one to compare with no text, or None for all built-in ones."
        )
    settings |= {"num_rows": num_rows, "max_prompt_length": max_prompt_length, "samples": samples}
    check_evaluation_settings(None, template, tokenizer, [seed], **settings)
    if scorer is None:
        references = evaluation_rows(dataset, "dataset", "instruct", tokenizer, "plain", num_rows).references
        marked = all(_MARKED_NUMBER.search(text) for right in references for text in right)
        scorer = "gsm8k" if marked else "rougeL"
    task = SCORERS[scorer][0] if isinstance(scorer, str) else None
    template = check_evaluation_settings(task, template, tokenizer, [seed], **settings)
    sets: dict[PrimingTemplate | None, EvaluationRows] = {}
    for text in templates:
        try:
            sets[text] = evaluation_rows(dataset, "dataset", task, tokenizer, template, num_rows, priming=text)
        except ValueError as error:
            raise error if text is None else ValueError(f"With the text {label_of(text)}: {error}") from error
    rows = [dict(row) for row in islice(plain_rows(dataset), num_rows)]
    longest = [max(map(len, prompts)) for prompts in zip(*(one.prompt_ids for one in sets.values()), strict=True)]
    kept = [row for row, length in enumerate(longest) if length <= (max_prompt_length or math.inf)]
    if len(kept) < 2:
        raise ValueError(
            f"Of `dataset`, {len(kept)} of {len(rows)} rows fit into `max_prompt_length={max_prompt_length}` with "
            "every text, but an interval needs two or more, better 100. Give more rows, or raise it."
        )
    for text, one in sets.items():
        prompts, references = ([values[row] for row in kept] for values in (one.prompt_ids, one.references))
        sets[text] = EvaluationRows(prompts, references, len(rows) - len(kept))
    return PrimedRows(sets, [rows[row] for row in kept], scorer, template)


def rank_priming(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset | IterableDataset | PrimedRows,
    texts: Sequence[str | PrimingTemplate] | None = None,
    scorer: str | Scorer | None = None,
    template: str | None = None,
    num_rows: int = 100,
    max_prompt_length: int | None = None,
    samples: int = 1,
    seed: int = 10,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    output_dir: str | None = None,
) -> dict[str, Any]:
    """Run a teacher with each of several priming texts and with none, and rank the texts by the scores of its answers.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The teacher, on its device.
        tokenizer (`PreTrainedTokenizerBase`): The teacher's.
        dataset (`Dataset`): Rows of the training data, in any format of [`evaluation_rows`]. Or the result of
            [`primed_rows`], and the arguments `texts` to `max_prompt_length` are ignored.
        texts (`list`, *optional*): Names of built-in texts, and templates. By default all built-in ones.
        scorer (`str` or `Callable`, *optional*): `"gsm8k"` (final numbers, read as the response priming paper does),
            `"exact_match"` or `"rougeL"`, in percent. Or a function of an answer and its row, a dict with all columns.
            It returns a number, and more is better. By default `"gsm8k"` if all right answers end in the style of
            `#### 18`, else `"rougeL"`.
        template (`str`, *optional*): As for [`evaluate_model`].
        num_rows (`int`, *optional*, defaults to `100`): Use only the first rows.
        max_prompt_length (`int`, *optional*): Omit rows whose prompt is longer with any of the texts.
        samples (`int`, *optional*, defaults to `1`): Answers to each row. Their scores are averaged.
        seed (`int`, *optional*, defaults to `10`): Seed of the first sample of each row. The others have the next
            numbers.
        temperature, max_new_tokens, batch_size, output_dir: As for [`evaluate_model`].

    Returns:
        `scorer`, `template`, `settings`, `rows`, `left_out`, `data_hash`, and these:

        - `texts`: the texts, the best first.
        - `best`: the name of the best text that is better than none with `p` below 0.05. `None` if there is none.
        - `smallest_seen`: the difference that so many rows show four times in five. `None` if no score differed.

        Each text has:

        - `name`, `text`, `placement`.
        - `score`, `difference`: lists of the mean and its 95 % interval over rows. The difference is to no text, row
            by row.
        - `p`: the p value of the difference, after Holm's correction over the texts.
        - `length`: the mean length of the answers, in tokens.
        - `cut`: the share of answers that `max_new_tokens` cut.
        - `row_scores`: the mean score of each row.

        Without a text, `text`, `placement`, `difference` and `p` are `None`.

    Raises:
        ValueError: if settings, texts, rows or scores cannot be used. The message names them.
    """
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    if not isinstance(dataset, PrimedRows):
        about = (texts, scorer, template, num_rows, max_prompt_length, samples, seed)
        dataset = primed_rows(tokenizer, dataset, *about, batch_size=batch_size, **settings)
    plain = dataset.sets[None]
    longest = max_new_tokens + max(len(ids) for one in dataset.sets.values() for ids in one.prompt_ids)
    check_positions("model", model, longest, "Lower `max_new_tokens` or `max_prompt_length`.")
    config = evaluation_config(model, tokenizer, greedy=False, **settings)
    source: dict[str, Any] = {}
    if output_dir is not None:
        os.makedirs(output_dir, exist_ok=True)
        # Random states are those of the prompts without a text
        about_rows = {"sampling": sampling_source(config), "unprimed": hash_of(plain.prompt_ids)}
        source = {**model_source(model, tokenizer), **about_rows}
    found: list[dict[str, Any]] = []
    for number, (text, rows) in enumerate(dataset.sets.items(), 1):
        name = label_of(text)
        scores: list[list[float]] = []
        answers: list[dict[str, Any]] = []
        for one in range(seed, seed + samples):
            title = f"Text {number} of {len(dataset.sets)}, {name}, seed {one}"
            path = None if output_dir is None else answers_path(output_dir, name, one, source, rows)
            row_seeds = evaluation_seeds(one, plain.prompt_ids)
            new = write_answers(model, tokenizer, rows, config, row_seeds, batch_size, path, title)
            written = judged_texts(tokenizer, rows.prompt_ids, [answer["completion"] for answer in new])
            scores.append(_scores(dataset, written))
            answers += new
        completions = [answer["completion"] for answer in answers]
        lengths = list(map(len, tokenizer(completions, add_special_tokens=False)["input_ids"]))
        found.append(
            {
                "name": name,
                "text": text and text.text,
                "placement": text and text.placement,
                "length": float(np.mean(lengths)),
                "cut": float(np.mean([not answer["ended"] for answer in answers])),
                "row_scores": np.mean(scores, axis=0).tolist(),
            }
        )
    widest = _compare(found)
    found.sort(key=lambda one: -one["score"][0])
    better = (one["name"] for one in found if one["difference"] and one["difference"][0] > 0 and one["p"] < 0.05)
    return {
        "scorer": dataset.scorer if isinstance(dataset.scorer, str) else _name_of(dataset.scorer),
        "template": dataset.template,
        "settings": {"samples": samples, "seed": seed, **settings},
        "rows": len(plain.prompt_ids),
        "left_out": plain.left_out,
        "data_hash": hash_of([plain.prompt_ids, plain.references])[:16],
        "texts": found,
        "best": next(better, None),
        "smallest_seen": widest or None,
    }


def label_of(text: PrimingTemplate | None) -> str:
    """What a text is called: its name, or its beginning."""
    if text is None:
        return NO_TEXT
    name = next((name for name, known in PRIMING_TEMPLATES.items() if known == text), shortened(text.text, 40))
    return name if text.placement == "prefix" else f"{name} ({text.placement})"


def _name_of(scorer: Scorer) -> str:
    return f"{scorer.__module__}:{scorer.__qualname__}"


def _scores(rows: PrimedRows, answers: list[str]) -> list[float]:
    """A score for each answer."""
    if isinstance(rows.scorer, str):
        task, metric = SCORERS[rows.scorer]
        return row_scores(task, answers, rows.sets[None].references)[metric]
    scores: list[float] = []
    for index, (answer, row) in enumerate(zip(answers, rows.rows, strict=True)):
        try:
            scores.append(float(rows.scorer(answer, row)))
        except Exception as error:  # whatever a function of the user's does
            raise ValueError(
                f"`scorer` {_name_of(rows.scorer)} failed on row {index}: {type(error).__name__}: {error}. It gets "
                "an answer and its row, and returns a number."
            ) from error
        if not math.isfinite(scores[-1]):
            raise ValueError(
                f"`scorer` {_name_of(rows.scorer)} is {scores[-1]} for row {index}, whose answer is "
                f"{shortened(answer)}; it must be a finite number. Correct the function, or filter such rows out."
            )
    return scores


def _compare(texts: list[dict[str, Any]]) -> float:
    """Add to each text its `score`, its `difference` to the first, which is no text, and its `p`.

    Returns:
        The largest of the texts' smallest visible differences.
    """
    none, *others = [np.array(one["row_scores"]) for one in texts]
    ones = np.ones(len(none))
    by_row = [np.stack([scores, ones], axis=1) for scores in (none, *others)]
    p_values = holm([sign_flip_p(scores - none) for scores in others])
    for one, scores, p in zip(texts, by_row, [None, *p_values], strict=True):
        one["score"] = list(mean_interval(scores))
        one["difference"] = None if p is None else list(difference(scores, by_row[0]))
        one["p"] = p
    return max(smallest_seen(scores - none, len(others)) for scores in others)
