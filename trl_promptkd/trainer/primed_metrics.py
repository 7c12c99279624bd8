"""The metrics of response priming, over all tokens and, with several teachers, over those of each."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..losses.primed_distill import PrimedLossSums
from .logged_metrics import Means


__all__ = ["add_gain", "add_sums", "add_token_counts"]


def add_sums(
    means: Means, sums: PrimedLossSums, count: Tensor, names: Sequence[str] = (), with_metrics: bool = True
) -> None:
    """Add a micro-batch's losses, and its metrics if they were computed.

    Args:
        count: Number of its completion tokens.
        names: The names of several teachers.
    """
    means.add("ce", sums.cross_entropy, count)
    means.add("kd", sums.divergence, count)
    if not with_metrics:
        return
    means.add("kl/student_teacher", sums.student_teacher, count)
    means.add("entropy/student", sums.student_entropy, count)
    means.add("entropy/teacher", sums.teacher_entropy, count)
    means.add("teacher/top1_agreement", sums.agreement, count)
    means.add("mean_token_accuracy", sums.accuracy, count)
    for name, (own_count, student_teacher, agreement, _) in zip(names, sums.of_teachers, strict=True):
        means.add(f"kl/student_teacher/{name}", student_teacher, own_count)
        means.add(f"teacher/top1_agreement/{name}", agreement, own_count)


def add_gain(
    means: Means, plain: Tensor | None, sums: PrimedLossSums, count: Tensor, names: Sequence[str] = ()
) -> None:
    """Add how much likelier the priming text makes a micro-batch's completions for the teacher.

    Args:
        plain: The sum of their log-probabilities without the text, or `None` if it is not known. With several
            teachers, one value for each, `(teachers,)`, which is NaN if it is not known.
    """
    if plain is None or sums.teacher_log_prob is None:
        return
    if not names:
        means.add("priming/gain_nats", sums.teacher_log_prob - plain, count)
        return
    counts, gains = sums.of_teachers[:, 0], sums.of_teachers[:, 3] - plain
    counts, gains = (torch.where(plain.isnan(), 0.0, values) for values in (counts, gains))
    means.add("priming/gain_nats", gains.sum(), counts.sum())
    for name, own_gain, own_count in zip(names, gains, counts, strict=True):
        means.add(f"priming/gain_nats/{name}", own_gain, own_count)


def add_token_counts(
    means: Means, batches: Sequence[dict[str, Tensor]], num_tokens: Tensor, names: Sequence[str], accelerator: Any
) -> None:
    """Add how many tokens one optimizer step trains on, on all ranks.

    Args:
        batches: The window's micro-batches on this rank.
        num_tokens: Number of their completion tokens on all ranks.
    """
    means.add("completion_tokens", num_tokens)
    for number, name in enumerate(names):
        own = [(batch["labels"][batch["teachers"] == number][:, 1:] != -100).sum() for batch in batches]
        means.add(f"completion_tokens/{name}", torch.stack(own).sum(), 1 / accelerator.num_processes)
