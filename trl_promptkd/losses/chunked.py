"""Losses that are computed a few tokens at a time, so that the logits of all tokens never exist at once.

A loss over (tokens x vocabulary) needs several tensors of that size in its forward pass, and more in its backward
pass. With 4,096 tokens and Qwen's vocabulary, each takes 2.5 GB. Here one chunk of tokens at a time goes through the
output heads and the loss. Its share of the gradient is computed at once, down to the hidden states and the head's
weights. Its logits are gone before the next chunk's are made. The backward pass recomputes nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..models.forward import TokenStates


__all__ = ["StateGradient", "chunked_sums"]


Sums = TypeVar("Sums", bound=tuple)

_BLOCK = 1_500_000  # entries of one tensor of log-probabilities that the loss works on at once on a CPU


class StateGradient(NamedTuple):
    """The gradient of a loss with respect to a model's hidden states and its head's trainable parameters."""

    tensors: list[Tensor]
    """The hidden states `(num_tokens, hidden)` with their graph, then the parameters."""
    gradients: list[Any]
    """One for each tensor, in float32. `None` for a parameter that the loss does not depend on."""

    def attach(self, value: Tensor) -> Tensor:
        """A scalar equal to `value`, whose backward pass hands this gradient on to the tensors."""
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
    sums: Callable[..., Sums], chunk_size: int | None, *parts: Any, **settings: Any
) -> tuple[Sums, list[StateGradient]]:
    """Add up `sums(*chunks, **settings)` over chunks of tokens, and the gradient of its first value.

    Args:
        sums: Gets a chunk of every part and returns a tuple of scalars, each a sum over the chunk's tokens, or `None`.
            The first one is the loss.
        chunk_size (`int`, *optional*): Tokens per chunk. `None`: all at once.
        parts: Each has one entry per token, or is `None`. Tensors are sliced, and `None` is passed on. Any other part
            is a model's output with `logits(start, end)`, of which `sums` gets logits `(tokens, vocab)`.
        settings: Passed on to `sums`.

    Returns:
        The tuple of sums, detached, and a list of the loss's gradients. The list has an entry for each [`TokenStates`]
        with a gradient path, in their order. It is empty if gradients are not enabled.
    """
    num_tokens = next(len(part) for part in parts if part is not None)
    step = chunk_size or max(num_tokens, 1)
    trained = [_is_trained(part) for part in parts]
    gradients = [_no_gradient_yet(part) for part, wanted in zip(parts, trained, strict=True) if wanted]
    totals = None
    for start in range(0, max(num_tokens, 1), step):
        end = min(start + step, num_tokens)
        chunk: list[Any] = []
        leaves: list[Tensor] = []
        for part, wanted in zip(parts, trained, strict=True):
            if wanted:
                leaves.append(part.hidden_states[start:end].detach().requires_grad_())
                chunk.append(part.head(leaves[-1]))
            elif part is None or isinstance(part, Tensor):
                chunk.append(None if part is None else part[start:end])
            else:
                with torch.no_grad():
                    chunk.append(part.logits(start, end))
        values = _block_by_block(sums, chunk, trained, settings)
        outputs = [logits for logits, wanted in zip(chunk, trained, strict=True) if wanted]
        for known, leaf, logits in zip(gradients, leaves, outputs, strict=True):
            wanted_of = [leaf, *known.tensors[1:]]
            _add(known, start, torch.autograd.grad(logits, wanted_of, logits.detach(), allow_unused=True))
        totals = values if totals is None else _each(torch.add, totals, values)
    return totals, gradients  # type: ignore[return-value]  # there is at least one chunk


def _each(function: Callable[..., Tensor], *tuples: Any) -> Any:
    """`function` of the entries at each place, as a tuple of the first tuple's type. `None` stays `None`."""
    entries = zip(*tuples, strict=True)
    return tuple.__new__(type(tuples[0]), (None if entry[0] is None else function(*entry) for entry in entries))


def _no_gradient_yet(part: TokenStates) -> StateGradient:
    tensors = [part.hidden_states, *part.head_parameters()]
    of_states = torch.zeros_like(part.hidden_states, dtype=torch.float32)
    return StateGradient(tensors, [of_states, *[None] * (len(tensors) - 1)])


def _is_trained(part: Any) -> bool:
    return torch.is_grad_enabled() and isinstance(part, TokenStates) and part.is_trained


def _block_by_block(sums: Callable[..., Sums], chunk: list[Any], trained: list[bool], settings: dict) -> Sums:
    """The sums of a chunk. The gradient of the first sum overwrites the trained logits in memory.

    A CPU works on a few rows at a time. They stay in its caches, and temporary tensors reuse memory that it has
    already. That is five times as fast as all rows at once.
    """
    logits = next(part for part, wanted in zip(chunk, trained, strict=True) if wanted) if any(trained) else chunk[0]
    rows = max(_BLOCK // logits.size(-1), 1) if logits.device.type == "cpu" else max(len(logits), 1)
    totals = None
    for start in range(0, max(len(logits), 1), rows):
        block: list[Any] = [
            None if part is None else part.detach()[start : start + rows].requires_grad_(wanted)
            for part, wanted in zip(chunk, trained, strict=True)
        ]
        values = sums(*block, **settings)
        leaves = [part for part, wanted in zip(block, trained, strict=True) if wanted]
        if leaves:
            for leaf, gradient in zip(leaves, torch.autograd.grad(values[0], leaves), strict=True):
                leaf.detach().copy_(gradient)
        values = _each(Tensor.detach, values)
        totals = values if totals is None else _each(torch.add, totals, values)
    return totals  # type: ignore[return-value]  # there is at least one block


def _add(known: StateGradient, start: int, found: Sequence[Tensor | None]) -> None:
    states, *parameters = found
    if states is not None:
        known.gradients[0][start : start + len(states)] = states
    for index, gradient in enumerate(parameters, start=1):
        if gradient is not None:
            total = known.gradients[index]
            known.gradients[index] = gradient.float() if total is None else total.add_(gradient)
