"""Two real ranks (gloo) on the CPU. `accelerate launch --cpu --num_processes 2` would start one (trap 16).

FSDP2 and DeepSpeed run here as they do on GPUs, in float32: see how distributed_run.py makes accelerate use them. DeepSpeed is looked for
in the environment and in `.venv/deepspeed`, where `make test-slow` puts it so that nothing else meets it.
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
from safetensors.torch import load_file


pytestmark = pytest.mark.slow
SCRIPT = str(Path(__file__).parent / "distributed_run.py")
DEEPSPEED = Path(sys.prefix) / "deepspeed"

SEQUENTIAL = {"config": {"prompt_update": "sequential"}}
SELF = {"student": "self"}
PRIMED = {"method": "primed"}
OWN_SAMPLES = {"method": "primed", "source": "student"}
TEACHER_WRITES = {"method": "primed", "source": "teacher"}
CASES = [
    ("", {}),
    ("", SEQUENTIAL),
    ("", {"student": "lora"}),
    ("", {**SELF, **SEQUENTIAL}),
    ("", {"config": {"gradient_checkpointing": True, "teacher_gradient_checkpointing": True}}),
    ("", PRIMED),
    ("", TEACHER_WRITES),
    ("", OWN_SAMPLES),
    ("", {"method": "primed", "source": "cache"}),
    ("fsdp2", SEQUENTIAL),
    ("fsdp2", {"student": "lora"}),
    ("fsdp2", SELF),
    ("fsdp2", {"family": "gpt2"}),  # the head is the embeddings
    ("fsdp2", {"by_name": True}),
    ("fsdp2", PRIMED),
    ("fsdp2", TEACHER_WRITES),
    ("fsdp2", OWN_SAMPLES),
    ("zero2", SEQUENTIAL),
    ("zero2", {**SELF, **SEQUENTIAL}),
    ("zero2", OWN_SAMPLES),
    ("zero3", SEQUENTIAL),
    ("zero3", {**SELF, **SEQUENTIAL}),
    ("zero3", {"by_name": True}),
    ("zero3", OWN_SAMPLES),
]


def launch(folder, processes, settings):
    """One run; its ranks' results."""
    folder.mkdir(parents=True, exist_ok=True)
    sharding = settings.get("sharding", "")
    environment = {**os.environ, "CI": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if sharding.startswith("zero"):
        if importlib.util.find_spec("deepspeed") is None and not DEEPSPEED.is_dir():
            pytest.skip("DeepSpeed is not installed")
        environment["PYTHONPATH"] = f"{DEEPSPEED}{os.pathsep}{environment.get('PYTHONPATH', '')}"
    if not sharding:
        environment["ACCELERATE_USE_CPU"] = "1"
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    result = subprocess.run(
        [*launcher, SCRIPT, json.dumps({"folder": str(folder), **settings})],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return [load_file(folder / f"rank{rank}.safetensors") for rank in range(processes)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process with four rows makes of some settings: run once for all ways of sharding."""

    @functools.cache
    def run(settings):
        return launch(tmp_path_factory.mktemp("alone"), 1, {**json.loads(settings), "rows": 4})[0]

    return lambda settings: run(json.dumps(settings, sort_keys=True))


def name_of(value):
    return (value or "ddp") if isinstance(value, str) else json.dumps(value).replace('"', "") or "plain"


@pytest.mark.parametrize(("sharding", "settings"), CASES, ids=name_of)
def test_two_ranks_of_two_rows_equal_one_of_four(tmp_path, alone, sharding, settings):
    """Traps 1 and 2: tokens are counted on all ranks, and gradients are not divided by their number.

    Student, prompt, logged and evaluated values, after a step with accumulation; the teacher is sharded as the student is.
    """
    first, second = launch(tmp_path, 2, {**settings, "rows": 2, "sharding": sharding})
    expected = alone(settings)
    is_sharded, of_teacher = first.pop("sharded").tolist()
    assert is_sharded == (sharding in ("fsdp2", "zero3"))
    assert of_teacher == (is_sharded and settings.get("student") != "self")
    for name, value in expected.items():
        if name == "sharded":
            continue
        limit = 5e-3 if name == "prompt" else 1e-4
        scale = value.abs().max().clamp(min=1)
        assert (first[name] - value).abs().max() / scale < limit, name
        if name in second:
            assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("sharding", ["", "fsdp2", "zero2", "zero3"], ids=name_of)
def test_the_prompt_is_bitwise_equal_on_all_ranks_after_many_sampled_steps(tmp_path, sharding):
    """Ranks stop generating at different lengths here, and draw different numbers of rows to be sampled; they do not hang."""
    settings = {"rows": 2, "steps": 20, "sampled": True, "sharding": sharding, "config": {"lmbda": 0.6}}
    first, second = launch(tmp_path, 2, settings)
    assert torch.equal(first["prompt"], second["prompt"])
    assert all(torch.equal(first[name], second[name]) for name in first if name in second)
    assert all(value.float().isfinite().all() for value in first.values())


@pytest.mark.parametrize("sharding", ["", "fsdp2", "zero3"], ids=name_of)
@pytest.mark.parametrize("method", ["promptkd", "primed"])
def test_a_rank_with_nothing_to_train_on_takes_part(tmp_path, sharding, method):
    settings = {"method": method, "rows": 2, "sharding": sharding, "empty_rank": 1, "config": {"lmbda": 0.0}}
    if method == "primed":
        settings["config"] = {}
    first, second = launch(tmp_path, 2, settings)
    assert all(torch.equal(first[name], second[name]) for name in first if name in second)
    assert all(value.float().isfinite().all() for value in first.values())


@pytest.mark.parametrize("sharding", ["", "fsdp2", "zero2", "zero3"], ids=name_of)
def test_an_interrupted_run_resumes(tmp_path, sharding):
    """One rank's SIGTERM stops both after the same step, with a whole checkpoint, which the next run goes on from."""
    settings = {"rows": 2, "steps": 4, "sampled": True, "sharding": sharding}
    (straight, _) = launch(tmp_path / "straight", 2, settings)
    launch(tmp_path / "parted", 2, {**settings, "interrupted_rank": 1})
    (parted, _) = launch(tmp_path / "parted", 2, {**settings, "resume": True})
    for name, value in straight.items():
        assert torch.equal(parted[name], value) or (sharding and torch.allclose(parted[name], value)), name
