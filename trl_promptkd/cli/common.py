"""What the command's tools share: flags, rows and models."""

import argparse
import json
import math
import os
import sys
from typing import Any

import torch
from datasets import load_dataset
from datasets.exceptions import DatasetsError

from ..data import name_columns
from ..priming import PRIMING_TEMPLATES, PrimingTemplate
from ..teacher import load_teacher


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


def without_nan(values: dict[str, Any]) -> dict[str, Any]:
    """What is not finite as null: JSON has no word for it."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }


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
    quantized = getattr(model, "quantization_method", None) is not None  # is where it belongs already
    return model.to("cuda") if torch.cuda.is_available() and not quantized else model
