"""What both configurations refuse: values out of range, and fields of the base class that would be ignored without a word."""

from collections.abc import Mapping, Sequence
from typing import Any


__all__ = ["check_choice", "check_ignored", "check_positive"]


def check_choice(config: Any, name: str, choices: Sequence[str]) -> None:
    """Refuse a value of the field `name` that is none of `choices`."""
    value = getattr(config, name)
    if value not in choices:
        raise ValueError(f"`{name}` is {value!r}; it must be {' or '.join(map(repr, choices))}.")


def check_positive(config: Any, *names: str) -> None:
    """Refuse values that are not above 0; `None` passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise ValueError(f"`{name}` is {value}; it must be above 0.")


def check_ignored(config: Any, method: str, ignored: Mapping[str, tuple[Any, str]]) -> None:
    """Refuse fields that have no meaning in `method`: name -> (the value that is right, why)."""
    for name, (supported, why) in ignored.items():
        if getattr(config, name) != supported:
            raise ValueError(
                f"`{name}={getattr(config, name)!r}` has no meaning in {method}: {why}. Leave it at {supported!r}."
            )
    if config.completion_only_loss is False:
        raise ValueError(f"`completion_only_loss=False` has no meaning in {method}: only completions are distilled.")
