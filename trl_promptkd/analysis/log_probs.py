"""Log-probabilities of several models at the same tokens of the same completions."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data import pad_rows
from ..divergences import on_shared_support
from ..models.forward import completion_states


__all__ = ["log_probs_together"]

_TOKENS = 256  # whose distributions exist at once


@torch.no_grad()
def log_probs_together(
    models: Sequence[tuple[nn.Module, Tensor | None]],
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    pad_token_id: int,
    vocab_size: int | None = None,
) -> Iterator[tuple[Tensor, ...]]:
    """The log-probabilities that each model gives to the next token, at every token of some completions.

    Args:
        models: Models in evaluation mode, each with a soft prompt of shape `(num_virtual_tokens, hidden)` before its
            input, or `None`.
        prompt_ids, completion_ids: Rows that go through the models at once. No prompt is empty.
        vocab_size (`int`, *optional*): Distributions are over the first `vocab_size` ids.

    Yields:
        For each model a `Tensor` of shape `(num_tokens, vocab)`, in float32, on the first model's device. Each tuple
        covers some tokens, in the order of the rows and of the tokens in them. Tokens that one of the models rules out
        are ruled out for all ([`on_shared_support`]).
    """
    batch = pad_rows(prompt_ids, completion_ids, pad_token_id)
    known: list[Any] = []
    for model, soft_prompt in models:
        device = model.get_input_embeddings().weight.device  # type: ignore[operator, union-attr]
        ids, mask, labels = (batch[name].to(device) for name in ("input_ids", "attention_mask", "labels"))
        known.append(completion_states(model, ids, mask, labels, soft_prompt, vocab_size))
    for start in range(0, len(known[0]), _TOKENS):
        logits = [part.logits(start, start + _TOKENS) for part in known]
        logits = [part.to(logits[0].device) for part in logits]
        log_probs = tuple(part.log_softmax(dim=-1) for part in on_shared_support(*logits))
        for (model, _), part in zip(models, log_probs, strict=True):
            if part[:, 0].isnan().any():  # one of them in a row makes all of it so
                raise ValueError(
                    f"The logits of {model.name_or_path or type(model).__name__} hold NaN or infinities. Check its "
                    "weights; load it in bfloat16 or float32 if it is in float16."
                )
        yield log_probs
