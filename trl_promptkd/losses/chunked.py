"""Losses over tokens without the tokens' logits: a few tokens at a time go through the output heads and the loss.

A loss over (tokens x vocabulary) needs several tensors of that size in its forward pass and more in its backward pass: with
4,096 tokens and Qwen's vocabulary, 2.5 GB each. Here a chunk's logits exist while its share of the loss is worked out, and
its gradient with it, down to the hidden states and the head's weights; the chunk's tensors are gone before the next one's
are made. Nothing is computed again in the backward pass.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..models.forward import TokenStates


__all__ = ["StateGradient", "chunked_sums"]


_BLOCK = 1_500_000  # entries of one tensor of log-probabilities that the loss works on at once on a CPU


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
        if ctx.gradients is None:
            raise RuntimeError("The gradient of a chunked loss has been handed on already; work the loss out again.")
        pairs = zip(ctx.gradients, ctx.dtypes, strict=True)
        ctx.gradients = None
        return (
            None,
            None,
            *(None if known is None else known.mul_(factor.to(known.device)).to(dtype) for known, dtype in pairs),
        )


def chunked_sums(
    sums: Callable[..., Sequence[Tensor]], chunk_size: int | None, *parts: Any
) -> tuple[tuple[Tensor, ...], list[StateGradient]]:
    """Add up `sums(*chunks)` over chunks of tokens, and the gradient of its first value.

    Args:
        sums: Gets a chunk of every part and returns scalars, each a sum over the chunk's tokens; the first is the loss.
        chunk_size (`int`, *optional*): Tokens a chunk; `None` for all at once.
        parts: All with one entry a token: [`TokenStates`], of which `sums` gets logits `(tokens, vocab)`; tensors, which are
            sliced; objects with `logits(start, end)`; or `None`, which is passed on.

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
    totals: tuple[Tensor, ...] = ()
    for start in range(0, max(num_tokens, 1), step):
        end = min(start + step, num_tokens)
        chunk: list[Any] = []
        leaves: list[Tensor] = []
        for part in parts:
            if isinstance(part, TokenStates):
                states = part.states[start:end].detach()
                with torch.set_grad_enabled(_is_trained(part)):
                    chunk.append(part.logits(states.requires_grad_(_is_trained(part))))
                if _is_trained(part):
                    leaves.append(states)
            elif hasattr(part, "logits"):
                chunk.append(part.logits(start, end))
            else:
                chunk.append(None if part is None else part[start:end])
        trained = [_is_trained(part) for part in parts]
        values = _block_by_block(sums, chunk, trained)
        inner = [logits for logits, wanted in zip(chunk, trained, strict=True) if wanted]
        for known, leaf, logits in zip(collected, leaves, inner, strict=True):
            wanted = [leaf, *known.tensors[1:]]
            _add(known, start, torch.autograd.grad(logits, wanted, logits.detach(), allow_unused=True))
        totals = tuple(map(torch.add, totals, values)) if totals else values
    return totals, collected


def _is_trained(part: Any) -> bool:
    return torch.is_grad_enabled() and isinstance(part, TokenStates) and part.is_trained


def _block_by_block(
    sums: Callable[..., Sequence[Tensor]], chunk: list[Any], trained: list[bool]
) -> tuple[Tensor, ...]:
    """The values of a chunk; the gradient of the first with respect to the trained logits takes their place in memory.

    On a CPU, the loss of a few rows at a time stays in its caches, and its temporaries in memory that need not be asked for
    anew: five times as fast as all rows at once.
    """
    logits = next(part for part, wanted in zip(chunk, trained, strict=True) if wanted) if any(trained) else chunk[0]
    rows = max(_BLOCK // logits.size(-1), 1) if logits.device.type == "cpu" else max(len(logits), 1)
    totals: tuple[Tensor, ...] = ()
    for start in range(0, max(len(logits), 1), rows):
        block: list[Any] = [
            None if part is None else part.detach()[start : start + rows].requires_grad_(wanted)
            for part, wanted in zip(chunk, trained, strict=True)
        ]
        values = sums(*block)
        leaves = [part for part, wanted in zip(block, trained, strict=True) if wanted]
        if leaves:
            for leaf, gradient in zip(leaves, torch.autograd.grad(values[0], leaves), strict=True):
                leaf.detach().copy_(gradient)
        values = tuple(value.detach() for value in values)
        totals = tuple(map(torch.add, totals, values)) if totals else values
    return totals


def _add(known: StateGradient, start: int, found: Sequence[Tensor | None]) -> None:
    states, *parameters = found
    if states is not None:
        known.gradients[0][start : start + len(states)] = states
    for index, gradient in enumerate(parameters, start=1):
        if gradient is not None:
            total = known.gradients[index]
            known.gradients[index] = gradient.float() if total is None else total.add_(gradient)
