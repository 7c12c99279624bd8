"""Two real ranks (gloo) on the CPU. `accelerate launch --cpu --num_processes 2` would start one (trap 16).

FSDP2 and DeepSpeed run here as they do on GPUs, in float32: see how distributed_run.py makes accelerate use them.
DeepSpeed is looked for in the environment and in `.venv/deepspeed`, where `make test-slow` puts it by itself.
All runs of one way of sharding share a launch.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paths import SCRIPTS
from safetensors.torch import load_file


pytestmark = pytest.mark.slow
SCRIPT = str(SCRIPTS / "distributed_run.py")
DEEPSPEED = Path(sys.prefix) / "deepspeed"
WAYS = ["ddp", "fsdp2", "zero2", "zero3"]

SEQUENTIAL = {"config": {"prompt_update": "sequential"}}
# Each rank's first row teaches the soft prompt: the first and the third of all
FIRST_OF_RANKS = {"alone": {"order": [0, 2, 1, 3, 4, 5, 6, 7]}}
# Compared with one process: a step, with accumulation
ALIKE = {
    "simultaneous": {},
    "sequential": SEQUENTIAL,
    "share": {"config": {"prompt_share": 0.25}, **FIRST_OF_RANKS},
    "share_sequential": {"config": {"prompt_share": 0.25, "prompt_update": "sequential"}, **FIRST_OF_RANKS},
    "share_self": {"student": "self", "config": {"prompt_share": 0.25}, **FIRST_OF_RANKS},
    # Three rows of the one rank teach, and two of the other
    "share_uneven": {
        "config": {"prompt_share": 0.6, "prompt_update": "sequential"},
        "short_rank": 1,
        "alone": {"short_rank": 0},
    },
    "lora": {"student": "lora"},
    "self": {"student": "self"},
    "self_sequential": {"student": "self", **SEQUENTIAL},
    "tied": {"family": "gpt2"},
    "two_families": {"teacher_family": "qwen2"},
    "by_name": {"by_name": True},
    "checkpointing": {"config": {"gradient_checkpointing": True, "teacher_gradient_checkpointing": True}},
    "primed": {"method": "primed"},
    "primed_padding_free": {"method": "primed", "config": {"padding_free": True}},
    "primed_self": {"method": "primed", "student": "self"},
    "primed_cache": {"method": "primed", "source": "cache"},
    "several": {"method": "primed", "several": ["a", "b"]},
    "several_and_self": {"method": "primed", "several": ["a", "own"], "student": "lora"},
    "several_judge": {"method": "primed", "several": ["a", "b"], "source": "student"},
    "several_write": {"method": "primed", "several": ["a", "b"], "source": "teacher"},
    "primed_served": {"method": "primed", "source": "server"},
    "own_samples": {"method": "primed", "source": "student"},
    "teacher_writes": {"method": "primed", "source": "teacher", "size": 18},  # nine batches: one rank has more of them
    "teacher_writes_by_name": {"method": "primed", "source": "teacher", "by_name": True, "size": 18},
}
REFUSED = {  # or not run
    "ddp": {"by_name", "teacher_writes_by_name", "two_families"},
    "fsdp2": {"self_sequential"},
    "zero2": {"by_name", "teacher_writes_by_name", "two_families"},
    "zero3": {"teacher_writes", "teacher_writes_by_name", "several_write"},
}
# Without a counterpart in one process
ADAM = {"steps": 4, "sampled": True, "config": {"optim": "adamw_torch", "learning_rate": 1e-3}}
ALONE = {
    "many_steps": {"steps": 20, "sampled": True, "config": {"lmbda": 0.6}},
    "empty_rank": {"empty_rank": 1, "config": {"lmbda": 0.0}},
    "empty_rank_primed": {"empty_rank": 1, "method": "primed"},
    "straight": ADAM,
    "interrupted": {**ADAM, "interrupted_rank": 1},
    "resumed": {**ADAM, "resume": True},
}


@functools.cache
def deepspeed_is_there():
    return DEEPSPEED.is_dir() or importlib.util.find_spec("deepspeed") is not None


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """For a way of sharding, each run's folder; `alone` for one process with all rows."""

    @functools.cache
    def launch(way):
        folder = tmp_path_factory.mktemp(way)
        runs = {name: run for name, run in {**ALIKE, **ALONE}.items() if name not in REFUSED.get(way, ())}
        if way == "alone":
            runs = ALIKE
        jobs = []
        for name, settings in runs.items():
            path = folder / {"resumed": "interrupted"}.get(name, name)
            path.mkdir(exist_ok=True)
            one_process = {"rows": 4, **settings.get("alone", {})} if way == "alone" else {"rows": 2}
            jobs.append({"folder": str(path), **settings, **one_process})
        sharding = way if way in ("fsdp2", "zero2", "zero3") else ""
        if sharding:
            cache = launch("alone") / "primed_cache" / "cache"
            jobs = [{**job, "cache": str(cache)} for job in jobs]
        environment = {**os.environ, "CI": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        environment |= {} if sharding else {"ACCELERATE_USE_CPU": "1"}
        if way.startswith("zero"):
            environment["PYTHONPATH"] = f"{DEEPSPEED}{os.pathsep}{environment.get('PYTHONPATH', '')}"
        launcher = [sys.executable]
        if way != "alone":
            launcher += ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
        with open(folder / "log", "w") as log:
            subprocess.run(
                [*launcher, SCRIPT, json.dumps({"sharding": sharding, "runs": jobs})],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=900,
                check=False,  # each run's own test says whether it was done
            )
        return folder

    def result(way, name, rank=0):
        if way.startswith("zero") and not deepspeed_is_there():
            pytest.skip("DeepSpeed is not installed")
        path = launch(way) / name / f"rank{rank}.safetensors"
        log = launch(way) / "log"
        assert path.exists(), f"{name} was not finished; see the end of {log}:\n{log.read_text()[-6000:]}"
        return load_file(path)

    return result


def assert_ranks_agree(first, second):
    assert all(torch.equal(first[name], second[name]) for name in first if name in second)
    assert all(value.float().isfinite().all() for value in first.values())


@pytest.mark.parametrize(("way", "name"), [(way, name) for way in WAYS for name in ALIKE if name not in REFUSED[way]])
def test_two_ranks_of_two_rows_equal_one_of_four(results, way, name):
    """Traps 1 and 2: tokens are counted on all ranks, and gradients are not divided by their number.

    Student, prompt, logged and evaluated values; the teacher is sharded as the student is.
    """
    first, second, expected = results(way, name), results(way, name, 1), results("alone", name)
    is_sharded, of_teacher = first["sharded"].tolist()
    assert is_sharded == (way in ("fsdp2", "zero3"))
    of_others = ("primed_cache", "primed_served")
    assert of_teacher == (is_sharded and ALIKE[name].get("student") != "self" and name not in of_others)
    for key, value in expected.items():
        if key == "sharded":
            continue
        limit = 5e-3 if key == "prompt" else 1e-4
        assert (first[key] - value).abs().max() / value.abs().max().clamp(min=1) < limit, key
    assert_ranks_agree(first, second)


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_without_padding_equal_two_with_it(results, way):
    """Token counts among what is logged."""
    padded, free = results(way, "primed"), results(way, "primed_padding_free")
    for key, value in padded.items():
        torch.testing.assert_close(free[key], value, atol=1e-5, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("way", WAYS)
def test_the_prompt_is_bitwise_equal_on_all_ranks_after_many_sampled_steps(results, way):
    """Ranks stop generating at different lengths here, and sample different numbers of rows. They do not hang."""
    assert_ranks_agree(results(way, "many_steps"), results(way, "many_steps", 1))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["empty_rank", "empty_rank_primed"])
def test_a_rank_with_nothing_to_train_on_takes_part(results, way, name):
    """And every way of sharding comes to the same."""
    first = results(way, name)
    assert_ranks_agree(first, results(way, name, 1))
    for key, value in results("ddp", name).items():
        assert key == "sharded" or torch.allclose(first[key], value, atol=1e-5), key


@pytest.mark.parametrize("way", WAYS)
def test_an_interrupted_run_resumes(results, way):
    """One rank's SIGTERM stopped both after the same step, with a whole checkpoint that the next run resumed from."""
    straight, parted = results(way, "straight"), results(way, "interrupted")
    for name, value in straight.items():
        assert torch.equal(parted[name], value) or (way != "ddp" and torch.allclose(parted[name], value)), name
