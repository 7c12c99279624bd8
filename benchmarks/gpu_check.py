"""Checks this package on a GPU, and at tiny shapes on a CPU: exactness, time, memory, sharding, 4 bits.

It needs no network and no weights. On a GPU, models have random weights in the shapes of Qwen2.5-0.5B (the student, in
float32) and Qwen2.5-7B (the teacher, in bfloat16). A part that fails does not stop the others. The exit code is 1 if
one fails. The result, a plot and all messages of the trainers are files in one folder.
"""

import argparse
import gc
import json
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoModelForCausalLM, PretrainedConfig

from trl_promptkd import PromptEncoderConfig, PromptKDConfig, PromptKDTrainer
from trl_promptkd.analysis.plot_style import LIGHT, new_figure, plot_style, save_figure

from . import common, exactness
from .common import Clock, Models, bench_settings, measured_with, median, tokenizer_of_words
from .memory_table import CONFIGS, qwen2
from .step_time import make_trainer, places, seconds_of
from .study.page_text import table


PAGE = "benchmarks.md"
# The slowest comes last, where it may find no time left
METHODS = (
    "PromptKD",
    "PromptKD, simultaneous",
    "PromptKD, share 0.25",
    "PromptKD, simultaneous, share 0.25",
    "priming, live teacher",
    "priming, cached",
    "DistillationTrainer",
    "GKDTrainer",
)
NOT_MEASURED = "not measured"


class VerdictError(Exception):
    """A part's verdict other than "pass", and why."""


@dataclass(frozen=True)
class Sizes:
    student: PretrainedConfig
    teacher: PretrainedConfig
    rows: int  # of a micro-batch
    accumulation: int
    prompt: int  # tokens
    new: int  # tokens


def sizes_for(device: str) -> Sizes:
    if device == "cpu":
        shape = {"heads": 4, "kv_heads": 2, "inner": 128, "vocab": 512}
        return Sizes(qwen2(64, 2, tied=True, **shape), qwen2(128, 3, tied=False, **shape), 2, 2, 16, 8)
    teacher = deepcopy(CONFIGS["Qwen2.5-7B"])
    teacher.vocab_size = CONFIGS["Qwen2.5-0.5B"].vocab_size  # GKDTrainer takes no teacher of another size
    return Sizes(CONFIGS["Qwen2.5-0.5B"], teacher, 8, 4, 192, 64)  # GKDTrainer: 2,048 tokens of about 6 MB


class Check:
    """Shared by the parts. `ends` is the time limit of a part."""

    ends: float

    def __init__(self, device: str, folder: Path, num_steps: int, say: Callable[[str], None]):
        self.device, self.folder, self.num_steps, self.say = device, folder, num_steps, say
        self.on_gpu = device != "cpu"
        self.sizes = sizes_for(device)
        self.result: dict[str, Any] = {}
        self._models: Models | None = None

    @property
    def left(self) -> float:
        return self.ends - time.monotonic()

    @property
    def models(self) -> Models:
        """Models made on the device, which draws their weights in seconds."""
        if self._models is None:
            self.say("making the models")
            torch.manual_seed(0)
            teacher_dtype = torch.bfloat16 if self.on_gpu else torch.float32
            made = []
            for config, dtype in ((self.sizes.teacher, teacher_dtype), (self.sizes.student, torch.float32)):
                with torch.device(self.device):
                    made.append(AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa"))
                made[-1].generation_config.eos_token_id = 0
            self._models = Models(made[0].eval(), made[1], tokenizer_of_words(self.sizes.student.vocab_size))
        return self._models

    def prompts(self) -> Dataset:
        words = torch.randint(4, self.sizes.student.vocab_size, (64, self.sizes.prompt - 2)).tolist()
        turns = [[{"role": "user", "content": " ".join(f"t{word}" for word in row)}] for row in words]
        return Dataset.from_dict({"prompt": turns})

    def settings(self) -> dict[str, Any]:
        return {"per_device_train_batch_size": self.sizes.rows, "gradient_accumulation_steps": self.sizes.accumulation}

    def clock(self, method: str, new: int, **settings: Any) -> Clock:
        """The clock of a method's trainer. All its samples have `new` tokens."""
        models = self.models
        torch.manual_seed(0)
        sizes = {"accumulation": self.sizes.accumulation, "batch_size": self.sizes.rows, "max_new_tokens": new}
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        trainer = make_trainer(method, models, self.prompts(), folder, **sizes, bf16=self.on_gpu, **settings)
        trainer.generation_config.min_new_tokens = new
        return Clock(trainer)

    def measured(self, clock: Clock, num_steps: int) -> dict[str, Any]:
        """Seconds of steps by part, after one that is not counted, the loss of that one, and the peak of memory."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        clock.step()
        loss = clock.trainer.state.log_history[-1]["train_loss"]
        found: list[dict[str, float]] = []
        while not found or (len(found) < num_steps and self.left > 2 * sum(found[-1].values())):
            found.append(clock.step())
        if not np.isfinite(loss):
            raise VerdictError("fail", f"the loss is {loss}")
        return {"steps": found, "loss": loss, "gb": torch.cuda.max_memory_allocated() / 1e9 if self.on_gpu else None}

    def free(self) -> None:
        """Free the memory of a deleted trainer, and remove its wrappers of the teacher's forward pass."""
        if self._models is not None:
            self._models.teacher.__dict__.pop("forward", None)
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()


# -------------------------------------------------------------------------------------------------------------- parts


def compared(check: Check, found: list[exactness.Difference]) -> str:
    """Fail if a value is too far off."""
    check.result.setdefault("exactness", []).extend(asdict(one) for one in found)
    worst = max(found, key=lambda one: one.off / one.limit if np.isfinite(one.off) else np.inf)
    about = f"{worst.what} ({worst.dtype}) is off by {worst.off:.1e}, with a limit of {worst.limit:.0e}"
    if wrong := sum(not one.is_small for one in found):
        raise VerdictError("fail", f"{wrong} of {len(found)} values are too far off; {about}")
    return f"{len(found)} values; nearest to its limit: {about}"


def exact(check: Check) -> str:
    return compared(check, list(exactness.exactness(check.device)))


def four_bit(check: Check) -> str:
    needs_four_bit(check.device)
    return compared(check, list(exactness.four_bit(check.device)))


def needs_four_bit(device: str) -> None:
    if find_spec("bitsandbytes") is None:
        raise VerdictError("not run", "bitsandbytes is not installed")
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        dequantize_4bit(*quantize_4bit(torch.ones(64, 64, device=device), quant_type="nf4"))
    except Exception as error:  # its part for the device is missing, of which it says so in many ways
        raise VerdictError("not run", f"bitsandbytes does not run on {device}: {error}") from error


def fsdp2(check: Check) -> str:
    path = check.folder / "fsdp2.json"
    command = [sys.executable, "-m", "benchmarks.exactness", str(path), check.device]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr)
        raise VerdictError("fail", done.stderr.strip().splitlines()[-1])
    return compared(check, [exactness.Difference(**one) for one in json.loads(path.read_text())])


def steps(check: Check) -> str:
    """Measure one method after the other, so that each peak of memory is its own."""
    found = check.result["steps"] = {}
    for method in METHODS:
        check.say(method)
        if check.left < 10:
            found[method] = {"error": "no time was left"}
            continue
        try:
            found[method] = check.measured(check.clock(method, check.sizes.new), check.num_steps)
        except TimeoutError:
            raise
        except Exception as error:
            print(traceback.format_exc())
            no_memory = isinstance(error, torch.OutOfMemoryError)
            found[method] = {"error": "out of memory" if no_memory else f"{type(error).__name__}: {error}"}
        check.free()
    errors = {method: one["error"] for method, one in found.items() if "error" in one}
    about = "; ".join(f"{method}: {error}" for method, error in errors.items())
    if any(not method.endswith("Trainer") for method in errors):
        raise VerdictError("fail", about)
    return about or f"{len(found)} methods"


class MarkedParts(common.Parts):
    """Marks the end of each part in a profile, with its name."""

    def _switch(self) -> None:
        super()._switch()
        with record_function(f"part: {self._inside[-1]}"):
            pass


def busy_seconds(events: Any) -> Counter[str]:
    """How long the device was busy in each part, from a profile's events. Simultaneous events count once."""
    of_parts = [e for e in events if e.device_type == DeviceType.CPU and e.name.startswith("part: ")]
    marks = sorted((e.time_range.start, e.name.removeprefix("part: ")) for e in of_parts)  # in microseconds
    kernels = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    start, end = np.array(sorted((e.time_range.start, e.time_range.end) for e in kernels)).reshape(-1, 2).T
    before = np.maximum.accumulate(np.append(-np.inf, end))[:-1]
    busy = np.clip(end - np.maximum(start, before), 0, None) / 1e6
    found: Counter[str] = Counter()
    for place, seconds in zip(np.searchsorted([at for at, _ in marks], start), busy, strict=True):
        if place < len(marks):
            found[marks[place][1]] += float(seconds)
    return found


def profiled(check: Check) -> str:
    """Time a step of PromptKD part by part, and one under the profiler, which is slower, for the device alone."""
    new = max(check.sizes.new // 4, 8)  # nearly all events are those of sampling
    clock = check.clock("PromptKD", new)
    clock.step()
    seconds, busy = clock.step(places(clock.trainer)), None
    result = check.result["profile"] = {"new_tokens": new, "seconds": seconds, "busy": None}
    if check.on_gpu:
        activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
        with mock.patch.object(common, "Parts", MarkedParts), profile(activities=activities) as found:
            clock.step(places(clock.trainer))
        check.say("reading the profile")
        busy = result["busy"] = busy_seconds(found.events())
        if not busy:
            raise VerdictError("not run", "the profiler sees nothing of what runs on the device (CUPTI)")
    whole = sum(seconds.values())
    idle = NOT_MEASURED if busy is None else f"{100 * max(0.0, 1 - sum(busy.values()) / whole):.0f} %"
    return f"{whole:.2f} s; share in which the device was idle: {idle}"


def checkpointing(check: Check) -> str:
    method = "PromptKD, simultaneous"
    plain = check.result.get("steps", {}).get(method, {})
    if "loss" not in plain:
        raise VerdictError("not run", f"no step of `{method}` without checkpointing to compare with")
    settings = {"gradient_checkpointing": True, "teacher_gradient_checkpointing": True}
    found = check.result["checkpointing"] = check.measured(check.clock(method, check.sizes.new, **settings), 1)
    about = f"loss {found['loss']:.4f}, without {plain['loss']:.4f}; peak {peak(found)}, without {peak(plain)}"
    same = abs(found["loss"] / plain["loss"] - 1) < 0.02  # in bfloat16, a sample may differ from some token on
    if not same or (check.on_gpu and found["gb"] >= plain["gb"]):
        raise VerdictError("fail", about)
    return about


def qlora(check: Check) -> str:
    """Check QLoRA. It is the last part, as it deletes the models without quantization."""
    needs_four_bit(check.device)
    models, prompts = check.models, check.prompts()
    check.say("quantizing both models")
    student, teacher = exactness.quantized(models.student.to(torch.bfloat16)), exactness.quantized(models.teacher)
    tokenizer, check._models, models = models.tokenizer, None, None
    check.free()
    settings = check.settings() | {"learning_rate": 1e-3, "bf16": True, "max_new_tokens": check.sizes.new}
    settings["generation_kwargs"] = {"min_new_tokens": check.sizes.new}
    trainer = PromptKDTrainer(
        student,
        teacher,
        PromptKDConfig(**bench_settings(check.folder / "qlora", **settings)),
        train_dataset=prompts,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        prompt_encoder_config=PromptEncoderConfig(prompt_init="vocab"),
    )
    adapter = {name: p for name, p in trainer.model.named_parameters() if "lora_B" in name}
    packed = teacher.get_decoder().layers[0].mlp.up_proj.weight
    before = packed.detach().clone()
    found = check.result["qlora"] = check.measured(Clock(trainer), 1)
    still = [name for name, p in adapter.items() if not p.any()]
    if still or not adapter:
        raise VerdictError("fail", f"of {len(adapter)} matrices of the adapter, {len(still)} did not move")
    if not torch.equal(packed, before):
        raise VerdictError("fail", "the teacher's weights have changed")
    return f"{seconds_of(found['steps']):.2f} s per step; peak {peak(found)}"


# Name -> (what it does, seconds of `--seconds` that it may take)
PARTS: dict[str, tuple[Callable[[Check], str], int]] = {
    "exactness": (exact, 90),
    "4-bit gradients": (four_bit, 25),
    "FSDP2 on one rank": (fsdp2, 70),
    "time and memory of a step": (steps, 160),
    "profile of a step": (profiled, 45),
    "gradient checkpointing": (checkpointing, 25),
    "QLoRA student, NF4 teacher": (qlora, 40),
}


SECONDS = sum(seconds for _, seconds in PARTS.values())  # with the imports, under eight minutes


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise a `TimeoutError` inside after this time."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"it took longer than its {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_part(part: Callable[[Check], str], seconds: float, check: Check) -> dict[str, Any]:
    began = time.monotonic()
    check.ends = began + seconds
    check.say("")
    try:
        with within(seconds):
            verdict, why = "pass", part(check)
    except VerdictError as error:
        verdict, why = error.args
    except Exception as error:
        print(traceback.format_exc())
        verdict, why = "fail", f"{type(error).__name__}: {error}"
    check.free()  # outside of `except`, which holds on to the part's tensors
    return {"verdict": verdict, "seconds": round(time.monotonic() - began, 1), "why": why.split("\n")[0]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="what to check")
    parser.add_argument("--steps", type=int, default=2, help="steps of each method, after one that is not counted")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time limit of all parts together")
    parser.set_defaults(output=Path("gpu_check") / "gpu_check.json")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.output.parent.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.set_verbosity_error()
    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[left]}"))
    progress = Progress(*columns, console=console, redirect_stdout=False, redirect_stderr=False)
    budgets = {name: PARTS[name][1] * args.seconds / SECONDS for name in args.parts}
    left = sum(budgets.values())
    task = progress.add_task("", total=left, left="")
    log = args.output.with_suffix(".log").open("w", encoding="utf-8", buffering=1)
    with tempfile.TemporaryDirectory() as folder, progress, log, redirect_stdout(log), redirect_stderr(log):

        def say(what: str) -> None:
            description = f"{name}: {what}" if what else name
            progress.update(task, description=description, left=f"at most {left + check.left:.0f} s left")

        check = Check(device, Path(folder), args.steps, say)
        check.result["verdicts"] = []
        for name, seconds in budgets.items():
            left -= seconds
            found = {"part": name, **run_part(PARTS[name][0], seconds, check)}
            check.result["verdicts"].append(found)
            progress.update(task, advance=seconds)
            console.print("{part}: {verdict} ({seconds:.0f} s). {why}".format(**found), highlight=False, markup=False)
    shape = {name: value for name, value in vars(check.sizes).items() if isinstance(value, int)}
    result = {"device": device, "sizes": shape, **check.result}
    draw(result, args.output.with_suffix(".png"))
    return result


def failed(result: dict[str, Any]) -> bool:
    return any(one["verdict"] == "fail" for one in result["verdicts"])


# ------------------------------------------------------------------------------------------------------------ results


def sampling_of(found: dict[str, Any]) -> float:
    return median(step.get("generation", 0.0) for step in found["steps"])


def peak(found: dict[str, Any]) -> str:
    return NOT_MEASURED if found["gb"] is None else f"{found['gb']:.1f} GB"


def tables(result: dict[str, Any]) -> dict[str, str]:
    made = {}
    if "exactness" in result:
        groups: dict[str, dict[str, float]] = {}
        for one in result["exactness"]:
            worst = groups.setdefault(one["what"].split(":")[0], dict.fromkeys(exactness.DTYPES, 0.0))
            worst[one["dtype"]] = max(worst[one["dtype"]], one["off"])
        rows = [
            [what, *(f"{value:.0e}" if value else "" for value in worst.values())] for what, worst in groups.items()
        ]
        limits = "; ".join(f"{dtype} {limit:.0e} ({why})" for dtype, (limit, why) in exactness.LIMITS.items())
        made["exactness"] = f"{table(['off by, at most', *exactness.DTYPES], rows)}\n\nLimits: {limits}."
    if "steps" in result:
        rows = [
            [method, found["error"], "", ""]
            if "error" in found
            else [method, f"{seconds_of(found['steps']):.2f}", f"{sampling_of(found):.2f}", peak(found)]
            for method, found in result["steps"].items()
        ]
        about = "{accumulation} micro-batches of {rows} rows, {prompt} + {new} tokens.".format(**result["sizes"])
        header = ["step", "seconds", "sampling", "peak memory"]
        made["steps"] = f"{table(header, rows)}\n\n{about} {measured_with(result)}"
    if "profile" in result:
        new, seconds, busy = result["profile"].values()
        rows = []
        for part, value in sorted(seconds.items(), key=lambda item: -item[1]):
            known = None if busy is None else (busy.get(part, 0.0), max(0.0, value - busy.get(part, 0.0)))
            rows.append([part, f"{value:.3f}", *(f"{k:.3f}" for k in known or ())] + [NOT_MEASURED] * 2 * (not known))
        made["profile"] = table([f"PromptKD, {new} new tokens", "seconds", "device busy", "device idle"], rows)
    rows = [[one["part"], one["verdict"], f"{one['seconds']:.0f}", one["why"]] for one in result["verdicts"]]
    made["verdicts"] = table(["part", "verdict", "seconds", "about it"], rows)
    return made


@plot_style()
def draw(result: dict[str, Any], path: Path) -> None:
    found = {method: one for method, one in reversed(result.get("steps", {}).items()) if "error" not in one}
    names = list(found)
    figure = new_figure(10.4, 3.8)
    of_time, of_memory = figure.subplots(1, 2, sharey=True)
    colors = [LIGHT.muted if name.endswith("Trainer") else LIGHT.lines[1] for name in names]
    of_time.barh(names, [seconds_of(one["steps"]) for one in found.values()], color=colors)
    of_time.barh(names, [sampling_of(one) for one in found.values()], color=LIGHT.lines[5], label="sampling")
    of_time.set(xlabel="seconds per optimizer step")
    of_time.legend(loc="center right")
    of_memory.barh(names, [one["gb"] or 0.0 for one in found.values()], color=colors)
    of_memory.set(xlabel="peak memory, GB" if result["device"] != "cpu" else "memory is not measured on a CPU")
    save_figure(figure, path)
