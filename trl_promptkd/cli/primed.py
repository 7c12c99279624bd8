"""`trl-promptkd primed`."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trl import ModelConfig, get_peft_config

from ..trainer.primed_distill_config import PrimedDistillConfig
from ..trainer.primed_distill_trainer import PrimedDistillTrainer
from .common import priming_of
from .launch import launched_or_here
from .training import DataArguments, TrainingParser, load_splits, prepare_models, train_and_save


_DESCRIPTION = """Distil a student from a teacher that sees a priming text which the student does not see, from flags
or a YAML file.

    trl-promptkd primed --config examples/configs/primed_qlora_single_gpu.yaml
    trl-promptkd primed --model HuggingFaceTB/SmolLM2-135M-Instruct --teacher HuggingFaceTB/SmolLM2-1.7B-Instruct \\
        --priming ground_truth --dataset openai/gsm8k --dataset_config main --prompt_column question \\
        --completion_column answer --conversational --output_dir smollm2-gsm8k

With an offline teacher: `trl-promptkd cache build --help`, then `--teacher_cache FOLDER` instead of a teacher.
A part of a split: `--dataset_train_split "train[:1000]"`.
"""


@dataclass
class PrimedArguments(DataArguments):
    """Where the data and its columns are, and the priming text."""

    prompt_column: str | None = field(default=None, metadata={"help": "Column to use as `prompt`."})
    completion_column: str | None = field(default=None, metadata={"help": "Column to use as `completion`."})
    conversational: bool = field(
        default=False, metadata={"help": "Turn texts into conversations, so that the chat template is used."}
    )
    priming: str | None = field(
        default=None,
        metadata={
            "help": "Built-in priming text: teacher, ground_truth, confidence (the paper's) or reference_answer."
        },
    )
    priming_text: str | None = field(default=None, metadata={"help": "A priming text of your own (Jinja)."})
    priming_file: str | None = field(default=None, metadata={"help": "A file with a priming text."})
    priming_placement: str = field(
        default="prefix",
        metadata={"help": "Placement of a text of your own.", "choices": ["prefix", "suffix", "system"]},
    )
    teacher_cache: str | None = field(
        default=None, metadata={"help": "An offline teacher instead of a live one: folder or Hub id of a cache."}
    )
    quantization_receipt_rows: int = field(
        default=0,
        metadata={
            "help": "Before training, compare the quantized teacher with the one loaded without quantization on this "
            "many rows. Both are in memory then."
        },
    )


def make_trainer(
    script_args: PrimedArguments, training_args: PrimedDistillConfig, model_args: ModelConfig
) -> PrimedDistillTrainer:
    priming = priming_of(script_args)
    prepare_models(training_args, model_args)
    columns = (script_args.prompt_column, script_args.completion_column, script_args.conversational)
    train_dataset, eval_dataset = load_splits(script_args, training_args.eval_strategy != "no", *columns)
    return PrimedDistillTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=get_peft_config(model_args),
        priming=priming,
        teacher_cache=script_args.teacher_cache,
    )


def make_parser() -> TrainingParser:
    groups = (PrimedArguments, PrimedDistillConfig, ModelConfig)
    return TrainingParser(groups, prog="trl-promptkd primed", description=_DESCRIPTION)


def train(script_args: PrimedArguments, *others: Any) -> int:
    trainer = make_trainer(script_args, *others)
    if script_args.quantization_receipt_rows:
        receipt = trainer.quantization_receipt(num_rows=script_args.quantization_receipt_rows)
        if trainer.accelerator.is_main_process:
            print(f"Quantization receipt: {json.dumps(receipt, indent=1)}")
    return train_and_save(trainer, script_args)


def parse(words: Sequence[str], launch: bool) -> argparse.Namespace:
    return launched_or_here("primed", make_parser(), train, words, launch)
