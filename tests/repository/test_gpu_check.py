"""The check of a GPU: what it compares, how it judges, and (slow) all of it at tiny shapes on a CPU."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from paths import ROOT
from torch.autograd import DeviceType

from benchmarks import __main__ as runner
from benchmarks import exactness, gpu_check
from benchmarks.gpu_check import VerdictError, busy_seconds


@pytest.fixture
def check(tmp_path):
    made = gpu_check.Check("cpu", tmp_path, 1, lambda what: None)
    made.ends = time.monotonic() + 1000
    return made


def found(off, limit=1e-4):
    return exactness.Difference("a loss", "float32", off, limit, "rounding")


class TestExactness:
    def test_padding_that_matters_is_found(self, monkeypatch):
        assert max(off for _, off in exactness.padding("cpu", "float32")) < 1e-5
        logits = exactness.forward_logits
        monkeypatch.setattr(
            exactness, "forward_logits", lambda model, ids, mask, prompt: logits(model, ids, mask | 1, prompt)
        )
        offs = dict(exactness.padding("cpu", "float32"))
        assert min(offs["padding: left"], offs["padding: both"]) > exactness.LIMITS["bfloat16"][0]

    def test_a_wrong_weight_of_the_loss_is_found(self, monkeypatch):
        assert max(off for _, off in exactness.chunks("cpu", "float32")) < 1e-5
        sums = exactness.promptkd_loss_sums
        monkeypatch.setattr(exactness, "promptkd_loss_sums", lambda *a, **k: sums(*a, **{**k, "weight": 1.0}))
        offs = {name.split(": ")[1]: off for name, off in exactness.chunks("cpu", "float32")}
        limit, _ = exactness.LIMITS["bfloat16"]
        assert min(offs["value"], offs["gradient of prompted teacher"]) > limit > offs["gradient of student"]

    def test_4_bit_gradients_are_those_of_the_same_weights(self):
        pytest.importorskip("bitsandbytes")
        assert all(one.is_small for one in exactness.four_bit("cpu"))

    def test_a_value_too_far_off_or_not_finite_fails(self, check):
        assert "1 values" in gpu_check.compared(check, [found(1e-5)])
        with pytest.raises(VerdictError) as error:
            gpu_check.compared(check, [found(1e-5), found(2e-4)])
        assert error.value.args[0] == "fail"
        assert "1 of 2 values are too far off; a loss (float32) is off by 2.0e-04" in error.value.args[1]
        with pytest.raises(VerdictError, match="off by nan"):
            gpu_check.compared(check, [found(float("nan")), found(1e-5)])


class TestVerdicts:
    def test_a_part_that_fails_does_not_stop_the_others(self, monkeypatch, tmp_path, capsys):
        def fails(check):
            raise ZeroDivisionError("first line\nsecond")

        def is_not_run(check):
            raise VerdictError("not run", "there is no such thing")

        def hangs(check):
            time.sleep(20)

        parts = {"fails": fails, "is not run": is_not_run, "hangs": hangs, "passes": lambda check: "all is well"}
        monkeypatch.setattr(gpu_check, "PARTS", {name: (part, 1) for name, part in parts.items()})
        flags = ["--seconds", str(gpu_check.SECONDS), "--output", str(tmp_path / "result.json"), "--parts", *parts]
        with pytest.raises(SystemExit) as ended:
            runner.main(["gpu-check", *flags])
        assert ended.value.code == 1
        result = json.loads((tmp_path / "result.json").read_text())
        assert {one["part"]: (one["verdict"], one["why"]) for one in result["verdicts"]} == {
            "fails": ("fail", "ZeroDivisionError: first line"),
            "is not run": ("not run", "there is no such thing"),
            "hangs": ("fail", "TimeoutError: it took longer than its 1 s"),
            "passes": ("pass", "all is well"),
        }
        assert "all is well" in capsys.readouterr().out
        assert "second" in (tmp_path / "result.log").read_text()
        del result["verdicts"][2], result["verdicts"][0]
        assert not gpu_check.failed(result)

    @pytest.mark.parametrize(("method", "passes"), [("GKDTrainer", True), ("PromptKD", False)])
    def test_too_little_memory_is_a_result(self, check, monkeypatch, method, passes):
        def measured(clock, steps):
            if clock == method:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return {"steps": [{"rest": 1.0}], "loss": 1.0, "gb": None}

        monkeypatch.setattr(check, "clock", lambda method, new: method)
        monkeypatch.setattr(check, "measured", measured)
        if passes:
            assert gpu_check.steps(check) == f"{method}: out of memory"
        else:
            with pytest.raises(VerdictError):
                gpu_check.steps(check)
        assert check.result["steps"].keys() == set(gpu_check.METHODS)
        assert check.result["steps"][method] == {"error": "out of memory"}

    def test_checkpointing_must_leave_the_loss(self, check, monkeypatch):
        monkeypatch.setattr(check, "clock", lambda *args, **settings: None)
        with pytest.raises(VerdictError) as error:
            gpu_check.checkpointing(check)
        assert error.value.args[0] == "not run"
        check.result["steps"] = {"PromptKD, simultaneous": {"loss": 1.0, "gb": None}}
        for loss, verdict in ((1.01, None), (1.03, "fail")):
            monkeypatch.setattr(check, "measured", lambda clock, steps, loss=loss: {"loss": loss, "gb": None})
            if verdict is None:
                gpu_check.checkpointing(check)
            else:
                with pytest.raises(VerdictError, match=r"loss 1\.0300"):
                    gpu_check.checkpointing(check)


def test_busy_seconds_are_of_the_part_that_launched_them():
    """Marks stand at the end of a part. Microseconds, in no order."""

    def event(name, start, end, device=DeviceType.CUDA, is_user_annotation=False):
        times = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(name=name, time_range=times, device_type=device, is_user_annotation=is_user_annotation)

    events = [
        event("part: student", 200, 201, DeviceType.CPU),
        event("part: generation", 100, 101, DeviceType.CPU),
        event("part: student", 300, 301, DeviceType.CPU),
        event("aten::mm", 100, 120, DeviceType.CPU),
        event("kernel", 110, 130),
        event("kernel", 120, 140),  # half of it beside the one before
        event("kernel", 10, 60),
        event("within it", 20, 30),
        event("an annotation", 100, 300, is_user_annotation=True),
        event("kernel", 250, 255),
        event("kernel", 400, 500),  # after the step
    ]
    assert busy_seconds(events) == pytest.approx({"generation": 50e-6, "student": 35e-6})


@pytest.mark.slow
def test_all_of_it_at_tiny_shapes(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "gpu_check.json"
    command = [sys.executable, "-m", "benchmarks", "gpu-check", "--threads", "1", "--steps", "1"]
    settings = {"cwd": ROOT, "env": os.environ | {"CUDA_VISIBLE_DEVICES": ""}, "capture_output": True, "text": True}
    done = subprocess.run([*command, "--seconds", "5000", "--output", str(path)], check=False, **settings)
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    verdicts = {one["part"]: one["verdict"] for one in result["verdicts"]}
    assert verdicts.keys() == gpu_check.PARTS.keys()
    if "not run" in verdicts.values():  # without bitsandbytes
        assert {verdicts.pop("4-bit gradients"), verdicts.pop("QLoRA student, NF4 teacher")} == {"not run"}
    assert set(verdicts.values()) == {"pass"}
    assert all(one["steps"][0]["rest"] > 0 for one in result["steps"].values())
    assert result["steps"].keys() == set(gpu_check.METHODS)
    assert {"generation", "student", "teacher", "the prompt's backward pass"} <= result["profile"]["seconds"].keys()
    assert path.with_suffix(".png").stat().st_size > 1000
