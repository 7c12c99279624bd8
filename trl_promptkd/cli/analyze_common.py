"""What the commands of `trl-promptkd analyze` share: flags, rows, tokenizers, how texts are sampled, and numbers in tables."""

import argparse
import os
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data import check_columns, tokenize_dataset
from ..files import write_text
from ..generation.rollouts import rollout_config
from ..models.limits import check_positions
from ..models.tokenizer import check_same_tokenizer
from .common import ROW_FLAGS, add_flags, at_least_one, json_text, load_rows, load_tokenizer, needed_tokenizer


def add_analysis_arguments(command: argparse.ArgumentParser, rows: int) -> None:
    """Rows and output; models, `--dataset` and `--output_dir` are each command's own."""
    add_flags(command, *ROW_FLAGS, "json", "trust_remote_code")
    command.add_argument("--rows", type=at_least_one, default=rows, help="how many rows, from the first (%(default)s)")
    told = "longest row in tokens (512): rows with longer prompts are left out, and counted; longer answers are cut"
    command.add_argument("--max_length", type=at_least_one, default=512, help=told)


def add_sampling_arguments(command: argparse.ArgumentParser, output_dir: str, max_new_tokens: int) -> None:
    """The teacher, how texts are sampled, and where files go."""
    add_flags(command, "teacher", required=True)
    add_flags(command, "output_dir", default=output_dir)
    add_flags(command, "student_init_kwargs", "teacher_init_kwargs")
    told = "longest sample (%(default)s)"
    command.add_argument("--max_new_tokens", type=at_least_one, default=max_new_tokens, help=told)
    command.add_argument("--batch_size", type=at_least_one, default=8, help="rows at once (8)")
    command.add_argument("--seed", type=int, default=42, help="of the samples (42)")


def save(args: argparse.Namespace, name: str, text: str | dict[str, Any]) -> None:
    """Write a file of `--output_dir`, a dict as JSON."""
    os.makedirs(args.output_dir, exist_ok=True)
    write_text(os.path.join(args.output_dir, name), text if isinstance(text, str) else json_text(text))


def shared_tokenizer(flag: str, models: Mapping[str, dict[str, Any]], trust_remote_code: bool) -> Any:
    """The tokenizer of the first model, compared with the others': distributions are compared token by token.

    Args:
        flag: By which the first one was given.
        models: A name -> its keyword arguments for `from_pretrained`.
    """
    first, *others = models
    tokenizer = needed_tokenizer(flag, first, models[first], trust_remote_code)
    for name in others:
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
    """Sampling at temperature 1 from the whole distribution, until an end-of-text token of the teacher's or the tokenizer's: all
    models end at the same ones."""
    whole = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "generation_kwargs": None}
    settings = SimpleNamespace(max_new_tokens=args.max_new_tokens, **whole)
    return rollout_config(teacher, teacher, tokenizer, settings)


def check_room(
    role: str, model: PreTrainedModel, rows: Sequence[dict[str, list[int]]], new_tokens: int, virtual: int = 0
) -> None:
    """Refuse rows that would run out of learned positions (GPT-2, OPT)."""
    longest = virtual + max(len(row["prompt_ids"]) + max(new_tokens, len(row["completion_ids"])) for row in rows)
    remedy = "Lower `--max_length`." if not new_tokens else "Lower `--max_length` or `--max_new_tokens`."
    check_positions(role, model, longest, remedy)


def number(value: float, digits: int) -> str:
    """A number, or a dash if it is not defined."""
    return "\N{EM DASH}" if value != value else f"{round(value, digits) + 0.0:.{digits}f}"  # no minus before a zero
