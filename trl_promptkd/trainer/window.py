"""The completions of an accumulation window: collected, sampled, and shared out to micro-batches again."""

import random
import time
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from trl import SFTTrainer

from ..data import grouped_by_length, masked_rows, pad_rows
from ..data.primed import pad_views, prompts_of_views
from ..generation.rollouts import rollout_seed
from .completions import Samples
from .logged_metrics import add_rollouts


__all__ = [
    "collected_window",
    "padded",
    "padded_views",
    "prompts_and_completions",
    "sample_mixture",
    "sample_views",
]


def collected_window(
    trainer: Any, epoch_iterator: Any, num_batches: int, device: torch.device
) -> list[dict[str, Any]]:
    """The micro-batches of one optimizer step; none if a run was resumed after its last one."""
    if trainer.state.global_step >= trainer.state.max_steps:
        return []  # the base class would make one more step
    batches, _ = SFTTrainer.get_batch_samples(trainer, epoch_iterator, num_batches, device)
    return [trainer._prepare_inputs(batch) for batch in batches]


def sample_mixture(trainer: Any, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """PromptKD's window: rows drawn one by one get a completion of the student (`lmbda`), others one of the plain
    teacher (`seq_kd`) or keep the data's."""
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
        # In the last micro-batch, the student may learn from another prompt than in the others: its rows stay in it
        num_regrouped = len(batches) - (args.prompt_update == "sequential")
        lengths = [len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True)]
        groups[:num_regrouped] = grouped_by_length(lengths[: sum(sizes[:num_regrouped])], sizes[:num_regrouped])
    return [
        padded(trainer, [prompts[row] for row in group], [completions[row] for row in group]) if is_new else batch
        for batch, group, is_new in zip(batches, groups, replaced, strict=True)
    ]


def sample_views(trainer: Any, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Response priming's window: both views of the student's samples, rows of similar lengths together."""
    views = [prompts_of_views(batch) for batch in batches]
    prompts = [ids for student, _ in views for ids in student]
    teacher_prompts = [ids for _, teacher in views for ids in teacher]
    completions = _student_completions(trainer, prompts)
    lengths = [len(prompt) + len(ids) for prompt, ids in zip(teacher_prompts, completions, strict=True)]
    groups = grouped_by_length(lengths, [len(student) for student, _ in views])
    teachers = torch.cat([batch["teachers"] for batch in batches]) if trainer._teacher_names else None
    # What is measured on one micro-batch in so many is not always to be measured on the longest rows
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
    """A batch of both views on the trainer's device; `teachers` `(batch,)` are the numbers of the rows' teachers."""
    pad, multiple = trainer.processing_class.pad_token_id, trainer.args.pad_to_multiple_of
    batch = pad_views(prompts, teacher_prompts, completions, pad, multiple)
    batch |= {} if teachers is None else {"teachers": teachers}
    return {name: value.to(trainer.accelerator.device) for name, value in batch.items()}
