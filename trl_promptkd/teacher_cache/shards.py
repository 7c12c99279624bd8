"""The rows of a cache, read from its shards when they are needed.

A shard is a parquet file of small row groups, and reading a row decodes only its group. Memory holds the rows' keys,
the footers of the files that were read last, and one group. A cache may be much larger than the memory.
"""

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
from transformers.utils import logging

from ..files import sha256_of, whole_file
from ..generation import store
from .codec import PRESETS, Preset, payload_columns
from .manifest import Manifest


__all__ = ["ID_COLUMNS", "CacheRows", "read_shard", "shard_schema"]

logger = logging.get_logger(__name__)

ID_COLUMNS = ("prompt_ids", "teacher_prompt_ids", "completion_ids")
_FOOTERS = 64  # of the files read last; up to 0.7 MB each
_ROWS_AT_ONCE = 256


def shard_schema(preset: Preset) -> pyarrow.Schema:
    """The columns of a shard."""
    types = {"key": pyarrow.string(), **dict.fromkeys(ID_COLUMNS, pyarrow.list_(pyarrow.int32()))}
    return pyarrow.schema(types | dict.fromkeys(sorted(payload_columns(preset)), pyarrow.binary()))


def read_shard(
    path: str, manifest: Manifest, remedy: str = "build the cache again", columns: Sequence[str] | None = None
) -> pyarrow.Table:
    """A shard's rows, or some of its columns. Cheap checks are done here, the others when rows are decoded."""
    num_ids = max(manifest.vocab_size, manifest.real_vocab_size)
    schema = shard_schema(PRESETS[manifest.preset])
    return store.read_part(path, schema, num_ids, remedy, optional="prompt_ids", columns=columns)


class CacheRows:
    """
    All rows of a cache, in the order of its shards: `rows[3]` is a row, `rows["key"]` a column's values.

    Opening reads keys and token ids, a shard at a time, and checks them.

    Args:
        folder (`str`): The cache's folder.
        manifest ([`Manifest`]): Names the shards.
        remedy (`str`): How to get a shard's rows back, for messages.

    Raises:
        ValueError: if a shard is damaged. The message names it. Later reads of rows raise it, too.
    """

    def __init__(self, folder: str, manifest: Manifest, remedy: str):
        self.numbers: dict[str, int] = {}
        """Indices of the rows, by their keys."""
        self._paths: list[str] = []
        self._groups: list[tuple[str, int]] = []  # file, and number in it
        self._starts: list[int] = []  # the first row of each group
        self._length = 0
        self._remedy = remedy
        self._remember()
        for shard in manifest.shards:
            path = os.path.join(folder, shard["file"])
            keys = read_shard(path, manifest, remedy, ("key", *ID_COLUMNS))["key"].to_pylist()
            self.numbers.update(zip(keys, range(self._length, self._length + len(keys)), strict=True))
            path = _in_small_groups(path, remedy)
            self._paths.append(path)
            footer = self._footer(path)
            for group in range(footer.num_row_groups):
                self._groups.append((path, group))
                self._starts.append(self._length)
                self._length += footer.row_group(group).num_rows

    def _remember(self) -> None:
        self._footer = lru_cache(_FOOTERS)(pyarrow.parquet.read_metadata)
        self._group = lru_cache(1)(self._read_group)

    def __getstate__(self) -> dict[str, Any]:
        """The state without what was read, for other processes."""
        return {name: value for name, value in vars(self).items() if name not in ("_footer", "_group")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._remember()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, key: int | str) -> Any:
        if isinstance(key, str):
            return list(self.values(key))
        return self.read([key])[0]

    def read(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Some rows, in the order of `indices`."""
        indices = [range(self._length)[index] for index in indices]  # as a list takes them
        found: dict[int, dict[str, Any]] = {}
        for index in sorted(set(indices)):
            number = bisect_right(self._starts, index) - 1
            (found[index],) = self._group(number).slice(index - self._starts[number], 1).to_pylist()
        return [found[index] for index in indices]

    def values(self, column: str) -> Iterator[Any]:
        """A column's values, row by row."""
        return (row[column] for row in _stream(self._paths, [column]))

    def id_columns(self) -> datasets.Dataset:
        """The token ids as a data set that `datasets` keeps on disk, with `prompt_ids` in every row."""
        ids = datasets.List(datasets.Value("int32"))
        return datasets.Dataset.from_generator(
            _training_rows,
            features=datasets.Features(dict.fromkeys(ID_COLUMNS, ids)),
            # A copy is found again by the content of the files, so it cannot be an older one's
            gen_kwargs={"shards": [(path, sha256_of(path)) for path in self._paths]},
        )

    def _read_group(self, number: int) -> pyarrow.Table:
        path, group = self._groups[number]
        try:
            footer = self._footer(path)
            options = {"page_checksum_verification": True, "pre_buffer": True}  # one read for all columns
            with pyarrow.parquet.ParquetFile(path, metadata=footer, **options) as file:
                return file.read_row_group(group, use_threads=False)
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"{path} cannot be read: {error}. If it is damaged, delete it and {self._remedy}.") from (
                error
            )


def _stream(paths: Sequence[str], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    for path in paths:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=columns):
                yield from batch.to_pylist()


def _training_rows(shards: Sequence[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    for row in _stream([path for path, _ in shards], ID_COLUMNS):
        yield {**row, "prompt_ids": row["teacher_prompt_ids"] if row["prompt_ids"] is None else row["prompt_ids"]}


def _in_small_groups(path: str, remedy: str) -> str:
    """`path`, or a copy in small row groups if it has large ones. Earlier versions wrote a file as one group."""
    with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
        groups = map(file.metadata.row_group, range(file.num_row_groups))
        if all(group.num_rows == 1 or group.total_byte_size <= 2 * store.GROUP_BYTES for group in groups):
            return path
        folder = os.path.join(datasets.config.HF_DATASETS_CACHE, "trl_promptkd")
        copy = os.path.join(folder, f"{sha256_of(path)}.parquet")
        if os.path.isfile(copy):
            return copy
        logger.warning_once(
            f"{path} was written by an earlier version, and its rows cannot be read one by one. It is copied to "
            f"{folder} once, and so are others like it."
        )
        try:
            os.makedirs(folder, exist_ok=True)
            with whole_file(copy) as temporary:
                tables = map(pyarrow.Table.from_batches, ([batch] for batch in file.iter_batches(_ROWS_AT_ONCE)))
                store.write_groups(temporary, tables, file.schema_arrow)
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(
                f"{path} cannot be copied to {folder}: {error}. If there is no room, set `HF_DATASETS_CACHE` to "
                f"another folder. If the file is damaged, delete it and {remedy}."
            ) from error
    return copy
