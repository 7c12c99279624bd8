"""Reading files unchanged, and writing files such that a killed run leaves no partial ones."""

import glob
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor


__all__ = [
    "content_hash",
    "read_safetensors",
    "read_text",
    "remove_incomplete",
    "sha256_of",
    "text_hash",
    "whole_file",
    "write_text",
]

_INCOMPLETE = ".incomplete"


def text_hash(text: str) -> str:
    """32 hexadecimal digits that identify a content."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def content_hash(value: Any, **settings: Any) -> str:
    """The hash of anything that JSON can write. `settings` go to `json.dumps`."""
    written = {"sort_keys": True, "separators": (",", ":"), "ensure_ascii": False, **settings}
    return text_hash(json.dumps(value, **written))


def sha256_of(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(path: str, what: str) -> str:
    """The text in a UTF-8 file, without a byte order mark. `what` names it in messages: "the priming text".

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not UTF-8.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{path}, the file with {what}, does not exist or is a folder. Check the path (relative ones start at "
            f"{os.getcwd()})."
        )
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, the file with {what}, is not UTF-8 ({error}). Save it as UTF-8.") from error


@contextmanager
def whole_file(path: str) -> Iterator[str]:
    """Yield a path to write to. When the block ends, `path` holds all of it. Until then it holds what it held before.

    Content and name are on the disk (synced) when the block has ended. If it fails, no temporary file stays.
    """
    temporary = f"{path}.{os.getpid()}{_INCOMPLETE}"
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        with suppress(OSError):  # Windows opens no folders, and some network file systems do not sync them
            _sync(os.path.dirname(path) or ".")
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_text(path: str, text: str) -> None:
    """Write `text` as UTF-8. `path` holds either its old content or all of the text."""
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        file.write(text)


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_incomplete(folder: str, name: str = "", older_than: float = 0.0) -> None:
    """Remove half-written files of killed processes from `folder`.

    Args:
        name: Only files that were to become this one.
        older_than: Age in seconds above which they are removed, in case others are still writing there.
    """
    for path in glob.glob(f"{os.path.join(glob.escape(folder), glob.escape(name))}*{_INCOMPLETE}"):
        with suppress(FileNotFoundError):  # a process that is just ending may have been quicker
            if older_than == 0 or time.time() - os.path.getmtime(path) > older_than:
                os.remove(path)


def read_safetensors(path: str, advice: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it cannot be read. The message names it, with `advice` on what to do.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, AttributeError, RuntimeError, TypeError) as error:  # and types that torch lacks
        kind = type(error).__name__
        raise ValueError(f"{path} cannot be read as safetensors ({kind}: {error}). {advice}") from error
