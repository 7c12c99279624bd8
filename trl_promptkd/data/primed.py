"""Two views of the same completion: the student's, after the plain prompt, and the teacher's, after the primed one.

Both hold the completion with the same token ids, including the end-of-text token. The `i`-th trained token of one view
is therefore the `i`-th of the other, whatever precedes it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .answered_rows import TEXTS, texts_of_row
from .by_teacher import Priming, check_priming, priming_of, teacher_of
from .collate import masked_rows, pad_rows
from .dataset import Limit, check_columns, is_empty_answer, prepare_rows
from .priming import PrimingTemplate, resolve_priming
from .tokenize import tokenize_primed_row


__all__ = [
    "DataCollatorForPrimedDistillation",
    "check_views",
    "pad_views",
    "prompts_of_views",
    "tokenize_primed_dataset",
]

_VIEWS = ("prompt_ids", "teacher_prompt_ids", "completion_ids")


def tokenize_primed_dataset(
    dataset: Dataset | IterableDataset,
    name: str,
    processing_class: PreTrainedTokenizerBase,
    priming: Priming,
    max_length: int | None = None,
    teacher_max_length: int | None = None,
    answers_needed: str | None = None,
    overlong: str = "drop",
    num_proc: int | None = None,
    server_answers: bool = False,
) -> Dataset | IterableDataset:
    """Replace a data set's columns by `prompt_ids`, `teacher_prompt_ids`, `completion_ids` and `length`.

    With several teachers, the column `teacher` is added. Nothing is ever cut. Rows whose student view exceeds
    `max_length` tokens, or whose teacher view exceeds `teacher_max_length`, are omitted and counted
    (`overlong="drop"`), or rejected (`"error"`).

    Args:
        answers_needed: Why answers in the data are needed, and what to do without them. `None` if they are not. In
            that case they are ignored, and the limits bound the prompts.
        server_answers: Whether a server writes the answers. If so, the column
            [`~trl_promptkd.data.answered_rows.TEXTS`] holds its requests, with the priming text, and the ids are those
            of the student's view alone.

    Raises:
        ValueError: if a template uses missing columns, if a row names none of several teachers, and as
            [`~trl_promptkd.data.dataset.prepare_rows`].
    """
    check_columns(dataset, name, answers_needed)
    check_priming(dataset, name, priming)
    of_several = ("teacher",) if isinstance(priming, Mapping) else ()
    return prepare_rows(
        dataset,
        name,
        _tokenize_and_measure,
        (
            *("prompt_ids", "teacher_prompt_ids", "completion_ids", "length"),
            *of_several,
            *([TEXTS] if server_answers else []),
        ),
        [
            Limit("max_length", max_length, "rows"),
            Limit("teacher_max_length", teacher_max_length, "rows, as the teacher sees them,"),
        ],
        answers_needed,
        overlong,
        num_proc,
        processing_class=processing_class,
        priming=priming,
        with_answer=answers_needed is not None,
        server_answers=server_answers,
    )


def _tokenize_and_measure(
    row: dict[str, Any],
    processing_class: PreTrainedTokenizerBase,
    priming: Priming,
    with_answer: bool,
    server_answers: bool,
) -> dict[str, Any]:
    texts = {TEXTS: texts_of_row(row, processing_class, priming_of(row, priming))} if server_answers else {}
    ids = tokenize_primed_row(row, processing_class, None if server_answers else priming, with_answer)
    number = len(ids["completion_ids"])
    teacher_length = len(ids["teacher_prompt_ids"]) + number
    return {
        **ids,
        **texts,
        **({"teacher": teacher_of(row, priming)} if isinstance(priming, Mapping) else {}),
        "length": teacher_length,  # what `group_by_length` groups by
        "empty_answer": int(is_empty_answer(row, ids["completion_ids"], processing_class)),
        "needs_max_length": len(ids["prompt_ids"]) + number,
        "needs_teacher_max_length": teacher_length,
    }


def pad_views(
    prompt_ids: Sequence[Sequence[int]],
    teacher_prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    pad_token_id: int,
    pad_to_multiple_of: int | None = None,
) -> dict[str, Tensor]:
    """One batch of both views, as [`DataCollatorForPrimedDistillation`] returns it."""
    student = pad_rows(prompt_ids, completion_ids, pad_token_id, pad_to_multiple_of)
    teacher = pad_rows(teacher_prompt_ids, completion_ids, pad_token_id, pad_to_multiple_of)
    names = ("input_ids", "attention_mask", "labels")
    return {name: student[name] for name in names} | {f"teacher_{name}": teacher[name] for name in names}


def prompts_of_views(batch: dict[str, Tensor]) -> tuple[list[list[int]], list[list[int]]]:
    """The student's and the teacher's prompts in a batch of [`pad_views`]."""

    def prompts(view: str) -> list[list[int]]:
        is_prompt = batch[f"{view}attention_mask"].bool() & (batch[f"{view}labels"] == -100)
        return masked_rows(batch[f"{view}input_ids"], is_prompt)

    return prompts(""), prompts("teacher_")


def check_views(teacher_labels: Tensor, tokens: Tensor) -> None:
    """Reject a batch of a user's collator whose views hold different completions."""
    teacher_tokens = teacher_labels[teacher_labels != -100]
    if not torch.equal(teacher_tokens, tokens):
        raise ValueError(
            f"The data collator's two views hold different completions ({len(tokens)} tokens in the student's, "
            f"{len(teacher_tokens)} in the teacher's). `labels` and `teacher_labels` must select the same ids in the "
            "same order; see DataCollatorForPrimedDistillation."
        )


@dataclass
class DataCollatorForPrimedDistillation:
    """
    Batches of two views of the same completions: the student's and the primed teacher's.

    The trainer tokenizes rows once, before training. Rows that are not tokenized are tokenized here.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer of both models. It needs a pad token, which may be the end-of-text token.
        priming (`str`, [`PrimingTemplate`] or `dict` of them, *optional*):
            What the teacher sees besides the prompt. A `str` is a name as for [`PrimedDistillTrainer`]. A `dict` has
            what each of several teachers sees, by its name. The rows' column `teacher` holds that name.
        pad_to_multiple_of (`int`, *optional*):
            Pads both views to a width that is a multiple of it.

    Returns (on call):
        `input_ids`, `attention_mask`, `labels` of shape `(batch, student_seq)` and `teacher_input_ids`,
        `teacher_attention_mask`, `teacher_labels` of shape `(batch, teacher_seq)`. Labels are the completion's ids,
        including the end of text, and -100 elsewhere. `labels != -100` selects the same ids in the same order in both
        views. Rows from a teacher cache add `cache_rows` of shape `(batch,)`. Rows of several teachers add `teachers`
        of that shape: the index of each row's teacher in the order of `priming`.
    """

    processing_class: PreTrainedTokenizerBase
    priming: str | PrimingTemplate | Mapping[str, str | PrimingTemplate | None] | None = None
    pad_to_multiple_of: int | None = None

    def __post_init__(self):
        self.template: Priming
        if isinstance(self.priming, Mapping):
            self.template = {name: resolve_priming(priming) for name, priming in self.priming.items()}
        else:
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
        # The trainer's rows were checked once, when they were tokenized
        ids = [
            row
            if all(row.get(name) is not None for name in _VIEWS)
            else tokenize_primed_row(row, self.processing_class, self.template)
            for row in rows
        ]
        batch = pad_views(
            [row["prompt_ids"] for row in ids],
            [row["teacher_prompt_ids"] for row in ids],
            [row["completion_ids"] for row in ids],
            self.processing_class.pad_token_id,
            self.pad_to_multiple_of,
        )
        if "cache_row" in rows[0]:
            batch["cache_rows"] = torch.tensor([row["cache_row"] for row in rows])
        if isinstance(self.template, Mapping):
            names = list(self.template)
            batch["teachers"] = torch.tensor([names.index(teacher_of(row, names)) for row in rows])
        return batch
