"""The command line of the training scripts: TRL's parser, with a help that one can read and errors of one line."""

import argparse
import difflib
import glob
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from trl import ModelConfig, ScriptArguments, TrlParser


# What nearly every run sets
USUAL = (
    "model_name_or_path",
    "teacher_model_name_or_path",
    "dataset_name",
    "output_dir",
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "max_new_tokens",
    "use_peft",
    "use_cpu",
    "bf16",
)
# Transformers' own that many runs set
COMMON = (
    "lr_scheduler_type",
    "warmup_steps",
    "gradient_checkpointing",
    "seed",
    "eval_strategy",
    "eval_steps",
    "logging_steps",
    "report_to",
    "save_strategy",
    "save_steps",
    "resume_from_checkpoint",
    "push_to_hub",
    "hub_model_id",
)
_FILE_FORMATS = (None, "json", "csv", "parquet", "arrow", "text")  # what `--data_files` are files of without the Hub
# For TRL's and transformers' fields that say nothing of themselves, or what does not hold here
_HELP = {
    "model_name_or_path": "The student: Hub id or folder, also of a PEFT adapter, which is then trained further.",
    "dataset_name": "Hub id of the data set; json, csv, ... with `--data_files`.",
    "dataset_config": "Configuration of the data set, for those that have several.",
    "dataset_train_split": "Split to train on.",
    "dataset_test_split": "Split to evaluate on, with `--eval_strategy steps` or `epoch`.",
    "dataset_streaming": "Read the data set as it is trained on, instead of before.",
    "teacher_model_name_or_path": "The teacher: Hub id or folder; without it, the student's own starting weights.",
    "teacher_model_init_kwargs": "JSON for the teacher's from_pretrained, such as a quantization config.",
    "max_length": "Longest row in tokens: prompt and answer of the data, or the prompt where answers are sampled.",
    "max_new_tokens": "Longest sampled answer in tokens.",
    "use_peft": "Train LoRA instead of all weights.",
    "use_cpu": "Train on the CPU.",
    "bf16": "Compute in bfloat16; done unless this is false or `--fp16` is set.",
    "max_steps": "Optimizer steps; above 0, instead of epochs.",
    "per_device_train_batch_size": "Rows at once on one device.",
    "gradient_accumulation_steps": "Batches an optimizer step.",
    "learning_rate": "Peak learning rate of the student.",
    "seq_kd": "The teacher writes the answers to the rows that the student does not sample.",
    "num_train_epochs": "Times the data is gone through.",
    "lr_scheduler_type": "Schedule of the learning rate.",
    "warmup_steps": "Optimizer steps, or below 1 the share of them, in which the learning rate rises.",
    "gradient_checkpointing": "Recompute the student's activations in the backward pass: less memory, more time.",
    "eval_strategy": "When to evaluate.",
    "eval_steps": "Optimizer steps between two evaluations; below 1 their share. By default `logging_steps`.",
    "logging_steps": "Optimizer steps between two logs; below 1 their share.",
    "report_to": "Where the logs go too: trackio, tensorboard, wandb, ..., all or none.",
    "save_strategy": "When to save a checkpoint.",
    "save_steps": "Optimizer steps between two checkpoints; below 1 their share.",
    "resume_from_checkpoint": "A checkpoint's folder to go on from.",
    "push_to_hub": "Push the student, and what belongs to it, to the Hub.",
    "output_dir": "Folder for the student, checkpoints and the model card.",
}


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """One spelling of each flag, no default of None, and the examples as they are written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{action.option_strings[0]} {action.metavar}"


class _HelpAll(argparse.Action):
    def __call__(self, parser, *_: Any) -> NoReturn:
        parser.show_all()
        parser.print_help()
        parser.exit()


class ScriptParser(TrlParser):
    """
    [`~trl.TrlParser`] for the scripts here. `--help` shows the usual flags and those of this package, in groups; `--help_all` adds
    what TRL's `SFTConfig` and transformers' `TrainingArguments` have. A wrong flag, a wrong value and a missing file end the script with one
    line, before anything is loaded.

    Args:
        groups (`dict[str, tuple[type, ...]]`):
            In the order of the help: title, and the dataclass whose fields stand there, but for those of the classes after it.
        dataclass_types:
            What is parsed, in the order in which it comes out.
    """

    def __init__(self, groups: dict[str, tuple[type, ...]], dataclass_types, description: str):
        super().__init__(dataclass_types, description=description, formatter_class=_HelpFormatter)
        self.usage = "accelerate launch %(prog)s [--config FILE.yaml] [--flag VALUE ...]"
        self.epilog = (
            "All other fields of TRL's SFTConfig and transformers' TrainingArguments are flags, too: --help_all."
        )
        # TRL reads `--config` before argparse does: this is for the help
        self.add_argument(
            "--config",
            metavar="FILE.yaml",
            default=argparse.SUPPRESS,
            help="YAML file of flags without their dashes. Flags on the command line win over it.",
        )
        self.add_argument(
            "--help_all", action=_HelpAll, nargs=0, default=argparse.SUPPRESS, help="Show every flag and exit."
        )
        self._others: list[tuple[argparse.Action, str]] = []
        titles = dict.fromkeys(USUAL, "the usual flags") | dict.fromkeys(COMMON, "also common (transformers)")
        for title, (owner, *others) in groups.items():
            elsewhere = {field.name for other in others for field in fields(other)} | set(titles)
            titles |= {field.name: title for field in fields(owner) if field.name not in elsewhere}
        titles.pop("ignore_bias_buffers")  # nothing here reads it
        sections = {title: self.add_argument_group(title) for title in dict.fromkeys(titles.values())}
        for action in self._actions:
            name = action.dest
            if name in ("help", "help_all", "config"):
                continue
            action.help = _HELP.get(name, action.help)
            if action.metavar is None:
                action.metavar = _metavar(action)
            if (
                name in titles and action.option_strings[0] == f"--{name}"
            ):  # not `--no_...`, which argparse lists under its field
                self._optionals._group_actions.remove(action)
                sections[titles[name]]._group_actions.append(action)
            else:
                self._others.append((action, action.help or ""))
                action.help = argparse.SUPPRESS
        for section in sections.values():
            section._group_actions.sort(key=lambda action: list(titles).index(action.dest))

    def show_all(self) -> None:
        section = self.add_argument_group("TRL's SFTConfig and transformers' TrainingArguments")
        for action, text in self._others:
            action.help = text
            self._optionals._group_actions.remove(action)
            section._group_actions.append(action)
        self.epilog = None

    def parse_args_and_config(self, args=None, **kwargs):
        args = list(sys.argv[1:] if args is None else args)
        args = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
        self._check_flags(args)
        try:
            parsed = super().parse_args_and_config(args, **kwargs)
            check_inputs(*parsed)
            return parsed
        except (ValueError, TypeError, FileNotFoundError) as error:  # they say what is wrong with which field
            self.error(str(error))

    def _check_flags(self, args: list[str]) -> None:
        """Refuse unknown flags and a missing file; TRL does so after it has made the configurations, or with a traceback."""
        given = list(args)
        names: list[str] = []
        if "--config" in given:
            index = given.index("--config")
            if index + 1 == len(given):
                self.error("`--config` needs a file.")
            path = Path(given[index + 1])
            del given[index : index + 2]
            if not path.is_file():
                self.error(
                    f"`--config` is '{path}', but there is no such file. Recipes are in {Path(__file__).parent / 'configs'}."
                )
            names = [f"--{name}" for name in _yaml(self, path) if name != "env"]
        unknown = self.parse_known_args(given)[1]
        known = [option for action in self._actions for option in action.option_strings]
        for place, flags in (("", unknown), (f" in {path}" if names else "", [n for n in names if n not in known])):
            if flags:
                name = flags[0].split("=")[0]
                close = difflib.get_close_matches(name, known, n=1)
                meant = f" Did you mean `{close[0]}`?" if close else " `--help` and `--help_all` list them."
                self.error(f"there is no flag `{name}`{place}.{meant}")


def _yaml(parser: argparse.ArgumentParser, path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        parser.error(f"{path} is not valid YAML: {error}")
    if not isinstance(content, dict):
        parser.error(f"{path} must hold lines of the form `flag: value`.")
    return content


def _metavar(action: argparse.Action) -> str:
    if action.choices is not None:
        return "{" + ",".join(map(str, action.choices)) + "}"
    kind = getattr(action.type, "__name__", "value")
    kind = {"string_to_bool": "BOOL", "str": "TEXT", "int": "N", "float": "X"}.get(kind, "VALUE")
    return {"+": f"{kind} ...", "?": f"[{kind}]"}.get(str(action.nargs), kind)


def check_inputs(script_args: ScriptArguments, training_args: Any, model_args: ModelConfig, *_: Any) -> None:
    """Refuse what no run can start without, before anything is loaded.

    Raises:
        ValueError: naming the flag that is missing.
        FileNotFoundError: for models and files of rows that are not there.
    """
    models = {
        "model_name_or_path": model_args.model_name_or_path,
        "teacher_model_name_or_path": training_args.teacher_model_name_or_path,
    }
    if models["model_name_or_path"] is None:
        raise ValueError("`--model_name_or_path` is missing. Give the student's Hub id or folder.")
    for name, model in models.items():
        if (
            model is not None
            and (model.startswith((".", "/", "~")) or model.count("/") > 1)
            and not os.path.isdir(model)
        ):
            raise FileNotFoundError(f"`--{name}` is {model!r}, but there is no such folder.")
    if script_args.dataset_name is None and script_args.data_files is None:
        raise ValueError("Neither `--dataset_name` nor `--data_files` is given. Pass a Hub id, or files of rows.")
    if script_args.dataset_name not in _FILE_FORMATS:
        return  # patterns within a data set of the Hub
    for name in ("data_files", "eval_data_files"):
        pattern = getattr(script_args, name)
        if pattern is not None and "://" not in pattern and not glob.glob(pattern, recursive=True):
            raise FileNotFoundError(
                f"`--{name}` is {pattern!r}, but no file is there. Give a file, or a pattern of files."
            )
