"""Teacher caches on the Hub: round trips with the real client, against `hub_server.py` on loopback."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from functools import partial

import huggingface_hub
import pytest
import torch
from datasets import load_dataset
from datasets.exceptions import NonMatchingSplitsSizesError
from hub_server import DIED
from tiny import answered_dataset, tiny_model, tiny_tokenizer
from trainers import PRIMING

from trl_promptkd import TeacherCache, build_teacher_cache
from trl_promptkd.cli import main
from trl_promptkd.generation import store


pytest_plugins = ["hub_client"]


@pytest.fixture
def build(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "BYTES_A_PART", 0)  # a shard for each batch

    def build(rows=6, teacher=None, preset="exact"):
        return build_teacher_cache(
            teacher or tiny_model(seed=2),
            answered_dataset(rows),
            str(tmp_path / "cache"),
            processing_class=tiny_tokenizer(),
            priming=PRIMING,
            preset=preset,
            batch_size=2,
        )

    return build


def test_is_a_data_set_and_trains(hub, build, primed, tmp_path):
    teacher = tiny_model(seed=2)
    teacher.config._name_or_path = "models/mentor"  # a folder, perhaps of another machine
    cache = build(teacher=teacher)
    (tmp_path / "cache" / "_teacher_answers").mkdir()
    (tmp_path / "cache" / "_teacher_answers" / "answers.parquet").touch()  # what the build itself went on from
    cache.push_to_hub("me/cache")
    shards = {shard["file"] for shard in cache.manifest.shards}
    assert len(shards) == 3
    files = {".gitattributes", "README.md", "manifest.json", "basis.safetensors", *shards}
    assert set(hub.files("me/cache", "datasets")) == files
    there = TeacherCache("me/cache")
    assert list(there.rows) == list(cache.rows)
    torch.testing.assert_close(there.log_probs([0, 3]), cache.log_probs([0, 3]), atol=0, rtol=0)
    assert load_dataset("me/cache", split="train").to_list() == list(cache.rows)
    losses = []
    for source in ("me/cache", str(tmp_path / "cache")):
        rows = {"train_dataset": answered_dataset(6), "teacher_cache": source}
        losses.append(primed(teacher_model=None, **rows, kd_temperature=1.0).train().training_loss)
    assert losses[0] == losses[1]
    card = hub.files("me/cache", "datasets")["README.md"].decode()
    for part in (
        "`mentor`",
        "red blue green ",
        "before the question",
        "| `preset` | `exact` |",
        'TeacherCache("me/cache")',
    ):
        assert part in card, part


def test_parts_travel_by_the_hub_and_are_merged_from_there(hub, tmp_path, capsys):
    names = ["me/part-1", "me/part-2"]
    for number, name in enumerate(names, 1):
        folder = str(tmp_path / str(number))
        basis = str(tmp_path / "1" / "basis.safetensors") if number == 2 else None
        build_teacher_cache(
            tiny_model(seed=2), answered_dataset(8), folder, tiny_tokenizer(), part=f"{number}/2", basis=basis
        )
        assert main(["cache", "push", folder, name]) == 0
    assert "is now the data set me/part-2 on the Hub" in capsys.readouterr().out
    card = hub.files("me/part-2", "datasets")["README.md"].decode()
    assert "This is part 2/2 of a cache" in card
    assert "trl-promptkd cache merge cache me/part-2" in card
    assert main(["cache", "merge", str(tmp_path / "cache"), *names]) == 0
    for path in (tmp_path / "cache").iterdir():
        assert not path.is_symlink()  # into the Hub's cache, which may be cleared
    assert len(TeacherCache(str(tmp_path / "cache"))) == 8


def test_other_files_beside_it_are_not_taken_for_rows(hub, build):
    build(rows=2).push_to_hub("me/cache")
    for name in ("a.jsonl", "b.jsonl"):  # `datasets` takes the kind of file that there is most of, if nobody says
        huggingface_hub.HfApi().upload_file(
            path_or_fileobj=b'{"a": 1}', path_in_repo=name, repo_id="me/cache", repo_type="dataset"
        )
    assert load_dataset("me/cache", split="train").column_names[0] == "key"


def test_a_private_one_is_only_for_those_with_a_token(hub, build, monkeypatch):
    build().push_to_hub("me/cache", private=True)
    assert hub.repos["datasets", "me/cache"].private
    assert len(TeacherCache("me/cache")) == 6
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", huggingface_hub.constants.HF_HUB_CACHE + "2")
    with pytest.raises(FileNotFoundError, match="neither a folder nor a data set on the Hub that can be reached"):
        TeacherCache("me/cache")


@pytest.mark.parametrize("fault", [{"uploads_left": 2}, {"takes_commits": False}])
def test_a_killed_upload_shows_nothing_and_can_be_repeated(hub, build, fault):
    cache = build()
    vars(hub).update(fault)
    with pytest.raises(DIED):
        cache.push_to_hub("me/cache")
    assert hub.dead
    hub.revive()
    with pytest.raises(FileNotFoundError, match="no teacher cache"):
        TeacherCache("me/cache")
    cache.push_to_hub("me/cache")
    assert list(TeacherCache("me/cache").rows) == list(cache.rows)


@pytest.mark.slow
def test_a_killed_process_leaves_nothing_and_the_next_one_uploads_all(hub, build, tmp_path):
    """Another process, whose client finds the server by HF_ENDPOINT, killed while its shards are on their way."""
    cache = build()
    code = f"from trl_promptkd import TeacherCache; TeacherCache({cache.path!r}).push_to_hub('me/cache')"
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path),
    }
    run = partial(subprocess.Popen, [sys.executable, "-c", code], env={**os.environ, **environment})
    hub.uploads_left = 2
    process = run()
    while not hub.dead:  # after that the client tries again and again
        assert process.poll() is None
        threading.Event().wait(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    hub.revive()
    assert len(hub.repos["datasets", "me/cache"].objects) == 2
    assert sorted(hub.files("me/cache", "datasets")) == [".gitattributes"]
    assert run().wait() == 0
    assert list(TeacherCache("me/cache").rows) == list(cache.rows)


def test_is_uploaded_in_one_commit(hub, build, monkeypatch):
    """`upload_folder` may make several, and with Xet does so."""
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", None)
    build().push_to_hub("me/cache")
    assert hub.repos["datasets", "me/cache"].messages == ["start", "Upload teacher cache"]


def test_a_part_of_one_does_not_load_as_a_whole(hub, build):
    """As other tools may upload it, file by file."""
    cache = build()
    cache.push_to_hub("me/cache")
    shards = [shard["file"] for shard in cache.manifest.shards]
    huggingface_hub.HfApi().delete_file(shards[0], "me/cache", repo_type="dataset")
    with pytest.raises(FileNotFoundError, match=f"{shards[0]} is missing. Load me/cache again, or push it there"):
        TeacherCache("me/cache")
    with pytest.raises(NonMatchingSplitsSizesError):
        load_dataset("me/cache", split="train")


def test_shards_of_an_earlier_state_are_removed(hub, build, tmp_path):
    build(rows=4).push_to_hub("me/cache")
    shutil.rmtree(tmp_path / "cache")
    cache = build(rows=6, preset="tiny")
    cache.push_to_hub("me/cache")
    assert list(TeacherCache("me/cache").rows) == list(cache.rows)
    assert len(load_dataset("me/cache", split="train")) == 6
    assert "basis.safetensors" not in hub.files("me/cache", "datasets")
