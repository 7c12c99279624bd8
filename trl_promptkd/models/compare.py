"""Compares the passes that losses come from with a model's own forward pass.

Trainers compute hidden states and then logits, in padded batches and after a soft prompt. A model may compute
something else there. It may ignore the attention mask, or need more than input embeddings. If rows are joined end to
end, it may not see where one ends: its state runs on, or its mask does not come from positions. `check_forward` finds
this on two short rows before training starts. The doctor makes the same comparison on the user's own rows.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..data import pad_rows
from ..divergences import kl_divergence
from .forward import completion_states, forward_logits, input_embeddings, is_sharded
from .side_effects import flags_restored


__all__ = ["Distance", "check_forward", "distance", "distances_from_own_forward", "is_exact", "is_same"]

logger = logging.get_logger(__name__)

_MAX_DIFFERENCE, _MAX_KL = 1e-3, 1e-2  # of log-probabilities (float32), and in nats per token (16 bits or quantized)
_SLACK = 5.0  # a run is stopped only if the logits are wrong beyond doubt
PADDED, WHOLE, ALONE = "of the loss, padded", "of whole rows, padded", "of the loss, row by row"
PADDING_FREE = "of the loss, padding-free"


class Distance(NamedTuple):
    """How far two sets of logits `(num_tokens, vocab)` are apart."""

    log_probs: float  # the largest difference of log-probabilities
    kl: float  # the mean KL divergence, in nats per token


def is_exact(model: Any) -> bool:
    """Whether two ways to compute the same value may differ only by rounding in float32."""
    return model.dtype == torch.float32 and getattr(model, "quantization_method", None) is None


def distance(logits: Tensor, others: Tensor) -> Distance:
    """The distance between two sets of logits. Log-probabilities below -100 count as -100."""
    a, b = (part.float().log_softmax(dim=-1).clamp(min=-100.0) for part in (others, logits))
    return Distance(float((a - b).abs().max()), float(kl_divergence(a, b).mean()))


def is_same(found: Distance, exact: bool, slack: float = 1.0) -> bool:
    """Whether the distance is no more than rounding. NaN is more.

    Args:
        exact: Whether everything was computed in float32.
        slack: How many times the usual limit is allowed.
    """
    return found.log_probs <= slack * _MAX_DIFFERENCE if exact else found.kl <= slack * _MAX_KL


@torch.no_grad()
def distances_from_own_forward(
    model: Any,
    rows: Sequence[Mapping[str, list[int]]],
    pad_token_id: int,
    soft_prompt: Tensor | None = None,
    vocab_size: int | None = None,
    own: Tensor | None = None,
    padding_free: bool = False,
) -> dict[str, Distance]:
    """How far the logits at the rows' completions are from those of the model's own forward pass on each row alone.

    Args:
        model: In evaluation mode, not wrapped.
        rows: Each with `prompt_ids` and `completion_ids`.
        soft_prompt (`Tensor` of shape `(num_virtual_tokens, hidden)`, *optional*): Comes before each row.
        vocab_size (`int`, *optional*): Only the first `vocab_size` logits are compared.
        own: The model's own logits, if they are known already.
        padding_free: Whether to compare the rows joined end to end, too.

    Returns:
        `dict` of distances, for the loss's pass on a padded batch, for the pass over whole rows of that batch, and for
        the loss's pass row by row. With `padding_free`, also for the loss's pass on the rows end to end.
    """
    own = _own_logits(model, rows, soft_prompt, vocab_size) if own is None else own

    def batch(rows: Sequence[Mapping[str, list[int]]], more: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, mask and labels, with `more` columns of padding on both sides."""
        padded = pad_rows([row["prompt_ids"] for row in rows], [row["completion_ids"] for row in rows], pad_token_id)
        fill = {"input_ids": pad_token_id, "attention_mask": 0, "labels": -100}
        ids, mask, labels = (nn.functional.pad(padded[name], more, value=fill[name]).to(model.device) for name in fill)
        return ids, mask, labels

    alone = [completion_states(model, *batch([row], (0, 0)), soft_prompt, vocab_size).logits() for row in rows]
    ids, mask, labels = batch(rows, (7, 3))
    padded = completion_states(model, ids, mask, labels, soft_prompt, vocab_size).logits()
    whole = forward_logits(model, ids, mask, soft_prompt)[:, :-1][labels[:, 1:] != -100][:, :vocab_size]
    found = {ALONE: distance(torch.cat(alone), own), PADDED: distance(padded, own), WHOLE: distance(whole, own)}
    if padding_free:
        joined = completion_states(model, ids, mask, labels, None, vocab_size, padding_free=True).logits()
        found[PADDING_FREE] = distance(joined, own)
    return found


def _own_logits(
    model: Any, rows: Sequence[Mapping[str, list[int]]], soft_prompt: Tensor | None, vocab_size: int | None
) -> Tensor:
    """The model's own logits at the completions of rows, each alone, from its ids only."""
    parts = []
    for row in rows:
        ids = torch.tensor([[*row["prompt_ids"], *row["completion_ids"]]], device=model.device)
        if soft_prompt is None:
            logits = model(input_ids=ids, use_cache=False).logits
        else:
            embeds = input_embeddings(model)(ids)
            embeds = torch.cat([soft_prompt.to(embeds).unsqueeze(0), embeds], dim=1)
            logits = model(inputs_embeds=embeds, use_cache=False).logits
        parts.append(logits[0, -len(row["completion_ids"]) - 1 : -1, :vocab_size].float())
    return torch.cat(parts)


@torch.no_grad()
def check_forward(
    role: str,
    model: Any,
    processing_class: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    soft_prompt: Tensor | None = None,
    vocab_size: int | None = None,
    padding_free: bool = False,
) -> None:
    """Stop before training if losses would be taken from logits that are not the model's.

    Two short rows of ordinary tokens are compared, in evaluation mode. Nothing is compared if weights are sharded or
    not on their device yet. `trl-promptkd doctor` can check such models.

    Args:
        role: `"student"`, `"teacher"` or `"prompted teacher"`, for messages.
        soft_prompt, vocab_size, padding_free: As for [`distances_from_own_forward`].
    """
    devices = {parameter.device.type for parameter in model.parameters()}
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    name = f"{role} ({type(base).__name__})"
    if is_sharded(model) or devices != {accelerator.device.type}:
        if padding_free:
            logger.warning(
                f"`padding_free` is True, but whether the {name} keeps rows apart was not measured, as its weights "
                "are sharded or not on their device yet. Run `trl-promptkd doctor` with `padding_free: true` once."
            )
        return
    rows = _probe_rows(processing_class, vocab_size)
    own = None
    with flags_restored(model), accelerator.autocast():
        model.eval()
        try:
            own = _own_logits(model, rows, soft_prompt, vocab_size)
            pad_token_id = processing_class.pad_token_id or 0
            settings = (pad_token_id, soft_prompt, vocab_size, own, padding_free)
            found = distances_from_own_forward(model, rows, *settings)
        except Exception as error:  # a model's code may raise anything
            if own is None and soft_prompt is None:
                return  # the model cannot run at all. The first step raises its own error
            needs = " A soft prompt needs a model that computes everything from `inputs_embeds`."
            raise ValueError(
                f"The {name} cannot be run as the loss needs it: {type(error).__name__}: {str(error)[:300]}."
                f"{'' if soft_prompt is None else needs} Choose another model"
                f"{', or set `padding_free=False`' if padding_free else ''}."
            ) from error
    if not torch.isfinite(own).all():
        return  # the check of the first step's loss names what is not finite
    exact = is_exact(model) and accelerator.mixed_precision == "no"
    for way, off in found.items():
        if is_same(off, exact, _SLACK):
            continue
        about = f"{off.log_probs:.2g} in log-probabilities, {off.kl:.2g} nats per token"
        if way == ALONE:
            raise ValueError(
                f"The logits of the {name} are not its output head applied to its last hidden state: they are off by "
                f"{about}. Losses would be wrong. Choose another model, or use transformers' own class for this one."
            )
        if way == PADDING_FREE:
            raise ValueError(
                f"The {name} gives rows that stand end to end in one sequence other logits than each row alone: they "
                f"are off by {about}. It does not see that positions start again, so each row would depend on the "
                "rows before it. Set `padding_free=False`, or choose a model or an attention implementation that "
                "keeps such rows apart."
            )
        raise ValueError(
            f"The {name} gives a padded row other logits than the row alone: they are off by {about}. Its forward "
            "pass ignores the attention mask or the positions, so losses and samples would depend on the padding. "
            "Choose a model whose forward pass uses both, or use transformers' own class for this one."
        )


def _probe_rows(processing_class: PreTrainedTokenizerBase, vocab_size: int | None) -> list[dict[str, list[int]]]:
    """Two rows of different lengths, of ordinary tokens from all over the vocabulary."""
    special = {index for index, token in processing_class.added_tokens_decoder.items() if token.special}
    known = sorted(set(processing_class.get_vocab().values()) - special)
    known = [index for index in known if vocab_size is None or index < vocab_size]
    ids = [known[index * (len(known) - 1) // 14] for index in range(15)]
    return [
        {"prompt_ids": ids[:6], "completion_ids": ids[6:10]},
        {"prompt_ids": ids[10:12], "completion_ids": ids[12:]},
    ]
