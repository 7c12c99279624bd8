"""Two real ranks (gloo) on the CPU. `accelerate launch --cpu --num_processes 2` would start one (trap 16)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


pytestmark = pytest.mark.slow
SCRIPT = str(Path(__file__).parent / "distributed_run.py")


def run(folder, processes, method, rows, steps, sampling, source="dataset"):
    folder.mkdir()
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "29577"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "CI": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*launcher, SCRIPT, str(folder), method, str(rows), str(steps), sampling, source],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [load_file(folder / f"rank{rank}.safetensors") for rank in range(processes)]


@pytest.mark.parametrize(
    ("method", "source"),
    [("promptkd", ""), ("primed", "dataset"), ("primed", "teacher"), ("primed", "student"), ("primed", "cache")],
)
def test_two_ranks_of_two_rows_equal_one_of_four(tmp_path, method, source):
    """Traps 1 and 2: tokens are counted on all ranks, and gradients are not divided by their number."""
    (alone,) = run(tmp_path / "one", 1, method, 4, 1, "greedy", source)
    first, second = run(tmp_path / "two", 2, method, 2, 1, "greedy", source)
    for name, value in alone.items():
        limit = 5e-3 if name == "prompt" else 1e-4
        scale = value.abs().max().clamp(min=1)
        assert (first[name] - value).abs().max() / scale < limit, name
        assert torch.equal(first[name], second[name]), name


def test_the_prompt_is_bitwise_equal_on_all_ranks_after_many_sampled_steps(tmp_path):
    """Ranks stop generating at different lengths here, and do not hang."""
    first, second = run(tmp_path / "two", 2, "promptkd", 2, 20, "sampled")
    assert torch.equal(first["prompt"], second["prompt"])
    assert all(torch.equal(first[name], second[name]) for name in first)
