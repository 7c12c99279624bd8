"""One run: a student that SFT has warmed up goes through one stage of training or two."""

import json
import logging
import os
import shutil
import time
from pathlib import Path

import torch
from candidates import CandidateTrainer, anchor_answers
from datasets import Dataset, disable_progress_bars
from measure import MAX_NEW_TOKENS, TOKENIZER, Measures, answers, prompt_ids, texts_of
from models import student as load_student
from models import training_rows
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from trl_promptkd import (
    PrimedDistillConfig,
    PrimedDistillTrainer,
    PrimingTemplate,
    PromptEncoderConfig,
    PromptKDConfig,
)


disable_progress_bars()
logging.getLogger("transformers").setLevel(logging.ERROR)
torch.set_num_threads(1)

BATCH_SIZE = 16
WARMUP_STEPS = 10


class Clock(TrainerCallback):
    """The seconds of one core for each optimizer step. Samples are drawn before `on_step_begin`."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.mark = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.process_time() - self.mark)
        self.mark = time.process_time()


def answers_of(teacher, line: str, num_rows: int) -> list[str]:
    """The teacher's greedy answers to the training questions, each after `line`."""
    questions = [question for question, _ in training_rows(num_rows)]
    return texts_of(answers(teacher, prompt_ids(questions, line), seed=None))


def make_trainer(stage: dict, student, teacher, seed: int, num_rows: int, work: Path):
    """The trainer of one stage.

    Args:
        stage: Has `method` ("sft", "kd", "gkd" or "promptkd"), `learning_rate` and `steps`. It may have these, too:

            - `answers`, for "sft": None for the data's, or the line after which the teacher writes them ("" for none).
            - `beta` of the divergence (1.0 is the reverse KL).
            - `line`, for "gkd": the line before the teacher's questions.
            - `prompt`: fields of PromptKD's two configurations.
            - `anchor` ("gold" or "right"), `anchor_weight`, `budget`: arguments of [`CandidateTrainer`].
            - `tune_steps`, `tune_rate`: of a prompt that is tuned before the training.
    """
    method = stage["method"]
    rows = training_rows(num_rows)
    if method == "sft" and stage.get("answers") is not None:
        texts = answers_of(teacher, stage["answers"], num_rows)
        rows = [(question, text) for (question, _), text in zip(rows, texts, strict=True)]
    args = {
        "output_dir": str(work),
        "learning_rate": stage["learning_rate"],
        "max_steps": stage["steps"],
        "per_device_train_batch_size": BATCH_SIZE,
        "warmup_steps": WARMUP_STEPS,
        "lr_scheduler_type": "cosine",
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
    data = Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": q}], "completion": [{"role": "assistant", "content": a}]}
            for q, a in rows
        ]
    )
    common = {"train_dataset": data, "processing_class": TOKENIZER}
    if method == "sft":
        return SFTTrainer(student, SFTConfig(**args), **common)
    beta = stage.get("beta", 1.0)
    if method in ("kd", "gkd"):
        config = PrimedDistillConfig(
            **args,
            alpha=0.0,
            kd_temperature=1.0,
            kd_beta=beta,
            temperature=1.0,
            response_source="student" if method == "gkd" else "dataset",
            max_new_tokens=MAX_NEW_TOKENS,
        )
        line = stage.get("line")
        priming = PrimingTemplate(line) if line else None
        return PrimedDistillTrainer(student, args=config, priming=priming, teacher_model=teacher, **common)
    prompt = dict(stage.get("prompt", {}))
    encoder = {name: prompt.pop(name) for name in list(prompt) if name in PromptEncoderConfig.__dataclass_fields__}
    trainer = CandidateTrainer(
        student,
        teacher,
        PromptKDConfig(**args, beta=beta, max_new_tokens=MAX_NEW_TOKENS, **prompt),
        prompt_encoder_config=PromptEncoderConfig(**encoder),
        anchor=anchor_answers(teacher, stage["anchor"], num_rows) if "anchor" in stage else None,
        anchor_weight=stage.get("anchor_weight", 0.0),
        budget=stage.get("budget"),
        **common,
    )
    if stage.get("tune_steps"):
        trainer.tune_prompt(stage["tune_steps"], stage["tune_rate"], BATCH_SIZE, seed)
    return trainer


def run(folder: Path, settings: dict, measures: Measures) -> dict:
    """Train through the stages of `settings`, and measure before and after.

    Args:
        settings: `seed`, `split`, `num_rows`, `warm_steps` of SFT and the `writer` of its answers, and `stages`, see
            [`make_trainer`].
    """
    seed = settings["seed"]
    student = load_student(folder, seed, settings["warm_steps"], settings["num_rows"], settings["writer"])
    start = folder / "starts" / f"{seed}_{settings['writer']}_{settings['split']}.json"
    if not start.exists():
        start.parent.mkdir(exist_ok=True)
        kept(start, measures.of(student))
    logs, seconds = [], 0.0
    work = folder / f"trainer_{os.getpid()}"
    for stage in settings["stages"]:
        trainer = make_trainer(stage, student, measures.teacher, seed, settings["num_rows"], work)
        trainer.add_callback(clock := Clock())
        trainer.train()
        seconds += sum(clock.seconds)
        logs += trainer.state.log_history[:-1]  # the last one holds the run time
    soft_prompt = trainer.prompt_embeddings() if isinstance(trainer, CandidateTrainer) else None
    end = measures.of(student, stage.get("line") or "", soft_prompt)
    shutil.rmtree(work, ignore_errors=True)
    return {"start": json.loads(start.read_text()), "end": end, "seconds": seconds, "log": logs}


def kept(path: Path, value) -> None:
    """Write JSON whole or not at all."""
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(value))
    unfinished.replace(path)
