"""Rows are read from the disk when they are needed."""

import json
import random

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from tiny import answered_dataset, tiny_model, tiny_tokenizer

from trl_promptkd import TeacherCache, build_teacher_cache
from trl_promptkd.files import sha256_of
from trl_promptkd.generation import store


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    """Where `datasets` keeps its copies."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return tmp_path / "datasets"


@pytest.fixture
def build(tmp_path, monkeypatch):
    """A cache whose row groups hold two or three rows each."""
    monkeypatch.setattr(store, "GROUP_BYTES", 500)

    def build(size=12, **settings):
        return build_teacher_cache(
            tiny_model(seed=2), answered_dataset(size), str(tmp_path / "cache"), tiny_tokenizer(), preset="exact"
        )

    return build


@pytest.fixture
def rewritten(build):
    """The folder of a cache after `change` of its only shard; `sign` corrects the manifest."""

    def rewritten(change, sign=True):
        folder = build().path
        (shard,) = store.part_paths(folder, "shard")
        change(shard)
        if sign:
            with open(f"{folder}/manifest.json") as file:
                manifest = json.load(file)
            manifest["shards"][0]["sha256"] = sha256_of(shard)
            with open(f"{folder}/manifest.json", "w") as file:
                json.dump(manifest, file)
        return folder

    return rewritten


def one_group(path):
    """As earlier versions wrote shards."""
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(path), path, compression="zstd", use_dictionary=False)


def test_rows_come_in_any_order(build):
    cache = build()
    (path,) = store.part_paths(cache.path, "shard")
    assert pyarrow.parquet.read_metadata(path).num_row_groups > 3
    expected = pyarrow.parquet.read_table(path).to_pylist()
    assert list(cache.rows) == expected
    order = [7, 0, 11, 7, -1, 3]
    assert cache.rows.read(order) == [expected[index] for index in order]
    assert cache.rows["key"] == [row["key"] for row in expected]
    assert [cache.find(row["teacher_prompt_ids"], row["completion_ids"]) for row in expected] == list(range(12))
    with pytest.raises(IndexError):
        cache.rows.read([12])


def test_memory_does_not_grow_with_the_cache(rewritten):
    """Payloads of 32 MB; what is held after opening and between shuffled reads is one row group."""

    def enlarge(path):
        table = pyarrow.parquet.read_table(path)
        rows = [{**row, "coefficients_0": random.Random(0).randbytes(2**18)} for row in table.to_pylist()]
        store.write_groups(path, [pyarrow.Table.from_pylist(rows * 11, schema=table.schema)], table.schema)

    folder = rewritten(enlarge)
    before = pyarrow.total_allocated_bytes()
    cache = TeacherCache(folder)
    order = list(range(len(cache)))
    random.Random(0).shuffle(order)
    held = [pyarrow.total_allocated_bytes() - before]
    for index in order:
        cache.rows.read([index])
        held.append(pyarrow.total_allocated_bytes() - before)
    assert len(cache) == 132
    assert max(held) < 2**20


def test_training_rows_are_those_of_the_files_that_are_there(build, datasets_cache):
    """Copies on the disk are found by the content of the shards, so none is an older cache's."""
    for size in (6, 12):
        cache = build(size)
        rows = list(cache.dataset())
        assert len(rows) == size
        for row, kept in zip(rows, cache.rows, strict=True):
            assert row["prompt_ids"] == row["teacher_prompt_ids"] == kept["teacher_prompt_ids"]
            assert row["completion_ids"] == kept["completion_ids"]
    assert cache.dataset().cache_files[0]["filename"].startswith(str(datasets_cache))


def test_a_shard_of_an_earlier_version_is_copied_once(build, rewritten, datasets_cache, caplog, propagate):
    expected = list(build().rows)
    folder = rewritten(one_group)
    assert "written by an earlier version" not in caplog.text
    assert list(TeacherCache(folder).rows) == expected
    (copy,) = (datasets_cache / "trl_promptkd").iterdir()
    assert pyarrow.parquet.read_metadata(copy).num_row_groups > 3
    assert "written by an earlier version" in caplog.text
    written = copy.stat().st_mtime_ns
    assert list(TeacherCache(folder).rows) == expected
    assert copy.stat().st_mtime_ns == written


def test_a_shard_that_cannot_be_copied_is_named(rewritten, datasets_cache):
    datasets_cache.write_text("a file where the folder belongs")
    with pytest.raises(ValueError, match=r"shard-\w+\.parquet cannot be copied to .*set `HF_DATASETS_CACHE`"):
        TeacherCache(rewritten(one_group))


def test_damage_after_opening_is_found_and_named(build):
    cache = build()
    (path,) = store.part_paths(cache.path, "shard")
    with open(path, "r+b") as file:
        file.seek(pyarrow.parquet.read_metadata(path).row_group(1).column(6).data_page_offset + 40)
        file.write(b"\xff\xff")
    first = cache.rows._starts[1]
    assert cache.log_probs([0]).isfinite().all()
    with pytest.raises(ValueError, match=r"shard-\w+\.parquet cannot be read: .*delete it and build the cache again"):
        cache.log_probs([first])
