import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from tiny import WORDS, save_models, save_rows, tiny_model

from trl_promptkd import TeacherCache, verify_teacher_cache
from trl_promptkd.cli import main


@pytest.fixture
def folder(tmp_path):
    save_models(tmp_path, teacher=tiny_model(seed=2))
    rows = [{"question": " ".join(WORDS[i : i + 3]), "answer": WORDS[i]} for i in range(16)]
    save_rows(tmp_path / "rows.jsonl", rows)
    return tmp_path


def build_flags(folder, name="cache", preset="exact"):
    return [
        *("cache", "build", "--teacher", str(folder / "teacher")),
        *("--output_dir", str(folder / name), "--preset", preset),
        *("--dataset", str(folder / "rows.jsonl"), "--prompt_column", "question", "--completion_column", "answer"),
        *("--conversational", "--priming", "teacher", "--batch_size", "2"),
    ]


class TestCache:
    @pytest.mark.parametrize("preset", ["exact", "tiny"])
    def test_build_info_verify(self, folder, capsys, preset):
        assert main(build_flags(folder, preset=preset)) == 0
        built = capsys.readouterr().out
        assert "As a teacher, guide your student" in built
        assert main(["cache", "info", str(folder / "cache")]) == 0
        assert "bytes_per_token" in capsys.readouterr().out
        assert main(["cache", "verify", str(folder / "cache"), "--rows", "5"]) == 0
        assert '"same_weights": true' in capsys.readouterr().out

    def test_verify_finds_another_teacher_and_damage(self, folder, capsys):
        main(build_flags(folder))
        tiny_model(seed=3).save_pretrained(folder / "teacher")
        assert main(["cache", "verify", str(folder / "cache")]) == 1
        assert "not the teacher that the cache was made with" in capsys.readouterr().out
        shard = next((folder / "cache").glob("shard-*"))
        shard.write_bytes(shard.read_bytes()[:-1] + b"x")
        assert main(["cache", "verify", str(folder / "cache")]) == 2
        assert f"{shard.name} is damaged" in capsys.readouterr().err

    def test_parts_are_built_and_merged(self, folder, capsys):
        basis = ["--basis", str(folder / "p1" / "basis.safetensors")]
        assert main([*build_flags(folder, "p2"), "--part", "2/2"]) == 2
        assert "`basis` is missing" in capsys.readouterr().err
        assert main([*build_flags(folder, "p1"), "--part", "1/2"]) == 0
        assert main([*build_flags(folder, "p2"), "--part", "2/2", *basis]) == 0
        assert re.search(r"^part +2/2$", capsys.readouterr().out, re.MULTILINE)
        names = [str(folder / name) for name in ("cache", "p1", "p2")]
        assert main(["cache", "merge", *names[:2]]) == 2
        assert "1 of 2 parts are missing (2/2)" in capsys.readouterr().err
        assert main(["cache", "merge", *names]) == 0
        assert re.search(r"^rows +16$", capsys.readouterr().out, re.MULTILINE)
        assert main(["cache", "verify", names[0]]) == 0

    def test_errors_are_one_line(self, folder, capsys):
        assert main(["cache", "info", str(folder)]) == 2
        assert "it is no teacher cache" in capsys.readouterr().err

    def test_verify_measures_what_the_preset_costs(self, folder):
        main(build_flags(folder, preset="standard"))
        result = verify_teacher_cache(TeacherCache(str(folder / "cache")), tiny_model(seed=2), num_rows=99)
        assert result["rows"] == 16
        assert 0 < result["kl_mean"] <= result["kl_max"] < 0.05


def run(folder, name, processes=1):
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    code = [str(folder / "build.py"), *build_flags(folder, name)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "CI": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*launcher, *code], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def shards(folder):
    return len(list(folder.glob("shard-*.parquet")))


@pytest.mark.slow
def test_killed_at_random_moments_and_on_two_ranks(folder):
    """SIGKILL at a random moment after each start's first shard or two; every batch is a shard here, and takes a
    while."""
    (folder / "build.py").write_text(
        "import sys, time\n"
        "from trl_promptkd.generation import store\n"
        "from trl_promptkd.teacher_cache import sources\n"
        "store.SECONDS_A_PART = 0.0\n"
        "original = sources.completion_states\n"
        "sources.completion_states = lambda *a, **k: (time.sleep(0.2), original(*a, **k))[1]\n"
        "from trl_promptkd.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    process = run(folder, "whole")
    assert process.wait(120) == 0, process.stderr.read()[-2000:]
    draw = random.Random(0)
    kills = 0
    while True:
        process = run(folder, "killed")
        before = shards(folder / "killed")
        while process.poll() is None and shards(folder / "killed") == before:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.15))  # within the next one, or its writing
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        kills += 1
    assert kills >= 3
    process = run(folder, "killed")
    assert process.wait(120) == 0, process.stderr.read()[-2000:]
    process = run(folder, "ranks", processes=2)
    assert process.wait(180) == 0, process.stderr.read()[-2000:]
    whole = TeacherCache(str(folder / "whole"))
    for name in ("killed", "ranks"):
        cache = TeacherCache(str(folder / name))
        assert sorted(cache.rows["key"]) == sorted(whole.rows["key"])
        for row in whole.rows:
            pair = [c.log_probs([c.find(row["teacher_prompt_ids"], row["completion_ids"])]) for c in (whole, cache)]
            assert (pair[0] - pair[1]).abs().max() < 1e-2
