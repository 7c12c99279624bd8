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

from scripts import DataArguments, ScriptParser, load_splits, student_init_kwargs, train_and_save
from trl import ModelConfig, get_peft_config

from trl_promptkd import PrimedDistillConfig, PrimedDistillTrainer, PrimingTemplate
from trl_promptkd.data import name_columns


@dataclass
class PrimedScriptArguments(DataArguments):
    """Where the data and its columns are, and the priming text."""

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
            "help": "Before training, compare the quantized teacher with the one loaded without quantization on this "
            "many rows. Both are in memory then."
        },
    )


def choose_priming(args: PrimedScriptArguments) -> str | PrimingTemplate | None:
    """The one priming text that is given."""
    given = [name for name in ("priming", "priming_text", "priming_file") if getattr(args, name) is not None]
    if len(given) > 1:
        raise ValueError(f"`{'` and `'.join(given)}` are set; choose one of them.")
    if args.priming_text is not None:
        return PrimingTemplate(args.priming_text, args.priming_placement)
    if args.priming_file is not None:
        return PrimingTemplate.from_file(args.priming_file, args.priming_placement)
    return args.priming


def make_trainer(
    script_args: PrimedScriptArguments, training_args: PrimedDistillConfig, model_args: ModelConfig
) -> PrimedDistillTrainer:
    priming = choose_priming(script_args)
    training_args.model_init_kwargs = student_init_kwargs(training_args, model_args)
    columns = (script_args.prompt_column, script_args.completion_column, script_args.conversational)
    splits = load_splits(script_args, wants_eval=training_args.eval_strategy != "no")
    train_dataset, eval_dataset = [split and name_columns(split, *columns) for split in splits]
    return PrimedDistillTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=get_peft_config(model_args),
        priming=priming,
        teacher_cache=script_args.teacher_cache,
    )


def make_parser() -> ScriptParser:
    return ScriptParser((PrimedScriptArguments, PrimedDistillConfig, ModelConfig), description=__doc__)


def main() -> None:
    script_args, *others = make_parser().parse_args_and_config()
    trainer = make_trainer(script_args, *others)
    if script_args.quantization_receipt_rows:
        receipt = trainer.quantization_receipt(num_rows=script_args.quantization_receipt_rows)
        if trainer.accelerator.is_main_process:
            print(f"Quantization receipt: {json.dumps(receipt, indent=1)}")
    train_and_save(trainer, script_args)


if __name__ == "__main__":
    main()
