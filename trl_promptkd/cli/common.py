"""What the command's tools share: flags, rows and models."""

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from datasets import load_dataset
from datasets.exceptions import DatasetsError
from peft import PeftConfig
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..data import name_columns
from ..data.priming import PRIMING_TEMPLATES, PrimingTemplate
from ..models.teacher import load_teacher
from ..models.tokenizer import load_teacher_tokenizer


FILE_SPLIT = "train"  # that a file's rows are
_FILES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def json_dict(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not the JSON of a dict, such as {json.dumps({'dtype': 'float32'})!r}"
        )
    return value


def add_row_arguments(command: argparse.ArgumentParser) -> None:
    """What a data set's rows are."""
    command.add_argument("--dataset_config", help="its configuration")
    command.add_argument("--dataset_split", default="train", help="its split, or a part of it: train[:1000]")
    command.add_argument("--prompt_column", help="column to take as `prompt`")
    command.add_argument("--completion_column", help="column to take as `completion`")
    command.add_argument("--conversational", action="store_true", help="make conversations of texts (chat template)")


def add_data_arguments(command: argparse.ArgumentParser) -> None:
    """What a data set's rows are, and what the teacher sees besides them."""
    add_row_arguments(command)
    command.add_argument(
        "--priming", choices=sorted(PRIMING_TEMPLATES), help="what the teacher sees besides the prompt"
    )
    command.add_argument("--priming_file", help="a file with a priming text of your own (Jinja)")
    command.add_argument("--priming_placement", default="prefix", choices=["prefix", "suffix", "system"])


def priming_of(args: argparse.Namespace) -> str | PrimingTemplate | None:
    if args.priming is not None and args.priming_file is not None:
        raise ValueError("`--priming` and `--priming_file` are both given; choose one.")
    if args.priming_file is not None:
        return PrimingTemplate.from_file(args.priming_file, args.priming_placement)
    return args.priming


def without_nan(values: Any) -> Any:
    """What is not finite, at any depth, as null: JSON has no word for it."""
    if isinstance(values, dict):
        return {key: without_nan(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [without_nan(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def json_text(values: dict[str, Any]) -> str:
    """The JSON of a result, with null for what is not finite."""
    return json.dumps(without_nan(values), indent=1, allow_nan=False)


def short_names(paths: Sequence[str], flags: str) -> dict[str, str]:
    """The end of each path that tells it from the others, of files without their endings.

    Args:
        flags: That the paths were given by, for the message.

    Raises:
        ValueError: where one is given twice.
    """
    parts = {path: os.path.normpath(path).split(os.sep) for path in paths}
    found = [os.path.normpath(path) for path in paths]
    twice = next((path for path in found if found.count(path) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice!r} is given twice in {flags}. Give each once.")
    stems = {
        path: [*names[:-1], os.path.splitext(names[-1])[0]] if os.path.isfile(path) else names
        for path, names in parts.items()
    }
    longest = max(map(len, parts.values()))
    shortened = (
        {path: "/".join(names[-number:]) for path, names in kind.items()}
        for kind in (stems, parts)
        for number in range(1, longest + 1)
    )
    return next(short for short in shortened if len(set(short.values())) == len(paths))


def print_table(title: str, columns: Sequence[str], lines: Sequence[Sequence[Any]], left: int = 1) -> None:
    """A table on standard output, whose first `left` columns are texts and the others numbers, which stand on the right."""
    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = 140
    console.print(Text(title), soft_wrap=True)
    table = Table(box=box.SIMPLE)
    for index, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if index < left else "right")
    for line in lines:
        table.add_row(*(Text(str(cell)) for cell in line))
    console.print(table)


def load_rows(args: argparse.Namespace) -> Any:
    """The data set of `--dataset`: a file by its ending, or a Hub id."""
    kind = _FILES.get(os.path.splitext(args.dataset)[1])
    if kind is not None and not os.path.isfile(args.dataset):
        raise ValueError(
            f"`--dataset` is {args.dataset!r}, and there is no such file. Check the path (relative ones start at {os.getcwd()})."
        )
    if kind is None and args.dataset_split is None:
        raise ValueError(
            f"`--dataset` is {args.dataset!r}, whose split is not said. Pass `--dataset_split` (such as test)."
        )
    files = None if kind is None else args.dataset
    try:
        dataset = load_dataset(
            kind or args.dataset, name=args.dataset_config, data_files=files, split=args.dataset_split or FILE_SPLIT
        )
    except DatasetsError as error:
        raise ValueError(f"`--dataset` is {args.dataset!r}, which cannot be read: {error}") from error
    return name_columns(dataset, args.prompt_column, args.completion_column, args.conversational)


def load_model(name: str, init_kwargs: dict[str, Any], trust_remote_code: bool) -> Any:
    print(f"Loading {name}", file=sys.stderr)
    model = load_teacher(name, init_kwargs, trust_remote_code)
    marks = ("quantization_method", "hf_device_map")  # of a model that is where it belongs already
    placed = any(getattr(model, mark, None) is not None for mark in marks)
    return model.to("cuda") if torch.cuda.is_available() and not placed else model


def load_tokenizer(name: str, init_kwargs: dict[str, Any], trust_remote_code: bool) -> Any:
    """The tokenizer beside a model, else that of the model below an adapter, else `None`; where it has no pad token, it pads with its
    end-of-text token."""
    tokenizer = load_teacher_tokenizer(name, init_kwargs, trust_remote_code)
    if tokenizer is None and os.path.isfile(os.path.join(name, "adapter_config.json")):
        base = PeftConfig.from_pretrained(name).base_model_name_or_path
        tokenizer = load_teacher_tokenizer(base or "", {}, trust_remote_code)
    if tokenizer is not None and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def needed_tokenizer(flag: str, name: str, init_kwargs: dict[str, Any], trust_remote_code: bool) -> Any:
    """[`load_tokenizer`], where there must be one.

    Raises:
        ValueError: where there is none, naming the flag.
    """
    tokenizer = load_tokenizer(name, init_kwargs, trust_remote_code)
    if tokenizer is None:
        raise ValueError(f"`{flag}` is {name!r}, beside which there is no tokenizer. Save one there.")
    return tokenizer
