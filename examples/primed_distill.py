r"""Distil a student from a teacher that sees a priming text which the student does not see, from flags or a YAML file.

    accelerate launch examples/primed_distill.py --config examples/configs/primed_llama3.1_405b_8b_gsm8k.yaml
    accelerate launch examples/primed_distill.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --teacher_model_name_or_path HuggingFaceTB/SmolLM2-1.7B-Instruct --priming ground_truth \
        --dataset_name openai/gsm8k --dataset_config main --prompt_column question --completion_column answer \
        --conversational --output_dir smollm2-gsm8k

With an offline teacher: `trl-promptkd cache build --help`, then `--teacher_cache <folder>` instead of a teacher.
Rows from local files: `--dataset_name json --data_files train.jsonl --eval_data_files test.jsonl`. A part of a split:
`--dataset_train_split "train[:1000]"`. Flags win over the file.
"""

import json
from dataclasses import dataclass, field

import torch
from datasets import load_dataset
from script_parser import ScriptParser
from trl import ModelConfig, ScriptArguments, SFTConfig, get_peft_config, get_quantization_config

from trl_promptkd import PrimedDistillConfig, PrimedDistillTrainer, PrimingTemplate
from trl_promptkd.data import name_columns
from trl_promptkd.trainer.sampling_config import SamplingConfig


@dataclass
class PrimedScriptArguments(ScriptArguments):
    """TRL's script arguments, where the data's columns are, and the priming text."""

    data_files: str | None = field(
        default=None,
        metadata={"help": "A file, or a pattern of files, of the training split, as for `--dataset_name json`."},
    )
    eval_data_files: str | None = field(
        default=None, metadata={"help": "The same for the evaluation split; without it, local files have none."}
    )
    prompt_column: str | None = field(default=None, metadata={"help": "Column to take as `prompt`."})
    completion_column: str | None = field(default=None, metadata={"help": "Column to take as `completion`."})
    conversational: bool = field(
        default=False, metadata={"help": "Make conversations of texts, so that the chat template is used."}
    )
    priming: str | None = field(
        default=None,
        metadata={
            "help": "What the teacher sees: teacher, ground_truth, confidence (the paper's) or reference_answer."
        },
    )
    priming_text: str | None = field(default=None, metadata={"help": "A priming text of your own (Jinja)."})
    priming_file: str | None = field(default=None, metadata={"help": "A file with one."})
    priming_placement: str = field(
        default="prefix",
        metadata={"help": "Where a text of your own stands.", "choices": ["prefix", "suffix", "system"]},
    )
    teacher_cache: str | None = field(
        default=None, metadata={"help": "An offline teacher instead of a live one: folder or Hub id of a cache."}
    )
    quantization_receipt_rows: int = field(
        default=0,
        metadata={
            "help": "Before training, compare the (quantized) teacher with the one loaded without quantization on so many rows; both "
            "are in memory then."
        },
    )


def choose_priming(args: PrimedScriptArguments) -> str | PrimingTemplate | None:
    """The one priming text that was asked for."""
    given = [name for name in ("priming", "priming_text", "priming_file") if getattr(args, name) is not None]
    if len(given) > 1:
        raise ValueError(f"`{'` and `'.join(given)}` are set; choose one of them.")
    if args.priming_text is not None:
        return PrimingTemplate(args.priming_text, args.priming_placement)
    if args.priming_file is not None:
        return PrimingTemplate.from_file(args.priming_file, args.priming_placement)
    return args.priming


def load_splits(args: PrimedScriptArguments, wants_eval: bool):
    """Training and evaluation data; the latter is `None` where it is not wanted."""
    files = None
    if args.data_files is not None:
        files = {"train": args.data_files} | ({"test": args.eval_data_files} if args.eval_data_files else {})
        wants_eval = wants_eval and args.eval_data_files is not None
    splits = []
    for split in (args.dataset_train_split, args.dataset_test_split if wants_eval else None):
        if split is None:
            splits.append(None)
            continue
        dataset = load_dataset(
            args.dataset_name or "json",
            name=args.dataset_config,
            data_files=files,
            split=split,
            streaming=args.dataset_streaming,
        )
        splits.append(name_columns(dataset, args.prompt_column, args.completion_column, args.conversational))
    return splits


def make_trainer(
    script_args: PrimedScriptArguments, training_args: PrimedDistillConfig, model_args: ModelConfig
) -> PrimedDistillTrainer:
    priming = choose_priming(script_args)
    quantization_config = get_quantization_config(model_args)
    model_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype if model_args.dtype in (None, "auto") else getattr(torch, model_args.dtype),
    }
    training_args.model_init_kwargs = {**model_kwargs, **(training_args.model_init_kwargs or {})}
    train_dataset, eval_dataset = load_splits(script_args, wants_eval=training_args.eval_strategy != "no")
    return PrimedDistillTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=quantization_config,
        peft_config=get_peft_config(model_args),
        priming=priming,
        teacher_cache=script_args.teacher_cache,
    )


def main(script_args: PrimedScriptArguments, training_args: PrimedDistillConfig, model_args: ModelConfig) -> None:
    trainer = make_trainer(script_args, training_args, model_args)
    if script_args.quantization_receipt_rows:
        receipt = trainer.quantization_receipt(num_rows=script_args.quantization_receipt_rows)
        if trainer.accelerator.is_main_process:
            print(f"Quantization receipt: {json.dumps(receipt, indent=1)}")
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.end()


def make_parser() -> ScriptParser:
    groups = {
        "data and priming text": (PrimedScriptArguments,),
        "distillation (PrimedDistillConfig)": (PrimedDistillConfig, SFTConfig, SamplingConfig),
        "sampling of the teacher's or student's answers, vLLM": (SamplingConfig,),
        "the student (TRL's ModelConfig)": (ModelConfig,),
    }
    return ScriptParser(groups, (PrimedScriptArguments, PrimedDistillConfig, ModelConfig), description=__doc__)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
