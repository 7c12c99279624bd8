"""Running a model, teacher or student, with or without a soft prompt.

`forward_logits` gives the logits of every position; `completion_states` gives the hidden states at the trained tokens,
and makes logits of them a few at a time: no tensor of (tokens x vocabulary) need exist. Positions are counted
from the attention mask, and a soft prompt stands directly before a row's first token, so padding on either side
changes nothing: for rotary, learned and sliding-window positions alike.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from accelerate.utils import extract_model_from_parallel
from jaxtyping import Float, Int, Shaped
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPast


__all__ = [
    "TokenLogits",
    "TokenStates",
    "below_the_head",
    "completion_states",
    "forward_logits",
    "input_embeddings",
    "inside_forward",
    "is_sharded",
    "prompted_embeddings",
    "whole_weights",
    "without_router_logits",
]


def input_embeddings(model: Any) -> nn.Module:
    """The module that turns token ids into the model's input embeddings.

    Raises:
        ValueError: if the model has none: a soft prompt has nothing to stand beside.
    """
    try:
        embeddings = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        embeddings = None
    if embeddings is None:
        raise ValueError(
            f"The teacher ({type(model).__name__}) has no input embeddings, so a soft prompt cannot be put "
            "before its input. `teacher_model.get_input_embeddings()` must return a module that embeds token ids."
        )
    return embeddings


def is_sharded(model: nn.Module) -> bool:
    """Whether every rank holds a part of the weights only (FSDP2, ZeRO-3), so that all ranks must run the model
    together."""
    return any(isinstance(module, FSDPModule) for module in model.modules()) or any(
        hasattr(parameter, "ds_id") for parameter in model.parameters()
    )


@contextmanager
def whole_weights(module: nn.Module) -> Iterator[None]:
    """Inside, the module's weights are whole on every rank, even if ZeRO-3 has loaded them in parts."""
    parts = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_id")]
    if not parts:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parts):
        yield


def inside_forward(model: nn.Module, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`function(bare model, *args, **kwargs)`, called inside the forward pass of `model` as it is wrapped.

    DDP then prepares gradients for whatever `function` computes with the bare model, although that is not the model's
    own forward. FSDP and DeepSpeed have the weights ready.

    Returns:
        What `function` returns. Tensors, or a tuple of them, are as exact as they were: in mixed precision, FSDP2
        casts what comes out of a forward pass.
    """
    bare = extract_model_from_parallel(model)
    own = bare.__dict__.get("forward")  # the instance's, if accelerate or TRL has replaced the class's

    def restore() -> None:
        if own is None:
            bare.__dict__.pop("forward", None)
        else:
            bare.forward = own

    exact: list[Any] = []

    def redirected() -> Any:
        restore()  # `function` may want the real one
        exact.append(function(bare, *args, **kwargs))
        return exact[0]

    bare.forward = redirected
    try:
        return _as_exact(model(), exact[0])
    finally:
        restore()


def _as_exact(wrapped: Any, exact: Any) -> Any:
    """The values of `exact`, with the way back for gradients that `wrapped` has."""
    if isinstance(exact, tuple):
        parts = list(map(_as_exact, wrapped, exact))
        return type(exact)(*parts) if hasattr(exact, "_fields") else tuple(parts)
    if isinstance(exact, Tensor) and wrapped.requires_grad and wrapped is not exact:
        return exact.detach() + (wrapped - wrapped.detach()).to(exact.dtype)
    return exact


def forward_logits(
    model: nn.Module,
    input_ids: Int[Tensor, "batch seq"],
    attention_mask: Shaped[Tensor, "batch seq"],
    soft_prompt: Float[Tensor, "virtual hidden"] | None = None,
) -> Float[Tensor, "batch seq vocab"]:
    """Next-token logits at all positions, equal to those of every row alone, without padding.

    Args:
        model: A causal language model, plain, PEFT or wrapped for data parallelism.
        input_ids (`Tensor` of shape `(batch, seq)`): Rows padded on the left, on the right or on both sides.
        attention_mask (`Tensor` of shape `(batch, seq)`): 1 for tokens, 0 for padding; the ones of a row are
            contiguous.
        soft_prompt (`Tensor` of shape `(num_virtual_tokens, hidden)`, *optional*): Stands directly before the first
            token of each row. It is cast to the dtype of the model's embeddings; its gradient flows back in its own
            dtype.

    Returns:
        `Tensor` of shape `(batch, seq, vocab)` in the model's dtype: entry `i` follows `input_ids[:, i]`, with or
        without a soft prompt. Entries at padding mean nothing.
    """
    bare = extract_model_from_parallel(model)
    inputs = _inputs(bare, _base(bare), input_ids, attention_mask, soft_prompt)
    return model(**inputs).logits[:, -input_ids.size(1) :]


class TokenLogits(Protocol):
    """What a teacher says at some tokens. It may run ([`TokenStates`]) or be read from a cache."""

    def __len__(self) -> int: ...

    def logits(self, start: int, end: int) -> Float[Tensor, "tokens vocab"]:
        """Logits or log-probabilities `(end - start, vocab)` in float32."""

    def entropies(self) -> Float[Tensor, "tokens"] | None:
        """If the logits are those of draws from a distribution: its entropies `(num_tokens,)` in nats."""


@dataclass
class TokenStates:
    """
    What a model knows at some tokens, before its output head, and the way from there to its logits.

    Args:
        hidden_states (`Tensor` of shape `(num_tokens, hidden)`): Of the model's decoder, in its dtype.
        model: The bare model that they come from.
        vocab_size (`int`, *optional*): Only the first `vocab_size` logits count, if vocabularies are padded
            differently.
        are_logits (`bool`): `hidden_states` are logits `(num_tokens, vocab)`; see [`~TokenStates.with_logits`].
    """

    hidden_states: Tensor
    model: nn.Module
    vocab_size: int | None = None
    detached: bool = False
    are_logits: bool = False

    def __len__(self) -> int:
        return len(self.hidden_states)

    def logits(self, start: int = 0, end: int | None = None) -> Float[Tensor, "tokens vocab"]:
        """Logits `(end - start, vocab)` of some tokens in float32, by default of all of them."""
        return self.head(self.hidden_states[start:end])

    def head(self, states: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens vocab"]:
        """Logits `(num_tokens, vocab)` in float32 of some hidden states.

        They are what the model's own forward makes of them: its bias, scaling, soft-capping, quantized weights and
        adapters are all in them.
        """
        if self.are_logits:
            return states[:, : self.vocab_size].to(torch.float32, copy=True)
        return self._run_head(states)[:, : self.vocab_size].float().to(self.hidden_states.device)

    def with_logits(self) -> "TokenStates":
        """The same with the logits of all tokens in place of the states.

        For the head of a sharded model, whose weights are there once in a forward pass: to ask it for a few tokens at
        a time, or to take its gradient before the backward pass, would get the wrapper out of step.
        """
        return replace(self, hidden_states=self._run_head(self.hidden_states), are_logits=True)

    def _run_head(self, states: Tensor) -> Tensor:
        base = _base(self.model)
        with _decoder_replaced(base, states):
            ids = torch.zeros(1, 1, dtype=torch.long, device=states.device)
            router = without_router_logits(base)
            return type(base).forward(base, input_ids=ids, use_cache=False, **router).logits[0]

    def entropies(self) -> None:
        """None: the logits are the model's own."""

    def __getitem__(self, tokens: slice) -> "TokenStates":
        """Of some tokens only."""
        return replace(self, hidden_states=self.hidden_states[tokens])

    def detach(self) -> "TokenStates":
        """The same, through which no gradient flows: neither to the states nor to the head."""
        return replace(self, hidden_states=self.hidden_states.detach(), detached=True)

    @property
    def is_trained(self) -> bool:
        return not self.detached and (self.hidden_states.requires_grad or bool(self.head_parameters()))

    def head_parameters(self) -> list[nn.Parameter]:
        """The trainable parameters that turn states into logits: those outside the decoder, and a head tied to its
        inside."""
        if self.are_logits:
            return []
        base = _base(self.model)
        inside = {id(p) for module in below_the_head(base) for p in module.parameters()}
        head = set(map(id, base.get_output_embeddings().parameters()))
        return [p for p in base.parameters() if p.requires_grad and (id(p) not in inside or id(p) in head)]


def completion_states(
    model: nn.Module,
    input_ids: Int[Tensor, "batch seq"],
    attention_mask: Shaped[Tensor, "batch seq"],
    labels: Int[Tensor, "batch seq"],
    soft_prompt: Float[Tensor, "virtual hidden"] | None = None,
    vocab_size: int | None = None,
) -> TokenStates:
    """The states that predict the trained tokens, and no others.

    Args:
        model: A causal language model, plain or PEFT; of one that is trained, the bare model [`inside_forward`].
        input_ids, attention_mask, soft_prompt: As for [`forward_logits`].
        labels (`Tensor` of shape `(batch, seq)`): -100 where a token is not trained on. A label in column 0 has
            nothing before it and is left out.
        vocab_size (`int`, *optional*): See [`TokenStates`].

    Returns:
        [`TokenStates`] in the order of `labels[:, 1:] != -100`; with logits already if the model is sharded.
    """
    decoder = _decoder(_base(model))
    trained = labels[:, 1:] != -100  # (batch, seq - 1)
    width = max(input_ids.size(1) - 1, 1)  # what follows the last token is not needed
    inputs = _inputs(model, decoder, input_ids[:, :width], attention_mask[:, :width], soft_prompt)
    output = decoder(**inputs)
    states = output.last_hidden_state[:, -width:].to(input_ids.device)
    known = TokenStates(states[:, : trained.size(1)][trained], model, vocab_size)
    return known.with_logits() if is_sharded(model) else known


def _base(model: nn.Module) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _inputs(
    bare: nn.Module, module: nn.Module, input_ids: Tensor, attention_mask: Tensor, soft_prompt: Tensor | None
) -> dict[str, Any]:
    """Arguments for the forward of `module`, which is the whole model or its decoder."""
    inputs: dict[str, Any] = {"use_cache": False}
    if soft_prompt is None:
        inputs["input_ids"] = input_ids
    else:
        inputs["inputs_embeds"], attention_mask = prompted_embeddings(bare, input_ids, attention_mask, soft_prompt)
    inputs["attention_mask"] = attention_mask
    # The class's signature: wrappers may hide it. BLOOM and MPT have no positions and count from the mask themselves.
    if "position_ids" in inspect.signature(type(module).forward).parameters:
        inputs["position_ids"] = (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)
    return inputs | without_router_logits(module)


def without_router_logits(model: nn.Module) -> dict[str, bool]:
    """The argument that keeps a mixture of experts from its load-balancing loss; none for other models.

    Some checkpoints ask for router logits in their configuration. The loss made of them fails in a padded batch that
    is generated.
    """
    known = inspect.signature(type(_base(model)).forward).parameters
    return {"output_router_logits": False} if "output_router_logits" in known else {}


def _decoder(base: Any) -> Any:
    """The module that makes the hidden states which the output head turns into logits.

    It is what `get_decoder` names. Some models name themselves (Llama 4) or their head (ModernBERT) there.

    Raises:
        ValueError: if the model has no such module.
    """
    head = base.get_output_embeddings()
    for module in (base.get_decoder(), base.base_model, getattr(base, "model", None)):
        if isinstance(module, nn.Module) and module is not base and module is not head:
            return module
    raise ValueError(
        f"{type(base).__name__} has no decoder apart from its output head, so its logits cannot be computed a few "
        "tokens at a time. `get_decoder()` must return the module whose hidden states `forward` turns into logits. "
        "Choose another model."
    )


def below_the_head(base: Any) -> list[nn.Module]:
    """The decoder, and the model around it where that is not `base` itself: in a multimodal model, what embeds text
    and images."""
    decoder, around = _decoder(base), base.base_model
    is_around = around is not base and around is not decoder and any(module is decoder for module in around.modules())
    return [decoder, around] if is_around else [decoder]


@dataclass
class _StatesAlone(BaseModelOutputWithPast):
    """Stands in for a decoder's output: the states, and `None` for whatever else a model may return (router logits,
    image states)."""

    last_hidden_state: Tensor | None = None  # of any dtype: older transformers say float32

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)
        return None


@contextmanager
def _decoder_replaced(base: Any, states: Tensor) -> Iterator[None]:
    """Inside, `base`'s forward takes `states` `(num_tokens, hidden)` for the output of its decoder.

    Raises:
        ValueError: if the forward does not call the decoder, so that its output is something else.
    """
    modules, called = below_the_head(base), []
    own = [module.__dict__.get("forward") for module in modules]

    def give(*args: Any, **kwargs: Any) -> _StatesAlone:
        called.append(True)
        return _StatesAlone(last_hidden_state=states.unsqueeze(0))

    for module in modules:
        module.forward = give  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.forward = forward  # type: ignore[method-assign]
    if not called:
        raise ValueError(
            f"The forward pass of {type(base).__name__} does not go through `get_decoder()`, so its output head "
            "cannot be run by itself. Implement `get_decoder` in the model's class, such that `forward` makes its "
            "logits of what that module returns."
        )


def prompted_embeddings(
    model: Any,
    input_ids: Int[Tensor, "batch seq"],
    attention_mask: Shaped[Tensor, "batch seq"],
    soft_prompt: Float[Tensor, "virtual hidden"],
) -> tuple[Float[Tensor, "batch virtual+seq hidden"], Shaped[Tensor, "batch virtual+seq"]]:
    """The embeddings of rows with the soft prompt between a row's left padding and its first token.

    PEFT puts it before the padding, which moves the text away from it. Here row `[pad pad a b]` becomes
    `[pad pad P a b]`: the token at column `i` is found at column `i + num_virtual_tokens` in every row.

    Returns:
        Embeddings `(batch, num_virtual_tokens + seq, hidden)` and mask `(batch, num_virtual_tokens + seq)`.
    """
    with torch.no_grad():
        token_embeds = input_embeddings(model)(input_ids)
    seq, hidden = token_embeds.shape[1:]
    virtual = soft_prompt.size(0)
    columns = torch.arange(virtual + seq, device=token_embeds.device)  # (virtual + seq)
    start = attention_mask.to(torch.long).argmax(dim=1, keepdim=True)  # (batch, 1): first token of the row
    is_prompt = (columns >= start) & (columns < start + virtual)  # (batch, virtual + seq)
    source = torch.where(columns < start, columns, (columns - virtual).clamp(min=0))  # column in token_embeds
    prompt_index = (columns - start).clamp(0, virtual - 1)  # (batch, virtual + seq): row of soft_prompt
    # Cast after the lookup, so that the gradient of the rows adds up in the prompt's own precision
    # Indexing would add gradients up in another order each time, on several threads
    prompt_embeds = F.embedding(prompt_index, soft_prompt.to(token_embeds.device)).to(token_embeds.dtype)
    text_embeds = token_embeds.gather(1, source.unsqueeze(-1).expand(-1, -1, hidden))
    embeds = torch.where(is_prompt.unsqueeze(-1), prompt_embeds, text_embeds)
    return embeds, torch.where(is_prompt, 1, attention_mask.gather(1, source))
