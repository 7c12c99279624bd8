"""From a data set to its rows' token ids, tokenized once, checked and counted."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from accelerate import PartialState
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .chat_template import RewrittenPromptError
from .rows import is_blank, split_row
from .tokenize import tokenize_row


__all__ = [
    "Limit",
    "check_columns",
    "is_empty_answer",
    "name_columns",
    "plain_rows",
    "prepare_rows",
    "tokenize_dataset",
]

logger = logging.get_logger(__name__)


def check_columns(dataset: Dataset | IterableDataset, name: str, answers_needed: str | None = None) -> None:
    """Reject a data set that cannot be trained on, before any weights are loaded.

    Args:
        name: Name of its argument, for messages.
        answers_needed: Why answers in the data are needed, and what to do without them. `None` if they are not.

    Raises:
        TypeError: if it is not a data set.
        ValueError: if it is empty, has neither `messages` nor `prompt`, or lacks answers that are needed.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        splits = f" with the keys {sorted(dataset)}" if isinstance(dataset, dict) else ""
        raise TypeError(
            f"`{name}` is a {type(dataset).__name__}{splits}; it must be a `datasets.Dataset` or "
            "`datasets.IterableDataset`. Pass one split (`dataset['train']`). Use `load_dataset(name, split=...)` for "
            "rows on the Hub or in files, `Dataset.from_list(rows)` for rows in memory."
        )
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(
            f"`{name}` is empty: it has no rows to train on or to evaluate. Check its path, split and filters."
        )
    columns = sorted(first)
    if not {"messages", "prompt", "prompt_ids"} & set(columns):
        raise ValueError(
            f"`{name}` has neither a `messages` nor a `prompt` column; its columns are {columns}. Rename a column "
            "with `dataset.rename_column`, or build `messages` (a list of {'role', 'content'}) or `prompt` with "
            "`dataset.map`."
        )
    if answers_needed is not None and not {"messages", "completion", "completion_ids"} & set(columns):
        raise ValueError(
            f"`{name}` holds prompts without answers; its columns are {columns}. {answers_needed} Or add a "
            "`completion` column."
        )


def name_columns(
    dataset: Dataset | IterableDataset,
    prompt_column: str | None = None,
    completion_column: str | None = None,
    conversational: bool = False,
) -> Dataset | IterableDataset:
    """Rename the columns that hold prompts and completions to `prompt` and `completion`. Other columns stay.

    Args:
        conversational: Turn texts into conversations, so that the chat template is used.
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


def plain_rows(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """A data set whose rows come as lists, for any format. A user's own transform (`with_transform`) stays."""
    is_transformed = isinstance(dataset, Dataset) and dataset.format["type"] == "custom"
    return dataset if is_transformed else dataset.with_format(None)


class Limit(NamedTuple):
    """A setting that bounds rows. The column `needs_<field>` holds how many tokens a row needs."""

    field: str  # such as "max_length"
    value: Any  # `None` for no limit
    what: str  # is too long, for messages


def prepare_rows(
    dataset: Dataset | IterableDataset,
    name: str,
    function: Callable[..., dict[str, Any]],
    columns: Sequence[str],
    limits: Sequence[Limit],
    answers_needed: str | None,
    overlong: str,
    num_proc: int | None,
    **fn_kwargs: Any,
) -> Dataset | IterableDataset:
    """Replace a data set's columns by the result of `function` on each row. Cached, or row by row for a stream.

    Args:
        columns: What `function` returns besides `empty_answer` and the limits' columns. Columns that end in `_ids` are
            lists of ids, those that end in `_json` and `teacher` are texts, others are whole numbers.
        limits: Rows beyond them are omitted and counted (`overlong="drop"`) or rejected (`"error"`).
        answers_needed: As for [`check_columns`].

    Raises:
        ValueError: if rows are too long, with their number and a sufficient limit. If no row remains. If answers are
            needed, and one is missing or all are empty. A stream is checked row by row.
    """
    dataset = plain_rows(dataset)
    fn_kwargs = {"function": function, "name": name, "fn_kwargs": fn_kwargs}
    measured = ["empty_answer", *(f"needs_{limit.field}" for limit in limits)]
    limits = [limit for limit in limits if limit.value is not None]
    if isinstance(dataset, IterableDataset):
        if limits and overlong == "drop":
            logger.warning(f"`{name}` is streamed, so rows that are too long are left out uncounted.")
        dataset = dataset.map(_named, fn_kwargs=fn_kwargs, remove_columns=list(next(iter(dataset))))
        keeps = partial(_keeps, name=name, limits=limits, overlong=overlong, answers_needed=answers_needed)
        return dataset.filter(keeps).remove_columns(measured)
    number = Value("int64")
    # Not guessed from the first rows, which may all have no answer
    kinds = {"ids": List(Value("int32")), "json": Value("string"), "teacher": Value("string")}
    with PartialState().main_process_first():
        dataset = dataset.map(
            _named,
            with_indices=True,
            fn_kwargs=fn_kwargs,
            remove_columns=dataset.column_names,
            features=Features({c: kinds.get(c.rpartition("_")[2], number) for c in (*columns, *measured)}),
            num_proc=num_proc,
            desc=f"Tokenizing {name}",
        )
    dataset = dataset.with_format(None)  # a transform is for the user's rows
    for limit in limits:
        dataset = _filter_overlong(dataset, name, limit, overlong)
    _check_answers(dataset, name, answers_needed)
    return dataset.remove_columns(measured)


def _named(
    row: dict, index: int | None = None, *, function: Callable[..., dict], name: str, fn_kwargs: dict[str, Any]
) -> dict:
    try:
        return function(row, **fn_kwargs)
    except ValueError as error:
        which = "A row" if index is None else f"Row {index}"
        raise ValueError(f"{which} of `{name}`: {error}") from error


def _keeps(row: dict[str, Any], name: str, limits: Sequence[Limit], overlong: str, answers_needed: str | None) -> bool:
    """Whether a stream keeps a row."""
    for field, value, what in limits:
        needed = row[f"needs_{field}"]
        if needed > value and overlong == "drop":
            return False
        if needed > value:
            raise ValueError(
                f"One of the {what} does not fit into `{field}={value}`. Set `{field}` to at least {needed}, or set "
                "`overlong='drop'` to leave such rows out."
            )
    if answers_needed is not None and not row["completion_ids"]:
        raise ValueError(f"A row in `{name}` has no answer. {answers_needed} Or filter such rows out.")
    return True


def _filter_overlong(dataset: Dataset, name: str, limit: Limit, overlong: str) -> Dataset:
    lengths = dataset[f"needs_{limit.field}"]
    kept = [index for index, length in enumerate(lengths) if length <= limit.value]
    if len(kept) == len(dataset):
        return dataset
    found = (
        f"{len(dataset) - len(kept)} of {len(dataset)} {limit.what} in `{name}` do not fit into "
        f"`{limit.field}={limit.value}`."
    )
    remedy = f"Set `{limit.field}` to at least {max(lengths)}"
    if overlong == "error":
        raise ValueError(f"{found} {remedy}, or set `overlong='drop'` to leave such rows out (some must remain).")
    if not kept:
        raise ValueError(f"{found} They would be left out, so that no row remains. {remedy}, or pass other rows.")
    logger.warning(f"{found} They are left out. {remedy} to keep them.")
    return dataset.select(kept)


def _check_answers(dataset: Dataset, name: str, answers_needed: str | None) -> None:
    """Reject rows without an answer that is needed, and warn of empty ones."""
    missing = sum(not ids for ids in dataset["completion_ids"])
    if missing and answers_needed is not None:
        raise ValueError(
            f"{missing} of {len(dataset)} rows in `{name}` have no answer. {answers_needed} Or filter these rows out."
        )
    empty, answers = sum(dataset["empty_answer"]), len(dataset) - missing
    if not empty:
        return
    effect = "the student learns to stop at once" if answers_needed else "only their end of text is compared"
    found = f"{empty} of {answers} answers in `{name}` are empty: {effect}."
    if empty == answers and answers_needed is not None:
        raise ValueError(f"{found} Check how the data was made, and pass rows with answers. {answers_needed}")
    logger.warning(f"{found} Filter them out with `dataset.filter`.")


def tokenize_dataset(
    dataset: Dataset | IterableDataset,
    name: str,
    processing_class: PreTrainedTokenizerBase,
    max_length: int | None,
    answers_needed: str | None = None,
    overlong: str = "error",
    num_proc: int | None = None,
    with_answers: bool = True,
) -> Dataset | IterableDataset:
    """Replace a data set's columns by `prompt_ids`, `completion_ids` and `length`.

    A prompt is never cut. Answers are cut at `max_length`, and a warning says how many, except for a stream. Rows
    whose prompt does not fit are rejected (`overlong="error"`), or omitted and counted (`"drop"`).

    Args:
        answers_needed: Why answers in the data are needed, and what to do without them. `None` if they are not. In
            that case, a row counts as one without an answer if the chat template writes its prompt differently once
            the answer follows.
        with_answers: `False` reads only the prompts, if no answer of the data is used.
    """
    dataset = prepare_rows(
        dataset,
        name,
        _tokenize_and_cut,
        ("prompt_ids", "completion_ids", "length", "rewritten_prompt", "cut_tokens"),
        [Limit("max_length", max_length, "prompts")],
        answers_needed,
        overlong,
        num_proc,
        processing_class=processing_class,
        max_length=max_length,
        with_answer=with_answers,
        answer_needed=answers_needed is not None,
    )
    if not isinstance(dataset, IterableDataset):
        cut, rewritten = (sum(n > 0 for n in dataset[column]) for column in ("cut_tokens", "rewritten_prompt"))
        if cut:
            logger.warning(
                f"{cut} of {len(dataset)} answers in `{name}` are cut at `max_length={max_length}` and so do not end "
                "with an end-of-text token. Raise `max_length` to train on them whole."
            )
        if rewritten:
            logger.warning(
                f"{rewritten} of {len(dataset)} rows in `{name}` count as rows without an answer: the chat template "
                "writes their prompt differently once an answer follows it, so that the model would be judged on "
                "another prompt than it is used with. Use a template that keeps prompts as they are (TRL ships "
                "patched ones) to use the data's answers."
            )
    return dataset.remove_columns(["cut_tokens", "rewritten_prompt"])


def _tokenize_and_cut(
    row: dict[str, Any],
    processing_class: PreTrainedTokenizerBase,
    max_length: int | None,
    with_answer: bool,
    answer_needed: bool,
) -> dict[str, Any]:
    rewritten = False
    try:
        ids = tokenize_row(row, processing_class, with_answer)
    except RewrittenPromptError:
        if answer_needed:
            raise
        ids, rewritten = tokenize_row(row, processing_class, with_answer=False), True
    prompt_ids, completion_ids = ids["prompt_ids"], ids["completion_ids"]
    kept = completion_ids if max_length is None else completion_ids[: max(max_length - len(prompt_ids), 0)]
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": kept,
        "length": len(prompt_ids) + len(kept),  # for `train_sampling_strategy="group_by_length"`
        "empty_answer": int(is_empty_answer(row, completion_ids, processing_class)),
        "rewritten_prompt": int(rewritten),
        "cut_tokens": len(completion_ids) - len(kept),
        "needs_max_length": len(prompt_ids) + (1 if with_answer and answer_needed else 0),
    }


def is_empty_answer(
    row: Mapping[str, Any], completion_ids: list[int], processing_class: PreTrainedTokenizerBase
) -> bool:
    """Whether a row has an answer, but an empty one. A template may write more than an end of text for it."""
    if not completion_ids or set(completion_ids) == {processing_class.eos_token_id}:
        return bool(completion_ids)
    return row.get("prompt_ids") is None and is_blank(split_row(row)[1], processing_class.eos_token)
