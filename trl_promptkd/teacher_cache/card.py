"""Shared by the model card and a cache's card."""

import os
import re
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


__all__ = ["PLACES", "fenced", "hub_id", "name_in_cache", "quoted", "settings_table", "shown_name"]


PLACES = {"prefix": "before the question", "suffix": "after the question", "system": "as the system message"}


def name_in_cache(teacher: dict[str, Any]) -> str:
    """The teacher's name in a manifest. Without a revision it is a folder, perhaps on another machine."""
    name = teacher["name"]
    return quoted(name if teacher["revision"] else os.path.basename(name.rstrip("/\\")))


def fenced(text: str) -> str:
    """`text` as a block of code, also if it holds fences."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"


def settings_table(settings: dict[str, Any], what: str = "setting") -> str:
    rows = "\n".join(f"| `{name}` | `{value}` |" for name, value in settings.items() if value is not None)
    return f"| {what} | value |\n| --- | --- |\n{rows}"


def quoted(name: str) -> str:
    return f"`{shown_name(name)}`"


def shown_name(name: str) -> str:
    """A name on the Hub, or the last part of a path."""
    return hub_id(name) or os.path.basename(name.rstrip("/\\")) or "a model without a name"


def hub_id(name: str | None) -> str | None:
    """`name` if it can be a repository's on the Hub, and is not a file or folder here. Otherwise `None`."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if not name or os.path.exists(name) else name
