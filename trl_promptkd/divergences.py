"""Divergences between next-token distributions, on log-probabilities.

Everything here is a pure function of tensors. The direction stands in the name: `forward_kl` is KL(teacher ||
student), `reverse_kl` is KL(student || teacher). All values are in nats per token; sums over the vocabulary are taken
in the dtype of the inputs, which the trainers make float32.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor


__all__ = [
    "entropy",
    "forward_kl",
    "generalized_jsd",
    "kl_divergence",
    "on_shared_support",
    "reverse_kl",
    "skewed_kl",
]

PerToken = Float[Tensor, "*tokens"]
OverVocab = Float[Tensor, "*tokens vocab"]

_RULED_OUT = -6e4  # logits as low as this rule a token out; float16's lowest number is -65504


def on_shared_support(*logits: OverVocab) -> tuple[OverVocab, ...]:
    """Logits of several models, in which a token that one of them rules out is ruled out for all.

    Some models give entries of their vocabulary, such as those of images, a logit of minus infinity or the lowest
    number of a dtype. The KL divergence to such a distribution from one that does not is infinite, or 0 times
    infinity. Distributions are compared on the tokens that all models allow, as padded vocabularies are on their real
    ids.

    Args:
        logits (`Tensor`s of shape `(..., vocab)`): Of each model.

    Returns:
        `Tensor`s of the same shapes: the same ones if no token is ruled out, otherwise copies in which such tokens
        have a low, finite logit and no gradient.
    """
    if not logits[0].numel() or torch.stack([part.detach().amin() for part in logits]).amin() > _RULED_OUT:
        return logits
    ruled_out = torch.stack([(part <= _RULED_OUT) for part in logits]).any(dim=0)
    return tuple(part.masked_fill(ruled_out, _RULED_OUT) for part in logits)


def kl_divergence(log_a: OverVocab, log_b: OverVocab) -> PerToken:
    """KL(a || b) = sum_v a_v (log a_v - log b_v), in nats.

    Args:
        log_a (`Tensor` of shape `(..., vocab)`): Log-probabilities of the first distribution.
        log_b (`Tensor` of shape `(..., vocab)`): Log-probabilities of the second distribution.

    Returns:
        `Tensor` of shape `(...)`. Not negative up to rounding, and 0 if both are equal.

    Source: Kullback and Leibler (1951). The arguments stand in the order of the formula, which is not that of
    `torch.nn.functional.kl_div`.
    """
    return (log_a.exp() * (log_a - log_b)).sum(dim=-1)


def forward_kl(student_log_probs: OverVocab, teacher_log_probs: OverVocab) -> PerToken:
    """KL(teacher || student) of shape `(...)` from log-probabilities of shape `(..., vocab)`, in nats per token."""
    return kl_divergence(teacher_log_probs, student_log_probs)


def reverse_kl(student_log_probs: OverVocab, teacher_log_probs: OverVocab) -> PerToken:
    """KL(student || teacher) of shape `(...)` from log-probabilities of shape `(..., vocab)`, in nats per token."""
    return kl_divergence(student_log_probs, teacher_log_probs)


def generalized_jsd(student_log_probs: OverVocab, teacher_log_probs: OverVocab, beta: float) -> PerToken:
    """Generalized Jensen-Shannon divergence, with the two Kullback-Leibler divergences at its ends.

    For 0 < beta < 1: `beta KL(teacher || m) + (1 - beta) KL(student || m)` with
    `m = beta teacher + (1 - beta) student`. `beta = 0` is the forward KL and `beta = 1` the reverse KL. The ends are
    *not* the limits: the divergence itself goes to 0 there, so `beta = 0.99` is not nearly the reverse KL.

    Args:
        student_log_probs (`Tensor` of shape `(..., vocab)`): Log-probabilities of the student.
        teacher_log_probs (`Tensor` of shape `(..., vocab)`): Log-probabilities of the teacher.
        beta (`float`): Between 0 and 1.

    Returns:
        `Tensor` of shape `(...)`, nats per token.

    Source: Agarwal et al., On-Policy Distillation of Language Models (arXiv 2306.13649), Eq. 1, with the meaning that
    TRL gives to `beta`.
    """
    if beta == 0.0:
        return forward_kl(student_log_probs, teacher_log_probs)
    if beta == 1.0:
        return reverse_kl(student_log_probs, teacher_log_probs)
    mixture = torch.logaddexp(student_log_probs + math.log1p(-beta), teacher_log_probs + math.log(beta))
    return beta * kl_divergence(teacher_log_probs, mixture) + (1 - beta) * kl_divergence(student_log_probs, mixture)


def skewed_kl(log_a: OverVocab, log_b: OverVocab, skew: float) -> PerToken:
    """KL(a || skew a + (1 - skew) b): bounded by -log(skew), and KL(a || b) for `skew = 0`.

    With `a` the teacher and `b` the student it is the skewed forward KL, the other way round the skewed reverse KL.

    Args:
        log_a (`Tensor` of shape `(..., vocab)`): Log-probabilities of the first distribution.
        log_b (`Tensor` of shape `(..., vocab)`): Log-probabilities of the second distribution.
        skew (`float`): At least 0 and below 1.

    Returns:
        `Tensor` of shape `(...)`, nats per token.

    Source: Ko et al., DistiLLM (arXiv 2402.03898).
    """
    if skew == 0.0:
        return kl_divergence(log_a, log_b)
    return kl_divergence(log_a, torch.logaddexp(log_a + math.log(skew), log_b + math.log1p(-skew)))


def entropy(log_probs: OverVocab) -> PerToken:
    """Entropy -sum_v p_v log p_v of shape `(...)` from log-probabilities of shape `(..., vocab)`, in nats."""
    return -(log_probs.exp() * log_probs).sum(dim=-1)
