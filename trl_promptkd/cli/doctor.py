"""`trl-promptkd doctor`."""

import argparse
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import yaml
from trl import ModelConfig, ScriptArguments

from ..doctor import Finding, diagnose, passed
from ..models.soft_prompt import PromptEncoderConfig
from ..trainer.primed_distill_config import PrimedDistillConfig
from ..trainer.promptkd_config import PromptKDConfig
from .common import load_model, load_rows, load_tokenizer, needed_tokenizer, priming_of, print_table, reporting
from .names import check_name
from .training import RecipeParser, quantization_of


@dataclass
class DoctorArguments:
    """Fields of recipes that are not in TRL's classes and the configurations, and the doctor's own flags."""

    rows: int = field(default=16, metadata={"help": "how many rows to check"})
    json: bool = field(default=False, metadata={"help": "print JSON instead of a table"})
    eval_dataset: str | None = None
    prompt_column: str | None = field(default=None, metadata={"help": "column to use as `prompt`"})
    completion_column: str | None = field(default=None, metadata={"help": "column to use as `completion`"})
    conversational: bool = field(default=False, metadata={"help": "turn texts into conversations (chat template)"})
    priming: str | None = field(default=None, metadata={"help": "what the teacher sees besides the prompt, by name"})
    priming_text: str | None = field(default=None, metadata={"help": "a priming text of your own (Jinja)"})
    priming_file: str | None = field(default=None, metadata={"help": "a file with a priming text"})
    priming_placement: str = field(default="prefix", metadata={"help": "prefix, suffix or system"})
    teacher_cache: str | None = None
    instruction_template: bool = False


_OTHERS = (DoctorArguments, ModelConfig, ScriptArguments, PromptEncoderConfig)
_FIELDS = {field.name: field for cls in (PromptKDConfig, PrimedDistillConfig, *_OTHERS) for field in fields(cls)}
_ALIASES = {
    "model_name_or_path": ("--model", "the student: Hub id or folder"),
    "teacher_model_name_or_path": ("--teacher", "Hub id or folder. Without it, the student teaches itself"),
    "dataset_name": ("--dataset", "Hub id, a .json, .jsonl, .csv or .parquet file, or a folder of such files"),
    "dataset_train_split": ("--dataset_split", "split of the data set, or a part of it: train[:1000]"),
    "teacher_model_init_kwargs": ("--teacher_init_kwargs", "JSON for from_pretrained"),
    "use_peft": ("--lora", "whether an adapter is trained instead of all weights"),
}
_AS_GIVEN: dict[str, Any] = {"metavar": "VALUE", "nargs": "*", "default": argparse.SUPPRESS}  # for `TrlParser`


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s --model MODEL --dataset DATASET [--teacher TEACHER] [--config FILE] [flags]"
    parser.epilog = "All other fields of the trainers' configurations and of TRL's ModelConfig are flags, too."
    parser.add_argument("--config", help="YAML file of a recipe. Flags override it")
    for name, (alias, text) in _ALIASES.items():
        parser.add_argument(alias, f"--{name}", dest=name, help=text, **_AS_GIVEN)
    ours = {*PromptKDConfig.__annotations__, *PrimedDistillConfig.__annotations__, *DoctorArguments.__annotations__}
    for name in sorted(_FIELDS.keys() - _ALIASES.keys()):
        told = str(_FIELDS[name].metadata.get("help", "")).replace("%", "%%") if name in ours else argparse.SUPPRESS
        parser.add_argument(f"--{name}", help=told, **_AS_GIVEN)
    parser.set_defaults(run=reporting(run_doctor))


def parse(given: argparse.Namespace) -> tuple[Any, ...]:
    """Parse flags and recipe to the arguments of doctor, model, script, soft prompt and trainer."""
    flags = {name: values for name, values in vars(given).items() if name in _FIELDS}
    recipe: Any = {}
    if given.config is not None:
        with open(given.config, encoding="utf-8") as file:
            recipe = yaml.safe_load(file)
        if not isinstance(recipe, dict):
            raise ValueError(f"`--config` is {given.config!r}, which holds no YAML mapping. Pass a recipe's file.")
    primed = ("priming", "priming_text", "priming_file", "response_source")
    trainer = PrimedDistillConfig if any(name in {**recipe, **flags} for name in primed) else PromptKDConfig
    words = [] if given.config is None else ["--config", given.config]
    words += [word for name, values in flags.items() for word in (f"--{name}", *values)]
    parser = RecipeParser((*_OTHERS, trainer), prog="trl-promptkd doctor", usage="%(prog)s --help")
    # The models are looked at in their own precision
    found = parser.parse_args_and_config([*words, "--bf16", "false", "--fp16", "false"], fail_with_unknown_args=False)
    arguments, model, script, _, settings = found
    for flag, value in (("--model", model.model_name_or_path), ("--dataset", script.dataset_name)):
        if value is None:
            raise ValueError(f"`{flag}` is not given, and no `--config` names it. Pass `{flag}`.")
    unseen = "is for the script alone; the doctor cannot look at it."
    if arguments.teacher_cache is not None and settings.teacher_model_name_or_path is None:
        raise ValueError(f"`teacher_cache` {unseen} Pass the live teacher by `--teacher`.")
    if isinstance(settings.teacher_model_name_or_path, Mapping):
        names = ", ".join(map(repr, settings.teacher_model_name_or_path))
        raise ValueError(f"The recipe has several teachers ({names}). Pass the one to look at by `--teacher`.")
    if arguments.instruction_template:
        raise ValueError(f"`instruction_template` {unseen} Pass rows that have been through it by `--dataset`.")
    return found


def run_doctor(given: argparse.Namespace) -> Any:
    arguments, model_args, script, encoder, args = parse(given)
    name, teacher_name = model_args.model_name_or_path, args.teacher_model_name_or_path
    priming = priming_of(arguments)
    columns = (arguments.prompt_column, arguments.completion_column, arguments.conversational)
    dataset = load_rows(script.dataset_name, script.dataset_config, script.dataset_train_split, *columns)
    quantization = quantization_of(model_args)
    kwargs = {"dtype": model_args.dtype, **({"quantization_config": quantization} if quantization else {})}
    kwargs |= args.model_init_kwargs or {}
    tokenizer = needed_tokenizer("--model", name, kwargs, args.trust_remote_code)
    if teacher_name is not None:
        check_name("--teacher", teacher_name, token=(args.teacher_model_init_kwargs or {}).get("token"))
    student = load_model(name, kwargs, args.trust_remote_code)
    teacher = teacher_tokenizer = None
    if teacher_name is not None:
        loading = (teacher_name, args.teacher_model_init_kwargs or {}, args.trust_remote_code)
        teacher, teacher_tokenizer = load_model(*loading), load_tokenizer(*loading)
    findings = diagnose(
        student,
        teacher,
        dataset,
        tokenizer,
        teacher_tokenizer,
        args=args,
        prompt_encoder_config=encoder,
        priming=priming,
        lora=model_args.use_peft,
        rows=arguments.rows,
    )
    about = {"model": name, "teacher": teacher_name, "dataset": script.dataset_name}
    given.json = arguments.json
    result = {**about, "passed": passed(findings), "checks": [asdict(finding) for finding in findings]}
    return result, lambda: show(findings, about), 0 if passed(findings) else 1


def show(findings: list[Finding], about: dict[str, Any]) -> None:
    title = ", ".join(f"{name} {value}" for name, value in about.items() if value)
    lines = [[finding.name, finding.status, finding.found, finding.advice] for finding in findings]
    print_table(title, ["check", "", "found", "what to do"], lines, left=4)
    counts = Counter(finding.status for finding in findings)
    print(", ".join(f"{counts[status]} {status}" for status in ("pass", "warn", "fail", "skip") if counts[status]))
