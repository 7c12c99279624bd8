"""Files that are whole or not there, whenever a run is killed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


__all__ = ["whole_file"]


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
