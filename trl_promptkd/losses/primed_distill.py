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
    """Sums over tokens: scalars. Only `loss` has a gradient, to the student. What was not computed is 0. Without the
    teacher's logits, what they are needed for is `None`."""

    loss: Tensor
    """alpha CE + (1 - alpha) tau^2 D."""
    cross_entropy: Tensor
    """-log q(token), at temperature 1."""
    divergence: Tensor | None
    """D, at temperature tau, without its square."""
    student_teacher: Tensor | None
    """KL(q || p), at temperature tau."""
    student_entropy: Tensor
    teacher_entropy: Tensor | None
    agreement: Tensor | None
    """Tokens at which both models' likeliest token is the same."""
    accuracy: Tensor
    """Tokens at which the student's likeliest token is the completion's."""
    teacher_log_prob: Tensor | None
    """log p(token)."""


def primed_loss_sums(
    student_logits: Float[Tensor, "tokens vocab"],
    teacher_logits: Float[Tensor, "tokens vocab"] | None,
    tokens: Int[Tensor, "tokens"],
    drawn_from: Float[Tensor, "tokens"] | None = None,
    *,
    alpha: float,
    temperature: float,
    beta: float = 1.0,
    skew: float = 0.0,
    with_metrics: bool = True,
) -> PrimedLossSums:
    """The loss, and what is logged about it, summed over tokens.

    `loss = alpha CE + (1 - alpha) tau^2 D` with CE the cross-entropy of the completion's tokens and D the divergence
    of both distributions at temperature tau. The factor tau^2 keeps the size of D's gradient when tau changes (Hinton
    et al., arXiv 1503.02531). Source: response priming (arXiv 2412.17846), whose released code has the reverse KL for
    D.

    Args:
        student_logits: Of the student, with gradient.
        teacher_logits: Of the teacher at the same tokens. `None` if they are not known: then the loss is the
            cross-entropy.
        tokens: Ids of the completion's tokens.
        drawn_from: If `teacher_logits` are those of tokens drawn from
            the teacher: the entropies of what they were drawn from. The entropy of the draws is lower, which makes the
            forward KL too large by the difference.
        beta (`float`): `1.0` for D = KL(q || p), `0.0` for KL(p || q), between them the generalized Jensen-Shannon
            divergence.
        skew (`float`): Share of the first distribution of either KL that is mixed into its second one.
        with_metrics (`bool`): Whether to compute what is only logged, which is about a third of the work.
    """
    if teacher_logits is None:
        return _hard_label_sums(student_logits, tokens, with_metrics)
    log_q = student_logits.log_softmax(dim=-1)
    cross_entropy = -log_q.gather(-1, tokens.unsqueeze(-1)).sum()
    shared, teacher_logits = on_shared_support(student_logits, teacher_logits)
    if shared is not student_logits:  # only the cross-entropy keeps the student's distribution over all its tokens
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
        divergence = skewed_kl(tempered_q, tempered_p, skew).sum()
    elif beta == 0.0:
        divergence = skewed_kl(tempered_p, tempered_q, skew).sum()
    else:
        divergence = generalized_jsd(tempered_q, tempered_p, beta).sum()
    if drawn_from is not None:
        with torch.no_grad():
            gap = (drawn_from - entropy(log_p)).sum()
        divergence = divergence - gap
    loss = alpha * cross_entropy + (1 - alpha) * temperature**2 * divergence
    if not with_metrics:
        zero = cross_entropy.new_zeros(())
        return PrimedLossSums(loss, cross_entropy.detach(), divergence.detach(), *[zero] * 6)
    with torch.no_grad():
        plain_reverse = beta == 1.0 and skew == 0.0
        best = log_q.argmax(dim=-1)
        return PrimedLossSums(
            loss,
            cross_entropy.detach(),
            divergence.detach(),
            divergence.detach() if plain_reverse else kl_divergence(tempered_q, tempered_p).sum(),
            entropy(log_q).sum(),
            entropy(log_p).sum(),
            (best == log_p.argmax(dim=-1)).sum(),
            (best == tokens).sum(),
            log_p.gather(-1, tokens.unsqueeze(-1)).sum(),
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
    return PrimedLossSums(loss, loss.detach(), None, None, entropies, None, None, accuracy, None)


def log_prob_sums(logits: Float[Tensor, "tokens vocab"], tokens: Int[Tensor, "tokens"]) -> tuple[Float[Tensor, ""]]:
    """The log-probability of `tokens` `(num_tokens,)` under `logits` `(num_tokens, vocab)`, summed: a tuple of one
    scalar. That of a token which is ruled out is low and finite, as in [`primed_loss_sums`].
    """
    (logits,) = on_shared_support(logits)
    return (logits.log_softmax(dim=-1).gather(-1, tokens.unsqueeze(-1)).sum(),)
