"""What the training scripts share: the command line, the data, and the run.

TRL's parser reads flags and YAML files. Here it gets a help that can be read, and errors of one line.
"""

import logging
import sys
import textwrap
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any


logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)  # it warns of a kernel that is not used here

import yaml
from datasets import load_dataset
from transformers import Trainer, TrainingArguments
from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser, get_quantization_config


# What many runs set
USUAL = (
    "model_name_or_path teacher_model_name_or_path dataset_name output_dir learning_rate num_train_epochs max_steps "
    "per_device_train_batch_size gradient_accumulation_steps max_length max_new_tokens use_peft use_cpu bf16 "
    "gradient_checkpointing seed lr_scheduler_type warmup_steps eval_strategy eval_steps logging_steps report_to "
    "save_strategy save_steps resume_from_checkpoint push_to_hub hub_model_id"
)
# Where upstream's words do not hold here
HELP = {
    "model_name_or_path": "The student: Hub id or folder, also of a PEFT adapter, which is then trained further.",
    "teacher_model_name_or_path": "The teacher: Hub id or folder. By default the student's own starting weights.",
    "dataset_name": "Hub id of the data set, or json, csv, ... with `--data_files`.",
    "max_length": "Longest row in tokens: prompt and answer of the data, or the prompt if answers are sampled.",
    "resume_from_checkpoint": "Folder of the checkpoint to resume from.",
}


class ScriptParser(TrlParser):
    """
    [`~trl.TrlParser`] whose `--help` shows the usual flags and this package's. `--help_all` adds those of TRL's
    `SFTConfig` and transformers' `TrainingArguments`. A wrong flag or value ends the script with one line.
    """

    def format_usage(self) -> str:
        return f"usage: accelerate launch {self.prog} [--config FILE.yaml] [--flag VALUE ...]\n"

    def format_help(self, everything: bool = False) -> str:
        flags = {x.name: x for group in self.dataclass_types for x in fields(group) if x.init}
        usual = USUAL.split()
        left_out = set(usual) if everything else {*usual, *(x.name for x in fields(SFTConfig))}
        sections = {"the usual flags": usual}
        for group in self.dataclass_types:
            names = [x.name for x in fields(group) if x.init and x.name not in left_out]
            sections[f"flags of {group.__name__}"] = names
        lines = [
            self.format_usage(),
            self.description,
            "--config: a YAML file of flags without their dashes. Flags on the command line win over it.",
            "--help: the usual flags and this package's. --help_all: also the rest of SFTConfig's.",
        ]
        for title, names in sections.items():
            lines += ["", f"{title}:", *(_entry(flags[name]) for name in names)]
        return "\n".join(lines) + "\n"

    def parse_args_and_config(self, args: list[str] | None = None, **kwargs: Any) -> tuple[Any, ...]:
        args = sys.argv[1:] if args is None else list(args)
        if "--help_all" in args:
            print(self.format_help(everything=True))
            self.exit()
        try:
            return super().parse_args_and_config(args, **kwargs)
        except (ValueError, TypeError, OSError, yaml.YAMLError) as error:  # they say which field, key or file is wrong
            self.error(str(error))


def _entry(flag: Field) -> str:
    text = HELP.get(flag.name, flag.metadata.get("help", "")).replace("%%", "%")
    default = "" if flag.default in (None, MISSING) else f" (default: {flag.default})"
    indent = " " * 8
    wrapped = textwrap.fill(text + default, 110, initial_indent=indent, subsequent_indent=indent)
    return f"  --{flag.name}\n{wrapped}"


@dataclass
class DataArguments(ScriptArguments):
    """TRL's script arguments, and where local files are."""

    data_files: str | None = field(
        default=None,
        metadata={"help": "A file, or a pattern of files, of the training split, as for `--dataset_name json`."},
    )
    eval_data_files: str | None = field(
        default=None, metadata={"help": "The same for the evaluation split. Without it, local files have none."}
    )


def load_splits(args: DataArguments, wants_eval: bool) -> list[Any]:
    """Training and evaluation data; the latter is `None` if it is not wanted."""
    if args.dataset_name is None and args.data_files is None:
        raise ValueError("Neither `--dataset_name` nor `--data_files` is given. Pass a Hub id, or files of rows.")
    files = None
    if args.data_files is not None:
        files = {"train": args.data_files} | ({"test": args.eval_data_files} if args.eval_data_files else {})
        wants_eval = wants_eval and args.eval_data_files is not None
    settings = {"name": args.dataset_config, "data_files": files, "streaming": args.dataset_streaming}
    splits = [args.dataset_train_split, args.dataset_test_split if wants_eval else None]
    return [split and load_dataset(args.dataset_name or "json", split=split, **settings) for split in splits]


def student_init_kwargs(training_args: TrainingArguments, model_args: ModelConfig) -> dict[str, Any]:
    """What `from_pretrained` gets for the student: the flags of TRL's `ModelConfig`, and `--model_init_kwargs`."""
    if model_args.model_name_or_path is None:
        raise ValueError("`--model_name_or_path` is missing. Give the student's Hub id or folder.")
    kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    if (quantization := get_quantization_config(model_args)) is not None:
        kwargs["quantization_config"] = quantization
    return kwargs | (training_args.model_init_kwargs or {})


def train_and_save(trainer: Trainer, script_args: ScriptArguments) -> None:
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model()
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.accelerator.end_training()
