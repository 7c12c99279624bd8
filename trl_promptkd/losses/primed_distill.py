"""The loss of response priming, as sums over tokens.

`q` is the student after the plain prompt, `p` the teacher after the primed one, both at the same completion tokens.
All sums are in nats.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..divergences import entropy, generalized_jsd, kl_divergence, on_shared_support, skewed_kl


__all__ = ["PrimedLossSums", "log_prob_sums", "primed_loss_sums"]


class PrimedLossSums(NamedTuple):
    """Sums over tokens. All but the last are scalars. Only `loss` has a gradient, which goes to the student. Values
    that were not computed are 0. Without the teacher's logits, values that need them are `None`."""

    loss: Tensor
    """alpha CE + (1 - alpha) tau^2 D."""
    cross_entropy: Tensor
    """-log q(token), at temperature 1."""
    divergence: Tensor | None
    """D, at temperature tau, without the factor tau^2."""
    student_teacher: Tensor | None
    """KL(q || p), at temperature tau."""
    student_entropy: Tensor
    teacher_entropy: Tensor | None
    agreement: Tensor | None
    """Number of tokens at which both models' likeliest token is the same."""
    accuracy: Tensor
    """Number of tokens at which the student's likeliest token is the completion's."""
    teacher_log_prob: Tensor | None
    """log p(token)."""
    of_teachers: Tensor
    """Of shape `(num_teachers, 4)`. For each of several teachers: the number of its tokens, and their
    `student_teacher`, `agreement` and `teacher_log_prob`."""


def primed_loss_sums(
    student_logits: Float[Tensor, "tokens vocab"],
    teacher_logits: Float[Tensor, "tokens vocab"] | None,
    tokens: Int[Tensor, "tokens"],
    drawn_from: Float[Tensor, "tokens"] | None = None,
    teachers: Int[Tensor, "tokens"] | None = None,
    *,
    num_teachers: int = 0,
    alpha: float,
    temperature: float,
    beta: float = 1.0,
    skew: float = 0.0,
    with_metrics: bool = True,
) -> PrimedLossSums:
    """The loss, and what is logged about it, summed over tokens.

    `loss = alpha CE + (1 - alpha) tau^2 D`. CE is the cross-entropy of the completion's tokens. D is the divergence of
    both distributions at temperature tau. The factor tau^2 keeps the size of D's gradient when tau changes (Hinton et
    al., arXiv 1503.02531). Source: response priming (arXiv 2412.17846), whose released code has the reverse KL for D.

    Args:
        student_logits: Logits of the student, with gradient.
        teacher_logits: Logits of the teacher at the same tokens. If they are `None`, the loss is the cross-entropy.
        tokens: Ids of the completion's tokens.
        drawn_from: If `teacher_logits` are those of tokens drawn from the teacher, the entropies of the distributions
            that they were drawn from. The entropy of the draws is lower, which makes the forward KL too large by the
            difference. The difference is subtracted from D. NaN at tokens whose logits are the teacher's own.
        teachers: If there are several teachers, the number of the teacher of each token.
        num_teachers (`int`): Number of teachers, if there are several.
        alpha (`float`): Weight of CE.
        temperature (`float`): tau. D's logits are divided by it.
        beta (`float`): `1.0` for D = KL(q || p), and `0.0` for KL(p || q). Values between are the generalized
            Jensen-Shannon divergence.
        skew (`float`): Share of the first distribution of either KL that is mixed into its second one.
        with_metrics (`bool`): Whether to compute the values that are only logged. They are about a third of the work.
    """
    if teacher_logits is None:
        return _hard_label_sums(student_logits, tokens, with_metrics)
    log_q = student_logits.log_softmax(dim=-1)
    cross_entropy = -log_q.gather(-1, tokens.unsqueeze(-1)).sum()
    shared, teacher_logits = on_shared_support(student_logits, teacher_logits)
    if shared is not student_logits:  # only the cross-entropy uses the student's distribution over all its tokens
        student_logits, log_q = shared, shared.log_softmax(dim=-1)
    with torch.no_grad():
        log_p = teacher_logits.log_softmax(dim=-1)
    if temperature == 1.0:
        tempered_q, tempered_p = log_q, log_p
    else:
        tempered_q = (student_logits / temperature).log_softmax(dim=-1)
        with torch.no_grad():
            tempered_p = (teacher_logits / temperature).log_softmax(dim=-1)
    if beta == 1.0:
        per_token = skewed_kl(tempered_q, tempered_p, skew)
    elif beta == 0.0:
        per_token = skewed_kl(tempered_p, tempered_q, skew)
    else:
        per_token = generalized_jsd(tempered_q, tempered_p, beta)
    divergence = per_token.sum()
    if drawn_from is not None:
        with torch.no_grad():
            kept = entropy(log_p)
            gap = (torch.where(drawn_from.isnan(), kept, drawn_from) - kept).sum()
        divergence = divergence - gap
    loss = alpha * cross_entropy + (1 - alpha) * temperature**2 * divergence
    if not with_metrics:
        zero, none = cross_entropy.new_zeros(()), cross_entropy.new_zeros(num_teachers, 4)
        losses = (loss, cross_entropy.detach(), divergence.detach())
        return PrimedLossSums(*losses, zero, zero, zero, zero, zero, zero, none)
    with torch.no_grad():
        plain_reverse = beta == 1.0 and skew == 0.0
        best = log_q.argmax(dim=-1)
        student_teacher = per_token.detach() if plain_reverse else kl_divergence(tempered_q, tempered_p)
        agreement = best == log_p.argmax(dim=-1)
        teacher_log_prob = log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        of_teachers = log_q.new_zeros(num_teachers, 4)
        if teachers is not None:
            ones = torch.ones_like(teacher_log_prob)
            values = torch.stack([ones, student_teacher, agreement.to(ones.dtype), teacher_log_prob], dim=-1)
            of_teachers.index_add_(0, teachers, values)
        return PrimedLossSums(
            loss,
            cross_entropy.detach(),
            divergence.detach(),
            student_teacher.sum(),
            entropy(log_q).sum(),
            entropy(log_p).sum(),
            agreement.sum(),
            (best == tokens).sum(),
            teacher_log_prob.sum(),
            of_teachers,
        )


def _hard_label_sums(student_logits: Tensor, tokens: Tensor, with_metrics: bool) -> PrimedLossSums:
    log_q = student_logits.log_softmax(dim=-1)
    loss = -log_q.gather(-1, tokens.unsqueeze(-1)).sum()
    entropies = accuracy = loss.new_zeros(())
    if with_metrics:
        with torch.no_grad():
            (allowed,) = on_shared_support(student_logits)  # the entropy of a token that is ruled out is 0
            entropies = entropy(log_q if allowed is student_logits else allowed.log_softmax(dim=-1)).sum()
            accuracy = (log_q.argmax(dim=-1) == tokens).sum()
    return PrimedLossSums(
        loss, loss.detach(), None, None, entropies, None, None, accuracy, None, of_teachers=loss.new_zeros(0, 4)
    )


def log_prob_sums(logits: Float[Tensor, "tokens vocab"], tokens: Int[Tensor, "tokens"]) -> tuple[Float[Tensor, ""]]:
    """Sum of the log-probabilities of `tokens` `(num_tokens,)` under `logits` `(num_tokens, vocab)`, as a tuple of one
    scalar. A token that is ruled out has a low, finite log-probability, as in [`primed_loss_sums`].
    """
    (logits,) = on_shared_support(logits)
    return (logits.log_softmax(dim=-1).gather(-1, tokens.unsqueeze(-1)).sum(),)
