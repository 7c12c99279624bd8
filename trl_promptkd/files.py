"""Files that are read as they are, and files that are whole or not there, whenever a run is killed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


__all__ = ["read_text", "whole_file"]


def read_text(path: str, what: str) -> str:
    """The text in a UTF-8 file, taken as it is but for a byte order mark.

    Args:
        what: Is in it, for messages: "the priming text".

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where it is not UTF-8.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{path}, the file with {what}, does not exist or is a folder. Check the path (relative ones start at {os.getcwd()})."
        )
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, the file with {what}, is not UTF-8 ({error}). Save it as UTF-8.") from error


@contextmanager
def whole_file(path: str) -> Iterator[str]:
    """Gives a path to write to; when the block ends, `path` holds all of it, and until then what it held before.

    What was written is on the disk before it gets its name. Where the block fails, nothing is left behind.
    """
    temporary = f"{path}.{os.getpid()}.incomplete"
    try:
        yield temporary
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
