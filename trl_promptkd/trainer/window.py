"""The completions of an accumulation window: collecting, sampling, and sorting them into micro-batches."""

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from trl import SFTTrainer

from ..data import grouped_by_length, masked_rows, pad_rows, warn_if_untrained
from ..data.primed import pad_views, prompts_of_views
from ..generation.rollouts import rollout_seed
from .completions import Samples
from .logged_metrics import add_rollouts


__all__ = [
    "Teaching",
    "collected_window",
    "padded",
    "padded_views",
    "prompts_and_completions",
    "sample_mixture",
    "sample_views",
    "teaching_rows",
    "with_teaching_rows",
]


@dataclass(frozen=True)
class Teaching:
    """What a micro-batch does for the soft prompt. All fields but `rows` are the same on all ranks.

    Args:
        rows (`int`): Number of teaching rows. These are its first rows, from which the prompt's gradient is taken.
        any_rows, any_others (`bool`): Whether any rank has teaching rows, or other rows, in this micro-batch.
        steps (`bool`): Whether the prompt steps in this micro-batch.
        num_tokens (`Tensor`): Completion tokens of all teaching rows of the window, on all ranks. At least 1.
    """

    rows: int
    any_rows: bool
    any_others: bool
    steps: bool
    num_tokens: Tensor


def collected_window(
    trainer: Any, epoch_iterator: Any, num_batches: int, device: torch.device
) -> list[dict[str, Any]]:
    """The micro-batches of one optimizer step. The list is empty if a run was resumed after its last step."""
    if trainer.state.global_step >= trainer.state.max_steps:
        return []  # the base class would take one more step
    batches, _ = SFTTrainer.get_batch_samples(trainer, epoch_iterator, num_batches, device)
    return [trainer._prepare_inputs(batch) for batch in batches]


def sample_mixture(trainer: Any, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """PromptKD's window. Rows are drawn one by one to get a completion of the student (`lmbda`). The others get one of
    the plain teacher (`seq_kd`) or keep the data's."""
    args, step = trainer.args, trainer.state.global_step
    rows = [row for batch in batches for row in zip(*prompts_and_completions(batch), strict=True)]
    prompts, completions = [prompt for prompt, _ in rows], [completion for _, completion in rows]
    draw = random.Random(rollout_seed(args.seed, "mixture", step, trainer.accelerator.process_index))
    by_student = [row for row in range(len(prompts)) if draw.random() < trainer.lmbda]
    by_teacher = sorted(set(range(len(prompts))) - set(by_student)) if trainer.seq_kd else []
    sampled = _student_completions(trainer, [prompts[row] for row in by_student])
    with trainer._run_teacher() as teacher:
        sampled += trainer._teacher_rollouts.sample(teacher, [prompts[row] for row in by_teacher], step)
    for row, completion in zip([*by_student, *by_teacher], sampled, strict=True):
        completions[row] = completion

    sizes = [len(batch["prompts"]) for batch in batches]
    groups = [list(range(end - size, end)) for size, end in zip(sizes, accumulate(sizes), strict=True)]
    replaced = [not {*by_student, *by_teacher}.isdisjoint(group) for group in groups]
    if all(replaced):
        lengths = [len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True)]
        for part in _exchangeable(sizes, args.prompt_share, args.prompt_update):
            members = [row for group in groups[part] for row in group]
            regrouped = grouped_by_length([lengths[row] for row in members], sizes[part])
            groups[part] = [[members[place] for place in group] for group in regrouped]
    return [
        padded(trainer, [prompts[row] for row in group], [completions[row] for row in group]) if is_new else batch
        for batch, group, is_new in zip(batches, groups, replaced, strict=True)
    ]


def teaching_rows(sizes: Sequence[int], share: float) -> list[int]:
    """How many rows of each micro-batch, from its first one on, teach the soft prompt. Together they are the first
    `share` of the window's rows, rounded up, and at least one."""
    wanted = max(math.ceil(round(share * sum(sizes), 6)), 1)  # rounded, because 0.07 * 100 is above 7
    starts = [end - size for size, end in zip(sizes, accumulate(sizes), strict=True)]
    return [min(max(wanted - start, 0), size) for size, start in zip(sizes, starts, strict=True)]


def _exchangeable(sizes: Sequence[int], share: float, prompt_update: str) -> list[slice]:
    """Groups of micro-batches within which rows may change places. Either all rows of a group teach the soft prompt or
    none does, and the student learns from the same prompt in all of them."""
    teaching = teaching_rows(sizes, share)
    last = max(index for index, rows in enumerate(teaching) if rows)
    joins = prompt_update == "simultaneous" and teaching[last] == sizes[last]
    return [slice(0, last + joins), slice(last + 1, None)]


def with_teaching_rows(
    trainer: Any, batches: list[dict[str, Any]], is_whole: bool
) -> tuple[list[dict[str, Any]], Tensor]:
    """PromptKD's window, each micro-batch with its [`Teaching`] as `teaching`, and the number of the window's
    completion tokens on all ranks.

    Args:
        is_whole (`bool`): `False` if the data ended within the window. The optimizers then step after the next one.
    """
    args = trainer.args
    trained = [batch["labels"][:, 1:] != -100 for batch in batches]
    rows = teaching_rows([len(mask) for mask in trained], args.prompt_share)
    # For each micro-batch: all tokens, those of teaching rows, teaching rows, other rows. Ranks may differ in their
    # last window
    counts = torch.zeros(args.gradient_accumulation_steps, 4, dtype=torch.long, device=trainer.accelerator.device)
    for index, (mask, own) in enumerate(zip(trained, rows, strict=True)):
        counts[index, 0], counts[index, 1] = mask.sum(), mask[:own].sum()
        counts[index, 2], counts[index, 3] = own, len(mask) - own
    counts = trainer.accelerator.reduce(counts, reduction="sum")
    num_tokens, num_teaching = counts[:, :2].sum(dim=0)
    tokens, _, with_rows, with_others = zip(*counts.tolist(), strict=True)
    warn_if_untrained(sum(tokens), trainer.state.global_step)
    last = len(batches) - 1
    if args.prompt_update == "sequential":  # as soon as all ranks have seen their last teaching row
        last = min(last, max(index for index, number in enumerate(with_rows) if number))
    taught = [
        Teaching(
            own,
            any_rows=with_rows[index] > 0,
            any_others=with_others[index] > 0,
            steps=is_whole and index == last,
            num_tokens=num_teaching.clamp(min=1),
        )
        for index, own in enumerate(rows)
    ]
    return [{**batch, "teaching": teaching} for batch, teaching in zip(batches, taught, strict=True)], num_tokens


def sample_views(trainer: Any, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Response priming's window: both views of the student's samples, with rows of similar lengths together."""
    views = [prompts_of_views(batch) for batch in batches]
    prompts = [ids for student, _ in views for ids in student]
    teacher_prompts = [ids for _, teacher in views for ids in teacher]
    completions = _student_completions(trainer, prompts)
    lengths = [len(prompt) + len(ids) for prompt, ids in zip(teacher_prompts, completions, strict=True)]
    groups = grouped_by_length(lengths, [len(student) for student, _ in views])
    teachers = torch.cat([batch["teachers"] for batch in batches]) if trainer._teacher_names else None
    # Some metrics are measured on one micro-batch in many, which should not always be that of the longest rows
    random.Random(rollout_seed(trainer.args.seed, "order", trainer.state.global_step, 0)).shuffle(groups)
    return [
        padded_views(
            trainer,
            *([rows[row] for row in group] for rows in (prompts, teacher_prompts, completions)),
            teachers=None if teachers is None else teachers[group],
        )
        for group in groups
    ]


def _student_completions(trainer: Any, prompts: list[list[int]]) -> list[list[int]]:
    """The student's samples, and what is logged about them."""
    trainer.rollouts.sync()
    start = time.perf_counter()
    completions = trainer.rollouts.sample(trainer.model_wrapped, prompts, trainer.state.global_step)
    seconds = time.perf_counter() - start
    add_rollouts(trainer._train_means, completions, trainer.generation_config, seconds, trainer.processing_class)
    trainer._samples = Samples(prompts, completions)
    return completions


def prompts_and_completions(batch: dict[str, Tensor]) -> tuple[list[list[int]], list[list[int]]]:
    """The token ids of a batch's rows."""
    prompts = masked_rows(batch["prompts"], batch["prompt_attention_mask"])
    return prompts, masked_rows(batch["input_ids"], batch["labels"] != -100)


def padded(trainer: Any, prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> dict[str, Tensor]:
    """A batch on the trainer's device."""
    batch = pad_rows(prompts, completions, trainer.processing_class.pad_token_id)
    return {name: value.to(trainer.accelerator.device) for name, value in batch.items()}


def padded_views(
    trainer: Any,
    prompts: Sequence[list[int]],
    teacher_prompts: Sequence[list[int]],
    completions: Sequence[list[int]],
    *,
    teachers: Tensor | None = None,
) -> dict[str, Tensor]:
    """A batch of both views on the trainer's device. `teachers` `(batch,)` are the numbers of the rows' teachers."""
    pad, multiple = trainer.processing_class.pad_token_id, trainer.args.pad_to_multiple_of
    batch = pad_views(prompts, teacher_prompts, completions, pad, multiple)
    batch |= {} if teachers is None else {"teachers": teachers}
    return {name: value.to(trainer.accelerator.device) for name, value in batch.items()}
