"""From a user's rows to token ids, and from token ids to padded batches.

A row becomes two lists of ids, `prompt_ids` and `completion_ids`, once, before training. A batch pads the prompts on the
left and the completions on the right, so that both start at the same column in every row; what is padding is known from
lengths and never from ids, as many models pad with their end-of-text token.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import jinja2
import torch
from accelerate import Accelerator, PartialState
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging


__all__ = [
    "DataCollatorForPromptCompletion",
    "check_answers",
    "check_columns",
    "check_ids",
    "count_trained_tokens",
    "grouped_by_length",
    "map_rows",
    "masked_rows",
    "name_columns",
    "pad_rows",
    "sift_overlong",
    "split_row",
    "tokenize_dataset",
    "tokenize_row",
    "without_repeats",
]

logger = logging.get_logger(__name__)

NO_TOKENS = "A row's prompt has no tokens, so that nothing comes before its answer's first one. Filter such rows out."


def check_columns(dataset: Dataset | IterableDataset, name: str, answers_needed: str | None = None) -> None:
    """Refuse a data set that cannot be trained on, before any weights are loaded.

    Args:
        dataset: What the user passed.
        name: Argument it was passed as, for messages.
        answers_needed: Why answers in the data are needed and what to do without them; `None` where they are not.

    Raises:
        TypeError: for what is no data set.
        ValueError: for an empty data set, one without `messages` or `prompt`, and one without answers where they are needed.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(
            f"`{name}` is a {type(dataset).__name__}; it must be a `datasets.Dataset` or `datasets.IterableDataset`. Use "
            "`load_dataset(name, split=...)` for one that is on the Hub or in files, `Dataset.from_list(rows)` for rows in memory."
        )
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
    if answers_needed is not None and not {"messages", "completion", "completion_ids"} & set(columns):
        raise ValueError(
            f"`{name}` holds prompts without answers; its columns are {columns}. {answers_needed} Or add a `completion` column."
        )


def name_columns(
    dataset: Dataset | IterableDataset,
    prompt_column: str | None = None,
    completion_column: str | None = None,
    conversational: bool = False,
) -> Dataset | IterableDataset:
    """`prompt` and `completion` from the columns that hold them; the other columns stay.

    Args:
        conversational: Make conversations of texts, so that the chat template is used.

    Raises:
        ValueError: for a column that is not there, naming those that are.
    """
    for name, column in (("prompt", prompt_column), ("completion", completion_column)):
        if column not in (None, name):
            if column not in next(iter(dataset)):
                raise ValueError(f"`{name}_column` is {column!r}; the columns are {sorted(next(iter(dataset)))}.")
            dataset = dataset.rename_column(column, name)
    return dataset.map(_to_conversation) if conversational else dataset


def _to_conversation(row: dict[str, Any]) -> dict[str, Any]:
    roles = (("prompt", "user"), ("completion", "assistant"))
    return {name: [{"role": role, "content": row[name]}] for name, role in roles if isinstance(row.get(name), str)}


def split_row(row: dict[str, Any]) -> tuple[Any, Any]:
    """A row's prompt and its answer: texts or lists of messages; the answer is `None` where there is none.

    Raises:
        ValueError: where either is something else, and where `messages` do not end with an assistant message.
    """
    messages = row.get("messages")
    if messages is None:
        prompt, completion = row.get("prompt"), row.get("completion")
        for name, value in (("prompt", prompt), ("completion", completion)):
            if value is not None and not isinstance(value, str):
                _check_messages(name, value)
        if isinstance(prompt, str) and completion is not None and not isinstance(completion, str):
            raise ValueError(
                "A row's `prompt` is a text, but its `completion` a list of messages. Make both texts or both messages."
            )
        if isinstance(completion, list) and completion[-1]["role"] != "assistant":
            raise ValueError(
                "A row's `completion` must end with an assistant message, the answer. Its roles are "
                f"{[message['role'] for message in completion]}. Filter such rows out, or leave away what follows the answer."
            )
        return prompt, completion
    if messages or not isinstance(messages, list | tuple):
        _check_messages("messages", messages)
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError(
            "A row's `messages` must end with an assistant message, the answer. Rows without an answer go into a "
            f"`prompt` column. The row's roles are {[message['role'] for message in messages]}."
        )
    if len(messages) == 1:
        raise ValueError("A row's `messages` hold an answer only. A message that it answers must come before it.")
    return messages[:-1], messages[-1:]


def _check_messages(name: str, messages: Any) -> None:
    """Refuse what is no list of messages; chat templates would write `None` for a text that is missing."""
    form = "{'role': 'user', 'content': 'a text'}"
    if not isinstance(messages, list | tuple) or not all(isinstance(message, Mapping) for message in messages):
        allowed = "a list of messages" if name == "messages" else "a text or a list of messages"
        raise ValueError(f"A row's `{name}` is {_shortened(messages)}; it must be {allowed}, such as {form}.")
    if not messages:
        raise ValueError(
            f"A row's `{name}` is an empty list of messages. Filter such rows out; for a row without an answer the completion is None."
        )
    for message in messages:
        content = message.get("content")
        # Calls of tools, thoughts: other keys may stand for the text
        says_more = any(value is not None for key, value in message.items() if key not in ("role", "content"))
        says = isinstance(content, str | list) or (content is None and says_more)
        if not isinstance(message.get("role"), str) or not says:
            raise ValueError(
                f"A row's `{name}` hold the message {_shortened(dict(message))}; it must have a role and a content, such as {form}."
            )


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def check_ids(row: Mapping[str, Any], processing_class: PreTrainedTokenizerBase) -> None:
    """Refuse a row that is tokenized already, and whose ids are no tokens.

    Raises:
        ValueError: naming the column and what is wrong in it.
    """
    if row.get("prompt_ids") is None:
        return
    for name in ("prompt_ids", "teacher_prompt_ids", "completion_ids"):
        ids = row.get(name)
        if ids is None:
            continue
        if not isinstance(ids, list) or not set(map(type, ids)) <= {int}:
            raise ValueError(
                f"A row's `{name}` are {_shortened(ids)}; they must be a list of whole numbers, the token ids."
            )
        if ids and (min(ids) < 0 or max(ids) >= len(processing_class)):
            known = set(processing_class.get_vocab().values())  # ids may have gaps
            strange = next((token for token in ids if token not in known), None)
            if strange is not None:
                raise ValueError(
                    f"A row's `{name}` hold the id {strange}, which the tokenizer does not have (its ids go up to {max(known)}). Tokenize "
                    "the data with the tokenizer that is passed as `processing_class`, or pass texts or messages."
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
    prompt, completion = split_row(row)
    if prompt is None:
        raise ValueError("A row has neither a prompt nor messages (both are missing or None). Filter such rows out.")
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
    tools, more = row.get("tools"), row.get("chat_template_kwargs") or {}
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools  # data sets may keep them as JSON
    except json.JSONDecodeError as error:
        raise ValueError(f"A row's `tools` are the text {_shortened(tools)}, which is not JSON: {error}.") from error
    if not isinstance(tools or [], list):
        raise ValueError(
            f"A row's `tools` are {_shortened(tools)}; they must be a list of JSON schemas, or JSON of one."
        )
    if not isinstance(more, Mapping):
        raise ValueError(f"A row's `chat_template_kwargs` are {_shortened(more)}; they must be a dict.")
    kwargs = {"tools": tools or None, "tokenize": False, **more}
    try:
        prompt_text = processing_class.apply_chat_template(prompt, add_generation_prompt=True, **kwargs)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"The chat template is not valid Jinja: {error.message} (line {error.lineno}). Correct the file of `chat_template_path`, or "
            "`tokenizer.chat_template`."
        ) from error
    except jinja2.TemplateError as error:
        roles = [message["role"] for message in prompt]
        raise ValueError(
            f"The chat template refuses a conversation with the roles {roles}: {error}. Change the data"
            + (" (this template may have no system role)." if "system" in roles else ".")
        ) from error
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


def map_rows(
    dataset: Dataset | IterableDataset, name: str, function: Callable[..., dict], num_proc: int | None, **fn_kwargs
) -> Dataset | IterableDataset:
    """Replace a data set's columns by what `function` makes of each row: once, cached; a stream's as they come."""
    fn_kwargs = {"function": function, "name": name, "fn_kwargs": fn_kwargs}
    if isinstance(dataset, IterableDataset):
        return dataset.map(_named, fn_kwargs=fn_kwargs, remove_columns=list(next(iter(dataset))))
    with PartialState().main_process_first():
        return dataset.with_format(None).map(  # lists, whatever the rows would come as
            _numbered,
            with_indices=True,
            fn_kwargs=fn_kwargs,
            remove_columns=dataset.column_names,
            num_proc=num_proc,
            desc=f"Tokenizing {name}",
        )


def _named(
    row: dict, function: Callable[..., dict], name: str, fn_kwargs: dict[str, Any], which: str = "A row"
) -> dict:
    try:
        return function(row, **fn_kwargs)
    except ValueError as error:
        raise ValueError(f"{which} of `{name}`: {error}") from error


def _numbered(row: dict, index: int, **kwargs: Any) -> dict:
    return _named(row, which=f"Row {index}", **kwargs)


def sift_overlong(
    dataset: Dataset | IterableDataset, name: str, what: str, column: str, field: str, limit: int | None, overlong: str
) -> Dataset | IterableDataset:
    """Leave out (`overlong="drop"`) or refuse (`"error"`) rows that are too long, and drop the column that says so.

    Args:
        what: What is too long, for messages.
        column: Holds the length that a row's limit would have to be raised to, or 0 where it fits.
        field: The setting that bounds it, such as `"max_length"`.
        limit: Its value; `None` for no limit.

    Raises:
        ValueError: with the number of rows and the limit that would do; also where no row would be left. Streamed data is
            checked row by row as it comes.
    """
    if limit is None:
        return dataset.remove_columns(column)
    bound = f"{field}={limit}"
    if isinstance(dataset, IterableDataset):
        if overlong == "drop":
            logger.warning(f"`{name}` is streamed: {what} that do not fit into `{bound}` are left out uncounted.")
        fits = partial(_fits, column=column, what=what, field=field, bound=bound, raises=overlong == "error")
        return dataset.filter(fits).remove_columns(column)
    lengths = dataset[column]
    too_long = [length for length in lengths if length]
    if too_long:
        found = f"{len(too_long)} of {len(dataset)} {what} in `{name}` do not fit into `{bound}`."
        remedy = f"Set `{field}` to at least {max(too_long)}"
        if overlong != "error" and len(too_long) == len(dataset):
            raise ValueError(f"{found} They would be left out, so that no row remains. {remedy}, or pass other rows.")
        if overlong == "error":
            raise ValueError(f"{found} {remedy}, or set `overlong='drop'` to leave such rows out (some must remain).")
        logger.warning(f"{found} They are left out. {remedy} to keep them.")
        dataset = dataset.select([index for index, length in enumerate(lengths) if not length])
    return dataset.remove_columns(column)


def _fits(row: dict[str, Any], column: str, what: str, field: str, bound: str, raises: bool) -> bool:
    if row[column] and raises:
        raise ValueError(
            f"One of the {what} does not fit into `{bound}`. Set `{field}` to at least {row[column]}, or set "
            "`overlong='drop'` to leave such rows out."
        )
    return not row[column]


def check_answers(
    dataset: Dataset | IterableDataset, name: str, answers_needed: str | None
) -> Dataset | IterableDataset:
    """Refuse rows whose answer is missing, where answers are needed; a stream's as they come."""
    if answers_needed is None:
        return dataset
    if isinstance(dataset, IterableDataset):
        return dataset.filter(partial(_has_answer, name=name, answers_needed=answers_needed))
    empty = sum(not ids for ids in dataset["completion_ids"])
    if empty:
        raise ValueError(
            f"{empty} of {len(dataset)} rows in `{name}` have no answer. {answers_needed} Or filter these rows out."
        )
    return dataset


def _has_answer(row: dict[str, Any], name: str, answers_needed: str) -> bool:
    if not row["completion_ids"]:
        raise ValueError(f"A row in `{name}` has no answer. {answers_needed} Or filter such rows out.")
    return True


def tokenize_dataset(
    dataset: Dataset | IterableDataset,
    name: str,
    processing_class: PreTrainedTokenizerBase,
    max_length: int | None,
    answers_needed: str | None = None,
    overlong: str = "error",
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """Replace a data set's columns by `prompt_ids`, `completion_ids` and `length`.

    A prompt is never cut. Answers are cut where `max_length` is reached, and how many were is reported. Rows whose prompt
    does not fit are refused (`overlong="error"`), or left out and counted (`"drop"`).

    Raises:
        ValueError: where prompts leave no room in `max_length`, with their number and what length would do; where no row is
            left; where an answer is missing and needed. Streamed data is checked row by row as it comes.
    """
    dataset = map_rows(
        dataset,
        name,
        _tokenize_and_cut,
        num_proc,
        processing_class=processing_class,
        max_length=max_length,
        needs_completions=answers_needed is not None,
    )
    dataset = sift_overlong(dataset, name, "prompts", "overlong_prompt", "max_length", max_length, overlong)
    dataset = check_answers(dataset, name, answers_needed)
    cut = 0 if isinstance(dataset, IterableDataset) else sum(tokens > 0 for tokens in dataset["cut_tokens"])
    if cut:
        logger.warning(
            f"{cut} of {len(dataset)} answers in `{name}` are cut at `max_length={max_length}` and so do not end with an "
            "end-of-text token. Raise `max_length` to train on them whole."
        )
    return dataset.remove_columns("cut_tokens")


def _tokenize_and_cut(
    row: dict[str, Any],
    processing_class: PreTrainedTokenizerBase,
    max_length: int | None,
    needs_completions: bool,
) -> dict[str, Any]:
    check_ids(row, processing_class)
    ids = tokenize_row(row, processing_class)
    if not ids["prompt_ids"]:
        raise ValueError(NO_TOKENS)
    length, room = len(ids["prompt_ids"]), len(ids["completion_ids"])
    if max_length is not None:
        room = max(max_length - length, 0)
    overlong = max_length is not None and (length > max_length or (needs_completions and length == max_length))
    return {
        "prompt_ids": ids["prompt_ids"],
        "completion_ids": ids["completion_ids"][:room],
        "length": length + len(ids["completion_ids"][:room]),  # for `train_sampling_strategy="group_by_length"`
        "cut_tokens": len(ids["completion_ids"][room:]),
        "overlong_prompt": length + 1 if overlong else 0,
    }


def pad_rows(
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    pad_token_id: int,
    pad_to_multiple_of: int | None = None,
) -> dict[str, Tensor]:
    """Rows of ids to one batch: prompts padded on the left, completions on the right (there also up to a multiple).

    Returns:
        `input_ids`, `attention_mask` and `labels` of shape `(batch, longest prompt + longest completion)`, with label -100 for
        everything but the completion; `prompts` and `prompt_attention_mask` of shape `(batch, longest prompt)`.
    """
    left = max(map(len, prompt_ids))
    width = left + max(map(len, completion_ids))
    width += -width % (pad_to_multiple_of or 1)
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


def grouped_by_length(lengths: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Which rows go into which micro-batch, the longest first, so that rows are padded to their likes.

    Args:
        lengths: Of all rows.
        sizes: Rows a micro-batch, adding up to the number of rows.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    ends = list(accumulate(sizes))
    return [order[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def count_trained_tokens(batches: Sequence[Mapping[str, Tensor]], accelerator: Accelerator, step: int) -> Tensor:
    """How many tokens the micro-batches of one window train on, on all ranks together: a scalar. None is a warning."""
    local = torch.stack([(batch["labels"][:, 1:] != -100).sum() for batch in batches]).sum()
    total = accelerator.reduce(local.to(accelerator.device), reduction="sum")
    if total == 0:
        logger.warning(f"Step {step + 1} has nothing to train on: all labels of its rows are -100, on all ranks.")
    return total


def without_repeats(labels: Tensor, accelerator: Accelerator) -> Tensor:
    """Labels of an evaluation batch, -100 in the rows with which accelerate filled up the last batches of several ranks."""
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return labels
    real = max(state.remainder - accelerator.process_index * len(labels), 0)
    return torch.where(torch.arange(len(labels), device=labels.device).unsqueeze(1) < real, labels, -100)


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
