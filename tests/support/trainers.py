"""Both trainers from tiny parts, and what tests look at in a trainer."""

import inspect

import pytest
import torch
import trl
from peft import LoraConfig
from runs import short_run
from tiny import answered_dataset, tiny_model, tiny_tokenizer, weights

from trl_promptkd import (
    PrimedDistillConfig,
    PrimedDistillTrainer,
    PrimingTemplate,
    PromptEncoderConfig,
    PromptKDConfig,
    PromptKDTrainer,
)


METHODS = {"promptkd": (PromptKDTrainer, PromptKDConfig), "primed": (PrimedDistillTrainer, PrimedDistillConfig)}
PROMPT_TEXT = "suppose you are a student ."
PRIMING = PrimingTemplate("red blue green ")
GREEDY = {"do_sample": False}
# Adam's first step would hide the gradient's scale
SGD = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant"}
SAVES = {"save_strategy": "steps", "save_steps": 1}
EVALUATES = {"eval_strategy": "steps", "eval_steps": 1}
BEST = {**SAVES, **EVALUATES, "load_best_model_at_end": True}


def needs_sft() -> None:
    """Skips a test that trains with TRL's own `SFTTrainer` if that cannot train here."""
    if trl.trainer.utils._ChunkedLogProbFunction is None:
        pytest.skip("TRL 1.15's SFTTrainer needs Triton, which PyTorch's CPU build does not have")


class Maker:
    """
    Makes trainers of one method, and their settings, for a short run on tiny models.

    Args:
        method: "promptkd" or "primed".
        folder: Where runs are saved.
    """

    def __init__(self, method, folder):
        self.method, self.folder = method, folder
        self.trainer_class, self.config_class = METHODS[method]

    def args(self, **settings):
        return short_run(self.config_class, self.folder, settings)

    def __call__(self, model=None, teacher_model="tiny", prompt=None, **overrides):
        """
        Args:
            model: The student.
            teacher_model: `None` for self-distillation.
            prompt: Settings of PromptKD's soft prompt.
            overrides: What the trainer takes, and settings of its configuration.
        """
        names = inspect.signature(self.trainer_class).parameters.keys() & overrides.keys()
        given = {name: overrides.pop(name) for name in names}
        parts = {"processing_class": tiny_tokenizer(), "train_dataset": answered_dataset()}
        if self.method == "promptkd":
            parts["prompt_encoder_config"] = PromptEncoderConfig(**{"prompt_init_text": PROMPT_TEXT, **(prompt or {})})
        else:
            parts["priming"] = PRIMING
        return self.trainer_class(
            model=tiny_model(seed=1) if model is None else model,
            teacher_model=tiny_teacher() if teacher_model == "tiny" else teacher_model,
            **{"args": self.args(**overrides), **parts, **given},
        )


def tiny_teacher():
    """Deeper than the student."""
    return tiny_model(seed=2, num_hidden_layers=3)


def lora(**settings):
    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, **settings})


def adapter_of(model):
    return {name: value for name, value in weights(model).items() if "lora_" in name}


def trained_parts(trainer):
    """A copy of all that training changes: the student, and PromptKD's soft prompt."""
    prompt = {"prompt": trainer.prompt_embeddings().clone()} if hasattr(trainer, "soft_prompt") else {}
    return weights(trainer.model) | prompt


def trained(trainer):
    trainer.train()
    return trained_parts(trainer)


def equal(a, b):
    """Whether two copies are the same to the bit."""
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def keep_windows(trainer):
    """Records what is trained on: for each step its micro-batches of rows.

    A row is its prompt, the teacher's prompt (with priming), and its completion, all token ids.
    """
    windows, original = [], trainer.get_batch_samples

    def record(*args):
        batches, count = original(*args)
        windows.append([_rows(batch) for batch in batches])
        return batches, count

    trainer.get_batch_samples = record
    return windows


def _rows(batch):
    prompts = []
    for view in ("", "teacher_"):
        if f"{view}input_ids" in batch:
            ids, mask, labels = (batch[view + name] for name in ("input_ids", "attention_mask", "labels"))
            prompts.append([row[kept].tolist() for row, kept in zip(ids, mask.bool() & (labels == -100), strict=True)])
    completions = [row[kept].tolist() for row, kept in zip(batch["input_ids"], batch["labels"] != -100, strict=True)]
    return list(zip(*prompts, completions, strict=True))


def all_rows(windows):
    return [row for window in windows for batch in window for row in batch]


def trained_rows(trainer):
    """Trains, and returns the rows that were trained on."""
    windows = keep_windows(trainer)
    trainer.train()
    return all_rows(windows)


def answers_always(model, completion):
    """Makes `completion` of all that the model generates."""
    new = torch.tensor([completion], dtype=torch.long)
    model.generate = lambda input_ids, **_: torch.cat([input_ids, new.expand(len(input_ids), -1)], dim=1)
