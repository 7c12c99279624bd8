import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trl_promptkd.files import content_hash, read_safetensors, read_text, remove_incomplete, whole_file


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "a"
    with whole_file(str(path)) as temporary:
        Path(temporary).write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_failure_leaves_what_was_there_and_no_rubbish(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), whole_file(str(path)):
        pass  # nothing was written
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"), whole_file(str(path)) as temporary:
        Path(temporary).write_text("ne")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_texts_are_read_as_they_are_but_for_a_byte_order_mark(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfred \r\n\n")
    assert read_text(str(path), "a text") == "red \r\n\n"


def test_the_name_is_on_the_disk_too(tmp_path, monkeypatch):
    """The content before the name, the folder's entry after it."""
    steps, sync, replace = [], os.fsync, os.replace

    def fsync(descriptor):
        steps.append(os.fstat(descriptor).st_ino)
        sync(descriptor)

    def rename(old, new):
        steps.append("rename")
        replace(old, new)

    monkeypatch.setattr("os.fsync", fsync)
    monkeypatch.setattr("os.replace", rename)
    with whole_file(str(tmp_path / "a")) as temporary:
        Path(temporary).write_text("new")
    assert steps == [(tmp_path / "a").stat().st_ino, "rename", tmp_path.stat().st_ino]


def test_a_folder_that_cannot_be_synced_is_no_error(tmp_path, monkeypatch):
    original = os.open

    def on_windows(path, flags, *args):
        if os.path.isdir(path):
            raise PermissionError(path)
        return original(path, flags, *args)

    monkeypatch.setattr("os.open", on_windows)
    with whole_file(str(tmp_path / "a")) as temporary:
        Path(temporary).write_text("new")
    assert (tmp_path / "a").read_text() == "new"


def test_what_killed_processes_left_is_removed_in_this_folder_only(tmp_path):
    (tmp_path / "[sub]").mkdir()
    for name in ("a.parquet.123.incomplete", "a.parquet", "[sub]/b.parquet.1.incomplete", "[sub]/b"):
        (tmp_path / name).write_text("x")
    remove_incomplete(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["[sub]", "a.parquet"]
    assert len(list((tmp_path / "[sub]").iterdir())) == 2
    remove_incomplete(str(tmp_path / "[sub]"))
    assert [path.name for path in (tmp_path / "[sub]").iterdir()] == ["b"]
    remove_incomplete(str(tmp_path / "not there"))


def test_safetensors_are_read_or_named(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(2)}, path, metadata={"a": "b"})
    tensors, metadata = read_safetensors(str(path), "Try again.")
    assert tensors["x"].tolist() == [1, 1]
    assert metadata == {"a": "b"}
    path.write_bytes(b"x" * 20)
    with pytest.raises(ValueError, match=r"a\.safetensors cannot be read as safetensors .*Try again\."):
        read_safetensors(str(path), "Try again.")
    with pytest.raises(FileNotFoundError):
        read_safetensors(str(tmp_path / "b"), "")


def test_hashes_are_of_the_content():
    key = content_hash([{"teacher": "a", "seed": 1}, [1, 2]])
    assert key == content_hash(({"seed": 1, "teacher": "a"}, (1, 2)))
    assert key != content_hash([{"teacher": "a", "seed": 1}, [12]])
