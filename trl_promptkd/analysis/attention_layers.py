"""A model's attention weights, one layer at a time: never all of them, as with `output_attentions=True`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.forward import completion_states
from ..models.side_effects import flags_restored


__all__ = ["attention_layers", "eager_attention", "model_device"]


@torch.no_grad()
def attention_layers(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, soft_prompt: Tensor | None = None
) -> list[Callable[[], Tensor]]:
    """A function for each layer, which computes that layer's attention weights.

    One forward pass keeps what goes into each attention layer, which grows with a row's length, and drops the weights, which grow with
    its square. They exist only while a caller has them.

    Args:
        model: A causal language model, plain or PEFT, in evaluation mode and with eager attention [`eager_attention`].
        input_ids, attention_mask (`Tensor` of shape `(batch, seq)`): Rows padded on either side.
        soft_prompt (`Tensor` of shape `(num_virtual_tokens, hidden)`, *optional*): Stands before each row's first token.

    Returns:
        Functions that return a `Tensor` of shape `(batch, heads, num_virtual_tokens + seq, num_virtual_tokens + seq)`: queries and keys.
        Without a soft prompt they are the columns of `input_ids`. With one, column `i` of `input_ids` is found at
        `num_virtual_tokens + i`, and the soft prompt directly before a row's first token.
    """
    size = input_ids.size(1) + (0 if soft_prompt is None else soft_prompt.size(0))
    layers: list[Callable[[], Tensor]] = []

    def keep_inputs(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if not _holds_weights(output, size):
            return None
        layers.append(partial(_weights, module, args, kwargs))
        return (output[0], None, *output[2:])  # nothing needs the weights any more

    hooks = [module.register_forward_hook(keep_inputs, with_kwargs=True) for module in model.modules()]
    # One more column of padding: `completion_states` leaves the last one out
    ids, mask = F.pad(input_ids, (0, 1)), F.pad(attention_mask, (0, 1))
    try:
        completion_states(model, ids, mask, torch.full_like(ids, -100), soft_prompt)
    finally:
        for hook in hooks:
            hook.remove()
    return layers


@torch.no_grad()
def _weights(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Tensor:
    return module(*args, **kwargs)[1]


def _holds_weights(output: Any, size: int) -> bool:
    """Whether a module's output is that of an attention layer: states, and weights `(batch, heads, size, size)`."""
    if not isinstance(output, tuple) or len(output) < 2 or not isinstance(output[1], Tensor):
        return False
    return output[1].ndim == 4 and output[1].shape[2:] == (size, size)


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """Inside, the model computes attention such that its weights exist, and is in evaluation mode."""
    before = model.config._attn_implementation
    with flags_restored(model):
        model.set_attn_implementation("eager")
        model.eval()
        try:
            yield
        finally:
            model.set_attn_implementation(before)


def model_device(model: Any) -> torch.device:
    """Where a model takes its input."""
    return model.get_input_embeddings().weight.device
