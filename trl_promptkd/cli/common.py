"""Shared by the command's tools: flags, rows, models, tables and files."""

import argparse
import glob
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from types import SimpleNamespace
from typing import Any

import torch
from datasets import load_dataset
from datasets.exceptions import DatasetsError
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data import check_columns, name_columns, tokenize_dataset
from ..data.priming import PrimingTemplate
from ..files import write_text
from ..generation.rollouts import rollout_config
from ..models.limits import check_positions
from ..models.teacher import load_teacher
from ..models.tokenizer import check_same_tokenizer, load_teacher_tokenizer
from .names import check_name


FILE_SPLIT = "train"  # that a file's rows are
_FILES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def json_dict(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is not the JSON of a dict, such as \'{{"dtype": "float32"}}\'')
    return value


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; it must be a whole number, 1 or more")
    return int(text)


# Flags that several commands have; [`add_flags`]
_INIT_KWARGS = {"type": json_dict, "default": {}, "help": "JSON for from_pretrained"}
_FLAGS: dict[str, dict[str, Any]] = {
    "model_init_kwargs": _INIT_KWARGS,
    "teacher_init_kwargs": _INIT_KWARGS,
    "trust_remote_code": {"action": "store_true", "help": "run code that comes with a model"},
    "teacher": {"help": "Hub id or folder"},
    "dataset": {"help": "Hub id, a .json, .jsonl, .csv or .parquet file, or a folder of such files"},
    "dataset_config": {"help": "configuration of the data set"},
    "dataset_split": {"default": "train", "help": "split of the data set, or a part of it: train[:1000]"},
    "prompt_column": {"help": "column to use as `prompt`"},
    "completion_column": {"help": "column to use as `completion`"},
    "conversational": {"action": "store_true", "help": "turn texts into conversations (chat template)"},
    "output_dir": {"help": "folder for all output files (%(default)s)"},
    "json": {"action": "store_true", "help": "print JSON instead of tables"},
}
ROW_FLAGS = ("dataset_config", "dataset_split", "prompt_column", "completion_column", "conversational")


def add_flags(command: argparse.ArgumentParser, *names: str, **settings: Any) -> None:
    """Add flags by their names. `settings` of `add_argument`, such as `required=True`, replace the usual ones."""
    for name in names:
        command.add_argument(f"--{name}", **{**_FLAGS[name], **settings})


def reporting(run: Callable[[Any], tuple[dict[str, Any], Callable[[], None], int]]) -> Callable[[Any], int]:
    """A command that prints its result and returns an exit code.

    With `--json` it prints JSON, otherwise it uses a function of its own. Standard output has only the result. What is
    printed before goes to standard error.
    """

    def command(args: argparse.Namespace) -> int:
        with redirect_stdout(sys.stderr):
            result, show, code = run(args)
        if args.json:
            print(json_text(result))
        else:
            show()
        return code

    return command


def priming_of(args: Any) -> str | PrimingTemplate | None:
    """The priming text of the flags, of which only one may be given."""
    texts = {name: getattr(args, name, None) for name in ("priming", "priming_text", "priming_file")}
    given = [name for name, text in texts.items() if text is not None]
    if len(given) > 1:
        raise ValueError(f"`--{'` and `--'.join(given)}` are {'both ' if len(given) == 2 else ''}given; choose one.")
    if args.priming_file is not None:
        return PrimingTemplate.from_file(args.priming_file, args.priming_placement)
    if texts["priming_text"] is not None:
        return PrimingTemplate(texts["priming_text"], args.priming_placement)
    return args.priming


def json_text(values: dict[str, Any]) -> str:
    """The JSON of a result, with null for numbers that are not finite, which JSON cannot express."""
    return json.dumps(json.loads(json.dumps(values), parse_constant=lambda word: None), indent=1)


def short_names(paths: Sequence[str], flags: str) -> dict[str, str]:
    """Names for tables: the last part of each path, without the ending of a file.

    If two names are equal, the whole paths. `flags` names the flags of the paths, for the message.
    """
    whole = [os.path.normpath(path) for path in paths]
    twice = next((path for path in whole if whole.count(path) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice!r} is given twice in {flags}. Give each once.")
    names = [os.path.basename(os.path.splitext(path)[0] if os.path.isfile(path) else path) for path in whole]
    return dict(zip(paths, names if len(set(names)) == len(names) else whole, strict=True))


def print_table(
    title: str, columns: Sequence[str], lines: Sequence[Sequence[Any]], left: int = 1, digits: int = 3
) -> None:
    """Print a table. Its first `left` columns are texts, the others numbers, which are aligned to the right."""
    console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 140
    table = Table(box=box.SIMPLE)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right")
    for line in lines:
        table.add_row(*(number(cell, digits) if isinstance(cell, float) else str(cell) for cell in line))
    console.print(title, soft_wrap=True)
    console.print(table)


def is_file(path: str) -> bool:
    """Whether a data set's name is a file of rows, or a pattern of such names."""
    return os.path.splitext(path)[1] in _FILES


def load_rows(
    path: str, config: str | None, split: str | None, *columns: Any, flag: str = "--dataset", streaming: bool = False
) -> Any:
    """Load the data set of a flag: files by their ending, a folder, or a Hub id. `columns` go to `name_columns`.

    The rows of a file are one split, of any name.
    """
    kind = _FILES.get(os.path.splitext(path)[1])
    if kind is not None and not glob.glob(path):
        raise ValueError(
            f"`{flag}` is {path!r}, and there is no such file. Check the path (relative ones start at {os.getcwd()})."
        )
    if kind is None and os.path.isfile(path):
        raise ValueError(f"`{flag}` is {path!r}, a file whose ending is none of {', '.join(_FILES)}. Convert it.")
    if kind is None and split is None:
        raise ValueError(f"`{flag}` is {path!r}, whose split is not said. Pass `{flag}_split` (such as test).")
    if kind is None:
        check_name(flag, path, "dataset")
    split = split or FILE_SPLIT
    files = {split.partition("[")[0]: path} if kind else None
    try:
        dataset = load_dataset(kind or path, name=config, data_files=files, split=split, streaming=streaming)
    except (DatasetsError, OSError, ValueError) as error:
        advice = " (Write it as a file: `dataset.to_parquet`.)" if "load_from_disk" in str(error) else ""
        reason = " ".join(str(error).split())
        raise ValueError(f"`{flag}` is {path!r}, which cannot be read: {reason}{advice}") from error
    return name_columns(dataset, *columns)


def load_model(name: str, init_kwargs: dict[str, Any], trust_remote_code: bool, longest: int = 0) -> Any:
    """Load a model in evaluation mode, on the GPU if there is one.

    Args:
        longest: Positions that the longest row needs, if known. GPT-2 and OPT have a limited number.
    """
    print(f"Loading {name}", file=sys.stderr)
    model = load_teacher(name, init_kwargs, trust_remote_code).eval()
    if longest:
        check_positions(f"model {name!r}", model, longest, "Lower `--max_length` or the longest sample.")
    marks = ("quantization_method", "hf_device_map")  # of a model that is where it belongs already
    placed = any(getattr(model, mark, None) is not None for mark in marks)
    return model.to("cuda") if torch.cuda.is_available() and not placed else model


def load_tokenizer(name: str, init_kwargs: dict[str, Any], trust_remote_code: bool) -> Any:
    """The tokenizer of a model, or `None`. Without a pad token, its end-of-text token pads."""
    tokenizer = load_teacher_tokenizer(name, init_kwargs, trust_remote_code)
    if tokenizer is not None and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def needed_tokenizer(flag: str, name: str, init_kwargs: dict[str, Any], trust_remote_code: bool) -> Any:
    """[`load_tokenizer`]. If there is no model of this name, or it has no tokenizer, the error names the flag."""
    check_name(flag, name, token=init_kwargs.get("token"))
    tokenizer = load_tokenizer(name, init_kwargs, trust_remote_code)
    if tokenizer is None:
        raise ValueError(f"`{flag}` is {name!r}, beside which there is no tokenizer. Save one there.")
    return tokenizer


def add_analysis_arguments(command: argparse.ArgumentParser, rows: int) -> None:
    """Flags for rows and output. Models, `--dataset` and `--output_dir` are each command's own."""
    add_flags(command, *ROW_FLAGS, "json", "trust_remote_code")
    command.add_argument("--rows", type=at_least_one, default=rows, help="use only the first rows (%(default)s)")
    told = "longest row in tokens (512). Rows with longer prompts are omitted and counted, longer answers are cut"
    command.add_argument("--max_length", type=at_least_one, default=512, help=told)
    told = "format of the plots (%(default)s). svg suits light and dark pages"
    command.add_argument("--plot_format", choices=["png", "svg"], default="png", help=told)


def add_sampling_arguments(command: argparse.ArgumentParser, output_dir: str, max_new_tokens: int) -> None:
    """Flags for the teacher, sampling, and output files. `--model` is each command's own."""
    add_flags(command, "teacher", required=True)
    add_flags(command, "output_dir", default=output_dir)
    add_flags(command, "model_init_kwargs", "teacher_init_kwargs")
    told = "longest sample in tokens (%(default)s)"
    command.add_argument("--max_new_tokens", type=at_least_one, default=max_new_tokens, help=told)
    command.add_argument("--batch_size", type=at_least_one, default=8, help="rows per batch (8)")
    command.add_argument("--seed", type=int, default=42, help="seed of the samples (42)")


def save(args: argparse.Namespace, name: str, text: str | dict[str, Any]) -> None:
    """Write a file in `--output_dir`, a dict as JSON."""
    os.makedirs(args.output_dir, exist_ok=True)
    write_text(os.path.join(args.output_dir, name), text if isinstance(text, str) else json_text(text))


def plot_path(args: argparse.Namespace, name: str) -> str:
    """Path of a plot in `--output_dir`."""
    return os.path.join(args.output_dir, f"{name}.{args.plot_format}")


def shared_tokenizer(flag: str, models: Mapping[str, dict[str, Any]], trust_remote_code: bool) -> Any:
    """The tokenizer of the first model. It must match the others', as distributions are compared token by token.

    Args:
        flag: The flag of the first model.
        models: Maps each name to its keyword arguments for `from_pretrained`.
    """
    first, *others = models
    tokenizer = needed_tokenizer(flag, first, models[first], trust_remote_code)
    for name in others:
        check_name("--model" if flag == "--teacher" else flag, name, token=models[name].get("token"))
        other = load_tokenizer(name, models[name], trust_remote_code)
        if other is None:
            print(f"There is no tokenizer beside {name}; it runs with that of {first}.")
            continue
        student, teacher = (other, tokenizer) if flag == "--teacher" else (tokenizer, other)
        try:
            check_same_tokenizer(student, teacher)
        except ValueError as error:
            raise ValueError(f"{first!r} and {name!r} cannot be compared. {error}") from error
    return tokenizer


def tokenized_rows(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, answers_needed: str | None = None
) -> list[dict[str, list[int]]]:
    """The first rows of `--dataset`, with `prompt_ids` and `completion_ids`."""
    columns = (args.prompt_column, args.completion_column, args.conversational)
    dataset = load_rows(args.dataset, args.dataset_config, args.dataset_split, *columns)
    check_columns(dataset, "--dataset", answers_needed)
    dataset = dataset.select(range(min(args.rows, len(dataset))))
    return list(tokenize_dataset(dataset, "--dataset", tokenizer, args.max_length, answers_needed, overlong="drop"))


def sampling_of(args: Any, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Sampling at temperature 1 from the whole distribution, up to an end-of-text token of teacher or tokenizer.

    All models end at the same tokens.
    """
    whole = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "generation_kwargs": None}
    settings = SimpleNamespace(max_new_tokens=args.max_new_tokens, **whole)
    return rollout_config(teacher, teacher, tokenizer, settings)


def number(value: float, digits: int) -> str:
    """A number, or a dash if it is not defined."""
    return "\N{EM DASH}" if value != value else f"{round(value, digits) + 0.0:.{digits}f}"  # no minus before a zero
