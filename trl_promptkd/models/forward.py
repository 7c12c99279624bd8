"""Running a model, teacher or student, with or without a soft prompt.

`forward_logits` gives the logits of every position. `completion_states` gives the hidden states at the trained tokens,
and turns a few of them into logits at a time, so that no tensor of (tokens x vocabulary) need exist.

Positions are counted from the attention mask, and a soft prompt comes directly before a row's first token. Padding on
either side therefore changes nothing, for rotary, learned and sliding-window positions alike. `completion_states` can
also join the rows end to end, without padding.
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
        ValueError: if the model has none, so that no soft prompt can be put before its input.
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
    """Whether every rank holds only a part of the weights (FSDP2, ZeRO-3). All ranks must then run the model
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
    """Call `function(bare model, *args, **kwargs)` inside the forward pass of the wrapped `model`.

    DDP then prepares gradients for whatever `function` computes with the bare model, although that is not the model's
    own forward pass. FSDP and DeepSpeed have the weights ready.

    Returns:
        What `function` returns. Tensors, and tuples of them, keep their dtype and values. FSDP2 would cast the output
        of a forward pass in mixed precision.
    """
    bare = extract_model_from_parallel(model)
    own = bare.__dict__.get("forward")  # set on the instance if accelerate or TRL has replaced the class's

    def restore() -> None:
        if own is None:
            bare.__dict__.pop("forward", None)
        else:
            bare.forward = own

    exact: list[Any] = []

    def redirected() -> Any:
        restore()  # `function` may call the real one
        exact.append(function(bare, *args, **kwargs))
        return exact[0]

    bare.forward = redirected
    try:
        return _as_exact(model(), exact[0])
    finally:
        restore()


def _as_exact(wrapped: Any, exact: Any) -> Any:
    """The values of `exact`, through which gradients flow back as through `wrapped`."""
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
    """Next-token logits at all positions. They equal those of each row alone, without padding.

    Args:
        model: A causal language model, plain, PEFT or wrapped for data parallelism.
        input_ids (`Tensor` of shape `(batch, seq)`): Rows padded on the left, on the right or on both sides.
        attention_mask (`Tensor` of shape `(batch, seq)`): 1 for tokens, 0 for padding. The ones of a row are
            contiguous.
        soft_prompt (`Tensor` of shape `(num_virtual_tokens, hidden)`, *optional*): Comes directly before the first
            token of each row. It is cast to the dtype of the model's embeddings. Its gradient flows back in its own
            dtype.

    Returns:
        `Tensor` of shape `(batch, seq, vocab)` in the model's dtype. Entry `i` is for the token after
        `input_ids[:, i]`, with or without a soft prompt. Entries at padding mean nothing.
    """
    bare = extract_model_from_parallel(model)
    inputs = _inputs(bare, _base(bare), input_ids, attention_mask, soft_prompt)
    return model(**inputs).logits[:, -input_ids.size(1) :]


class TokenLogits(Protocol):
    """A model's output at some tokens. It comes from a model that runs ([`TokenStates`]) or from a cache."""

    def __len__(self) -> int: ...

    def logits(self, start: int, end: int) -> Float[Tensor, "tokens vocab"]:
        """Logits or log-probabilities `(end - start, vocab)` in float32."""

    def entropies(self) -> Float[Tensor, "tokens"] | None:
        """If the logits are those of draws: entropies `(num_tokens,)`, in nats, of the distributions drawn from."""


@dataclass
class TokenStates:
    """
    A model's hidden states at some tokens, before its output head, and the way from there to its logits.

    Args:
        hidden_states (`Tensor` of shape `(num_tokens, hidden)`): Output of the model's decoder, in its dtype.
        model: The bare model that they come from.
        vocab_size (`int`, *optional*): Only the first `vocab_size` logits count, if vocabularies are padded
            differently.
        detached (`bool`): Whether no gradient flows through it, see [`~TokenStates.detach`].
        are_logits (`bool`): Whether `hidden_states` are logits `(num_tokens, vocab)`, see
            [`~TokenStates.with_logits`].
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

        The model's own forward pass computes them. Its bias, scaling, soft-capping, quantized weights and adapters
        are therefore included.
        """
        if self.are_logits:
            return states[:, : self.vocab_size].to(torch.float32, copy=True)
        return self._run_head(states)[:, : self.vocab_size].float().to(self.hidden_states.device)

    def with_logits(self) -> "TokenStates":
        """A copy with the logits of all tokens in place of the hidden states.

        A sharded model needs this, because its weights are gathered once in a forward pass. To run its head on a few
        tokens at a time, or to take its gradient before the backward pass, would put the wrapper out of step.
        """
        return replace(self, hidden_states=self._run_head(self.hidden_states), are_logits=True)

    def _run_head(self, states: Tensor) -> Tensor:
        base = _base(self.model)
        with _decoder_replaced(base, states):
            ids = torch.zeros(1, 1, dtype=torch.long, device=states.device)
            router = without_router_logits(base)
            return type(base).forward(base, input_ids=ids, use_cache=False, **router).logits[0]

    def entropies(self) -> None:
        """`None`, as the logits are the model's own."""

    def __getitem__(self, tokens: slice) -> "TokenStates":
        """A copy with some of the tokens."""
        return replace(self, hidden_states=self.hidden_states[tokens])

    def detach(self) -> "TokenStates":
        """A copy through which no gradient flows, neither to the states nor to the head."""
        return replace(self, hidden_states=self.hidden_states.detach(), detached=True)

    @property
    def is_trained(self) -> bool:
        return not self.detached and (self.hidden_states.requires_grad or bool(self.head_parameters()))

    def head_parameters(self) -> list[nn.Parameter]:
        """The trainable parameters that turn states into logits. These are the ones outside the decoder, and a head
        that is tied to weights inside it."""
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
    padding_free: bool = False,
) -> TokenStates:
    """The hidden states that predict the trained tokens.

    Args:
        model: A causal language model, plain or PEFT. If it is trained, the bare model inside [`inside_forward`].
        input_ids, attention_mask, soft_prompt: As for [`forward_logits`].
        labels (`Tensor` of shape `(batch, seq)`): -100 for tokens that are not trained on. A label in column 0 is
            ignored, as nothing precedes it.
        vocab_size (`int`, *optional*): As for [`TokenStates`].
        padding_free (`bool`): Run the rows end to end in one sequence, without their padding. Only the positions,
            which start again, show where a row begins. [`~trl_promptkd.models.compare.check_forward`] measures whether
            the model keeps rows apart. Not supported with a soft prompt.

    Returns:
        [`TokenStates`] in the order of `labels[:, 1:] != -100`. It holds logits already if the model is sharded.
    """
    decoder = _decoder(_base(model))
    width = max(input_ids.size(1) - 1, 1)  # no prediction after the last token is needed
    rows = input_ids[:, :width], attention_mask[:, :width]
    trained = F.pad(labels, (0, 1), value=-100)[:, 1 : width + 1] != -100  # (batch, width)
    if padding_free:
        kept = rows[1].bool() | trained  # a label on padding has no meaning, but counts as in a padded batch
        inputs, trained = _end_to_end(decoder, *rows, kept), trained[kept].unsqueeze(0)  # (1, tokens)
    else:
        inputs = _inputs(model, decoder, *rows, soft_prompt)
    states = decoder(**inputs).last_hidden_state[:, -trained.size(1) :].to(input_ids.device)
    known = TokenStates(states[trained], model, vocab_size)
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
    # BLOOM and MPT have no positions and count from the mask themselves
    if _takes_positions(module):
        inputs["position_ids"] = _positions(attention_mask)
    return inputs | without_router_logits(module)


def _end_to_end(module: nn.Module, input_ids: Tensor, attention_mask: Tensor, kept: Tensor) -> dict[str, Any]:
    """Arguments for the forward of `module`: the kept tokens of all rows, in one sequence.

    With a mask or a cache, transformers would not tell rows apart by their positions. So there is neither.
    """
    inputs: dict[str, Any] = {"use_cache": False, "input_ids": input_ids[kept].unsqueeze(0)}
    if _takes_positions(module):
        inputs["position_ids"] = _positions(attention_mask)[kept].unsqueeze(0)
    return inputs | without_router_logits(module)


def _takes_positions(module: nn.Module) -> bool:
    return "position_ids" in inspect.signature(type(module).forward).parameters  # wrappers may hide the instance's


def _positions(attention_mask: Tensor) -> Tensor:
    return (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)


def without_router_logits(model: nn.Module) -> dict[str, bool]:
    """The argument that switches off the load-balancing loss of a mixture of experts. Empty for other models.

    Some checkpoints switch router logits on in their configuration. The loss that is computed from them fails when a
    padded batch is generated.
    """
    known = inspect.signature(type(_base(model)).forward).parameters
    return {"output_router_logits": False} if "output_router_logits" in known else {}


def _decoder(base: Any) -> Any:
    """The module whose hidden states the output head turns into logits.

    Usually `get_decoder` returns it. Some models return themselves (Llama 4) or their head (ModernBERT) there.

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
    """The decoder, and the module around it if that is not `base` itself. In a multimodal model, that module embeds
    text and images."""
    decoder, around = _decoder(base), base.base_model
    is_around = around is not base and around is not decoder and any(module is decoder for module in around.modules())
    return [decoder, around] if is_around else [decoder]


@dataclass
class _StatesAlone(BaseModelOutputWithPast):
    """Stands in for a decoder's output: the states, and `None` for whatever else a model may return (router logits,
    image states)."""

    last_hidden_state: Tensor | None = None  # of any dtype. Older versions of transformers annotate float32

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)
        return None


@contextmanager
def _decoder_replaced(base: Any, states: Tensor) -> Iterator[None]:
    """Inside, `states` `(num_tokens, hidden)` replace the output of the decoder in `base`'s forward pass.

    Raises:
        ValueError: if the forward pass does not call the decoder.
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
    """The embeddings of rows, with the soft prompt between a row's left padding and its first token.

    PEFT puts the prompt before the padding, which separates it from the text. Here the row `[pad pad a b]` becomes
    `[pad pad P a b]`. A token at column `i` moves to column `i + num_virtual_tokens` in every row.

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
    # Cast after the lookup, so that the gradients of the rows add up in the prompt's own precision. `F.embedding`,
    # because on several threads indexing would add them up in another order each time
    prompt_embeds = F.embedding(prompt_index, soft_prompt.to(token_embeds.device)).to(token_embeds.dtype)
    text_embeds = token_embeds.gather(1, source.unsqueeze(-1).expand(-1, -1, hidden))
    embeds = torch.where(is_prompt.unsqueeze(-1), prompt_embeds, text_embeds)
    return embeds, torch.where(is_prompt, 1, attention_mask.gather(1, source))
