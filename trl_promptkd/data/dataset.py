"""From a data set to its rows' token ids: checked, counted and, where rows are unusable, refused with their number."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from accelerate import PartialState
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .chat_template import RewrittenPromptError
from .rows import NO_TOKENS, check_ids, check_text_only, is_blank, split_row
from .tokenize import tokenize_row


__all__ = [
    "check_answers",
    "check_columns",
    "is_empty_answer",
    "map_rows",
    "name_columns",
    "plain_rows",
    "sift_overlong",
    "tokenize_dataset",
]

logger = logging.get_logger(__name__)


def check_columns(dataset: Dataset | IterableDataset, name: str, answers_needed: str | None = None) -> None:
    """Refuse a data set that cannot be trained on, before any weights are loaded.

    Args:
        dataset: What the user passed.
        name: Argument it was passed as, for messages.
        answers_needed: Why answers in the data are needed and what to do without them; `None` where they are not.

    Raises:
        TypeError: for what is no data set.
        ValueError: for an empty data set, one without `messages` or `prompt`, and one without answers where they are
            needed.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(
            f"`{name}` is a {type(dataset).__name__}; it must be a `datasets.Dataset` or `datasets.IterableDataset`. "
            "Use `load_dataset(name, split=...)` for one that is on the Hub or in files, `Dataset.from_list(rows)` "
            "for rows in memory."
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


def plain_rows(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """A data set whose rows come as lists, whatever its format; a transform of the user's own (`with_transform`)
    stays."""
    is_transformed = isinstance(dataset, Dataset) and dataset.format["type"] == "custom"
    return dataset if is_transformed else dataset.with_format(None)


def map_rows(
    dataset: Dataset | IterableDataset,
    name: str,
    function: Callable[..., dict],
    columns: Sequence[str],
    num_proc: int | None,
    **fn_kwargs,
) -> Dataset | IterableDataset:
    """Replace a data set's columns by what `function` makes of each row: once, cached; a stream's as they come.

    Args:
        columns: What `function` returns: lists of ids if they end in `_ids`, else whole numbers.
    """
    fn_kwargs = {"function": function, "name": name, "fn_kwargs": fn_kwargs}
    dataset = plain_rows(dataset)
    if isinstance(dataset, IterableDataset):
        return dataset.map(_named, fn_kwargs=fn_kwargs, remove_columns=list(next(iter(dataset))))
    number = Value("int64")
    with PartialState().main_process_first():
        dataset = dataset.map(
            _numbered,
            with_indices=True,
            fn_kwargs=fn_kwargs,
            remove_columns=dataset.column_names,
            # Not guessed from the first rows, which may all have no answer
            features=Features({name: List(number) if name.endswith("_ids") else number for name in columns}),
            num_proc=num_proc,
            desc=f"Tokenizing {name}",
        )
    return dataset.with_format(None)  # a transform is for the user's rows


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
        ValueError: with the number of rows and the limit that would do; also where no row would be left. Streamed
            data is checked row by row as it comes.
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
    """Refuse rows whose answer is missing, if answers are needed, and warn of empty ones; a stream's missing ones are
    refused as they come. Drops the column `empty_answer`."""
    if isinstance(dataset, IterableDataset):
        dataset = dataset.remove_columns("empty_answer")
        if answers_needed is None:
            return dataset
        return dataset.filter(partial(_has_answer, name=name, answers_needed=answers_needed))
    missing = sum(not ids for ids in dataset["completion_ids"])
    if missing and answers_needed is not None:
        raise ValueError(
            f"{missing} of {len(dataset)} rows in `{name}` have no answer. {answers_needed} Or filter these rows out."
        )
    empty, answers = sum(dataset["empty_answer"]), len(dataset) - missing
    if empty:
        effect = (
            "only their end of text is compared" if answers_needed is None else "the student learns to stop at once"
        )
        found = f"{empty} of {answers} answers in `{name}` are empty: {effect}."
        if empty == answers and answers_needed is not None:
            raise ValueError(f"{found} Check how the data was made, and pass rows with answers. {answers_needed}")
        logger.warning(f"{found} Filter them out with `dataset.filter`.")
    return dataset.remove_columns("empty_answer")


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
    with_answers: bool = True,
) -> Dataset | IterableDataset:
    """Replace a data set's columns by `prompt_ids`, `completion_ids` and `length`.

    A prompt is never cut. Answers are cut where `max_length` is reached, and how many were is reported. Rows whose
    prompt does not fit are refused (`overlong="error"`), or left out and counted (`"drop"`).

    Args:
        answers_needed: Why answers in the data are needed and what to do without them; `None` if they are not. A row
            then counts as one without an answer if the chat template writes its prompt differently once the answer
            follows.
        with_answers: `False` takes the prompts alone, if no answer of the data is used.

    Raises:
        ValueError: where prompts leave no room in `max_length`, with their number and what length would do; where no
            row is left; where an answer is missing and needed, and if all are empty. Streamed data is checked row by
            row as it comes.
    """
    dataset = map_rows(
        dataset,
        name,
        _tokenize_and_cut,
        (
            "prompt_ids",
            "completion_ids",
            "length",
            "empty_answer",
            "rewritten_prompt",
            "cut_tokens",
            "overlong_prompt",
        ),
        num_proc,
        processing_class=processing_class,
        max_length=max_length,
        answers="none" if not with_answers else "any" if answers_needed is None else "needed",
    )
    dataset = sift_overlong(dataset, name, "prompts", "overlong_prompt", "max_length", max_length, overlong)
    dataset = check_answers(dataset, name, answers_needed)
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
    answers: str,
) -> dict[str, Any]:
    check_text_only(row)
    if answers == "none":
        row = {name: value for name, value in row.items() if name != "completion_ids"}
    check_ids(row, processing_class)
    rewritten = False
    try:
        ids = tokenize_row(row, processing_class, with_answer=answers != "none")
    except RewrittenPromptError:
        if answers == "needed":
            raise
        ids, rewritten = tokenize_row(row, processing_class, with_answer=False), True
    if not ids["prompt_ids"]:
        raise ValueError(NO_TOKENS)
    length, room = len(ids["prompt_ids"]), len(ids["completion_ids"])
    if max_length is not None:
        room = max(max_length - length, 0)
    overlong = max_length is not None and (length > max_length or (answers == "needed" and length == max_length))
    return {
        "prompt_ids": ids["prompt_ids"],
        "completion_ids": ids["completion_ids"][:room],
        "length": length + len(ids["completion_ids"][:room]),  # for `train_sampling_strategy="group_by_length"`
        "empty_answer": int(is_empty_answer(row, ids["completion_ids"], processing_class)),
        "rewritten_prompt": int(rewritten),
        "cut_tokens": len(ids["completion_ids"][room:]),
        "overlong_prompt": length + 1 if overlong else 0,
    }


def is_empty_answer(
    row: Mapping[str, Any], completion_ids: list[int], processing_class: PreTrainedTokenizerBase
) -> bool:
    """Whether a row has an answer, but one that says nothing: a template may write more than an end of text for it."""
    if not completion_ids or set(completion_ids) == {processing_class.eos_token_id}:
        return bool(completion_ids)
    return row.get("prompt_ids") is None and is_blank(split_row(row)[1], processing_class.eos_token)
