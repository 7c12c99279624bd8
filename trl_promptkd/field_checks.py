"""What configurations reject: values of the wrong kind or out of range, and fields that would be ignored silently."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints


__all__ = [
    "check_at_least_zero",
    "check_choice",
    "check_ignored",
    "check_kind",
    "check_kinds",
    "check_number",
    "check_positive",
    "check_share",
    "check_training",
]

# What a field's annotation wants: the class that a value must have, and its name in messages
_KINDS: dict[type, tuple[type, str]] = {
    bool: (bool, "True or False"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "a text"),
    dict: (Mapping, "a dict"),
}
# Fields of TrainingArguments that otherwise fail deep inside a run
_BATCH_SIZES = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")


def check_kinds(config: Any, *classes: type) -> None:
    """Reject values whose kind contradicts the annotations of the fields of `classes`, such as a text for a number.

    Must run before anything compares the values. Texts for `dict` fields are JSON, which the base class reads later. A
    field with choices in its metadata must be one of them. Annotations that say more than kinds are not checked.
    """
    hints = {name: hint for cls in classes for name, hint in get_type_hints(cls).items()}
    fields = type(config).__dataclass_fields__
    for name in dict.fromkeys(name for cls in classes for name in cls.__annotations__ if name in fields):
        if "choices" in fields[name].metadata:
            check_choice(config, name, fields[name].metadata["choices"])
        else:
            check_kind(name, getattr(config, name), hints[name])


def check_kind(name: str, value: Any, annotation: Any) -> None:
    """Reject a value of the field `name` whose kind contradicts its annotation."""
    allowed = (annotation,) if get_origin(annotation) is dict else get_args(annotation) or (annotation,)
    kinds = [get_origin(kind) or kind for kind in allowed if kind is not NoneType]
    if not all(kind in _KINDS for kind in kinds) or (value is None and NoneType in allowed):
        return
    if dict in kinds and isinstance(value, str):
        _check_json(name, value)
        return
    if any(isinstance(value, _KINDS[kind][0]) and (bool in kinds or not isinstance(value, bool)) for kind in kinds):
        return
    wanted = "a dict" if dict in kinds else " or ".join(_KINDS[kind][1] for kind in kinds)
    wanted += " or None" if NoneType in allowed else ""
    hint = ""
    if isinstance(value, str):
        hint = " Write it without quotes"
        hint += " (YAML takes 1e-4 for a text; write 1.0e-4)." if float in kinds else "."
    raise TypeError(f"`{name}` is {value!r}, a {type(value).__name__}; it must be {wanted}.{hint}")


def _check_json(name: str, value: str) -> None:
    try:
        holds_dict = isinstance(json.loads(value), dict)
    except json.JSONDecodeError:
        holds_dict = False
    if not holds_dict:
        raise ValueError(
            f"`{name}` is the text {value!r}; it must be a dict, or one written as JSON, such as "
            "'{\"name\": true}' (names in double quotes; true, false, null)."
        )


def check_choice(config: Any, name: str, choices: Sequence[str]) -> None:
    """Reject a value of the field `name` that is none of `choices`."""
    value = getattr(config, name)
    if value not in choices:
        raise ValueError(f"`{name}` is {value!r}; it must be {' or '.join(map(repr, choices))}.")


def check_number(config: Any, name: str, holds: Callable[[Any], bool], allowed: str, hint: str = "") -> None:
    """Reject a number that is not finite or for which `holds` is false. `None` passes.

    Args:
        allowed: What the number must be, for the message: "between 0 and 1".
        hint: More for the end of the message.
    """
    value = getattr(config, name)
    if value is not None and not (math.isfinite(value) and holds(value)):
        finite = "" if math.isfinite(value) else "finite, and "
        raise ValueError(f"`{name}` is {value}; it must be {finite}{allowed}.{hint}")


def check_positive(config: Any, *names: str) -> None:
    for name in names:
        check_number(config, name, lambda value: value > 0, "above 0")


def check_at_least_zero(config: Any, *names: str) -> None:
    for name in names:
        check_number(config, name, lambda value: value >= 0, "at least 0")


def check_share(config: Any, *names: str) -> None:
    for name in names:
        check_number(config, name, lambda value: 0 <= value <= 1, "between 0 and 1")


def check_training(config: Any) -> None:
    """Reject values of base class fields that nothing else checks in time."""
    for name in (*_BATCH_SIZES, "seed"):
        check_kind(name, getattr(config, name), int)
    check_positive(config, *_BATCH_SIZES, "max_length", "pad_to_multiple_of")
    check_at_least_zero(config, "learning_rate", "seed", "dataset_num_proc")


def check_ignored(config: Any, method: str, ignored: Mapping[str, tuple[Any, str]]) -> None:
    """Reject fields that have no meaning in `method`. `ignored` maps a name to the supported value and the reason."""
    for name, (supported, why) in ignored.items():
        if getattr(config, name) != supported:
            raise ValueError(
                f"`{name}={getattr(config, name)!r}` has no meaning in {method}: {why}. Leave it at {supported!r}."
            )
    if config.router_aux_loss_coef:
        raise ValueError(
            f"`router_aux_loss_coef={config.router_aux_loss_coef!r}` has no meaning in {method}: the load-balancing "
            "loss of a mixture of experts is not computed. Leave it at None or 0.0."
        )
    if config.completion_only_loss is False:
        raise ValueError(
            f"`completion_only_loss=False` has no meaning in {method}: only completions are distilled. Omit it."
        )
