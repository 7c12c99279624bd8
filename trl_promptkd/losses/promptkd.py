"""The two losses of PromptKD, as sums over tokens.

The notation is the paper's (arXiv 2402.12842): `q` is the student, `p` the plain teacher, and `pP` the prompted
teacher. All sums are over tokens, in nats.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..divergences import entropy, generalized_jsd, kl_divergence, on_shared_support


__all__ = [
    "PromptKDLossSums",
    "PromptLossSums",
    "StudentLossSums",
    "prompt_loss_sums",
    "promptkd_loss_sums",
    "regularization_weight",
    "student_loss_sums",
]


OverVocab = Float[Tensor, "tokens vocab"]


class PromptLossSums(NamedTuple):
    """Sums over tokens, all scalars. Only `prompt_loss` has a gradient, which goes to the prompted teacher."""

    prompt_loss: Tensor
    prompted_student: Tensor
    """KL(pP || q)."""
    prompted_plain: Tensor
    """KL(pP || p). 0 without the plain teacher."""
    student_plain: Tensor
    """KL(q || p). 0 without the plain teacher."""


class StudentLossSums(NamedTuple):
    """Sums over tokens, all scalars. Only `student_loss` has a gradient, which goes to the student."""

    student_loss: Tensor
    student_prompted: Tensor
    """KL(q || pP)."""
    student_entropy: Tensor
    teacher_entropy: Tensor
    """Entropy of `pP`."""


class PromptKDLossSums(NamedTuple):
    """The sums of both losses. Values that were not computed are 0."""

    loss: Tensor
    """The sum of the losses that were computed. Their gradients do not mix."""
    prompt_loss: Tensor
    prompted_student: Tensor
    prompted_plain: Tensor
    student_plain: Tensor
    student_loss: Tensor
    student_prompted: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor


def regularization_weight(coef: float, schedule: str, step: int, total_steps: int) -> float:
    """The weight `w(t)`. It is `coef (1 - t / T)` for the schedule `"linear"`, and `coef` for `"constant"`. `t` is the
    number of steps done, and `T` that of all steps."""
    return coef * (1 - step / total_steps) if schedule == "linear" and total_steps > 0 else coef


def prompt_loss_sums(
    prompted: OverVocab, student: OverVocab, plain: OverVocab | None, direction: str = "reverse", weight: float = 1.0
) -> PromptLossSums:
    """Loss of the soft prompt, summed over tokens.

    `direction="reverse"` is KL(pP || q) + w KL(pP || p), and `"forward"` is KL(q || pP) + w KL(p || pP). No gradient
    goes to `q` or `p`. Source: PromptKD, the adaptive teaching step, with the released code's weight.

    Args:
        prompted, student, plain: Log-probabilities. `plain` may be `None` if `weight` is 0.
    """
    student = student.detach()
    reverse = direction == "reverse"
    with torch.set_grad_enabled(reverse and torch.is_grad_enabled()):
        prompted_student = kl_divergence(prompted, student).sum()
    loss = prompted_student if reverse else kl_divergence(student, prompted).sum()
    if plain is None:
        zero = loss.new_zeros(())
        return PromptLossSums(loss, prompted_student, zero, zero)
    plain = plain.detach()
    with torch.set_grad_enabled(reverse and weight > 0 and torch.is_grad_enabled()):
        prompted_plain = kl_divergence(prompted, plain).sum()
    if weight:
        loss = loss + weight * (prompted_plain if reverse else kl_divergence(plain, prompted).sum())
    with torch.no_grad():
        return PromptLossSums(loss, prompted_student, prompted_plain, kl_divergence(student, plain).sum())


def student_loss_sums(student: OverVocab, prompted: OverVocab, beta: float = 1.0) -> StudentLossSums:
    """Loss of the student, and what is logged about it, summed over tokens.

    The loss is the divergence that `beta` selects. 1.0 is the paper's, KL(q || pP). No gradient goes to `pP`.

    Args:
        student, prompted: Log-probabilities.
    """
    prompted = prompted.detach()
    loss = generalized_jsd(student, prompted, beta).sum()
    with torch.no_grad():
        reverse = loss if beta == 1.0 else kl_divergence(student, prompted).sum()
        return StudentLossSums(loss, reverse, entropy(student).sum(), entropy(prompted).sum())


def promptkd_loss_sums(
    student_logits: OverVocab,
    prompted_logits: OverVocab,
    plain_logits: OverVocab | None = None,
    *,
    losses: str = "both",
    prompt_divergence: str = "reverse",
    weight: float = 1.0,
    beta: float = 1.0,
    temperature: float = 1.0,
) -> PromptKDLossSums:
    """One or both losses of the same tokens, from logits.

    Tokens of the vocabulary that one model rules out are ruled out for all ([`on_shared_support`]).

    Args:
        student_logits, prompted_logits, plain_logits: `plain_logits` may be `None` if `weight` is 0.
        losses (`str`): `"prompt"`, `"student"` or `"both"`.
        prompt_divergence (`str`): Direction of the prompt's loss, see [`prompt_loss_sums`].
        weight (`float`): Weight of the prompt's second term, see [`regularization_weight`].
        beta (`float`): Divergence of the student's loss, see [`student_loss_sums`].
        temperature (`float`): All logits are divided by it.
    """
    known = [logits for logits in (student_logits, prompted_logits, plain_logits) if logits is not None]
    log_probs = [(logits / temperature).log_softmax(dim=-1) for logits in on_shared_support(*known)]
    student, prompted = log_probs[:2]
    plain = None if plain_logits is None else log_probs[2]
    zero = prompted.new_zeros(())
    of_prompt, of_student = PromptLossSums(*[zero] * 4), StudentLossSums(*[zero] * 4)
    if losses != "student":
        of_prompt = prompt_loss_sums(prompted, student, plain, prompt_divergence, weight)
    if losses != "prompt":
        of_student = student_loss_sums(student, prompted, beta)
    return PromptKDLossSums(of_prompt.prompt_loss + of_student.student_loss, *of_prompt, *of_student)
