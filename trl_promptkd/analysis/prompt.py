"""What a soft prompt has become, and what it does: near which tokens it lies, how far it has come, and at which tokens of an answer the
prompted teacher differs from the plain one and from the student.

Notation: `q` the student, `p` the plain teacher, `pP` the prompted teacher.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..divergences import kl_divergence
from ..models.forward import input_embeddings
from .asking import log_probs_together
from .token_classes import TOKEN_CLASSES, token_classes, token_text


__all__ = ["Change", "Drift", "PromptEffect", "nearest_tokens", "prompt_drift", "prompt_effect", "similarity"]


@torch.no_grad()
def nearest_tokens(
    soft_prompt: Tensor, teacher: PreTrainedModel, vocab_size: int, number: int = 5
) -> list[dict[str, list[tuple[int, float, float]]]]:
    """The tokens whose input embeddings are nearest to each virtual token.

    Args:
        soft_prompt (`Tensor` of shape `(num_virtual_tokens, hidden)`): In float32.
        teacher: Whose embeddings they are compared with, scaled if the model scales them.
        vocab_size (`int`): Number of ids that stand for tokens.
        number (`int`): Tokens per virtual token.

    Returns:
        For each virtual token `{"cosine": [...], "distance": [...]}`: the tokens with the highest cosine, and those with the smallest
        Euclidean distance, each as (token id, cosine, distance). Distances are shares of the typical norm, the median norm of the
        vocabulary's embeddings.
    """
    embeddings: Any = input_embeddings(teacher)
    device = embeddings.weight.device
    prompt, vocab = soft_prompt.to(device), embeddings(torch.arange(vocab_size, device=device)).float()
    cosine = nn.functional.normalize(prompt, dim=-1) @ nn.functional.normalize(vocab, dim=-1).T
    # Norms and products alone would lose the distance of a virtual token that has hardly moved
    distance = torch.cdist(prompt, vocab, compute_mode="donot_use_mm_for_euclid_dist") / vocab.norm(dim=-1).median()
    number = min(number, vocab_size)
    chosen = {"cosine": cosine.topk(number).indices, "distance": distance.topk(number, largest=False).indices}
    return [
        {
            by: [(int(i), float(cosine[row, i]), float(distance[row, i])) for i in ids[row]]
            for by, ids in chosen.items()
        }
        for row in range(len(prompt))
    ]


@dataclass(frozen=True)
class Drift:
    """
    How far a soft prompt has come from its start.

    Args:
        relative: |P_i - S_i| / |S_i| of each virtual token.
        cosine: Between P_i and S_i.
        overall: |P - S| / |S| of all of them together: what is logged as `prompt/drift`.
    """

    relative: list[float]
    cosine: list[float]
    overall: float


def prompt_drift(soft_prompt: Tensor, initial: Tensor) -> Drift:
    """[`Drift`] of a soft prompt from what it started from, both of shape `(num_virtual_tokens, hidden)`."""
    away = soft_prompt - initial
    return Drift(
        relative=(away.norm(dim=-1) / initial.norm(dim=-1)).tolist(),
        cosine=nn.functional.cosine_similarity(soft_prompt, initial, dim=-1).tolist(),
        overall=float(away.norm() / initial.norm()),
    )


def similarity(soft_prompt: Tensor) -> Tensor:
    """The cosine between each two virtual tokens, `(num_virtual_tokens, num_virtual_tokens)`."""
    unit = nn.functional.normalize(soft_prompt, dim=-1)
    return unit @ unit.T


@dataclass(frozen=True)
class Change:
    """
    A place where the soft prompt changed the teacher's likeliest next token.

    Args:
        row, place: Which row, and which token of its answer, from 0.
        kl: KL(pP || p) there, in nats.
        context: The end of the text before it.
        token: The answer's own token there.
        prompted, plain, student: The three likeliest tokens of each model with their probabilities; `student` is empty without one.
    """

    row: int
    place: int
    kl: float
    context: str
    token: str
    prompted: list[tuple[str, float]]
    plain: list[tuple[str, float]]
    student: list[tuple[str, float]] = field(default_factory=list)


@dataclass
class PromptEffect:
    """
    What a soft prompt does at the tokens of some answers, an entry per token.

    Args:
        classes: The tokens' classes ([`~trl_promptkd.analysis.token_classes.token_classes`]).
        prompted_plain: KL(pP || p), in nats.
        prompted_student: KL(pP || q), in nats; empty without a student.
        changed: How many tokens there are at which the teacher's likeliest next token is another one.
        changes: The places of the largest KL(pP || p) among them, the largest first.
    """

    classes: list[str]
    prompted_plain: list[float]
    prompted_student: list[float]
    changed: int
    changes: list[Change]

    def by_class(self) -> dict[str, dict[str, float]]:
        """For each class that occurs: `tokens`, the means `prompted_plain` and, with a student, `prompted_student` in nats per token, and
        `share`, its part of the sum of KL(pP || p). Last `all tokens`."""
        table = {}
        total = sum(self.prompted_plain)
        for name in (*TOKEN_CLASSES, "all tokens"):
            places = [i for i, found in enumerate(self.classes) if name in (found, "all tokens")]
            if places:
                part = sum(self.prompted_plain[i] for i in places)
                table[name] = {"tokens": len(places), "prompted_plain": part / len(places)}
                if self.prompted_student:
                    table[name]["prompted_student"] = sum(self.prompted_student[i] for i in places) / len(places)
                table[name]["share"] = part / total if total > 0 else float("nan")
        return table


@torch.no_grad()
def prompt_effect(
    teacher: PreTrainedModel,
    soft_prompt: Tensor,
    student: PreTrainedModel | None,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    processing_class: PreTrainedTokenizerBase,
    ends: Set[int],
    batch_size: int = 8,
    vocab_size: int | None = None,
    max_changes: int = 20,
) -> PromptEffect:
    """Compare the prompted teacher with the plain one, and with the student, at every token of some answers.

    A token's values are those of the distributions of which it is the outcome: after all tokens before it.

    Args:
        teacher, student: In evaluation mode; the student may be omitted.
        soft_prompt (`Tensor` of shape `(num_virtual_tokens, hidden)`): Stands before the teacher's input.
        completion_ids: The answers, from anyone; none is empty.
        ends: Ids that end a text.
        max_changes (`int`): Places to keep, at most.

    Raises:
        ValueError: if a model's logits are not numbers.
    """
    passes = [(teacher, soft_prompt), (teacher, None)] + ([] if student is None else [(student, None)])
    pad = int(processing_class.pad_token_id)
    rows = list(zip(prompt_ids, completion_ids, strict=True))
    kls: list[list[float]] = [[], []]  # KL(pP || p) and KL(pP || q)
    likeliest: list[Any] = []  # of each token: the models' three likeliest ids with their probabilities
    for start in tqdm(range(0, len(rows), batch_size), desc="Comparing", unit="batch"):
        prompts, completions = zip(*rows[start : start + batch_size], strict=True)
        for log_probs in log_probs_together(passes, prompts, completions, pad, vocab_size):
            for values, others in zip(kls, log_probs[1:], strict=False):
                values += kl_divergence(log_probs[0], others).tolist()
            likeliest += zip(*map(_top, log_probs), strict=True)
    places = [(row, place) for row, (_, ids) in enumerate(rows) for place in range(len(ids))]
    changed = [i for i, (prompted, plain, *_) in enumerate(likeliest) if prompted[0][0] != plain[0][0]]

    def change(index: int) -> Change:
        row, place = places[index]
        before, token = [*rows[row][0], *rows[row][1][:place]], rows[row][1][place]
        tops = [[(token_text(i, before[-1], processing_class), share) for i, share in top] for top in likeliest[index]]
        context = processing_class.decode(before[-64:], skip_special_tokens=False)
        return Change(row, place, kls[0][index], context, token_text(token, before[-1], processing_class), *tops)

    return PromptEffect(
        classes=[name for row in rows for name in token_classes(*row, processing_class, ends)],
        prompted_plain=kls[0],
        prompted_student=kls[1],
        changed=len(changed),
        changes=[change(index) for index in sorted(changed, key=lambda index: -kls[0][index])[:max_changes]],
    )


def _top(log_probs: Tensor) -> list[list[tuple[int, float]]]:
    """The three likeliest ids of each row with their probabilities."""
    values, ids = log_probs.topk(3)
    return [list(zip(*row, strict=True)) for row in zip(ids.tolist(), values.exp().tolist(), strict=True)]
