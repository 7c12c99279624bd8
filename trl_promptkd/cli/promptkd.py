"""`trl-promptkd promptkd`."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trl import ModelConfig, get_peft_config

from ..evaluation.rows import instruction_text
from ..models.soft_prompt import PromptEncoderConfig
from ..trainer.promptkd_config import PromptKDConfig
from ..trainer.promptkd_trainer import PromptKDTrainer
from .launch import launched_or_here
from .training import DataArguments, TrainingParser, load_splits, prepare_models, train_and_save


_DESCRIPTION = """Distil a student from a prompted teacher with PromptKD, from flags or a YAML file.

    trl-promptkd promptkd --config examples/configs/promptkd_gpt2_120m.yaml
    trl-promptkd promptkd --model HuggingFaceTB/SmolLM2-135M-Instruct --teacher HuggingFaceTB/SmolLM2-1.7B-Instruct \\
        --dataset prompts.jsonl --output_dir smollm2-promptkd
"""


@dataclass
class PromptKDArguments(DataArguments):
    """Where the data is, and its template."""

    instruction_template: bool = field(
        default=False,
        metadata={
            "help": "Build prompts from `instruction`, `input` (or `context`) and `output` (or `response`) columns "
            "with the template of the PromptKD paper, instead of using the data set's own format."
        },
    )


def from_instruction(row: dict[str, str]) -> dict[str, str]:
    """`prompt` and `completion` in the template of both papers' evaluation."""
    prompt = instruction_text(row["instruction"], row.get("input") or row.get("context") or "")
    return {"prompt": prompt, "completion": row["output"] if row.get("output") is not None else row["response"]}


def make_trainer(
    script_args: PromptKDArguments,
    training_args: PromptKDConfig,
    model_args: ModelConfig,
    prompt_args: PromptEncoderConfig,
) -> PromptKDTrainer:
    prepare_models(training_args, model_args)
    splits = load_splits(script_args, wants_eval=training_args.eval_strategy != "no")
    if script_args.instruction_template:
        splits = [split and split.map(from_instruction, remove_columns=split.column_names) for split in splits]
    return PromptKDTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=splits[0],
        eval_dataset=splits[1],
        peft_config=get_peft_config(model_args),
        prompt_encoder_config=prompt_args,
    )


def make_parser() -> TrainingParser:
    groups = (PromptKDArguments, PromptKDConfig, ModelConfig, PromptEncoderConfig)
    return TrainingParser(groups, prog="trl-promptkd promptkd", description=_DESCRIPTION)


def train(script_args: PromptKDArguments, *others: Any) -> int:
    return train_and_save(make_trainer(script_args, *others), script_args)


def parse(words: Sequence[str], launch: bool) -> argparse.Namespace:
    return launched_or_here("promptkd", make_parser(), train, words, launch)
