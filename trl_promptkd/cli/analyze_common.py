"""What the commands of `trl-promptkd analyze` share: flags, rows, how texts are sampled, and numbers in tables."""

import argparse
import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data import check_columns, tokenize_dataset
from ..files import write_text
from ..generation.rollouts import rollout_config
from ..models.limits import check_positions
from ..models.tokenizer import check_same_tokenizer, shared_vocab_size
from .common import add_row_arguments, json_dict, json_text, load_rows, load_tokenizer, needed_tokenizer


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; it must be a whole number, 1 or more")
    return int(text)


def add_analysis_arguments(command: argparse.ArgumentParser, rows: int) -> None:
    """Rows and output; models, `--dataset` and `--output_dir` are each command's own."""
    add_row_arguments(command)
    command.add_argument("--rows", type=at_least_one, default=rows, help=f"how many rows, from the first ({rows})")
    told = "longest row in tokens (512): rows with longer prompts are left out, and counted; longer answers are cut"
    command.add_argument("--max_length", type=at_least_one, default=512, help=told)
    command.add_argument("--json", action="store_true", help="print JSON instead of tables")
    command.add_argument("--trust_remote_code", action="store_true")


def add_sampling_arguments(command: argparse.ArgumentParser, output_dir: str, max_new_tokens: int) -> None:
    """The teacher, how texts are sampled, and where files go."""
    command.add_argument("--teacher", required=True, help="Hub id or folder")
    told = f"longest sample ({max_new_tokens})"
    command.add_argument("--max_new_tokens", type=at_least_one, default=max_new_tokens, help=told)
    command.add_argument("--batch_size", type=at_least_one, default=8, help="rows at once (8)")
    command.add_argument("--seed", type=int, default=42, help="of the samples (42)")
    command.add_argument("--output_dir", default=output_dir, help=f"where the files go ({output_dir})")
    for role in ("student", "teacher"):
        command.add_argument(f"--{role}_init_kwargs", type=json_dict, default={}, help="JSON for from_pretrained")


def save(args: argparse.Namespace, name: str, text: str | dict[str, Any]) -> None:
    """Write a file of `--output_dir`, a dict as JSON."""
    os.makedirs(args.output_dir, exist_ok=True)
    write_text(os.path.join(args.output_dir, name), text if isinstance(text, str) else json_text(text))


def tokenizer_of(args: argparse.Namespace, students: Sequence[str]) -> PreTrainedTokenizerBase:
    """The teacher's tokenizer, after it has been compared with the students'."""
    tokenizer = needed_tokenizer("--teacher", args.teacher, args.teacher_init_kwargs, args.trust_remote_code)
    for student in students:
        other = load_tokenizer(student, args.student_init_kwargs, args.trust_remote_code)
        if other is not None:
            check_same_tokenizer(other, tokenizer)
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
    config: GenerationConfig = rollout_config(teacher, teacher, tokenizer, settings)
    return config


def compared_ids(tokenizer: PreTrainedTokenizerBase, teacher: PreTrainedModel, student: PreTrainedModel | None) -> int:
    """How many token ids are sampled and compared: the tokenizer's real ones, as far as both models have them."""
    models = [teacher] if student is None else [teacher, student]
    shared_vocab_size(models[-1], teacher, tokenizer)
    sizes = [model.config.get_text_config().vocab_size for model in models]
    return min(max(tokenizer.get_vocab().values()) + 1, *sizes)


def check_room(
    role: str, model: PreTrainedModel, rows: Sequence[dict[str, list[int]]], new_tokens: int, virtual: int = 0
) -> None:
    """Refuse rows that would run out of learned positions (GPT-2, OPT)."""
    longest = virtual + max(len(row["prompt_ids"]) + max(new_tokens, len(row["completion_ids"])) for row in rows)
    check_positions(role, model, longest, "Lower `--max_length` or `--max_new_tokens`.")


def number(value: float, digits: int) -> str:
    """A number, or a dash if it is not defined."""
    return "\N{EM DASH}" if value != value else f"{round(value, digits) + 0.0:.{digits}f}"  # no minus before a zero
