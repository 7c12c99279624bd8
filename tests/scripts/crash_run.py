"""Run by test_crashes.py: a training that is killed at random moments and resumes, again and again.

The only argument is JSON: `folder`, `method` (promptkd, primed), `kills`, `signal` (9, 15), `seed`. Prints a report as
JSON. Everything is imported once; the trainings are forks of this process.
"""

import json
import os
import random
import shutil
import sys
import time
import traceback
from pathlib import Path


sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(__file__)), "support"))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from runs import short_trainer
from safetensors.torch import load_file, save_file
from tiny import answered_dataset, prompt_dataset
from transformers.utils import logging

from trl_promptkd import (
    PrimedDistillTrainer,
    PrimingTemplate,
    PromptEncoderConfig,
    PromptKDTrainer,
)
from trl_promptkd.trainer.checkpoints import checkpoint_to_resume


settings = json.loads(sys.argv[1])
folder, method = settings["folder"], settings["method"]
run_dir, result = f"{folder}/run", f"{folder}/weights.safetensors"
STEPS = 25
torch.set_num_threads(1)
logging.set_verbosity_error()


def train() -> None:
    """One process's life: go on from the newest whole checkpoint, if there is one, to the end."""
    common = {
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "max_new_tokens": 5,
        "logging_steps": 5,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 2,
        "save_on_interrupt": settings["signal"] == 15,
    }
    if method == "promptkd":
        prompt = PromptEncoderConfig(prompt_init_text="suppose you are a student .")
        more = {"train_dataset": prompt_dataset(16), "prompt_encoder_config": prompt}
        trainer = short_trainer(PromptKDTrainer, folder, common, **more)
    else:
        more = {"train_dataset": answered_dataset(16), "priming": PrimingTemplate("red blue ")}
        trainer = short_trainer(PrimedDistillTrainer, folder, {**common, "response_source": "student"}, **more)
    trainer.train(resume_from_checkpoint=bool(steps_begun()))  # as a script would that is started again and again
    if trainer.state.global_step == STEPS:
        tensors = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        if method == "promptkd":
            tensors["prompt"] = trainer.prompt_embeddings()
        save_file(tensors, result)


def fork() -> int:
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(f"{folder}/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
            os.dup2(1, 2)
            train()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return child


def log() -> str:
    return Path(folder, "log").read_text()


def new_life() -> None:
    shutil.rmtree(run_dir, ignore_errors=True)
    Path(result).unlink(missing_ok=True)


def steps_begun() -> list[int]:
    """Steps whose checkpoints are there, whole or not."""
    return [int(path.name.split("-")[1]) for path in Path(run_dir).glob("checkpoint-*")]


def half_written() -> int:
    """How many of them are not whole."""
    count = 0
    for step in steps_begun():
        try:
            checkpoint_to_resume(f"{run_dir}/checkpoint-{step}", folder)
        except ValueError:
            count += 1
    return count


new_life()
start = time.monotonic()
_, status = os.waitpid(fork(), 0)
assert status == 0, log()
seconds = time.monotonic() - start
undisturbed = load_file(result)

chance = random.Random(settings["seed"])
report = {"seconds": round(seconds, 1), "kills": 0, "lives": 0, "resumed": 0, "half_written": 0, "different": 0}
new_life()
while True:
    begun = max(steps_begun(), default=0)
    child = fork()
    ended = 0
    if report["kills"] < settings["kills"]:
        # Some steps on (at once, now and then: within the start), and then any moment of a step or its saving
        some_steps_on, deadline = begun + chance.randint(0, 3), float("inf")
        while time.monotonic() < deadline and not ended:
            if deadline == float("inf") and max(steps_begun(), default=0) >= some_steps_on:
                deadline = time.monotonic() + chance.uniform(0, 2) * seconds / STEPS
            ended, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.001)
        if not ended:
            os.kill(child, settings["signal"])
            report["kills"] += 1
            report["resumed"] += begun > 0
            _, status = os.waitpid(child, 0)
            assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, log()
            report["half_written"] += half_written()
            continue
    else:
        _, status = os.waitpid(child, 0)
    assert status == 0, log()
    after = load_file(result)
    report["lives"] += 1
    report["different"] += not all(torch.equal(after[name], value) for name, value in undisturbed.items())
    if report["kills"] == settings["kills"]:
        break
    new_life()
print(json.dumps(report))
