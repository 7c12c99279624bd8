"""What quantization did to a teacher, measured on the user's own rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..data import pad_rows
from ..divergences import kl_divergence
from ..models.forward import completion_states


__all__ = ["quantization_receipt"]


@torch.no_grad()
def quantization_receipt(
    full: nn.Module,
    quantized: nn.Module,
    rows: Sequence[Mapping[str, list[int]]],
    pad_token_id: int,
    batch_size: int = 4,
) -> dict[str, Any]:
    """Compare a quantized model with the one it was made from, at every token of some answers.

    Args:
        full, quantized: The two models, each on its own device.
        rows: Rows with `prompt_ids` (as the teacher sees the prompt) and `completion_ids`.
        batch_size: Rows per batch.

    Returns:
        - `num_rows`, `num_tokens`: what was compared.
        - `kl_full_quantized`, `kl_full_quantized_p95`: mean over tokens and 95th percentile of KL(full || quantized),
            in nats.
        - `top1_agreement`: share of tokens at which both models' likeliest token is the same.
        - `answer_nll_full`, `answer_nll_quantized`: mean negative log-likelihood of the answers' tokens, in nats.

    Raises:
        ValueError: if there is no row with an answer.
    """
    rows = [row for row in rows if row["completion_ids"]]
    if not rows:
        raise ValueError("A quantization receipt needs rows with answers, and there are none.")
    parts = []
    for start in tqdm(range(0, len(rows), batch_size), desc="Quantization receipt", unit="batch"):
        chunk = rows[start : start + batch_size]
        batch = pad_rows([row["prompt_ids"] for row in chunk], [row["completion_ids"] for row in chunk], pad_token_id)
        log_probs = []
        for model in (full, quantized):
            device = next(model.eval().parameters()).device
            ids, mask, labels = (batch[name].to(device) for name in ("input_ids", "attention_mask", "labels"))
            log_probs.append(completion_states(model, ids, mask, labels).logits().log_softmax(dim=-1).cpu())
        tokens = torch.tensor([token for row in chunk for token in row["completion_ids"]]).unsqueeze(-1)
        same = log_probs[0].argmax(dim=-1) == log_probs[1].argmax(dim=-1)
        losses = [-known.gather(-1, tokens).squeeze(-1) for known in log_probs]
        parts.append(torch.stack([kl_divergence(*log_probs), same.float(), *losses]))
    kl, agreement, *losses = torch.cat(parts, dim=1)
    return {
        "num_rows": len(rows),
        "num_tokens": len(kl),
        "kl_full_quantized": float(kl.mean()),
        "kl_full_quantized_p95": float(kl.quantile(0.95)),
        "top1_agreement": float(agreement.mean()),
        "answer_nll_full": float(losses[0].mean()),
        "answer_nll_quantized": float(losses[1].mean()),
    }
