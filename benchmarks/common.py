"""Shared by the benchmarks: models, rows, trainers' settings, clocks, memory, and the machine."""

import copy
import math
import multiprocessing
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
)

import trl_promptkd
from trl_promptkd.cli.smollm2 import PROMPTS, cut_layers, load_smollm2


Key = TypeVar("Key", bound=Hashable)
Found = TypeVar("Found")
median = statistics.median


# ----------------------------------------------------------------------------------------------------- models and rows


@dataclass
class Models:
    teacher: PreTrainedModel
    student: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def new_student(self) -> PreTrainedModel:
        """A copy of the student. Weights that are not trained exist once."""
        return copy.deepcopy(self.student, {id(p): p for p in self.student.parameters() if not p.requires_grad})


def load_models(teacher: str | None, student: str | None, layers: int = 11) -> Models:
    """Load the models by name or folder. Without names, SmolLM2-135M-Instruct and `layers` of its 30 layers."""
    if (teacher is None) != (student is None):
        raise SystemExit("Pass both `--teacher` and `--student`, or neither.")
    if teacher is not None:
        models = [AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32) for name in (teacher, student)]
        return _never_ending(Models(*models, AutoTokenizer.from_pretrained(student)))
    smollm2, tokenizer = load_smollm2()
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()[:16]
    cut = cut_layers(smollm2, layers, tokenizer(lines, return_tensors="pt", padding=True))
    return _never_ending(Models(smollm2, cut, tokenizer))


@torch.no_grad()
def _never_ending(models: Models) -> Models:
    """Make the student's least likely token the end of text, so that all samples have the same length."""
    tokenizer, student = models.tokenizer, models.student
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    logits = student(torch.tensor([tokenizer.encode("Once upon a time there was a student and a teacher.")])).logits[0]
    rarest = int(logits.log_softmax(dim=-1).amax(dim=0)[: len(tokenizer)].argmin())
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(rarest)
    for model in (models.teacher, student):
        model.generation_config.eos_token_id = rarest
        model.config.eos_token_id = rarest
    return models


def tokenizer_of_words(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are `t0`, `t1`, ..."""
    backend = Tokenizer(WordLevel({f"t{index}": index for index in range(vocab_size)}, unk_token="t0"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="t0", pad_token="t1", padding_side="left")
    tokenizer.chat_template = "{% for m in messages %}t2 {{ m['content'] }} t3 {% endfor %}"
    return tokenizer


def random_models(
    vocab_size: int, hidden_size: int = 256, teacher_layers: int = 8, student_layers: int = 4, inner_size: int = 0
) -> Models:
    """Models with random weights, and a tokenizer whose tokens are `t0`, `t1`, ...

    If `inner_size` is 0, it is three times the hidden size.
    """
    teacher, student = (
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size,
                hidden_size=hidden_size,
                intermediate_size=inner_size or 3 * hidden_size,
                num_hidden_layers=layers,
                num_attention_heads=max(hidden_size // 64, 2),
                tie_word_embeddings=True,
                eos_token_id=0,
            )
        )
        for layers in (teacher_layers, student_layers)
    )
    return _never_ending(Models(teacher.eval(), student, tokenizer_of_words(vocab_size)))


def asked(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """The user's turn with a row's `instruction` and `input`."""
    return [{"role": "user", "content": "\n\n".join(filter(None, (row["instruction"], row.get("input"))))}]


def prompt_rows(
    data_files: str | None, tokenizer: PreTrainedTokenizerBase, longest: int = 192, rows: int = 256
) -> Dataset:
    """Conversations of one user turn, none longer than `longest` tokens with the template."""
    dataset = load_dataset("json", data_files=data_files or str(PROMPTS), split="train")
    if data_files is not None:
        dataset = dataset.map(lambda row: {"prompt": asked(row)})
    dataset = dataset.select_columns("prompt")
    dataset = dataset.filter(
        lambda row: len(tokenizer.apply_chat_template(row["prompt"], return_dict=False)) <= longest
    )
    return dataset.select(range(min(rows, len(dataset))))


# --------------------------------------------------------------------------------------------------------------- time


def bench_settings(folder: Any, **settings: Any) -> dict[str, Any]:
    """Settings of a trainer that only makes steps. All steps of all trainers work on the same models."""
    return {
        "output_dir": str(folder),
        "learning_rate": 1e-12,  # not 0: PromptKD would leave out what trains the prompt
        "max_steps": 1000,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1000,
        "disable_tqdm": True,
        "seed": 0,
    } | settings


def finished() -> float:
    """The time at which the device has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Parts:
    """Seconds by part. A part inside another one does not count for the outer one, except in generation, which is one
    part."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inside: list[str] = ["rest"]
        self._since = finished()

    def _switch(self) -> None:
        now = finished()
        self.seconds[self._inside[-1]] += now - self._since
        self._since = now

    def watch(self, owner: Any, name: str, part: str) -> Any:
        """A context in which the calls of `owner.name` count as `part`."""
        inner = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._switch()
            self._inside.append("generation" if self._inside[-1] == "generation" else part)
            try:
                return inner(*args, **kwargs)
            finally:
                self._switch()
                self._inside.pop()

        return patch.object(owner, name, timed)

    def stop(self) -> dict[str, float]:
        self._switch()
        return dict(self.seconds)


class Clock(TrainerCallback):
    """Makes a trainer's optimizer steps one at a time, in the trainer's own loop, including sampling."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.steps = trainer, 0
        trainer.add_callback(self)
        trainer.remove_callback(PrinterCallback)

    def step(self, watched: Collection[tuple[Any, str, str]] = ()) -> dict[str, float]:
        """Seconds of the next step by part. `watched` are arguments of [`Parts.watch`]."""
        with ExitStack() as stack:
            self._stack = stack
            self._watched = watched or [(self.trainer.model, "generate", "generation")]
            self.trainer.train()
        self.steps += 1
        return self._seconds

    def on_train_begin(self, args, state, control, **kwargs):
        state.global_step = self.steps  # the trainer begins again otherwise
        if hasattr(self.trainer, "_train_batches"):  # what priming measures now and then
            self.trainer._train_batches = self.steps * args.gradient_accumulation_steps

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._parts = Parts()
        for owner, name, part in self._watched:
            self._stack.enter_context(self._parts.watch(owner, name, part))

    def on_step_end(self, args, state, control, **kwargs):
        self._seconds = self._parts.stop()
        control.should_training_stop = True


def steps_in_turn(
    trainers: Mapping[Key, Callable[[], Trainer]],
    repeats: int,
    once: Collection[Key] = (),
    minutes: float | None = None,
) -> tuple[dict[Key, Clock], dict[Key, list[dict[str, float]]]]:
    """Seconds by part of `repeats` steps of each trainer, after one that is not counted. The trainers take turns.

    Args:
        once: Trainers of which one step is enough.
        minutes: No round starts that would not end in this time.

    Returns:
        The trainers' clocks, for more steps, and the seconds.
    """
    clocks: dict[Key, Clock] = {}
    found: dict[Key, list[dict[str, float]]] = {name: [] for name in trainers}
    began = time.monotonic()
    bar = tqdm(total=len(trainers) * (repeats + 1) - len(set(once) & set(trainers)) * (repeats - 1), unit="step")
    for number in range(repeats + 1):
        round_began = time.monotonic()
        for name in trainers:
            if number > 1 and name in once:
                continue
            title = name if isinstance(name, str) else ", ".join(map(str, name))
            bar.set_description(title)
            if name not in clocks:
                clocks[name] = Clock(trainers[name]())
            seconds = clocks[name].step()
            bar.write(f"{title}: {sum(seconds.values()):.2f} s{'' if number else ' (not counted)'}", sys.stderr)
            bar.update()
            if number:
                found[name].append(seconds)
        now = time.monotonic()
        if number and minutes is not None and now - began + (now - round_began) > minutes * 60:
            break
    bar.close()
    return clocks, found


def slope(points: Mapping[float, float]) -> float:
    """Slope of the line through the logarithms: 1 if the second is proportional to the first, 0 if it is constant."""
    x, y = ([math.log(value) for value in values] for values in (points, points.values()))
    return statistics.linear_regression(x, y).slope


# ------------------------------------------------------------------------------------------------------------- memory


def in_a_process(function: Callable[..., Found], *arguments: Any, most_gb: float | None = None) -> Found | None:
    """The result of a module's function in a process of its own, or `None` if it ran out of memory."""
    settings = (torch.get_num_threads(), most_gb)
    # A process that has imported everything is quick to fork, but CUDA cannot be forked
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    context.set_forkserver_preload([function.__module__])
    with ProcessPoolExecutor(1, context, _first_to_go, settings) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except (BrokenProcessPool, MemoryError):
            return None
        except RuntimeError as error:
            if "out of memory" in str(error) or "allocate memory" in str(error):
                return None
            raise


def _first_to_go(threads: int, most_gb: float | None) -> None:
    torch.set_num_threads(threads)
    if most_gb is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (int(most_gb * 1e9),) * 2)
    if sys.platform == "linux":
        Path("/proc/self/oom_score_adj").write_text("1000")


class MemoryPeak(threading.Thread):
    """Peak memory above that at the start, in MB, of the device or of the process (Linux).

    RSS counts touched pages of memory maps, which the system takes back when it needs them. RssAnon does not. It is
    read every 5 ms.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._reset()
        self._first = dict(self._most)
        self.start()

    def _reset(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the peak of VmRSS, counts from here
        self._most: dict[str, float] = {}
        self._look()

    def _look(self) -> None:
        if torch.cuda.is_available():
            now = {"CUDA": torch.cuda.max_memory_allocated() / 1e6}
        else:
            lines = Path("/proc/self/status").read_text().splitlines()
            values = dict(line.split(":", 1) for line in lines)
            fields = {"RSS": "VmHWM", "RssAnon": "RssAnon"}
            now = {name: int(values[field].split()[0]) * 1024 / 1e6 for name, field in fields.items()}
        self._most = {name: max(value, self._most.get(name, 0.0)) for name, value in now.items()}

    def run(self) -> None:
        while True:
            self._look()
            time.sleep(0.005)

    def since(self) -> dict[str, float]:
        """Peaks since the start or the last call."""
        self._look()
        most = {name: round(value - self._first[name], 1) for name, value in self._most.items()}
        self._reset()
        return most


# ------------------------------------------------------------------------------------------------------------ machine


def machine() -> dict[str, Any]:
    """What the figures depend on: hardware and versions."""
    root = Path(__file__).parent.parent

    def git(*words: str) -> str:
        if shutil.which("git") is None:
            return ""
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_before": round(os.getloadavg()[0], 2),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "accelerate")}
        | {"trl_promptkd": trl_promptkd.__version__},  # which may run from a clone, without being installed
        "commit": git("rev-parse", "HEAD") + (" and changes" if git("status", "--porcelain") else ""),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def measured_with(result: dict[str, Any]) -> str:
    """The line below a table with machine and versions."""
    machine, known = result["machine"], result["machine"]["versions"]
    on = machine["gpu"] or f"{machine['threads']} of {machine['cores']} cores, {machine['cpu']}"
    versions = ", ".join(f"{name} {known[name]}" for name in ("torch", "transformers", "trl"))
    return f"Measured on {on} ({versions}, commit {machine['commit'][:7]}, {machine['date']})."
