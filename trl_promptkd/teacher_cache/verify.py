"""Compares rows of a cache with the live teacher."""

from typing import Any

import torch

from ..data import pad_rows
from ..divergences import kl_divergence
from ..generation.teacher_answers import weights_fingerprint
from ..models.forward import completion_states
from ..models.teacher import freeze
from .reader import TeacherCache


__all__ = ["verify_teacher_cache"]


@torch.no_grad()
def verify_teacher_cache(cache: TeacherCache, teacher: Any, num_rows: int = 16) -> dict[str, Any]:
    """Run the teacher again on some rows, spread over the cache, and compare.

    Args:
        cache ([`TeacherCache`]): The cache. Its checksums were compared when it was opened.
        teacher ([`~transformers.PreTrainedModel`]): The teacher it was made with, or one to compare with.
        num_rows (`int`, *optional*, defaults to `16`): Number of rows to compare.

    Returns:
        A `dict`:

        - `rows`, `tokens`: how many were compared.
        - `same_weights`: whether the teacher's fingerprint is the manifest's. For a cache that was built with vLLM, it
            is the fingerprint of the output head.
        - `kl_mean`, `kl_max`: mean and maximum over rows of KL(teacher || kept), in nats per token.
        - `worst_row`: the index of the row with the maximum.
        - `covered_mass`: only for the preset `tiny`, instead of the KL. The teacher's probability of the drawn tokens,
            averaged over tokens and then over rows.

    Raises:
        ValueError: if the teacher has another vocabulary than the cache.
    """
    freeze(teacher)
    device = next(teacher.parameters()).device
    cache.to(device)
    chosen = torch.linspace(0, len(cache) - 1, min(num_rows, len(cache))).long().tolist()
    values, tokens = [], 0
    for index in chosen:
        row = cache.rows[index]
        batch = pad_rows([row["teacher_prompt_ids"]], [row["completion_ids"]], 0)
        ids, mask, labels = (batch[name].to(device) for name in ("input_ids", "attention_mask", "labels"))
        states = completion_states(teacher, ids, mask, labels, vocab_size=cache.manifest.vocab_size)
        live = states.logits().log_softmax(dim=-1)
        kept = cache.log_probs([index])
        if live.shape != kept.shape:
            raise ValueError(
                f"The cache's distributions have {kept.size(-1)} entries and the teacher's {live.size(-1)}: it is "
                "another model. Pass the one that the cache was made with."
            )
        value = (live.exp() * (kept > -1e3)).sum(dim=-1) if cache.preset.draws else kl_divergence(live, kept)
        values.append(value.mean())
        tokens += len(value)
    means = torch.stack(values)
    made = cache.manifest.teacher
    known = teacher.get_output_embeddings() if "backend" in made else teacher  # all that was known of it there
    result = {
        "rows": len(chosen),
        "tokens": tokens,
        "same_weights": made["weights"] == weights_fingerprint(known),
    }
    if cache.preset.draws:
        return {**result, "covered_mass": float(means.mean())}
    found = {"kl_mean": float(means.mean()), "kl_max": float(means.max()), "worst_row": chosen[int(means.argmax())]}
    return result | found
