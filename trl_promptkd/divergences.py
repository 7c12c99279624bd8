"""Divergences between next-token distributions, on log-probabilities.

All functions here are pure functions of tensors. Their names say the direction: `forward_kl` is KL(teacher ||
student), and `reverse_kl` is KL(student || teacher). Values are in nats per token. Sums over the vocabulary are in the
dtype of the inputs, which is float32 in the trainers.
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

_RULED_OUT = -6e4  # a token with such a low logit is ruled out. The lowest number of float16 is -65504


def on_shared_support(*logits: OverVocab) -> tuple[OverVocab, ...]:
    """Rule a token out for all models if one of them rules it out.

    Some models rule out entries of their vocabulary, such as those of images. Their logit is minus infinity, or the
    lowest number of a dtype. The KL divergence between such a model and one that allows the token can be infinite, or
    0 times infinity. Distributions are therefore compared on the tokens that all models allow.

    Args:
        logits (`Tensor`s of shape `(..., vocab)`): Logits of each model.

    Returns:
        `Tensor`s of the same shapes. If no token is ruled out, they are the inputs themselves. Otherwise they are
        copies in which such tokens have a low, finite logit and no gradient.
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
        `Tensor` of shape `(...)`. Not negative, up to rounding. 0 if both distributions are equal.

    Source: Kullback and Leibler (1951). The arguments are in the order of the formula. `torch.nn.functional.kl_div`
    has the opposite order.
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

    For 0 < beta < 1, it is `beta KL(teacher || m) + (1 - beta) KL(student || m)` with
    `m = beta teacher + (1 - beta) student`. `beta = 0` is the forward KL, and `beta = 1` is the reverse KL. These are
    *not* the limits of the formula, which goes to 0 at both ends. `beta = 0.99` is therefore not close to the reverse
    KL.

    Args:
        student_log_probs (`Tensor` of shape `(..., vocab)`): Log-probabilities of the student.
        teacher_log_probs (`Tensor` of shape `(..., vocab)`): Log-probabilities of the teacher.
        beta (`float`): Between 0 and 1.

    Returns:
        `Tensor` of shape `(...)`, nats per token.

    Source: Agarwal et al., On-Policy Distillation of Language Models (arXiv 2306.13649), Eq. 1. `beta` has TRL's
    meaning.
    """
    if beta == 0.0:
        return forward_kl(student_log_probs, teacher_log_probs)
    if beta == 1.0:
        return reverse_kl(student_log_probs, teacher_log_probs)
    mixture = torch.logaddexp(student_log_probs + math.log1p(-beta), teacher_log_probs + math.log(beta))
    return beta * kl_divergence(teacher_log_probs, mixture) + (1 - beta) * kl_divergence(student_log_probs, mixture)


def skewed_kl(log_a: OverVocab, log_b: OverVocab, skew: float) -> PerToken:
    """Skewed KL divergence KL(a || skew a + (1 - skew) b). It is at most -log(skew). `skew = 0` is KL(a || b).

    With `a` the teacher and `b` the student, it is the skewed forward KL. With `a` the student and `b` the teacher, it
    is the skewed reverse KL.

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
