"""From a user's rows to token ids, and from token ids to padded batches.

A row becomes two lists of ids, `prompt_ids` and `completion_ids`, once, before training. A batch pads the prompts on the
left and the completions on the right, so that both start at the same column in every row; what is padding is known from
lengths and never from ids, as many models pad with their end-of-text token.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging


__all__ = [
    "DataCollatorForPromptCompletion",
    "check_columns",
    "masked_rows",
    "pad_rows",
    "tokenize_dataset",
    "tokenize_row",
]

logger = logging.get_logger(__name__)

_REPORTED = ["overlong_prompt", "cut_tokens"]  # columns that say what did not fit, for the report


def check_columns(dataset: Dataset | IterableDataset, name: str, needs_completions: bool) -> None:
    """Refuse a data set that cannot be trained on, before any weights are loaded.

    Args:
        dataset: What the user passed.
        name: Argument it was passed as, for messages.
        needs_completions: Whether answers in the data are trained on (`lmbda < 1` without `seq_kd`).

    Raises:
        ValueError: for an empty data set, one without `messages` or `prompt`, and one without answers where they are needed.
    """
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(
            f"`{name}` is empty: it has no rows to train on or to evaluate. Check its path, split and filters."
        )
    columns = sorted(first)
    if not {"messages", "prompt", "prompt_ids"} & set(columns):
        raise ValueError(
            f"`{name}` has neither a `messages` nor a `prompt` column; its columns are {columns}. Rename a column with "
            "`dataset.rename_column`, or build `messages` (a list of {'role', 'content'}) or `prompt` with `dataset.map`."
        )
    if needs_completions and not {"messages", "completion", "completion_ids"} & set(columns):
        raise ValueError(
            f"`{name}` holds prompts without answers, but `lmbda` is below 1, so that part of the training uses the data's "
            "own answers. Set `lmbda=1.0` (train on the student's samples only), set `seq_kd=True` (the teacher writes the "
            "answers), or add a `completion` column."
        )


def tokenize_row(row: dict[str, Any], processing_class: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Token ids of one row.

    Args:
        row: `messages` (the last one is the answer), or `prompt` with or without `completion`; each a text or a list of
            messages. `tools` and `chat_template_kwargs` reach the chat template. Rows that hold `prompt_ids` are tokenized
            already and are taken as they are.
        processing_class: The tokenizer. Conversations need its chat template.

    Returns:
        `{"prompt_ids": [...], "completion_ids": [...]}`; the answer ends with an end-of-text token and is empty where the row
        has none.
    """
    if row.get("prompt_ids") is not None:
        return {"prompt_ids": row["prompt_ids"], "completion_ids": row.get("completion_ids") or []}
    prompt, completion = row.get("prompt"), row.get("completion")
    if row.get("messages") is not None:
        if not row["messages"] or row["messages"][-1]["role"] != "assistant":
            raise ValueError(
                "A row's `messages` must end with an assistant message, the answer. Rows without an answer go into a "
                f"`prompt` column. The row's roles are {[message['role'] for message in row['messages']]}."
            )
        prompt, completion = row["messages"][:-1], row["messages"][-1:]

    conversational = not isinstance(prompt, str)
    prompt_text: str
    completion_text: str | None
    if conversational:
        prompt_text, completion_text = _apply_chat_template(prompt, completion, row, processing_class)
    else:
        prompt_text, completion_text = str(prompt), completion
    special = not conversational  # a chat template writes the special tokens itself
    prompt_ids = processing_class(prompt_text, add_special_tokens=special)["input_ids"]
    eos = processing_class.eos_token_id
    if special and eos is not None and len(prompt_ids) > 1 and prompt_ids[-1] == eos:
        prompt_ids = prompt_ids[:-1]  # some tokenizers end every text; an answer follows here
    if completion_text is None:
        return {"prompt_ids": prompt_ids, "completion_ids": []}

    # Together, so that no token boundary is forced between them; apart only where they would merge
    full_ids = processing_class(prompt_text + completion_text, add_special_tokens=special)["input_ids"]
    if full_ids[: len(prompt_ids)] == prompt_ids:
        completion_ids = full_ids[len(prompt_ids) :]
    else:
        completion_ids = processing_class(completion_text, add_special_tokens=False)["input_ids"]
    if eos is not None:
        if eos in completion_ids:  # templates may write a line break after it, which is never generated
            completion_ids = completion_ids[: len(completion_ids) - completion_ids[::-1].index(eos)]
        elif conversational:
            completion_ids = _without_blank_tail(completion_ids, processing_class)
        else:
            completion_ids = [*completion_ids, eos]
    return {"prompt_ids": prompt_ids, "completion_ids": completion_ids}


def _without_blank_tail(ids: list[int], processing_class: PreTrainedTokenizerBase) -> list[int]:
    """Without white space after the last special token: turns may end with one that is not the end of text (Gemma), and a
    line break."""
    special = {index for index, token in processing_class.added_tokens_decoder.items() if token.special}
    end = max((i + 1 for i, token in enumerate(ids) if token in special), default=0)
    return ids[:end] if end and not processing_class.decode(ids[end:]).strip() else ids


def _apply_chat_template(prompt, completion, row, processing_class) -> tuple[str, str | None]:
    if processing_class.chat_template is None:
        raise ValueError(
            "The data holds conversations, but the tokenizer has no chat template. Use an instruction-tuned model's tokenizer, "
            "set `chat_template_path`, or give the prompts as texts."
        )
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools  # data sets may keep them as JSON
    kwargs = {"tools": tools or None, "tokenize": False, **(row.get("chat_template_kwargs") or {})}
    prompt_text = processing_class.apply_chat_template(prompt, add_generation_prompt=True, **kwargs)
    if completion is None:
        return prompt_text, None
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    full_text = processing_class.apply_chat_template([*prompt, *completion], **kwargs)
    if not full_text.startswith(prompt_text):
        raise ValueError(
            "The chat template writes a prompt differently once an answer follows it, so that training on the data's answers "
            f"would not match generation. The prompt ends in {prompt_text[-60:]!r}, the conversation has "
            f"{full_text[max(len(prompt_text) - 60, 0) : len(prompt_text)]!r} there. Use a template that keeps prompts as they "
            "are (TRL ships patched ones), or `prompt` rows with `lmbda=1.0`."
        )
    return prompt_text, full_text[len(prompt_text) :]


def tokenize_dataset(
    dataset: Dataset | IterableDataset,
    name: str,
    processing_class: PreTrainedTokenizerBase,
    max_length: int | None,
    needs_completions: bool,
    overlong: str = "error",
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """Replace a data set's columns by `prompt_ids` and `completion_ids`.

    A prompt is never cut. Answers are cut where `max_length` is reached, and how many were is reported. Rows whose prompt
    does not fit are refused (`overlong="error"`), or left out and counted (`"drop"`).

    Raises:
        ValueError: where prompts leave no room in `max_length`, with their number and what length would do; where no row is
            left. Streamed data is checked row by row as it comes.
    """
    kwargs = {"processing_class": processing_class, "max_length": max_length, "needs_completions": needs_completions}
    if isinstance(dataset, IterableDataset):
        columns = list(next(iter(dataset)))
        tokenized = dataset.map(_tokenize_and_cut, fn_kwargs=kwargs, remove_columns=columns)
        if overlong == "drop":
            logger.warning(
                f"`{name}` is streamed: rows whose prompt is longer than {max_length} tokens are left out uncounted."
            )
        fits = partial(_fits, raises=overlong == "error", max_length=max_length, needs_completions=needs_completions)
        return tokenized.filter(fits).remove_columns(_REPORTED)
    with PartialState().main_process_first():
        dataset = dataset.map(
            _tokenize_and_cut,
            fn_kwargs=kwargs,
            remove_columns=dataset.column_names,
            num_proc=num_proc,
            desc=f"Tokenizing {name}",
        )
    lengths = dataset["overlong_prompt"]
    too_long = [length for length in lengths if length]
    if too_long:
        found = (
            f"{len(too_long)} of {len(dataset)} prompts in `{name}` do not fit into `max_length={max_length}`; the longest has "
            f"{max(too_long)} tokens."
        )
        remedy = f"Set `max_length` to at least {max(too_long) + 1}"
        if overlong == "error" or len(too_long) == len(dataset):
            raise ValueError(f"{found} {remedy}, or set `overlong='drop'` to leave such rows out (some must remain).")
        logger.warning(f"{found} They are left out. {remedy} to keep them.")
        dataset = dataset.select([index for index, length in enumerate(lengths) if not length])
    empty = sum(not ids for ids in dataset["completion_ids"]) if needs_completions else 0
    if empty:
        raise ValueError(
            f"{empty} of {len(dataset)} rows in `{name}` have no answer, but `lmbda` is below 1, so that part of the training uses "
            "the data's own answers. Filter these rows out, or set `lmbda=1.0` or `seq_kd=True`."
        )
    cut = sum(num_tokens > 0 for num_tokens in dataset["cut_tokens"])
    if cut:
        logger.warning(
            f"{cut} of {len(dataset)} answers in `{name}` are cut at `max_length={max_length}` and so do not end with an "
            "end-of-text token. Raise `max_length` to train on them whole."
        )
    return dataset.remove_columns(_REPORTED)


def _tokenize_and_cut(
    row: dict[str, Any],
    processing_class: PreTrainedTokenizerBase,
    max_length: int | None,
    needs_completions: bool,
) -> dict[str, Any]:
    ids = tokenize_row(row, processing_class)
    length, room = len(ids["prompt_ids"]), len(ids["completion_ids"])
    if max_length is not None:
        room = max(max_length - length, 0)
    overlong = max_length is not None and (length > max_length or (needs_completions and length == max_length))
    return {
        "prompt_ids": ids["prompt_ids"],
        "completion_ids": ids["completion_ids"][:room],
        "cut_tokens": len(ids["completion_ids"][room:]),
        "overlong_prompt": length if overlong else 0,
    }


def _fits(row: dict[str, Any], raises: bool, max_length: int | None, needs_completions: bool) -> bool:
    if needs_completions and not row["completion_ids"] and not row["overlong_prompt"]:
        raise ValueError(
            "A row has no answer, but `lmbda` is below 1, so that part of the training uses the data's own answers. Filter such "
            "rows out, or set `lmbda=1.0` or `seq_kd=True`."
        )
    if row["overlong_prompt"] and raises:
        raise ValueError(
            f"A prompt has {row['overlong_prompt']} tokens and does not fit into `max_length={max_length}`. Raise "
            "`max_length`, or set `overlong='drop'` to leave such rows out."
        )
    return not row["overlong_prompt"]


def pad_rows(
    prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], pad_token_id: int
) -> dict[str, Tensor]:
    """Rows of ids to one batch: prompts padded on the left, completions on the right.

    Returns:
        `input_ids`, `attention_mask` and `labels` of shape `(batch, longest prompt + longest completion)`, with label -100 for
        everything but the completion; `prompts` and `prompt_attention_mask` of shape `(batch, longest prompt)`.
    """
    left = max(map(len, prompt_ids))
    width = left + max(map(len, completion_ids))
    input_ids = torch.full((len(prompt_ids), width), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, -100)
    for row, (prompt, completion) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
        start, end = left - len(prompt), left + len(completion)
        ids = torch.tensor([*prompt, *completion])
        input_ids[row, start:end] = ids
        attention_mask[row, start:end] = 1
        labels[row, left:end] = ids[len(prompt) :]
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": labels,
        "prompts": input_ids[:, :left],
        "prompt_attention_mask": attention_mask[:, :left],
    }


def masked_rows(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The ids of each row where the mask is set; `ids` and `mask` of shape `(batch, seq)`."""
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]


@dataclass
class DataCollatorForPromptCompletion:
    """
    Batches of tokenized rows, with the keys of TRL's ChatML collator that `GKDTrainer` reads.

    Args:
        pad_token_id (`int`): Fills up the rows; it may be the end-of-text token.
    """

    pad_token_id: int

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        return pad_rows(
            [row["prompt_ids"] for row in rows], [row["completion_ids"] for row in rows], self.pad_token_id
        )
