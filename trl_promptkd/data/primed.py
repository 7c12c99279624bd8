"""From rows to two views of the same completion: the student's, behind the plain prompt, and the teacher's, behind the
primed one.

Both views hold the completion with the same token ids, the end-of-text token included, so that the `i`-th trained
token of one is the `i`-th of the other, whatever stands before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .collate import masked_rows, pad_rows
from .dataset import check_answers, check_columns, is_empty_answer, map_rows, sift_overlong
from .priming import PrimingTemplate, resolve_priming
from .rows import NO_TOKENS, check_ids, check_text_only
from .tokenize import tokenize_row, tokenize_views


__all__ = [
    "DataCollatorForPrimedDistillation",
    "pad_views",
    "prompts_of_views",
    "tokenize_primed_dataset",
    "tokenize_primed_row",
]


def tokenize_primed_row(
    row: dict[str, Any],
    processing_class: PreTrainedTokenizerBase,
    priming: PrimingTemplate | None,
    with_answer: bool = True,
) -> dict[str, list[int]]:
    """Token ids of one row, in both views.

    Args:
        row: As for [`~trl_promptkd.data.tokenize_row`]; the template sees all of its columns. A row that is tokenized
            already also needs `teacher_prompt_ids` where there is a template.
        with_answer: `False` takes the prompts alone, for rows whose answer is not trained on.

    Returns:
        `prompt_ids` (what the student sees), `teacher_prompt_ids` (what the teacher sees) and `completion_ids` (the
        same for both; empty where the row has no answer).

    Raises:
        ValueError: where a prompt has no tokens: nothing would predict the completion's first one.
    """
    if row.get("prompt_ids") is not None:
        ids = _tokenized_views(row, processing_class, priming, with_answer)
    else:
        primed = [] if priming is None else [priming.prime(row, with_answer)]
        prompts, completion_ids = tokenize_views(row, processing_class, primed, with_answer)
        ids = {"prompt_ids": prompts[0], "completion_ids": completion_ids, "teacher_prompt_ids": prompts[-1]}
        if priming is not None and prompts[0] == prompts[1] and priming.render(row).strip():
            raise ValueError(
                "The priming text does not reach the teacher: its prompt is the student's. The chat template seems to "
                f"drop a text at placement {priming.placement!r}. Use another placement."
            )
    if not ids["prompt_ids"] or not ids["teacher_prompt_ids"]:
        raise ValueError(NO_TOKENS)
    return ids


def _tokenized_views(
    row: dict[str, Any],
    processing_class: PreTrainedTokenizerBase,
    priming: PrimingTemplate | None,
    with_answer: bool,
) -> dict[str, list[int]]:
    """Both views of a row that is tokenized already."""
    ids = tokenize_row(row, processing_class, with_answer)
    if row.get("teacher_prompt_ids") is not None:
        return {**ids, "teacher_prompt_ids": row["teacher_prompt_ids"]}
    if priming is not None:
        raise ValueError(
            "The rows hold `prompt_ids` but no `teacher_prompt_ids`: a priming text cannot be put into a prompt that "
            "is tokenized already. Add `teacher_prompt_ids`, pass the rows as texts or messages, or set "
            "`priming=None`."
        )
    return {**ids, "teacher_prompt_ids": ids["prompt_ids"]}


def tokenize_primed_dataset(
    dataset: Dataset | IterableDataset,
    name: str,
    processing_class: PreTrainedTokenizerBase,
    priming: PrimingTemplate | None,
    max_length: int | None = None,
    teacher_max_length: int | None = None,
    answers_needed: str | None = None,
    overlong: str = "drop",
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """Replace a data set's columns by `prompt_ids`, `teacher_prompt_ids`, `completion_ids` and `length`.

    Nothing is ever cut. Rows whose student view exceeds `max_length` tokens, or whose teacher view exceeds
    `teacher_max_length`, are left out and counted (`overlong="drop"`), or refused (`"error"`).

    Args:
        answers_needed: Why answers in the data are needed and what to do without them; `None` where they are not, and
            then they are not looked at: the lengths bound the prompts.

    Raises:
        ValueError: for a template that uses columns which are not there; where rows are too long, with their number
            and the length that would do; where no row is left; where an answer is missing and needed.
    """
    check_columns(dataset, name, answers_needed)
    columns = list(next(iter(dataset)))
    if priming is not None and "teacher_prompt_ids" not in columns:
        priming.check_columns(columns, name)
    dataset = map_rows(
        dataset,
        name,
        _tokenize_and_measure,
        (
            "prompt_ids",
            "teacher_prompt_ids",
            "completion_ids",
            "length",
            "empty_answer",
            "overlong",
            "teacher_overlong",
        ),
        num_proc,
        processing_class=processing_class,
        priming=priming,
        max_length=max_length,
        teacher_max_length=teacher_max_length,
        with_answers=answers_needed is not None,
    )
    for what, column, field, limit in (
        ("rows", "overlong", "max_length", max_length),
        ("rows, as the teacher sees them,", "teacher_overlong", "teacher_max_length", teacher_max_length),
    ):
        dataset = sift_overlong(dataset, name, what, column, field, limit, overlong)
    return check_answers(dataset, name, answers_needed)


def _tokenize_and_measure(
    row: dict[str, Any],
    processing_class: PreTrainedTokenizerBase,
    priming: PrimingTemplate | None,
    max_length: int | None,
    teacher_max_length: int | None,
    with_answers: bool,
) -> dict[str, Any]:
    check_text_only(row)
    if not with_answers:
        row = {name: value for name, value in row.items() if name != "completion_ids"}
    check_ids(row, processing_class)
    ids = tokenize_primed_row(row, processing_class, priming, with_answers)
    length = len(ids["prompt_ids"]) + len(ids["completion_ids"])
    teacher_length = len(ids["teacher_prompt_ids"]) + len(ids["completion_ids"])
    return {
        **ids,
        "length": teacher_length,  # what `group_by_length` groups by
        "empty_answer": int(is_empty_answer(row, ids["completion_ids"], processing_class)),
        "overlong": length if max_length is not None and length > max_length else 0,
        "teacher_overlong": (
            teacher_length if teacher_max_length is not None and teacher_length > teacher_max_length else 0
        ),
    }


def pad_views(
    prompt_ids: Sequence[Sequence[int]],
    teacher_prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    pad_token_id: int,
    pad_to_multiple_of: int | None = None,
) -> dict[str, Tensor]:
    """One batch of both views.

    Returns:
        `input_ids`, `attention_mask` and `labels` of shape `(batch, student_seq)`; `teacher_input_ids`,
        `teacher_attention_mask` and `teacher_labels` of shape `(batch, teacher_seq)`. `labels[:, 1:] != -100` and
        `teacher_labels[:, 1:] != -100` select the same tokens in the same order.
    """
    student = pad_rows(prompt_ids, completion_ids, pad_token_id, pad_to_multiple_of)
    teacher = pad_rows(teacher_prompt_ids, completion_ids, pad_token_id, pad_to_multiple_of)
    names = ("input_ids", "attention_mask", "labels")
    return {name: student[name] for name in names} | {f"teacher_{name}": teacher[name] for name in names}


def prompts_of_views(batch: dict[str, Tensor]) -> tuple[list[list[int]], list[list[int]]]:
    """The student's and the teacher's prompts in a batch of [`pad_views`]."""
    student, teacher = (
        masked_rows(
            batch[f"{view}input_ids"], batch[f"{view}attention_mask"].bool() & (batch[f"{view}labels"] == -100)
        )
        for view in ("", "teacher_")
    )
    return student, teacher


@dataclass
class DataCollatorForPrimedDistillation:
    """
    Batches of two views of the same completions: the student's and the primed teacher's.

    The trainer tokenizes rows once, before training, and then only pads here. Rows that are not tokenized are, on the
    spot.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer of both models; it needs a pad token, which may be the end-of-text token.
        priming (`str` or [`PrimingTemplate`], *optional*):
            What the teacher sees besides the prompt; a name as for [`PrimedDistillTrainer`].
        pad_to_multiple_of (`int`, *optional*):
            Makes both views' widths multiples of it.

    Returns (on call):
        `input_ids`, `attention_mask`, `labels` of shape `(batch, student_seq)` and `teacher_input_ids`,
        `teacher_attention_mask`, `teacher_labels` of shape `(batch, teacher_seq)`. Labels are -100 but for the
        completion, end of text included; `labels != -100` selects the same ids in the same order in both views.
        Prompts are padded on the left, completions on the right. Rows from a teacher cache add `cache_rows` of shape
        `(batch,)`.
    """

    processing_class: PreTrainedTokenizerBase
    priming: str | PrimingTemplate | None = None
    pad_to_multiple_of: int | None = None

    def __post_init__(self):
        self.template = resolve_priming(self.priming)
        if not isinstance(self.processing_class, PreTrainedTokenizerBase):
            raise TypeError(
                f"`processing_class` is a {type(self.processing_class).__name__}; it must be a tokenizer, such as "
                "`AutoTokenizer.from_pretrained(name)` gives."
            )
        if self.processing_class.pad_token_id is None:
            raise ValueError(
                "The tokenizer has no pad token. Set `tokenizer.pad_token = tokenizer.eos_token`; masks come from "
                "lengths, so this is safe."
            )

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids = [tokenize_primed_row(row, self.processing_class, self.template) for row in rows]
        batch = pad_views(
            [row["prompt_ids"] for row in ids],
            [row["teacher_prompt_ids"] for row in ids],
            [row["completion_ids"] for row in ids],
            self.processing_class.pad_token_id,
            self.pad_to_multiple_of,
        )
        if "cache_row" in rows[0]:
            batch["cache_rows"] = torch.tensor([row["cache_row"] for row in rows])
        return batch
