"""What a soft prompt has become, and what it does.

Which tokens it is near, how far it has moved, and at which tokens of a completion the prompted teacher differs from
the plain one and from the student.

Notation: `q` is the student, `p` the plain teacher, `pP` the prompted teacher.
"""

from collections.abc import Sequence, Set
from functools import partial
from typing import Any

import torch
from pandas import DataFrame, concat
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..divergences import kl_divergence
from ..models.forward import input_embeddings
from .log_probs import log_probs_together
from .token_classes import TOKEN_CLASSES, token_classes, token_text


__all__ = ["by_class", "nearest_tokens", "prompt_drift", "prompt_effect", "similarity"]


@torch.no_grad()
def nearest_tokens(
    soft_prompt: Tensor, teacher: PreTrainedModel, vocab_size: int, number: int = 5
) -> list[dict[str, list[dict[str, Any]]]]:
    """The tokens whose input embeddings are nearest to each virtual token.

    Args:
        soft_prompt (`Tensor` of shape `(num_virtual_tokens, hidden)`): In float32.
        teacher: The model whose embeddings they are compared with, scaled if the model scales them.
        vocab_size (`int`): Number of ids that stand for tokens.
        number (`int`): Tokens per virtual token.

    Returns:
        For each virtual token `{"cosine": [...], "distance": [...]}`: the tokens with the highest cosine, and those
        with the smallest Euclidean distance. Each is `{"id": ..., "cosine": ..., "distance": ...}`. Distances are
        relative to the median norm of the vocabulary's embeddings.
    """
    embeddings: Any = input_embeddings(teacher)
    device = embeddings.weight.device
    prompt, vocab = soft_prompt.to(device), embeddings(torch.arange(vocab_size, device=device)).float()
    cosine = nn.functional.normalize(prompt, dim=-1) @ nn.functional.normalize(vocab, dim=-1).T
    # Norms and products alone would lose the distance of a virtual token that has hardly moved
    distance = torch.cdist(prompt, vocab, compute_mode="donot_use_mm_for_euclid_dist") / vocab.norm(dim=-1).median()
    number = min(number, vocab_size)
    chosen = {
        "cosine": cosine.topk(number).indices.tolist(),
        "distance": distance.topk(number, largest=False).indices.tolist(),
    }
    return [
        {
            by: [{"id": i, "cosine": float(cosine[row, i]), "distance": float(distance[row, i])} for i in ids[row]]
            for by, ids in chosen.items()
        }
        for row in range(len(prompt))
    ]


def prompt_drift(soft_prompt: Tensor, initial: Tensor) -> dict[str, Any]:
    """How far a soft prompt P has moved from its start S, both of shape `(num_virtual_tokens, hidden)`.

    Returns:
        `relative` is |P_i - S_i| / |S_i| of each virtual token, and `cosine` the cosine between P_i and S_i. `overall`
        is |P - S| / |S| of all of them together, which is logged as `prompt/drift`.
    """
    away = soft_prompt - initial
    return {
        "relative": (away.norm(dim=-1) / initial.norm(dim=-1)).tolist(),
        "cosine": nn.functional.cosine_similarity(soft_prompt, initial, dim=-1).tolist(),
        "overall": float(away.norm() / initial.norm()),
    }


def similarity(soft_prompt: Tensor) -> Tensor:
    """The cosine between each two virtual tokens, `(num_virtual_tokens, num_virtual_tokens)`."""
    unit = nn.functional.normalize(soft_prompt, dim=-1)
    return unit @ unit.T


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
) -> tuple[DataFrame, DataFrame]:
    """Compare the prompted teacher with the plain one, and with the student, at every token of some completions.

    A token's values belong to the distribution that predicts it, after all tokens before it.

    Args:
        teacher, student: Models in evaluation mode. The student may be `None`.
        soft_prompt (`Tensor` of shape `(num_virtual_tokens, hidden)`): Stands before the teacher's input.
        completion_ids: The completions, from any source. None is empty.
        ends: Ids that end a text.
        max_changes (`int`): Changed tokens to return, at most.

    Returns:
        Two `DataFrame`s. The first has a row per token:

        - `class`: its class, see [`~trl_promptkd.analysis.token_classes.token_classes`].
        - `prompted_plain`: KL(pP || p), in nats.
        - `prompted_student`: KL(pP || q), in nats, only with a student.
        - `changed`: whether the soft prompt changes the teacher's likeliest next token.

        The second has a row per changed token, the largest KL(pP || p) first:

        - `row`, `place`: which row, and which token of its completion, from 0.
        - `kl`: KL(pP || p), in nats.
        - `context`: the end of the text before it.
        - `token`: the completion's own token.
        - `prompted`, `plain`, `student`: each model's three likeliest tokens with their probabilities. The last one
            only with a student.

    Raises:
        ValueError: if a model's logits are not numbers.
    """
    passes: dict[str, tuple[PreTrainedModel, Tensor | None]]
    passes = {"prompted": (teacher, soft_prompt), "plain": (teacher, None)}
    passes |= {} if student is None else {"student": (student, None)}
    pad = int(processing_class.pad_token_id)
    rows = list(zip(prompt_ids, completion_ids, strict=True))
    kls: dict[str, list[float]] = {f"prompted_{name}": [] for name in passes if name != "prompted"}
    likeliest: list[Any] = []  # of each token: the models' three likeliest ids with their probabilities
    for start in tqdm(range(0, len(rows), batch_size), desc="Comparing", unit="batch"):
        prompts, completions = zip(*rows[start : start + batch_size], strict=True)
        for log_probs in log_probs_together(list(passes.values()), prompts, completions, pad, vocab_size):
            for values, others in zip(kls.values(), log_probs[1:], strict=True):
                values += kl_divergence(log_probs[0], others).tolist()
            likeliest += zip(*map(_top, log_probs), strict=True)
    classes = [name for row in rows for name in token_classes(*row, processing_class, ends)]
    tokens = DataFrame({"class": classes, **kls})
    tokens["changed"] = [prompted[0][0] != plain[0][0] for prompted, plain, *_ in likeliest]

    places = [(row, place) for row, (_, ids) in enumerate(rows) for place in range(len(ids))]
    changes = []
    for index in tokens[tokens.changed].nlargest(max_changes, "prompted_plain").index:
        row, place = places[index]
        prompt, answer = rows[row]
        before = [*prompt, *answer[:place]]
        context = processing_class.decode(before[-64:], skip_special_tokens=False)
        text = partial(token_text, before=before[-1], tokenizer=processing_class)
        tops = [[(text(i), share) for i, share in top] for top in likeliest[index]]
        changes.append([row, place, tokens.prompted_plain[index], context, text(answer[place]), *tops])
    return tokens, DataFrame(changes, columns=["row", "place", "kl", "context", "token", *passes])


def by_class(tokens: DataFrame) -> DataFrame:
    """Means of [`prompt_effect`]'s tokens by class that occurs, and last those of `all tokens`.

    `tokens` is their number, and `share` their part of the sum of KL(pP || p). `prompted_plain` and, with a student,
    `prompted_student` are means in nats per token.
    """
    kls = tokens.drop(columns="changed")
    kls = concat([kls, kls.assign(**{"class": "all tokens"})]).groupby("class")
    table = kls.mean()
    table.insert(0, "tokens", kls.size())
    table["share"] = kls.prompted_plain.sum() / tokens.prompted_plain.sum()
    return table.reindex([name for name in (*TOKEN_CLASSES, "all tokens") if name in table.index])


def _top(log_probs: Tensor) -> list[list[tuple[int, float]]]:
    """The three likeliest ids of each row with their probabilities."""
    values, ids = log_probs.topk(3)
    return [list(zip(*row, strict=True)) for row in zip(ids.tolist(), values.exp().tolist(), strict=True)]
