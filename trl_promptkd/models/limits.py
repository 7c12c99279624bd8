"""The limits of a model: the tokens that it embeds, and its positions.

If a tokenizer was extended and a model was not resized, the model has no embeddings for the new tokens.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from datasets import IterableDataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase


__all__ = ["Embedded", "check_positions", "check_rows_embedded", "embedded_by", "position_limit"]

# A role ("student", "teacher") -> the number of ids that its model embeds, and the columns of rows that it sees
Embedded = Mapping[str, tuple[int, Sequence[str]]]


def embedded_by(
    models: Mapping[str, tuple[PreTrainedModel, Sequence[str]]], processing_class: PreTrainedTokenizerBase
) -> Embedded:
    """What the model of each role embeds. The pad token and the end-of-text token must be embedded.

    Raises:
        ValueError: naming a token without an embedding.
    """
    embedded = {}
    for role, (model, columns) in models.items():
        embeddings: Any = model.get_input_embeddings()
        size = getattr(embeddings, "num_embeddings", model.config.get_text_config().vocab_size)
        embedded[role] = (size, columns)
    for kind in ("pad", "eos"):
        index = getattr(processing_class, f"{kind}_token_id")
        for role, (size, _) in embedded.items():
            if index is not None and index >= size:
                hint = " Or set `tokenizer.pad_token = tokenizer.eos_token`." if kind == "pad" else ""
                token = getattr(processing_class, f"{kind}_token")
                raise ValueError(f"The tokenizer's {kind} token is {token!r}{_missing(index, role, size)}{hint}")
    return embedded


def check_rows_embedded(dataset: Any, name: str, processing_class: PreTrainedTokenizerBase, embedded: Embedded) -> Any:
    """Reject tokenized rows with a token that a model has no embedding for.

    The tokenizer may know more tokens than a model, such as those of images, as long as they do not occur.

    Returns:
        The data set, or a stream that checks its rows as they come.

    Raises:
        ValueError: naming the token and the model.
    """
    if isinstance(dataset, dict):
        return {
            key: check_rows_embedded(part, f"{name}[{key!r}]", processing_class, embedded)
            for key, part in dataset.items()
        }
    tokens = {index: token for token, index in processing_class.get_vocab().items()}
    if dataset is None or max(tokens) < min(size for size, _ in embedded.values()):
        return dataset
    check = partial(_check_row, name=name, tokens=tokens, embedded=embedded)
    if isinstance(dataset, IterableDataset):
        return dataset.map(check)
    columns = sorted({column for _, columns in embedded.values() for column in columns})
    for row in dataset.select_columns(columns):
        check(row)
    return dataset


def _check_row(row: Mapping[str, Any], name: str, tokens: Mapping[int, str], embedded: Embedded) -> dict[str, Any]:
    for role, (size, columns) in embedded.items():
        index = max(max(row[column], default=0) for column in columns)
        if index >= size:
            raise ValueError(f"A row of `{name}` holds the token {tokens[index]!r}{_missing(index, role, size)}")
    return {}


def _missing(index: int, role: str, size: int) -> str:
    model = "model" if role == "student" else "teacher_model"
    return (
        f" with id {index}, but the {role} has embeddings for the ids below {size} only. A token was added to the "
        f"tokenizer, and the {role} was not resized: call `{model}.resize_token_embeddings(len(tokenizer))` on the "
        f"loaded {role}, and on the other model too."
    )


def position_limit(model: PreTrainedModel) -> int | None:
    """The number of learned absolute positions of a model (GPT-2, OPT, ...), or `None` if it has none."""
    names = ("wpe", "embed_positions", "position_embeddings")
    learned = any(isinstance(m, nn.Embedding) and name.endswith(names) for name, m in model.named_modules())
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) if learned else None


def check_positions(role: str, model: PreTrainedModel, longest: int, remedy: str) -> None:
    """Reject rows before training if a model has too few learned positions for them.

    Args:
        longest: Positions that the longest row needs.
        remedy: What the user can do, for the message.
    """
    limit = position_limit(model)
    if limit is not None and longest > limit:
        raise ValueError(f"The {role} has {limit} positions, but the longest row needs {longest}. {remedy}")
