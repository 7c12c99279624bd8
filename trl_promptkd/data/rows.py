"""The prompt and the answer of a row, checked, and without the `None`s that Arrow fills in."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from .._trl import remove_none_values


__all__ = ["check_ids", "check_text_only", "is_blank", "joined_text", "shortened", "split_row"]

_FORM = "{'role': 'user', 'content': 'a text'}"
_MEDIA = ("image", "images", "audio", "audios", "video", "videos")  # columns of multimodal data sets
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # what templates call an answer's thoughts


def split_row(row: Mapping[str, Any], with_answer: bool = True) -> tuple[Any, Any]:
    """A row's prompt and its answer: texts or lists of messages, `None` if there is none.

    Args:
        with_answer: `False` neither checks nor returns the answer.

    Raises:
        ValueError: if either is anything else or holds more than text, or if `messages` do not end with an assistant
            message.
    """
    check_text_only(row)
    if row.get("messages") is not None:
        return _split_messages(row["messages"], with_answer)
    prompt, completion = row.get("prompt"), row.get("completion") if with_answer else None
    for name, value in (("prompt", prompt), ("completion", completion)):
        if value is not None and not isinstance(value, str):
            _check_messages(name, value)
    if completion is not None and not isinstance(completion, str):
        if isinstance(prompt, str):
            raise ValueError(
                "A row's `prompt` is a text, but its `completion` a list of messages. Make both texts or both "
                "messages."
            )
        if completion[-1]["role"] != "assistant":
            raise ValueError(
                "A row's `completion` must end with an assistant message, the answer. Its roles are "
                f"{_roles(completion)}. Filter such rows out, or omit what follows the answer."
            )
    return _given(prompt), _given(completion)


def _split_messages(messages: Any, with_answer: bool) -> tuple[Any, Any]:
    if messages or not isinstance(messages, list | tuple):
        _check_messages("messages", messages, last_counts=with_answer)
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError(
            "A row's `messages` must end with an assistant message, the answer. Rows without an answer go into a "
            f"`prompt` column. The row's roles are {_roles(messages)}."
        )
    if len(messages) == 1:
        raise ValueError("A row's `messages` hold an answer only. A message that it answers must come before it.")
    messages = _given(messages)
    return messages[:-1], messages[-1:] if with_answer else None


def _roles(messages: Any) -> list[str]:
    return [message["role"] for message in messages]


def _given(value: Any) -> Any:
    """The value without keys that are `None`. Arrow gives all rows the same keys, and fills in missing values."""
    return value if value is None or isinstance(value, str) else remove_none_values(list(value))


def _check_messages(name: str, messages: Any, last_counts: bool = True) -> None:
    """Reject anything that is not a list of messages. Chat templates would write `None` for a missing text.

    Args:
        last_counts: Whether the last message's content is also checked.
    """
    if not isinstance(messages, list | tuple) or not all(isinstance(message, Mapping) for message in messages):
        allowed = "a list of messages" if name == "messages" else "a text or a list of messages"
        raise ValueError(f"A row's `{name}` is {shortened(messages)}; it must be {allowed}, such as {_FORM}.")
    if not messages:
        raise ValueError(
            f"A row's `{name}` is an empty list of messages. Filter such rows out; for a row without an answer the "
            "completion is None."
        )
    for index, message in enumerate(messages):
        counts = last_counts or index < len(messages) - 1
        if not isinstance(message.get("role"), str) or (counts and not _says_something(message)):
            raise ValueError(
                f"A row's `{name}` hold the message {shortened(dict(message))}; it must have a role and a content, "
                f"such as {_FORM}."
            )
        calls = message.get("tool_calls") or []
        if counts and not (isinstance(calls, list | tuple) and all(isinstance(call, Mapping) for call in calls)):
            raise ValueError(
                f"A row's `{name}` hold the `tool_calls` {shortened(calls)}; they must be a list of dicts, one for "
                "each call."
            )
        if counts and isinstance(message.get("content"), list):
            _check_parts(name, message["content"])


def _says_something(message: Mapping[str, Any]) -> bool:
    """Whether a message has a content, or another key in its place, such as tool calls or thoughts."""
    others = [value for key, value in message.items() if key not in ("role", "content")]
    content = message.get("content")
    return isinstance(content, str | list) or (
        content is None and any(value not in (None, "", []) for value in others)
    )


def _check_parts(name: str, parts: list[Any]) -> None:
    for part in parts:
        if isinstance(part, Mapping) and part.get("type") not in (None, "text"):
            raise ValueError(
                f"A row's `{name}` hold a content part of the type {part['type']!r}, but only parts of the type "
                "'text' are supported. Filter such rows out, or take those parts out of the data."
            )
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            raise ValueError(
                f"A row's `{name}` hold the content part {shortened(part)}; it must be "
                "{'type': 'text', 'text': 'a text'}, and the content a list of such parts or a text."
            )


def check_text_only(row: Mapping[str, Any]) -> None:
    """Reject a row with images, sound or videos, which would be ignored silently."""
    for name in _MEDIA:
        if _is_given(row.get(name)):
            raise ValueError(
                f"A row's `{name}` column is not empty, but multimodal rows are not supported, text only. Filter such "
                f"rows out, or remove the column with `dataset.remove_columns({name!r})` if the text can do without "
                "it."
            )


def _is_given(value: Any) -> bool:
    if isinstance(value, Mapping | list | tuple):
        return any(map(_is_given, value.values() if isinstance(value, Mapping) else value))
    return value is not None and not (isinstance(value, str) and not value)


def joined_text(content: Any) -> str:
    """The content of a message as one text: itself, its parts joined, or empty if it has none."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""


def is_blank(completion: Any, eos_token: str | None = None) -> bool:
    """Whether an answer is empty: only white space and the end of text, no thoughts, no tool call."""
    if isinstance(completion, str):
        return not (completion.replace(eos_token, "") if eos_token else completion).strip()
    return all(_is_blank(message, eos_token) for message in completion if message["role"] == "assistant")


def _is_blank(message: Mapping[str, Any], eos_token: str | None) -> bool:
    content = message.get("content")
    if content is None:
        return not any(value for name, value in message.items() if name not in ("role", "content"))
    says_more = any(message.get(name) for name in ("tool_calls", *_THOUGHTS))
    return is_blank(joined_text(content), eos_token) and not says_more


def shortened(value: Any, length: int = 100) -> str:
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."


def check_ids(name: str, ids: Any, processing_class: PreTrainedTokenizerBase) -> None:
    """Reject a tokenized row's ids that the tokenizer does not have."""
    if not isinstance(ids, list | tuple) or not set(map(type, ids)) <= {int}:
        raise ValueError(
            f"A row's `{name}` are {shortened(ids)}; they must be a list of whole numbers, the token ids."
        )
    if ids and (min(ids) < 0 or max(ids) >= len(processing_class)):
        known = set(processing_class.get_vocab().values())  # may have gaps
        strange = next((token for token in ids if token not in known), None)
        if strange is not None:
            raise ValueError(
                f"A row's `{name}` hold the id {strange}, which the tokenizer does not have (its ids go up to "
                f"{max(known)}). Tokenize the data with the tokenizer that is passed as `processing_class`, or pass "
                "texts or messages."
            )
