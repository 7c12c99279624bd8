from pathlib import Path

import pytest

from trl_promptkd.files import read_text, whole_file


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
