"""Trainings that are killed at random moments, twenty times, and end with the weights of one that was not."""

import json
import os
import subprocess
import sys

import pytest
from paths import SCRIPTS


pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")]
SCRIPT = str(SCRIPTS / "crash_run.py")


@pytest.mark.parametrize(("method", "signal", "kills"), [("promptkd", 9, 20), ("primed", 9, 20), ("promptkd", 15, 5)])
def test_a_killed_run_ends_with_the_weights_of_an_undisturbed_one(tmp_path, method, signal, kills):
    settings = {"folder": str(tmp_path), "method": method, "kills": kills, "signal": signal, "seed": 0}
    environment = {**os.environ, "CI": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, SCRIPT, json.dumps(settings)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(result.stdout)
    print(report)
    assert report["kills"] == kills
    assert report["resumed"] >= kills / 2  # the others hit before the first checkpoint was there
    assert report["lives"] >= 1
    assert report["different"] == 0
    if signal == 15:
        assert report["half_written"] == 0
