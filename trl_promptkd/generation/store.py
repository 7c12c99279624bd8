"""Rows that take long to compute, written to disk regularly. A killed run loses half a minute of work.

A file appears whole (written, synced, renamed) or not at all. Its name is a hash of its rows' keys, and a key is a
hash of what made the row. Finished rows are therefore not computed again, and none is lost or doubled. Teacher answers
and the shards of a teacher cache are stored in such files. An evaluation computes its answers the same way, and has
files of its own.
"""

import glob
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import pyarrow
import pyarrow.compute
import pyarrow.parquet
from accelerate import Accelerator
from transformers.utils import logging

from ..files import text_hash, whole_file
from .progress import rows_bar


__all__ = ["GROUP_BYTES", "compute_missing", "part_paths", "read_part", "write_groups", "write_part"]

logger = logging.get_logger(__name__)

SECONDS_A_PART = 30.0  # at most so much work is lost when a run is killed
BYTES_A_PART = 64 * 2**20
GROUP_BYTES = 2**20  # of a row group, decoded: reading one row decodes all of its group
_MAX_BYTES = 2**33  # of one file in memory: it has `BYTES_A_PART` and a batch
_LEAST_BYTES = 16  # a row's key alone: random digits, which nothing compresses


def compute_missing(
    lengths: Mapping[Any, int],
    finished: Collection[Any],
    compute: Callable[[list[Any]], Mapping[Any, dict[str, Any]]],
    write: Callable[[dict[Any, dict[str, Any]]], None],
    batch_size: int,
    title: str,
    accelerator: Accelerator | None = None,
    disable_tqdm: bool = False,
) -> None:
    """Compute the unfinished rows, the longest first, and write them about every half a minute.

    Args:
        lengths: Lengths of all rows, by their keys.
        finished: Keys of finished rows.
        compute: Returns rows by key, for the keys of one batch. All ranks call it equally often, as a sharded model
            needs all of them. A rank that has run out of rows passes an empty list.
        write: Stores some rows.
        title: What the rows are, for the progress bar.
        accelerator: Its ranks share the batches.
        disable_tqdm: Show no progress bar. Only the main process shows one.
    """
    missing = sorted(lengths.keys() - set(finished), key=lambda key: (-lengths[key], key))
    rank, ranks = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    batches = [missing[start : start + batch_size] for start in range(0, len(missing), batch_size)]
    share = batches[rank::ranks]
    share += [[]] * (-(-len(batches) // ranks) - len(share))
    shows = accelerator is None or accelerator.is_main_process
    if shows and missing and len(missing) < len(lengths):
        logger.warning(f"{title}: {len(lengths) - len(missing)} of {len(lengths)} are there already.")
    rows: dict[Any, dict[str, Any]] = {}
    size, written = 0, time.monotonic()
    with rows_bar(sum(map(len, share)), title, shows and not disable_tqdm) as bar:
        finished_rows = 0
        for batch in share:
            for key, row in compute(batch).items():
                rows[key] = row
                size += sum(len(value) for value in row.values() if isinstance(value, bytes))
            if rows and (time.monotonic() - written > SECONDS_A_PART or size > BYTES_A_PART):
                write(rows)
                rows, size, written = {}, 0, time.monotonic()
            finished_rows += len(batch)
            bar.move_to(finished_rows)
        if rows:
            write(rows)


def part_paths(folder: str, kind: str) -> list[str]:
    """The files of one kind in `folder`, in the order of their names."""
    return sorted(glob.glob(os.path.join(glob.escape(folder), f"{kind}-*.parquet")))


def write_part(folder: str, kind: str, rows: Mapping[str, dict[str, Any]], schema: pyarrow.Schema) -> None:
    """Write some rows by key to a parquet file of their own.

    Raises:
        OSError: if it cannot be written.
    """
    table = pyarrow.Table.from_pylist([{"key": key, **row} for key, row in rows.items()], schema=schema)
    try:
        os.makedirs(folder, exist_ok=True)
        with whole_file(os.path.join(folder, f"{kind}-{text_hash(''.join(rows))}.parquet")) as path:
            write_groups(path, [table], schema)
    except OSError as error:
        raise OSError(
            f"{folder} could not be written to ({error}). The files that are there are kept: make room and start "
            "again."
        ) from error


def write_groups(path: str, tables: Iterable[pyarrow.Table], schema: pyarrow.Schema) -> None:
    """Write tables to a parquet file in row groups of about [`GROUP_BYTES`] each, so that a row can be read alone."""
    with pyarrow.parquet.ParquetWriter(
        path,
        schema,
        compression="zstd",
        compression_level=1,  # higher levels took more bytes for a cache's rows, and more time
        use_dictionary=False,
        write_statistics=False,  # they would be two whole values for each group and column
        write_page_checksum=True,
    ) as writer:
        for table in tables:
            start = size = 0
            for row in range(len(table)):
                more = table.slice(row, 1).nbytes
                if row > start and size + more > GROUP_BYTES:
                    writer.write_table(table.slice(start, row - start))
                    start, size = row, 0
                size += more
            writer.write_table(table.slice(start))


def read_part(
    path: str,
    schema: pyarrow.Schema,
    num_ids: int,
    remedy: str,
    optional: str = "",
    columns: Sequence[str] | None = None,
) -> pyarrow.Table:
    """The rows of a file that [`write_part`] wrote.

    Args:
        schema: The expected columns, in any order.
        num_ids: All ids must be below it.
        remedy: How to get the file's rows back, for the message.
        optional: Name of the column whose values may be missing.
        columns: Columns to read. `None` for all.

    Raises:
        ValueError: if the file cannot be read or holds anything else. The message names it and the column.
    """
    try:
        _check_size(path)
        found = pyarrow.parquet.read_schema(path)
        if sorted(found.names) != sorted(schema.names):
            raise ValueError(f"its columns are {sorted(found.names)}, not {sorted(schema.names)}")
        for field in schema:
            if found.field(field.name).type != field.type:
                raise ValueError(f"`{field.name}` is a column of {found.field(field.name).type}, not {field.type}")
        columns = schema.names if columns is None else list(columns)
        table = pyarrow.parquet.read_table(path, columns=columns, page_checksum_verification=True).select(columns)
        table.validate(full=True)
        for field in table.schema:
            if field.name != optional and table[field.name].null_count:
                raise ValueError(f"`{field.name}` is missing in some rows")
            if pyarrow.types.is_list(field.type):
                _check_ids(field.name, pyarrow.compute.list_flatten(table[field.name]), num_ids)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} is damaged, or from elsewhere: {error}. Delete it and {remedy}.") from error
    return table.replace_schema_metadata()


def _check_size(path: str) -> None:
    """Reject a small file that would fill the memory."""
    metadata = pyarrow.parquet.read_metadata(path)
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    size = sum(group.column(index).total_uncompressed_size for group in groups for index in range(group.num_columns))
    if size > _MAX_BYTES or metadata.num_rows * _LEAST_BYTES > os.path.getsize(path):
        raise ValueError(f"it claims {metadata.num_rows} rows and {size} bytes, more than fit")


def _check_ids(name: str, ids: pyarrow.Array, num_ids: int) -> None:
    ends = pyarrow.compute.min_max(ids).as_py()
    if ids.null_count or (len(ids) and not 0 <= ends["min"] <= ends["max"] < num_ids):
        raise ValueError(f"`{name}` has ids from {ends['min']} to {ends['max']}; they must be from 0 to {num_ids - 1}")
