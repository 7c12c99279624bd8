"""A model's attention weights, one layer at a time: never all of them, as with `output_attentions=True`."""

import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from queue import Queue
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.forward import completion_states
from ..models.side_effects import flags_restored


__all__ = ["attention_layers", "eager_attention", "model_device"]


def attention_layers(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, soft_prompt: Tensor | None = None
) -> Generator[Tensor, None, None]:
    """The attention weights of one layer after the other; in between, the forward pass stands still and keeps none of them.

    It runs in a thread of its own, which waits inside a hook while the caller has the weights. Only one of the two runs at a time.

    Args:
        model: A causal language model, plain or PEFT, in evaluation mode and with eager attention [`eager_attention`].
        input_ids, attention_mask (`Tensor` of shape `(batch, seq)`): Rows padded on either side.
        soft_prompt (`Tensor` of shape `(num_virtual_tokens, hidden)`, *optional*): Stands before each row's first token.

    Yields:
        `Tensor` of shape `(batch, heads, num_virtual_tokens + seq, num_virtual_tokens + seq)`: queries and keys. Without a soft
        prompt they are the columns of `input_ids`; with one, column `i` of `input_ids` is found at `num_virtual_tokens + i`, and the soft
        prompt directly before a row's first token.
    """
    size = input_ids.size(1) + (0 if soft_prompt is None else soft_prompt.size(0))
    layers: Queue[Any] = Queue()  # a layer's weights; at last an error, or None at the end
    go_on, stopped = threading.Semaphore(0), threading.Event()

    def hand_over(module: nn.Module, args: Any, output: Any) -> Any:
        if threading.current_thread() is not thread or not _holds_weights(output, size):
            return None  # the same model may be asked by others, with and without a soft prompt
        layers.put(output[1])
        go_on.acquire()
        if stopped.is_set():
            raise _StoppedError
        return (output[0], None, *output[2:])  # the layer needs them no more, and must not keep them

    def ask() -> None:
        # One more column of padding: `completion_states` does not ask for the last one
        ids, mask = F.pad(input_ids, (0, 1)), F.pad(attention_mask, (0, 1))
        try:
            with torch.no_grad():
                completion_states(model, ids, mask, torch.full_like(ids, -100), soft_prompt)
            layers.put(None)
        except _StoppedError:
            pass
        except Exception as error:
            layers.put(error)

    hooks = [module.register_forward_hook(hand_over) for module in model.modules()]
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    try:
        while (weights := layers.get()) is not None:
            if isinstance(weights, Exception):
                raise weights
            yield weights
            del weights
            go_on.release()
    finally:
        stopped.set()
        go_on.release()
        thread.join()
        for hook in hooks:
            hook.remove()


class _StoppedError(Exception):
    """Ends a forward pass that nobody waits for."""


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
