from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest

from trl_promptkd.generation import store


SCHEMA = pyarrow.schema({"key": pyarrow.string(), "ids": pyarrow.list_(pyarrow.int64())})
LENGTHS = {"a": 1, "b": 5, "c": 3, "d": 5, "e": 2}


@pytest.fixture
def compute(tmp_path):
    """Rows as one of two ranks, or alone, computes and writes them; returns the batches."""

    def compute(rank=0, ranks=1, dies_after=99, size=1):
        batches = []

        def rows(batch):
            if len(batches) == dies_after:
                raise KeyboardInterrupt
            batches.append(batch)
            return {key: {"ids": [ord(key)] * LENGTHS[key], "payload": bytes(size)} for key in batch}

        def write(rows):
            assert rows
            store.write_part(str(tmp_path), "part", {key: {"ids": row["ids"]} for key, row in rows.items()}, SCHEMA)

        accelerator = SimpleNamespace(process_index=rank, num_processes=ranks, is_main_process=rank == 0)
        store.compute_missing(LENGTHS, written(tmp_path), rows, write, 2, "Rows", accelerator)
        return batches

    return compute


def written(folder):
    parts = [store.read_part(path, SCHEMA, 128, "start again") for path in store.part_paths(str(folder), "part")]
    keys = [key for part in parts for key in part["key"].to_pylist()]
    assert len(set(keys)) == len(keys)
    assert all(row["ids"] == [ord(row["key"])] * LENGTHS[row["key"]] for part in parts for row in part.to_pylist())
    return keys


def test_the_longest_come_first_and_one_file_is_written(compute, tmp_path):
    assert compute() == [["b", "d"], ["c", "e"], ["a"]]
    assert len(store.part_paths(str(tmp_path), "part")) == 1
    assert sorted(written(tmp_path)) == sorted(LENGTHS)
    assert compute() == []


def test_ranks_share_the_batches_and_are_called_equally_often(compute, tmp_path):
    assert compute(rank=0, ranks=2) == [["b", "d"], ["a"]]
    for path in store.part_paths(str(tmp_path), "part"):
        (tmp_path / path).unlink()
    assert compute(rank=1, ranks=2) == [["c", "e"], []]


@pytest.mark.parametrize("change", [{"SECONDS_A_PART": 0.0}, {"BYTES_A_PART": 3}])
def test_what_was_written_before_a_kill_is_not_computed_again(
    compute, tmp_path, monkeypatch, change, caplog, propagate
):
    for name, value in change.items():
        monkeypatch.setattr(store, name, value)
    with pytest.raises(KeyboardInterrupt):
        compute(dies_after=2, size=2)
    assert sorted(written(tmp_path)) == ["b", "c", "d", "e"]
    assert compute() == [["a"]]
    assert "Rows: 4 of 5 are there already" in caplog.text
    assert sorted(written(tmp_path)) == sorted(LENGTHS)


def test_row_groups_are_small_and_hold_the_rows_in_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "GROUP_BYTES", 1000)
    lengths = [10, 300, 5, 5, 60, 200, 1]
    rows = {str(number): {"ids": [number] * length} for number, length in enumerate(lengths)}
    store.write_part(str(tmp_path), "part", rows, SCHEMA)
    (path,) = store.part_paths(str(tmp_path), "part")
    with pyarrow.parquet.ParquetFile(path) as file:
        groups = [file.read_row_group(number)["key"].to_pylist() for number in range(file.num_row_groups)]
    assert groups == [["0"], ["1"], ["2", "3", "4"], ["5"], ["6"]]
    assert store.read_part(path, SCHEMA, 128, "start again", columns=["key"])["key"].to_pylist() == list(rows)
