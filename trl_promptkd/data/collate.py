"""From token ids to padded batches, and counts of trained tokens.

Prompts are padded on the left and completions on the right, so completions start at the same column in every row.
Masks come from lengths and never from ids, as many models pad with their end-of-text token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers.utils import logging


__all__ = [
    "DataCollatorForPromptCompletion",
    "count_trained_tokens",
    "grouped_by_length",
    "masked_rows",
    "pad_rows",
    "warn_if_untrained",
    "without_repeats",
]

logger = logging.get_logger(__name__)


def pad_rows(
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    pad_token_id: int,
    pad_to_multiple_of: int | None = None,
) -> dict[str, Tensor]:
    """One batch of rows: prompts padded on the left, completions on the right.

    More padding on the right makes the width a multiple of `pad_to_multiple_of`.

    Returns:
        `input_ids`, `attention_mask` and `labels` of shape `(batch, longest prompt + longest completion)`. The labels
        are the completion's ids, and -100 elsewhere. `prompts` and `prompt_attention_mask` have the shape `(batch,
        longest prompt)`.
    """
    left = max(map(len, prompt_ids))
    width = left + max(map(len, completion_ids))
    width += -width % (pad_to_multiple_of or 1)
    input_ids = torch.full((len(prompt_ids), width), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, -100)
    for row, (prompt, completion) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
        start, end = left - len(prompt), left + len(completion)
        ids = torch.tensor([*prompt, *completion])
        input_ids[row, start:end] = ids
        attention_mask[row, start:end] = 1
        labels[row, left:end] = ids[len(prompt) :]
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": labels,
        "prompts": input_ids[:, :left],
        "prompt_attention_mask": attention_mask[:, :left],
    }


def grouped_by_length(lengths: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """The rows of each micro-batch of the given `sizes`. The longest come first, so that little is padded."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    ends = list(accumulate(sizes))
    return [order[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def count_trained_tokens(batches: Sequence[Mapping[str, Tensor]], accelerator: Accelerator, step: int) -> Tensor:
    """How many tokens the micro-batches of one window train on, summed over all ranks, as a scalar."""
    local = torch.stack([(batch["labels"][:, 1:] != -100).sum() for batch in batches]).sum()
    total = accelerator.reduce(local.to(accelerator.device), reduction="sum")
    warn_if_untrained(int(total), step)
    return total


def warn_if_untrained(num_tokens: int, step: int) -> None:
    """Log a warning if a window has no token to train on."""
    if num_tokens == 0:
        logger.warning(f"Step {step + 1} has nothing to train on: all labels of its rows are -100, on all ranks.")


def without_repeats(labels: Tensor, accelerator: Accelerator) -> Tensor:
    """Labels of an evaluation batch, -100 in rows that accelerate repeats to fill up the ranks' last batches."""
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return labels
    real = max(state.remainder - accelerator.process_index * len(labels), 0)
    return torch.where(torch.arange(len(labels), device=labels.device).unsqueeze(1) < real, labels, -100)


def masked_rows(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The ids of each row at which the mask is set. `ids` and `mask` have the shape `(batch, seq)`."""
    ids, mask = ids.cpu(), mask.cpu().bool()  # at once: each row's own way from a GPU would wait for it
    return [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]


@dataclass
class DataCollatorForPromptCompletion:
    """
    Batches of tokenized rows, with the keys of TRL's ChatML collator that `GKDTrainer` reads.

    Args:
        pad_token_id (`int`): Id that fills up the rows. It may be the end-of-text token.
    """

    pad_token_id: int

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        return pad_rows(
            [row["prompt_ids"] for row in rows], [row["completion_ids"] for row in rows], self.pad_token_id
        )
