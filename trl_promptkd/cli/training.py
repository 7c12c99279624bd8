"""Shared by the two training commands: their flags, their data, and the run.

TRL's parser reads flags and YAML files. Here it gets a short help, short names, and errors of one line.
"""

import argparse
import sys
import textwrap
import traceback
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, NoReturn

import yaml
from transformers import Trainer
from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser, get_quantization_config

from ..models.init_kwargs import check_bitsandbytes
from ..trainer.checkpoints import checkpoint_to_resume
from .common import is_file, load_rows
from .names import check_name


# Short names for fields whose own names are TRL's
ALIASES = {
    "model": "model_name_or_path",
    "teacher": "teacher_model_name_or_path",
    "dataset": "dataset_name",
}
# What many runs set
_USUAL = (
    "model_name_or_path teacher_model_name_or_path dataset_name output_dir learning_rate num_train_epochs max_steps "
    "per_device_train_batch_size gradient_accumulation_steps max_length max_new_tokens use_peft use_cpu bf16 "
    "gradient_checkpointing seed lr_scheduler_type warmup_steps eval_strategy eval_steps logging_steps report_to "
    "save_strategy save_steps resume_from_checkpoint push_to_hub hub_model_id"
)
# Where upstream's words do not hold here
_HELP = {
    "model_name_or_path": "The student: Hub id or folder, also of a PEFT adapter, which is then trained further.",
    "teacher_model_name_or_path": "The teacher: Hub id or folder. By default the student's own starting weights.",
    "dataset_name": "Rows: Hub id, a .json, .jsonl, .csv or .parquet file, or a folder of such files.",
    "max_length": "Longest row in tokens: prompt and answer of the data, or the prompt if answers are sampled.",
    "resume_from_checkpoint": "Folder of a checkpoint to resume from, or true for the newest whole one.",
}


class RecipeParser(TrlParser):
    """[`~trl.TrlParser`] with the short names, as flags and in the YAML file of `--config`."""

    def __init__(self, dataclass_types: Sequence[Any], **settings: Any) -> None:
        super().__init__(dataclass_types, **settings)
        for alias, name in ALIASES.items():
            self.add_argument(f"--{alias}", dest=name, default=argparse.SUPPRESS)

    def set_defaults_with_config(self, **settings: Any) -> list[str]:
        for alias, name in ALIASES.items():
            if alias in settings and name in settings:
                raise ValueError(f"The config file holds both `{alias}` and `{name}`, two names of one field.")
        return super().set_defaults_with_config(**{ALIASES.get(key, key): value for key, value in settings.items()})


class _HelpAll(argparse.Action):
    def __call__(self, parser: Any, *args: Any) -> None:
        print(parser.format_help(everything=True))
        parser.exit()


class TrainingParser(RecipeParser):
    """
    [`RecipeParser`] whose `--help` shows the usual flags and this package's. `--help_all` adds those of TRL's
    `SFTConfig` and transformers' `TrainingArguments`. A wrong flag or value ends the command with one line.
    """

    def __init__(self, dataclass_types: Sequence[Any], **settings: Any) -> None:
        super().__init__(dataclass_types, **settings)
        self.add_argument("--help_all", action=_HelpAll, nargs=0, default=argparse.SUPPRESS)

    def format_usage(self) -> str:
        return f"usage: {self.prog} [--config FILE.yaml] [--flag VALUE ...]\n"

    def sections(self, everything: bool = False) -> dict[str, list[Field]]:
        """The flags by title: the usual ones, those of this package, and with `everything` TRL's and transformers'."""
        flags = {x.name: x for group in self.dataclass_types for x in fields(group) if x.init}
        usual = _USUAL.split()
        left_out = set(usual) if everything else {*usual, *(x.name for x in fields(SFTConfig))}
        found = {"the usual flags": [flags[name] for name in usual]}
        for group in self.dataclass_types:
            own = [x for x in fields(group) if x.init and x.name not in left_out]
            found[f"flags of {group.__name__}"] = [flags[x.name] for x in own]
        return found

    def format_help(self, everything: bool = False) -> str:
        lines = [
            self.format_usage(),
            self.description,
            "--config: a YAML file of flags without their dashes. Flags on the command line win over it.",
            "--help: the usual flags and this package's. --help_all: also the rest of SFTConfig's.",
        ]
        for title, flags in self.sections(everything).items():
            lines += ["", f"{title}:", *map(_entry, flags)]
        return "\n".join(lines) + "\n"

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(2)

    def parse_args_and_config(self, args: Sequence[str], **kwargs: Any) -> tuple[Any, ...]:
        if list(args[-1:]) == ["--config"]:
            self.error("argument --config: expected a YAML file")
        try:
            return super().parse_args_and_config(args, **kwargs)
        except (ValueError, TypeError, OSError, yaml.YAMLError) as error:  # they say which field, key or file is wrong
            self.error(str(error))


def told(flag: Field) -> tuple[str, str, str]:
    """A flag with its short name, its help, and its default or an empty text."""
    names = [*(f"--{alias}" for alias, name in ALIASES.items() if name == flag.name), f"--{flag.name}"]
    text = _HELP.get(flag.name, flag.metadata.get("help", "")).replace("%%", "%")
    return ", ".join(names), text, "" if flag.default in (None, MISSING) else str(flag.default)


def _entry(flag: Field) -> str:
    names, text, default = told(flag)
    indent = " " * 8
    text += f" (default: {default})" if default else ""
    wrapped = textwrap.fill(text, 110, initial_indent=indent, subsequent_indent=indent)
    return f"  {names}\n{wrapped}"


@dataclass
class DataArguments(ScriptArguments):
    """TRL's script arguments, and separate rows for evaluation."""

    eval_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Rows for evaluation: Hub id, file or folder. By default the split `dataset_test_split` of "
            "`dataset`. A file has no such split."
        },
    )


_TEST_SPLIT = "--dataset` (its split for evaluation, `--dataset_test_split`; or pass `--eval_dataset"


def load_splits(args: DataArguments, wants_eval: bool, *columns: Any) -> list[Any]:
    """Training and evaluation data. The latter is `None` if it is not wanted or does not exist.

    `columns` go to [`~common.load_rows`].
    """
    if args.dataset_name is None:
        raise ValueError("`--dataset` is missing. Pass a Hub id, or a file or folder of rows.")
    train = (args.dataset_name, args.dataset_config, args.dataset_train_split, "--dataset")
    test: tuple[Any, ...] | None = (args.eval_dataset, None, args.dataset_test_split, "--eval_dataset")
    if args.eval_dataset is None:
        test = None if is_file(args.dataset_name) else (*train[:2], args.dataset_test_split, _TEST_SPLIT)
    return [
        part and load_rows(*part[:3], *columns, flag=part[3], streaming=args.dataset_streaming)
        for part in (train, test if wants_eval else None)
    ]


def quantization_of(model_args: ModelConfig) -> Any:
    """The quantization of TRL's `--load_in_4bit` and `--load_in_8bit`."""
    for name in ("load_in_4bit", "load_in_8bit"):
        if getattr(model_args, name):
            check_bitsandbytes(f"--{name}")
    return get_quantization_config(model_args)


def prepare_models(training_args: Any, model_args: ModelConfig) -> None:
    """Check the names of both models, and give the student's `from_pretrained` the flags of TRL's `ModelConfig`."""
    student, teacher = model_args.model_name_or_path, training_args.teacher_model_name_or_path
    if student is None:
        raise ValueError("`--model` is missing. Give the student's Hub id or folder.")
    kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    if (quantization := quantization_of(model_args)) is not None:
        kwargs["quantization_config"] = quantization
    training_args.model_init_kwargs = kwargs | (training_args.model_init_kwargs or {})
    check_name("--model", student, token=training_args.model_init_kwargs.get("token"))
    if teacher is not None:
        check_name("--teacher", teacher, token=(training_args.teacher_model_init_kwargs or {}).get("token"))


def train_and_save(trainer: Trainer, script_args: ScriptArguments) -> int:
    """Train, save, and return the exit code. Errors here have a traceback, as users' mistakes were found before."""
    wanted: Any = trainer.args.resume_from_checkpoint  # a text, if it was a flag
    wanted = {"true": True, "false": None}.get(str(wanted).lower(), wanted)
    checkpoint = checkpoint_to_resume(wanted, trainer.args.output_dir)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        trainer.save_state()  # for `trl-promptkd report`
        if trainer.args.push_to_hub:
            trainer.push_to_hub(dataset_name=script_args.dataset_name)
        trainer.accelerator.end_training()
    except Exception:
        traceback.print_exc()
        return 1
    return 0
