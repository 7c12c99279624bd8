"""One run: a method takes a student that SFT has warmed up some steps, or seconds, further."""

import json
import logging
import os
import random
import time
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from measure import MAX_NEW_TOKENS, TOKENIZER, Measures, answers, prompt_ids
from models import student as load_student
from models import training_rows
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from world import WRITERS, gold_answer, make_problem

from trl_promptkd import (
    PrimedDistillConfig,
    PrimedDistillTrainer,
    PrimingTemplate,
    PromptEncoderConfig,
    PromptKDConfig,
    PromptKDTrainer,
)
from trl_promptkd.files import whole_file


disable_progress_bars()
BATCH_SIZE = 16
WARMUP_STEPS = 20
FRESH_ROWS = 8000


def rows_of(folder: Path, data: str, num_rows: int, by_teacher) -> list[tuple[str, str]]:
    """(question, answer): the finite set, or fresh problems; the answers the data's, or greedy ones `by_teacher`."""
    if data == "finite":
        rows = training_rows(num_rows)
    else:
        rng = random.Random("fresh")
        problems = [make_problem(rng) for _ in range(num_rows)]
        rows = [(problem.question, gold_answer(problem, rng)) for problem in problems]
    if by_teacher is None:
        return rows
    path = folder / f"teacher_answers_{data}_{num_rows}.json"
    questions = [question for question, _ in rows]
    if not path.exists():
        found = answers(by_teacher, prompt_ids(questions), seed=None)
        with whole_file(str(path)) as file:
            Path(file).write_text(json.dumps(TOKENIZER.batch_decode(found, skip_special_tokens=True)))
    return list(zip(questions, json.loads(path.read_text()), strict=True))


class Snapshots(TrainerCallback):
    """Measures the student after some steps and after so many seconds of one core, and stops when it has done both;
    measuring does not count."""

    def __init__(self, measures: Measures, snapshots: list[int], steps: int, seconds: float | None):
        self.measures, self.at_steps, self.limit = measures, [*snapshots, steps], seconds
        self.last_snapshot = max(snapshots, default=0)
        self.seconds, self.found, self.trainer = 0.0, {}, None
        self.in_time = True

    def measure(self, step: int) -> None:
        soft_prompt = None
        if isinstance(self.trainer, PromptKDTrainer):
            soft_prompt = self.trainer.prompt_embeddings()
        self.found[step] = {
            "step": step,
            "seconds": self.seconds,
            **self.measures.of(self.trainer.model, soft_prompt),
        }

    def on_train_begin(self, args, state, control, **kwargs):
        self.mark = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        # Since the last step's end: PromptKD samples before `on_step_begin`
        self.seconds += time.process_time() - self.mark
        runs_out = self.in_time and self.limit is not None and self.seconds >= self.limit
        self.in_time &= not runs_out
        if state.global_step in self.at_steps or runs_out:
            self.measure(state.global_step)
        control.should_training_stop |= not self.in_time and state.global_step >= self.last_snapshot
        self.mark = time.process_time()


def run(folder: Path, settings: dict, measures: Measures) -> dict:
    """Train by `settings`; what was measured, and what the trainer logged.

    Args:
        settings: `method` ("sft", "seqkd", "kd", "gkd", "promptkd" or "primed"), `seed`, `data` ("finite" or "fresh"),
            `num_rows`, `warm_steps` of SFT, `learning_rate`, `beta`, `steps`, `seconds` (None: no limit), `snapshots`
            (steps after which the student is measured, besides the start and the end), `prompt` (of PromptKD: fields
            of both its configurations), `line` and `response_source` (of priming).
    """
    seed, method = settings["seed"], settings["method"]
    teacher = measures.teacher
    student = load_student(folder, seed, settings["warm_steps"], settings["num_rows"])
    wanted = settings["num_rows"] if settings["data"] == "finite" else FRESH_ROWS
    rows = rows_of(folder, settings["data"], wanted, teacher if method == "seqkd" else None)
    args = {
        "output_dir": str(folder / f"trainer_{os.getpid()}"),
        "learning_rate": settings["learning_rate"],
        "max_steps": settings["steps"],
        "per_device_train_batch_size": BATCH_SIZE,
        "warmup_steps": WARMUP_STEPS,
        "lr_scheduler_type": "constant_with_warmup",
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 10,
        "disable_tqdm": True,
        "seed": seed,
        "max_length": 160,
    }
    chats = [
        {"prompt": [{"role": "user", "content": q}], "completion": [{"role": "assistant", "content": a}]}
        for q, a in rows
    ]
    messages = Dataset.from_list([{"messages": row["prompt"] + row["completion"]} for row in chats])
    pairs = Dataset.from_list(chats)
    common = {"processing_class": TOKENIZER}
    if method in ("sft", "seqkd"):
        trainer = SFTTrainer(student, SFTConfig(**args), train_dataset=pairs, **common)
    elif method in ("kd", "gkd"):
        on_policy = {"lmbda": float(method == "gkd"), "beta": settings["beta"], "temperature": 1.0}
        config = GKDConfig(**args, **on_policy, max_new_tokens=MAX_NEW_TOKENS, disable_dropout=True)
        trainer = GKDTrainer(student, teacher, config, train_dataset=messages, **common)
    elif method == "promptkd":
        prompt = dict(settings["prompt"])
        encoder = {name: prompt.pop(name) for name in list(prompt) if name in PromptEncoderConfig.__dataclass_fields__}
        config = PromptKDConfig(**args, beta=settings["beta"], max_new_tokens=MAX_NEW_TOKENS, **prompt)
        trainer = PromptKDTrainer(
            student,
            teacher,
            config,
            train_dataset=messages,
            prompt_encoder_config=PromptEncoderConfig(**encoder),
            **common,
        )
    else:
        config = PrimedDistillConfig(
            **args,
            alpha=0.0,
            kd_temperature=1.0,
            kd_beta=settings["beta"],
            response_source=settings["response_source"],
            max_new_tokens=MAX_NEW_TOKENS,
        )
        line = settings["line"]
        priming = None if line is None else PrimingTemplate(WRITERS[line][0] + " ")
        trainer = PrimedDistillTrainer(
            student, args=config, priming=priming, teacher_model=teacher, train_dataset=pairs, **common
        )
    snapshots = Snapshots(measures, settings.get("snapshots", []), settings["steps"], settings.get("seconds"))
    snapshots.trainer = trainer
    trainer.add_callback(snapshots)
    snapshots.measure(0)
    trainer.train()
    return {"measures": list(snapshots.found.values()), "log": trainer.state.log_history}


logging.getLogger("transformers").setLevel(logging.ERROR)
torch.set_num_threads(1)
