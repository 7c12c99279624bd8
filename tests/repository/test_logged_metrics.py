"""docs/logged_metrics.md names everything that a run logs, and nothing else."""

import re

import pytest
from paths import ROOT
from tiny import answered_dataset, tiny_model, tiny_tokenizer

from trl_promptkd import PrimedDistillTrainer, PrimingTemplate, PromptKDTrainer


PAGE = ROOT / "docs" / "logged_metrics.md"
# Of TRL and transformers, in every trainer's log
THEIRS = re.compile(r"epoch|step|learning_rate|grad_norm|train_\w+|total_flos|eval_(runtime|\w+_per_second)")


def named(heading):
    """The names in the first column of the tables below a heading."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([\w/.]+)`", row)}


def logged(trainer):
    trainer.train()
    return {name for entry in trainer.state.log_history for name in entry if not THEIRS.fullmatch(name)}


@pytest.fixture
def parts():
    return {
        "model": tiny_model(seed=1),
        "teacher_model": tiny_model(seed=0),
        "train_dataset": answered_dataset(4),
        "eval_dataset": answered_dataset(2),
        "processing_class": tiny_tokenizer(),
    }


SETTINGS = {"max_steps": 1, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 1}


def test_promptkd(parts, make_args):
    assert logged(PromptKDTrainer(args=make_args(**SETTINGS), **parts)) == named("PromptKDTrainer")


def test_primed_distillation(parts, make_primed_args):
    parts["priming"] = PrimingTemplate("the cat ")
    names = named("PrimedDistillTrainer") - {"rollout/..."}
    found = logged(PrimedDistillTrainer(args=make_primed_args(**SETTINGS), **parts))
    assert {name for name in found if not name.startswith("eval_")} == names
    not_in_evaluation = {"completion_tokens", "num_tokens", "dropped_rows"}
    assert {name.removeprefix("eval_") for name in found if name.startswith("eval_")} == names - not_in_evaluation
