"""Losses over tokens without the tokens' logits: a few tokens at a time go through the output heads and the loss.

A loss over (tokens x vocabulary) needs several tensors of that size in its forward pass and more in its backward pass: with
4,096 tokens and Qwen's vocabulary, 2.5 GB each. Here a chunk's logits exist while its share of the loss is worked out, and
its gradient with it, down to the hidden states and the head's weights; the chunk's tensors are gone before the next one's
are made. Nothing is computed twice.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .forward import TokenStates


__all__ = ["StateGradient", "chunked_sums"]


class StateGradient(NamedTuple):
    """The gradient of a loss with respect to a model's hidden states and its head's trainable parameters."""

    tensors: list[Tensor]
    """`states` `(num_tokens, hidden)` first, with the graph behind them; then the parameters."""
    gradients: list[Any]
    """In float32; `None` for a parameter that plays no part."""

    def attach(self, value: Tensor) -> Tensor:
        """A scalar that is `value` and whose backward pass carries this gradient on."""
        return _Attached.apply(value.detach(), self.gradients, *self.tensors)  # type: ignore[no-any-return]


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Any], *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        pairs = zip(ctx.gradients, ctx.dtypes, strict=True)
        return (None, None, *(None if known is None else (known * factor).to(dtype) for known, dtype in pairs))


def chunked_sums(
    sums: Callable[..., Sequence[Tensor]], chunk_size: int | None, *parts: Any
) -> tuple[tuple[Tensor, ...], list[StateGradient]]:
    """Add up `sums(*chunks)` over chunks of tokens, and the gradient of its first value.

    Args:
        sums: Gets a chunk of every part and returns scalars, each a sum over the chunk's tokens; the first is the loss.
        chunk_size (`int`, *optional*): Tokens a chunk; `None` for all at once.
        parts: All with one entry a token: [`TokenStates`], of which `sums` gets logits `(tokens, vocab)`; tensors, which are
            sliced; objects with `logits_of(start, end)`; or `None`, which is passed on.

    Returns:
        The scalars, detached, and for each [`TokenStates`] whose states have a gradient path, in their order, the gradient of the first
        scalar. Without gradients enabled there are none.
    """
    num_tokens = next(len(part) for part in parts if part is not None)
    step = chunk_size or max(num_tokens, 1)
    collected = []
    for part in filter(_is_trained, parts):
        tensors = [part.states, *part.head_parameters()]
        zeros = torch.zeros_like(part.states, dtype=torch.float32)
        collected.append(StateGradient(tensors, [zeros, *[None] * (len(tensors) - 1)]))
    totals: list[Tensor] = []
    for start in range(0, max(num_tokens, 1), step):
        chunk: list[Any] = []
        leaves: list[Tensor] = []
        for part in parts:
            if isinstance(part, TokenStates):
                states = part.states[start : start + step].detach()
                if _is_trained(part):
                    leaves.append(states.requires_grad_(True))
                    chunk.append(part.logits(states))
                else:
                    with torch.no_grad():
                        chunk.append(part.logits(states))
            elif hasattr(part, "logits_of"):
                chunk.append(part.logits_of(start, min(start + step, num_tokens)))
            else:
                chunk.append(None if part is None else part[start : start + step])
        values = sums(*chunk)
        if collected:
            wanted = [[leaf, *known.tensors[1:]] for leaf, known in zip(leaves, collected, strict=True)]
            found = iter(torch.autograd.grad(values[0], list(chain(*wanted)), allow_unused=True))
            for known in collected:
                _add(known, start, [next(found) for _ in known.tensors])
        values = [value.detach() for value in values]
        totals = values if not totals else [total + value for total, value in zip(totals, values, strict=True)]
    return tuple(totals), collected


def _is_trained(part: Any) -> bool:
    return torch.is_grad_enabled() and isinstance(part, TokenStates) and part.is_trained


def _add(known: StateGradient, start: int, found: list[Tensor | None]) -> None:
    states, *parameters = found
    if states is not None:
        known.gradients[0][start : start + len(states)] = states
    for index, gradient in enumerate(parameters, start=1):
        if gradient is not None:
            total = known.gradients[index]
            known.gradients[index] = gradient.float() if total is None else total.add_(gradient)
