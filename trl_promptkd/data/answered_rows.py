"""Rows whose answers a server generates: its requests, and the rows' token ids once it has answered.

The server gets texts and returns a text, so its tokenizer and chat template may differ from the student's.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import PartialState
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .._trl import remove_none_values
from .chat_template import RewrittenPromptError
from .priming import PrimingTemplate
from .rows import is_blank, joined_text, split_row
from .tokenize import tokenize_cut_row, tokenize_row


__all__ = ["TEXTS", "add_answers", "requests_of", "texts_of_row"]

logger = logging.get_logger(__name__)

TEXTS = "texts_json"
"""The column with what [`texts_of_row`] returns."""


def texts_of_row(
    row: Mapping[str, Any], processing_class: PreTrainedTokenizerBase, priming: PrimingTemplate | None
) -> str:
    """The request to the server for a row, and what the student needs to read the answer, as JSON.

    `request` holds the primed prompt. That is `messages` of a conversation, before any chat template, or a `prompt`, a
    text. `prompt` is the student's.

    Raises:
        ValueError: if the row cannot be sent, or if the student could not read its answer.
    """
    if row.get("prompt_ids") is not None:
        raise ValueError(
            "The rows hold `prompt_ids`, but a server is sent texts (`teacher_answers_url`). Pass the rows as texts "
            "or messages."
        )
    if row.get("tools"):
        raise ValueError(
            "The row has `tools`, but only answers that are texts can be taken from a server (`teacher_answers_url`). "
            "Filter such rows out, or remove the column."
        )
    prompt, _ = split_row(row, with_answer=False)
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        raise ValueError(
            "The row's prompt ends with an assistant message, but a server (`teacher_answers_url`) starts a message "
            "of its own and does not continue one. Filter such rows out, or end their prompts with the question."
        )
    sent = prompt if priming is None else priming.prime(row, with_answer=False)
    request = {"prompt": sent} if isinstance(sent, str) else {"messages": [*map(_with_one_text, sent)]}
    texts = {"prompt": prompt, "request": request}
    if more := remove_none_values(dict(row.get("chat_template_kwargs") or {})):
        texts["chat_template_kwargs"] = request["chat_template_kwargs"] = more
    try:
        _tokenize_answer(texts, "x", False, processing_class)  # before anybody pays for an answer
    except RewrittenPromptError as error:
        raise ValueError(
            "The chat template writes a prompt differently once an answer follows it, so that training on a server's "
            "answers (`teacher_answers_url`) would not match generation. Use a template that keeps prompts as they "
            "are (TRL ships patched ones, `chat_template_path`)."
        ) from error
    return json.dumps(texts)


def _with_one_text(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its content as one text, as not all servers accept a content in parts."""
    return {**message, "content": joined_text(message["content"])} if "content" in message else message


def requests_of(dataset: Dataset) -> list[dict[str, Any]]:
    """The requests to the server, one per row."""
    return [json.loads(texts)["request"] for texts in dataset[TEXTS]]


def add_answers(
    dataset: Dataset,
    name: str,
    answers: Sequence[tuple[str, bool]],
    processing_class: PreTrainedTokenizerBase,
    num_proc: int | None = None,
) -> Dataset:
    """The rows with the token ids of their answers, in place of [`TEXTS`].

    An answer is tokenized like one of a data set, and ends with the student's end-of-text token. One that was cut does
    not. The student's view also stands for the teacher's, as no teacher runs here.

    Args:
        name: Name of the argument with the rows, for messages.
        answers: Each row's text, and whether it was cut.

    Raises:
        ValueError: if all are empty. If only some are, a warning is logged.
    """
    empty = sum(is_blank(text) for text, _ in answers)
    if empty:
        found = (
            f"{empty} of {len(answers)} answers that the server wrote for `{name}` are empty. (Thoughts do not count. "
            "A model that thinks may need more than `max_new_tokens`.)"
        )
        if empty == len(answers):
            raise ValueError(f"{found} Look at what the server says to such a prompt.")
        logger.warning(f"{found} From those that ended, the student learns to stop at once.")
    texts, cut = zip(*answers, strict=True)
    ids = ("prompt_ids", "teacher_prompt_ids", "completion_ids")
    dataset = dataset.select_columns([TEXTS]).add_column("answer", list(texts)).add_column("is_cut", list(cut))
    with PartialState().main_process_first():
        return dataset.map(
            _with_answer,
            fn_kwargs={"processing_class": processing_class},
            remove_columns=dataset.column_names,
            features=Features({**dict.fromkeys(ids, List(Value("int32"))), "length": Value("int64")}),
            num_proc=num_proc,
            desc=f"Tokenizing the answers for {name}",
        )


def _with_answer(row: dict[str, Any], processing_class: PreTrainedTokenizerBase) -> dict[str, Any]:
    ids = _tokenize_answer(json.loads(row[TEXTS]), row["answer"], row["is_cut"], processing_class)
    length = len(ids["prompt_ids"]) + len(ids["completion_ids"])
    return {**ids, "teacher_prompt_ids": ids["prompt_ids"], "length": length}


def _tokenize_answer(
    texts: Mapping[str, Any], answer: str, is_cut: bool, processing_class: PreTrainedTokenizerBase
) -> dict[str, list[int]]:
    row = {**texts, "completion": answer}
    return tokenize_cut_row(row, processing_class) if is_cut else tokenize_row(row, processing_class)
