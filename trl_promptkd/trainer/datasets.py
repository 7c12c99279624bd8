"""What both trainers do with a data set, or a `dict` of them, before and after models are loaded."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import check_columns, tokenize_dataset
from ..models.limits import check_positions, check_rows_embedded, embedded_by


__all__ = ["View", "check_streamed_evaluation", "checked_rows", "map_parts", "tokenize_part"]


def map_parts(function: Callable[..., Any], dataset: Any, name: str, *args: Any) -> Any:
    """`function(dataset, name, *args)`, or that of each data set if `dataset` is a `dict`. `None` stays `None`."""
    if isinstance(dataset, dict):
        return {key: function(part, f"{name}[{key!r}]", *args) for key, part in dataset.items()}
    return None if dataset is None else function(dataset, name, *args)


def check_streamed_evaluation(dataset: Any, name: str, args: Any) -> None:
    """Reject streamed evaluation data on several ranks. Its last rows would be counted twice, or would not fit
    together.

    Raises:
        ValueError: saying what to do.
    """
    map_parts(_check_streamed_part, dataset, name, args.world_size)


def _check_streamed_part(dataset: Any, name: str, world_size: int) -> None:
    if isinstance(dataset, IterableDataset) and world_size > 1:
        raise ValueError(
            f"`{name}` is streamed, but it is shared out to {world_size} processes, which need to know how many rows "
            "there are. Load it without streaming. For the first rows of a stream: "
            "`Dataset.from_list(list(stream.take(1000)))`. (Training data may be streamed.)"
        )


class View(NamedTuple):
    """A row as one of the models sees it."""

    role: str
    """`"student"` or `"teacher"`, for messages."""
    model: PreTrainedModel
    prompt_column: str
    num_virtual_tokens: int = 0
    """Positions that a soft prompt takes."""
    teachers: Sequence[str] | None = None
    """The model sees only rows that name one of these teachers. `None`: all rows."""


def checked_rows(trainer: Any, dataset: Any, name: str, max_new_tokens: int) -> Any:
    """Reject tokenized rows for which one of the models lacks embeddings or learned positions.

    Args:
        trainer: Its `_views` say what each model sees. Rows for a user's own collator are not checked.
        max_new_tokens: Length of the longest sampled completion.

    Raises:
        ValueError: naming the token, or how many positions there are and how many are needed.
    """
    tokenizer, views = trainer.processing_class, trainer._views
    embedded = embedded_by(
        {view.role: (view.model, (view.prompt_column, "completion_ids")) for view in views}, tokenizer
    )
    if not trainer._tokenizes:
        return dataset
    map_parts(_check_row_positions, dataset, name, views, max_new_tokens)
    return check_rows_embedded(dataset, name, tokenizer, embedded)


def _check_row_positions(dataset: Any, name: str, views: Sequence[View], max_new_tokens: int) -> None:
    if not isinstance(dataset, Dataset):
        return  # a stream's rows are not known
    completions = list(map(len, dataset["completion_ids"]))
    for view in views:
        prompts = list(map(len, dataset[view.prompt_column]))
        asked = dataset["teacher"] if view.teachers else [None] * len(prompts)
        longest = max(
            (
                prompt + max(completion, max_new_tokens)
                for prompt, completion, teacher in zip(prompts, completions, asked, strict=True)
                if view.teachers is None or teacher in view.teachers
            ),
            default=0,
        )
        also = [f"a soft prompt of {view.num_virtual_tokens}"] if view.num_virtual_tokens else []
        also += [f"`max_new_tokens={max_new_tokens}`"] if max_new_tokens else []
        with_them = f"That is with {' and '.join(also)}. " if also else ""
        lower = "Lower `max_new_tokens`" if max_new_tokens else "Lower `max_length` or `teacher_max_length`"
        remedy = f"{with_them}{lower}, or filter the longest rows of `{name}` out."
        check_positions(view.role, view.model, longest + view.num_virtual_tokens, remedy)


def tokenize_part(
    dataset: Any,
    name: str,
    processing_class: PreTrainedTokenizerBase,
    args: Any,
    answers_needed: str | None = None,
    with_answers: bool = True,
) -> Any:
    """Check and tokenize a data set for PromptKD.

    Args:
        answers_needed, with_answers: As in [`~trl_promptkd.data.tokenize_dataset`].
    """
    check_columns(dataset, name, answers_needed)
    tokenized = tokenize_dataset(
        dataset,
        name,
        processing_class,
        args.max_length,
        answers_needed,
        args.overlong,
        args.dataset_num_proc,
        with_answers,
    )
    return tokenized.shuffle(seed=args.seed) if args.shuffle_dataset else tokenized
