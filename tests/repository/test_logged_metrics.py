"""docs/logged_metrics.md names everything that a run logs, and nothing else."""

import re

from paths import ROOT
from runs import short_trainer
from tiny import answered_dataset

from trl_promptkd import PrimedDistillTrainer, PrimingTemplate, PromptKDTrainer


PAGE = (ROOT / "docs" / "logged_metrics.md").read_text(encoding="utf-8")
# Of TRL and transformers, in every trainer's log
THEIRS = re.compile(r"epoch|step|learning_rate|grad_norm|train_\w+|total_flos|eval_(runtime|\w+_per_second)")


def named(heading):
    """The names in the first column of the tables below a heading."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([\w/.]+)`", row)}


def logged(trainer_class, folder, **settings):
    data = {"train_dataset": answered_dataset(4), "eval_dataset": answered_dataset(2)}
    trainer = short_trainer(trainer_class, folder, {"eval_strategy": "steps", "eval_steps": 1}, **data, **settings)
    trainer.train()
    return {name for entry in trainer.state.log_history for name in entry if not THEIRS.fullmatch(name)}


def test_promptkd(tmp_path):
    assert logged(PromptKDTrainer, tmp_path) == named("PromptKDTrainer")


def test_primed_distillation(tmp_path):
    names = named("PrimedDistillTrainer") - {"rollout/..."}
    found = logged(PrimedDistillTrainer, tmp_path, priming=PrimingTemplate("the cat "))
    assert {name for name in found if not name.startswith("eval_")} == names
    not_in_evaluation = {"completion_tokens", "num_tokens", "dropped_rows"}
    assert {name.removeprefix("eval_") for name in found if name.startswith("eval_")} == names - not_in_evaluation
