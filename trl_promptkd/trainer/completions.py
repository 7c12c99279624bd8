"""The student's samples of a logged step: in the terminal, as parquet files, and as a table for wandb and trackio."""

import importlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object
from pandas import DataFrame
from torch import Tensor

from .._trl import print_prompt_completions_sample
from ..data import masked_rows
from ..divergences import kl_divergence, on_shared_support
from ..files import whole_file
from ..generation.rollouts import have_ended
from .logged_metrics import is_logged_step


__all__ = ["Samples", "keep_row_kls", "log_completions", "row_kls", "save_table", "send_table"]


@dataclass
class Samples:
    """What the student sampled for the last window.

    Args:
        prompts, completions: Token ids of the rows.
        row_kls: The KLs of each row by name, if they are logged. A key is a row's prompt and completion together.
    """

    prompts: list[list[int]] = field(default_factory=list)
    completions: list[list[int]] = field(default_factory=list)
    row_kls: dict[tuple[int, ...], dict[str, float]] = field(default_factory=dict)


@torch.no_grad()
def row_kls(labels: Tensor, student: Any, teacher: Any, temperature: float, chunk_size: int | None) -> list[float]:
    """KL(student || teacher) of each row of a batch, the mean over its trained tokens, in nats per token.

    Args:
        labels (`Tensor` of shape `(batch, seq)`): -100 for tokens that are not trained on.
        student, teacher: The models' outputs at the trained tokens. Each has `logits(start, end)`.
        temperature: All logits are divided by it.
        chunk_size: Tokens whose logits exist at once. `None`: all.
    """
    counts = (labels[:, 1:] != -100).sum(dim=1).tolist()
    size = chunk_size or max(len(student), 1)
    values = []
    for start in range(0, len(student), size):
        logits = (part.logits(start, min(start + size, len(student))) for part in (student, teacher))
        log_q, log_p = ((part / temperature).log_softmax(dim=-1) for part in on_shared_support(*logits))
        values.append(kl_divergence(log_q, log_p))
    found = torch.cat(values) if values else torch.zeros(0)
    return [part.mean().item() for part in found.split(counts)]


def keep_row_kls(
    trainer: Any, inputs: Mapping[str, Tensor], student: Any, teachers: Mapping[str, Any], temperature: float
) -> None:
    """Keep the KLs of a micro-batch's rows for the log, in training and if this step's samples are logged.

    Args:
        student, teachers: The models' outputs at the trained tokens. Teachers are under the names of their KLs.
    """
    if not trainer.args.log_completions or not torch.is_grad_enabled() or not is_logged_step(trainer):
        return
    settings = (temperature, trainer.args.loss_chunk_size)
    kls = {name: row_kls(inputs["labels"], student, teacher, *settings) for name, teacher in teachers.items()}
    for index, ids in enumerate(masked_rows(inputs["input_ids"], inputs["attention_mask"])):
        trainer._samples.row_kls[tuple(ids)] = {name: values[index] for name, values in kls.items()}


def log_completions(trainer: Any) -> None:
    """If `log_completions` is set, log the last window's samples. The first rows go to the terminal, wandb and
    trackio. The rows of all ranks go to `output_dir/completions/completions_<step>.parquet`.

    The columns are `step`, `prompt`, `completion`, `length` (tokens, end of text included), `ended` (by itself), and
    the KLs that the trainer logs. A row's KL is the mean over its tokens.
    """
    args, tokenizer, samples = trainer.args, trainer.processing_class, trainer._samples
    if not args.log_completions:
        return
    texts = [tokenizer.batch_decode(ids) if ids else [] for ids in (samples.prompts, samples.completions)]
    ended = have_ended(samples.completions, trainer.generation_config, tokenizer)
    rows = [
        {
            "step": trainer.state.global_step,
            "prompt": prompt_text,
            "completion": text,
            "length": len(completion),
            "ended": has_ended,
            **samples.row_kls.get((*prompt, *completion), {}),
        }
        for prompt, completion, prompt_text, text, has_ended in zip(
            samples.prompts, samples.completions, *texts, ended, strict=True
        )
    ]
    rows = gather_object(rows)
    if not trainer.accelerator.is_main_process or not rows:
        return
    table = DataFrame(rows)
    shown = table.head(len(table) if args.num_completions_to_print is None else args.num_completions_to_print)
    if len(shown):
        about = {_title(name): [_cell(value) for value in shown[name]] for name in shown.columns[3:]}
        prompt_texts, texts = shown["prompt"].tolist(), shown["completion"].tolist()
        print_prompt_completions_sample(prompt_texts, texts, {}, None, trainer.state.global_step, extra=about)
        send_table(args, "completions", shown)
    save_table(os.path.join(args.output_dir, "completions"), trainer.state.global_step, table)


def _title(name: str) -> str:
    """A column's name with spaces, so that a narrow terminal can wrap it."""
    return re.sub("[/_]", " ", name)


def _cell(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def save_table(folder: str, step: int, table: DataFrame) -> None:
    """Write `folder/completions_<step>.parquet`."""
    os.makedirs(folder, exist_ok=True)
    with whole_file(os.path.join(folder, f"completions_{step:05d}.parquet")) as path:
        table.to_parquet(path, index=False)


def send_table(args: Any, name: str, table: DataFrame) -> None:
    """Log a table to wandb and trackio, if the trainer reports there. Source: TRL's `DistillationTrainer`."""
    for backend_name in ("wandb", "trackio"):
        if backend_name in (args.report_to or []):
            backend = importlib.import_module(backend_name)
            if backend_name == "trackio" or backend.run is not None:
                backend.log({name: backend.Table(dataframe=table)})
