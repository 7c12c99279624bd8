"""The two losses of PromptKD, as sums over tokens.

Notation as in the paper (arXiv 2402.12842): `q` the student, `p` the plain teacher, `pP` the teacher behind the soft
prompt. Logits have shape `(num_tokens, vocab)`; all sums are in nats.
"""

from torch import Tensor

from .divergences import entropy, generalized_jsd, kl_divergence


__all__ = ["prompt_loss_sums", "regularization_weight", "student_loss_sums"]


def regularization_weight(coef: float, schedule: str, step: int, total_steps: int) -> float:
    """`w(t)`: `coef (1 - t / T)` for the schedule `"linear"`, `coef` for `"constant"`; `t` counts the steps done, from 0."""
    return coef * (1 - step / total_steps) if schedule == "linear" and total_steps > 0 else coef


def prompt_loss_sums(
    prompted_logits: Tensor,
    student_logits: Tensor,
    plain_logits: Tensor | None,
    direction: str = "reverse",
    weight: float = 1.0,
    temperature: float = 1.0,
) -> tuple[Tensor, ...]:
    """Loss of the soft prompt, summed over tokens.

    `direction="reverse"`: KL(pP || q) + w KL(pP || p); `"forward"`: KL(q || pP) + w KL(p || pP). Source: PromptKD, the
    adaptive teaching step, with the released code's weight. No gradient goes to `q` or `p`.

    Args:
        plain_logits: May be `None` where `weight` is 0.

    Returns:
        `(loss, KL(pP || q))` and, where `plain_logits` is given, KL(pP || p): scalars.
    """
    prompted = (prompted_logits / temperature).log_softmax(dim=-1)
    student = (student_logits.detach() / temperature).log_softmax(dim=-1)
    prompted_student = kl_divergence(prompted, student).sum()
    loss = prompted_student if direction == "reverse" else kl_divergence(student, prompted).sum()
    if plain_logits is None:
        return loss, prompted_student.detach()
    plain = (plain_logits.detach() / temperature).log_softmax(dim=-1)
    prompted_plain = kl_divergence(prompted, plain).sum()
    if weight:
        loss = loss + weight * (prompted_plain if direction == "reverse" else kl_divergence(plain, prompted).sum())
    return loss, prompted_student.detach(), prompted_plain.detach()


def student_loss_sums(
    student_logits: Tensor,
    prompted_logits: Tensor,
    plain_logits: Tensor | None,
    beta: float = 1.0,
    temperature: float = 1.0,
) -> tuple[Tensor, ...]:
    """Loss of the student, and what is logged about it, summed over tokens.

    The loss is the divergence that `beta` selects (1.0: KL(q || pP), the paper's). No gradient goes to `pP` or `p`.

    Returns:
        `(loss, KL(q || pP), entropy of q, entropy of pP)` and, where `plain_logits` is given, KL(q || p): scalars.
    """
    student = (student_logits / temperature).log_softmax(dim=-1)
    prompted = (prompted_logits.detach() / temperature).log_softmax(dim=-1)
    loss = generalized_jsd(student, prompted, beta).sum()
    fixed = student.detach()
    sums = (loss, kl_divergence(fixed, prompted).sum(), entropy(fixed).sum(), entropy(prompted).sum())
    if plain_logits is None:
        return sums
    plain = (plain_logits.detach() / temperature).log_softmax(dim=-1)
    return (*sums, kl_divergence(fixed, plain).sum())
