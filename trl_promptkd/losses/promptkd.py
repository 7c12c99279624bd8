"""The two losses of PromptKD, as sums over tokens.

Notation as in the paper (arXiv 2402.12842): `q` the student, `p` the plain teacher, `pP` the teacher behind the soft
prompt. All take log-probabilities of shape `(num_tokens, vocab)`, at the loss temperature, and sum over tokens, in nats.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..divergences import entropy, generalized_jsd, kl_divergence, on_shared_support


__all__ = ["prompt_loss_sums", "promptkd_loss_sums", "regularization_weight", "student_loss_sums"]


def regularization_weight(coef: float, schedule: str, step: int, total_steps: int) -> float:
    """`w(t)`: `coef (1 - t / T)` for the schedule `"linear"`, `coef` for `"constant"`; `t` counts the steps done, from 0."""
    return coef * (1 - step / total_steps) if schedule == "linear" and total_steps > 0 else coef


def prompt_loss_sums(
    prompted: Tensor, student: Tensor, plain: Tensor | None, direction: str = "reverse", weight: float = 1.0
) -> tuple[Tensor, ...]:
    """Loss of the soft prompt, summed over tokens.

    `direction="reverse"`: KL(pP || q) + w KL(pP || p); `"forward"`: KL(q || pP) + w KL(p || pP). Source: PromptKD, the
    adaptive teaching step, with the released code's weight. No gradient goes to `q` or `p`.

    Args:
        plain: May be `None` where `weight` is 0.

    Returns:
        `(loss, KL(pP || q))` and, where `plain` is given, KL(pP || p) and KL(q || p): scalars.
    """
    student = student.detach()
    reverse = direction == "reverse"
    with torch.set_grad_enabled(reverse and torch.is_grad_enabled()):
        prompted_student = kl_divergence(prompted, student).sum()
    loss = prompted_student if reverse else kl_divergence(student, prompted).sum()
    if plain is None:
        return loss, prompted_student
    plain = plain.detach()
    with torch.set_grad_enabled(reverse and weight > 0 and torch.is_grad_enabled()):
        prompted_plain = kl_divergence(prompted, plain).sum()
    if weight:
        loss = loss + weight * (prompted_plain if reverse else kl_divergence(plain, prompted).sum())
    with torch.no_grad():
        return loss, prompted_student, prompted_plain, kl_divergence(student, plain).sum()


def student_loss_sums(student: Tensor, prompted: Tensor, beta: float = 1.0) -> tuple[Tensor, ...]:
    """Loss of the student, and what is logged about it, summed over tokens.

    The loss is the divergence that `beta` selects (1.0: KL(q || pP), the paper's). No gradient goes to `pP`.

    Returns:
        `(loss, KL(q || pP), entropy of q, entropy of pP)`: scalars.
    """
    prompted = prompted.detach()
    loss = generalized_jsd(student, prompted, beta).sum()
    with torch.no_grad():
        reverse = loss if beta == 1.0 else kl_divergence(student, prompted).sum()
        return loss, reverse, entropy(student).sum(), entropy(prompted).sum()


def promptkd_loss_sums(
    student_logits: Tensor,
    prompted_logits: Tensor,
    plain_logits: Tensor | None,
    prompt_loss: Callable[..., tuple[Tensor, ...]] | None,
    student_loss: Callable[..., tuple[Tensor, ...]] | None,
    temperature: float = 1.0,
) -> tuple[Tensor, ...]:
    """One or both losses of the same tokens, from logits.

    Args:
        prompt_loss: [`prompt_loss_sums`] with its settings, or `None` to leave it out.
        student_loss: [`student_loss_sums`] with its settings, or `None` to leave it out.
        temperature (`float`): Divides all logits. Tokens that a model rules out are left out ([`on_shared_support`]).

    Returns:
        The sum of the losses asked for, whose gradients do not mix, then what `prompt_loss` and `student_loss` return.
    """
    known = [logits for logits in (student_logits, prompted_logits, plain_logits) if logits is not None]
    log_probs = [(logits / temperature).log_softmax(dim=-1) for logits in on_shared_support(*known)]
    student, prompted, plain = log_probs if len(log_probs) == 3 else (*log_probs, None)
    of_prompt = () if prompt_loss is None else prompt_loss(prompted, student, plain)
    of_student = () if student_loss is None else student_loss(student, prompted)
    total = torch.stack([sums[0] for sums in (of_prompt, of_student) if sums]).sum()
    return (total, *of_prompt, *of_student)
