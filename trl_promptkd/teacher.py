"""The frozen teacher: loading, the proof that both vocabularies are one, and the forward pass.

`forward_logits` is the one way in which this package asks a model (teacher or student, with or without a soft prompt)
for its logits. Positions are counted from the attention mask, and a soft prompt stands directly before a row's first
token, so padding on either side changes nothing: for rotary, learned and sliding-window positions alike.
"""

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ._trl import keep_four_bit_weights_differentiable, prepare_deepspeed


__all__ = [
    "asked_teacher",
    "build_teacher",
    "check_same_tokenizer",
    "completion_logits",
    "completion_states",
    "disable_dropout",
    "forward_logits",
    "freeze",
    "input_embeddings",
    "load_teacher",
    "load_teacher_tokenizer",
    "place_teacher",
    "position_limit",
    "shared_vocab_size",
]

logger = logging.get_logger(__name__)


def load_teacher(name_or_path: str, init_kwargs: Mapping[str, Any] | None = None, trust_remote_code: bool = False):
    """Load a causal language model to be the teacher.

    Args:
        name_or_path (`str`): Hub id or folder.
        init_kwargs (`Mapping`, *optional*): For `AutoModelForCausalLM.from_pretrained`; a `dtype` may be a string such as
            `"bfloat16"`, `"auto"`, or absent, and a `quantization_config` may be a `dict`.
        trust_remote_code (`bool`): Whether code from the repository may run, unless `init_kwargs` says otherwise.
    """
    kwargs = {"trust_remote_code": trust_remote_code, **(init_kwargs or {})}
    dtype = kwargs.get("dtype")
    if isinstance(dtype, str) and dtype != "auto":
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(
                f"`teacher_model_init_kwargs['dtype']` is {dtype!r}; it must be the name of a torch dtype, such as "
                "'bfloat16' or 'float32', or 'auto'."
            )
        kwargs["dtype"] = getattr(torch, dtype)
    quantization = kwargs.get("quantization_config")
    if isinstance(quantization, Mapping) and quantization.get("quant_method", "bitsandbytes") == "bitsandbytes":
        from transformers import BitsAndBytesConfig

        kwargs["quantization_config"] = BitsAndBytesConfig(**quantization)
    return AutoModelForCausalLM.from_pretrained(name_or_path, **kwargs)


def load_teacher_tokenizer(
    name_or_path: str, init_kwargs: Mapping[str, Any] | None = None, trust_remote_code: bool = False
) -> Any | None:
    """The tokenizer that stands beside the teacher, or `None` where there is none to compare with."""
    if not name_or_path:
        return None
    known = ("revision", "subfolder", "gguf_file", "trust_remote_code")
    kwargs: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    kwargs |= {key: value for key, value in (init_kwargs or {}).items() if key in known}
    try:
        return AutoTokenizer.from_pretrained(name_or_path, **kwargs)
    except (OSError, ValueError):
        return None


def check_same_tokenizer(
    student_tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Refuse a teacher whose token ids mean something else.

    Raises:
        ValueError: naming the first id at which the vocabularies differ.
    """
    student_tokens = {index: token for token, index in student_tokenizer.get_vocab().items()}
    teacher_tokens = {index: token for token, index in teacher_tokenizer.get_vocab().items()}
    for index in sorted(student_tokens.keys() | teacher_tokens.keys()):
        if student_tokens.get(index) != teacher_tokens.get(index):
            raise ValueError(
                "The student and the teacher have different tokenizers: the first token that differs has id "
                f"{index}, which is {student_tokens.get(index)!r} for the student ({len(student_tokens)} tokens) and "
                f"{teacher_tokens.get(index)!r} for the teacher ({len(teacher_tokens)} tokens). Their distributions "
                "cannot be compared token by token. Choose two models of one family; if only a pad token was added to "
                "one of them, use the end-of-text token for padding instead."
            )


def shared_vocab_size(
    student: PreTrainedModel, teacher: PreTrainedModel | int, tokenizer: PreTrainedTokenizerBase
) -> int | None:
    """How many token ids both models are compared on.

    Models of one family may pad their vocabularies to different sizes (Qwen2.5: 151,936 and 152,064). The padding means
    nothing, so both are then compared, and normalised, on the tokenizer's real ids only. Of a teacher that is not at hand, its
    vocabulary's size is enough.

    Returns:
        `int` or `None`: the number of real ids; `None` where both vocabularies have one size and all of it is compared.

    Raises:
        ValueError: where a model has fewer entries than the tokenizer has tokens.
    """
    student_size = student.config.get_text_config().vocab_size
    teacher_size = teacher if isinstance(teacher, int) else teacher.config.get_text_config().vocab_size
    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    real_size = max(tokens) + 1
    for role, size in (("student", student_size), ("teacher", teacher_size)):
        missing = [index for index in tokens if index >= size and index not in added]
        if missing:
            raise ValueError(
                f"The {role}'s vocabulary has {size} entries, but the tokenizer has {real_size} tokens, such as "
                f"{tokens[min(missing)]!r} with id {min(missing)}. Student, teacher and `processing_class` must share one tokenizer."
            )
    # Special tokens beyond both vocabularies (images in Gemma 3's text models) cannot occur in text
    return None if student_size == teacher_size else min(real_size, student_size, teacher_size)


def freeze(model: nn.Module) -> nn.Module:
    """Make `model` a teacher: evaluation mode, no gradient for any weight, gradients through 4-bit weights kept right."""
    keep_four_bit_weights_differentiable(model)
    model.requires_grad_(False)
    return model.eval()


def build_teacher(student: nn.Module, teacher_model: Any, args: Any) -> nn.Module:
    """The frozen teacher of a trainer.

    Args:
        student: The trainer's student, as it starts.
        teacher_model: A model, a name, or `None` for the student's own starting weights.
        args: Has `teacher_model_init_kwargs` and `trust_remote_code`.

    Returns:
        The teacher. For `None`, a PEFT student itself (its teacher is what is below the adapter, see [`asked_teacher`], and no
        second copy is held), else a frozen copy of the student.

    Raises:
        ValueError: for an adapter that changes what is below it, so that switching it off does not bring the start back.
    """
    if teacher_model is None and isinstance(student, PeftModel):
        _check_base_stays(student.active_peft_config)
        return student  # frozen by PEFT below its adapter; must not be frozen as a whole
    if teacher_model is None:
        teacher_model = copy.deepcopy(student)
        # TRL has replaced `forward` by one that holds on to the student; the copy needs its own
        teacher_model.__dict__.pop("forward", None)
        teacher_model.__dict__.pop("_is_accelerate_prepared", None)
    elif isinstance(teacher_model, str):
        teacher_model = load_teacher(teacher_model, args.teacher_model_init_kwargs, args.trust_remote_code)
    return freeze(teacher_model)


def _check_base_stays(config: Any) -> None:
    bias, init = getattr(config, "bias", "none"), getattr(config, "init_lora_weights", True)
    remedy = "Pass `teacher_model`, for example the student's name, so that the teacher has weights of its own."
    if bias != "none":
        raise ValueError(
            f"The student's adapter has `bias={bias!r}` and so trains weights of the model below it, which is to be the teacher and "
            f"must not change. Set `bias='none'`. Or: {remedy}"
        )
    if not isinstance(init, bool) and init not in ("gaussian", "eva", "orthogonal"):
        raise ValueError(
            f"The student's adapter has `init_lora_weights={init!r}`, which rewrites the model below it, so that switching the "
            f"adapter off does not bring the student's start back. Set `init_lora_weights=True`. Or: {remedy}"
        )


def place_teacher(teacher: nn.Module, student: nn.Module, accelerator: Accelerator) -> nn.Module | None:
    """The teacher on its device, sharded under ZeRO-3; `None` where it is the student below its adapter."""
    if teacher is student:
        return None
    if accelerator.state.deepspeed_plugin is not None:
        return prepare_deepspeed(teacher, accelerator)
    return accelerator.prepare_model(teacher, evaluation_mode=True)


@contextmanager
def asked_teacher(teacher: nn.Module | None, student: Any) -> Iterator[nn.Module]:
    """The teacher in evaluation mode: `teacher`, or `student` with its adapter switched off where that is `None`."""
    if teacher is not None:
        yield teacher
        return
    was_training = student.training
    student.eval()
    try:
        with student.disable_adapter():
            yield student
    finally:
        student.train(was_training)


def disable_dropout(model: nn.Module, adapters: bool = True) -> None:
    """Set every dropout probability to 0: that of modules, and the numbers that some models (OPT) keep for functional calls.

    Args:
        adapters (`bool`): Whether a PEFT adapter's own dropout (`lora_dropout`) is switched off too.
    """
    for path, module in model.named_modules():
        if "lora_dropout" in path and not adapters:
            continue
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def input_embeddings(model: PreTrainedModel) -> nn.Module:
    """The module that turns token ids into the model's input embeddings.

    Raises:
        ValueError: where the model has none: a soft prompt has nothing to stand beside.
    """
    try:
        embeddings = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        embeddings = None
    if embeddings is None:
        raise ValueError(
            f"The teacher ({type(model).__name__}) has no input embeddings, so that a soft prompt cannot be put before its "
            "input. `teacher_model.get_input_embeddings()` must return a module that embeds token ids."
        )
    return embeddings


def position_limit(model: PreTrainedModel) -> int | None:
    """The number of learned absolute positions of a model (GPT-2, OPT, ...), or `None` if it is not bound by one."""
    names = ("wpe", "embed_positions", "position_embeddings")
    learned = any(isinstance(m, nn.Embedding) and name.endswith(names) for name, m in model.named_modules())
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) if learned else None


def forward_logits(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    soft_prompt: Tensor | None = None,
    num_columns: int = 0,
) -> Tensor:
    """Next-token logits, equal to those of every row alone, without padding.

    Args:
        model: A causal language model, plain, PEFT or wrapped for data parallelism.
        input_ids (`Tensor` of shape `(batch, seq)`): Rows padded on the left, on the right or on both sides.
        attention_mask (`Tensor` of shape `(batch, seq)`): 1 for tokens, 0 for padding; the ones of a row are contiguous.
        soft_prompt (`Tensor` of shape `(num_virtual_tokens, hidden)`, *optional*): Stands directly before the first token
            of each row. It is cast to the dtype of the model's embeddings; its gradient flows back in its own dtype.
        num_columns (`int`): Only the logits of the last `num_columns` columns are computed; 0 for all.

    Returns:
        `Tensor` of shape `(batch, num_columns or seq, vocab)` in the model's dtype: entry `i` follows `input_ids[:, i]`,
        with or without a soft prompt. Entries at padding mean nothing.
    """
    bare = extract_model_from_parallel(model)
    base = bare.get_base_model() if isinstance(bare, PeftModel) else bare
    accepted = inspect.signature(type(base).forward).parameters  # the class: wrappers may hide it
    inputs: dict[str, Any] = {"use_cache": False}
    if soft_prompt is None:
        inputs["input_ids"] = input_ids
    else:
        with torch.no_grad():
            token_embeds = input_embeddings(bare)(input_ids)
        inputs["inputs_embeds"], attention_mask = _prepend_soft_prompt(token_embeds, attention_mask, soft_prompt)
    inputs["attention_mask"] = attention_mask
    if "position_ids" in accepted:  # models without it (BLOOM, MPT) count positions from the mask themselves
        inputs["position_ids"] = (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)
    num_columns = num_columns or input_ids.size(1)
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = num_columns
    return model(**inputs).logits[:, -num_columns:]


def _prepend_soft_prompt(token_embeds: Tensor, attention_mask: Tensor, soft_prompt: Tensor) -> tuple[Tensor, Tensor]:
    """Put the soft prompt between a row's left padding and its first token.

    PEFT puts it before the padding, which moves the text away from it. Here row `[pad pad a b]` becomes `[pad pad P a b]`:
    the token at column `i` is found at column `i + num_virtual_tokens` in every row.

    Returns:
        Embeddings `(batch, num_virtual_tokens + seq, hidden)` and mask `(batch, num_virtual_tokens + seq)`.
    """
    seq, hidden = token_embeds.shape[1:]
    virtual = soft_prompt.size(0)
    columns = torch.arange(virtual + seq, device=token_embeds.device)  # (virtual + seq)
    start = attention_mask.to(torch.long).argmax(dim=1, keepdim=True)  # (batch, 1): first token of the row
    is_prompt = (columns >= start) & (columns < start + virtual)  # (batch, virtual + seq)
    source = torch.where(columns < start, columns, (columns - virtual).clamp(min=0))  # column in token_embeds
    prompt_index = (columns - start).clamp(0, virtual - 1)  # (batch, virtual + seq): row of soft_prompt
    # Cast after the lookup, so that the gradient of the rows adds up in the prompt's own precision
    prompt_embeds = soft_prompt.to(token_embeds.device)[prompt_index].to(token_embeds.dtype)
    text_embeds = token_embeds.gather(1, source.unsqueeze(-1).expand(-1, -1, hidden))
    embeds = torch.where(is_prompt.unsqueeze(-1), prompt_embeds, text_embeds)
    return embeds, torch.where(is_prompt, 1, attention_mask.gather(1, source))


def completion_logits(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    soft_prompt: Tensor | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """The logits that predict the trained tokens, and no others.

    Args:
        model, input_ids, attention_mask, soft_prompt: As for [`forward_logits`].
        labels (`Tensor` of shape `(batch, seq)`): -100 where a token is not trained on. A label in column 0 has nothing
            before it and is left out.
        vocab_size (`int`, *optional*): Keep only the first `vocab_size` entries, where vocabularies are padded differently.

    Returns:
        `Tensor` of shape `(num_trained_tokens, vocab)` in float32, in the order of `labels[:, 1:] != -100`.
    """
    trained, num_columns = _trained_columns(labels)
    logits = forward_logits(model, input_ids, attention_mask, soft_prompt, num_columns)
    return logits[:, :-1][trained][:, :vocab_size].float()


def _trained_columns(labels: Tensor) -> tuple[Tensor, int]:
    """Which of the last columns' logits predict trained tokens, `(batch, num_columns - 1)`, and the number of those columns."""
    trained = labels[:, 1:] != -100  # (batch, seq - 1)
    columns = trained.any(dim=0).nonzero()
    first = int(columns[0]) if len(columns) else trained.size(1) - 1
    # The logits of columns first .. seq - 2 predict the labels of columns first + 1 .. seq - 1
    return trained[:, first:], labels.size(1) - first


@torch.no_grad()
def completion_states(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, vocab_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """What goes into the output head at the trained tokens, and what comes out of the model there.

    Returns:
        Hidden states `(num_trained_tokens, hidden)` in the model's dtype and logits as of [`completion_logits`].
    """
    trained, num_columns = _trained_columns(labels)
    captured: list[Tensor] = []
    head = extract_model_from_parallel(model).get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
    try:
        logits = forward_logits(model, input_ids, attention_mask, num_columns=num_columns)
    finally:
        handle.remove()
    states, logits = (tensor.to(input_ids.device) for tensor in (captured[0][:, -num_columns:], logits))
    return states[:, :-1][trained], logits[:, :-1][trained][:, :vocab_size].float()
