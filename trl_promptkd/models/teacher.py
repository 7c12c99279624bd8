"""The frozen teacher: loading it, taking it from the student if it has no name, and placing it on its device."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from accelerate import Accelerator
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from .._trl import (
    AuxiliaryTrainingWrapper,
    BaseTunerLayer,
    fsdp2_prepare_model,
    keep_four_bit_weights_differentiable,
    prepare_deepspeed,
)
from .init_kwargs import from_pretrained_kwargs
from .side_effects import flags_restored


__all__ = [
    "build_teacher",
    "disable_dropout",
    "each_teacher",
    "freeze",
    "load_teacher",
    "place_teacher",
    "recomputed_activations",
    "run_teacher",
]


def load_teacher(name_or_path: str, init_kwargs: Mapping[str, Any] | None = None, trust_remote_code: bool = False):
    """Load a causal language model to be the teacher.

    Args:
        name_or_path (`str`): Hub id or folder.
        init_kwargs (`Mapping`, *optional*): Arguments of `AutoModelForCausalLM.from_pretrained`. A `dtype` may be a
            string such as `"bfloat16"`, `"auto"`, or absent. A `quantization_config` may be a `dict`.
        trust_remote_code (`bool`): Whether code from the repository may run, unless `init_kwargs` says otherwise.
    """
    kwargs = from_pretrained_kwargs("teacher_model_init_kwargs", init_kwargs)
    kwargs.setdefault("trust_remote_code", trust_remote_code)
    quantization = kwargs.get("quantization_config")
    if isinstance(quantization, Mapping) and quantization.get("quant_method", "bitsandbytes") == "bitsandbytes":
        kwargs["quantization_config"] = BitsAndBytesConfig(**quantization)  # a quantized checkpoint rejects a dict
    try:
        try:
            return AutoModelForCausalLM.from_pretrained(name_or_path, **kwargs)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            # A model of images and text, used for text only (Mistral 3, Llava)
            return AutoModelForImageTextToText.from_pretrained(name_or_path, **kwargs)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"The teacher {name_or_path!r} could not be loaded. Check the name (a Hub id or a folder), that you have "
            f"access to it, and that its files are whole. ({str(error).splitlines()[0]})"
        ) from error


def each_teacher(teacher_model: Any) -> dict[str, Any]:
    """A trainer's `teacher_model`, or each of several teachers, by its name in messages."""
    if not isinstance(teacher_model, Mapping):
        return {"teacher_model": teacher_model}
    return {f"teacher_model[{name!r}]": one for name, one in teacher_model.items()}


def freeze(model: nn.Module) -> nn.Module:
    """Make `model` a teacher: evaluation mode, no gradient for any weight, correct gradients through 4-bit weights."""
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
        The teacher. Without a `teacher_model`, it is a frozen copy of the student. A PEFT student is returned itself,
        because with its adapter switched off it is its own teacher (see [`run_teacher`]).
    """
    if teacher_model is None and isinstance(student, PeftModel):
        _check_comes_back(student)
        return student  # PEFT has frozen it below its adapter. It must not be frozen as a whole
    if teacher_model is None:
        teacher_model = copy.deepcopy(student)
        # TRL has replaced `forward` by one that belongs to the student. The copy needs its own
        teacher_model.__dict__.pop("forward", None)
        teacher_model.__dict__.pop("_is_accelerate_prepared", None)
    elif isinstance(teacher_model, str):
        teacher_model = load_teacher(teacher_model, args.teacher_model_init_kwargs, args.trust_remote_code)
    return freeze(teacher_model)


def _check_comes_back(student: PeftModel) -> None:
    """Reject an adapter with which the student cannot be its own teacher."""
    config: Any = student.active_peft_config
    bias, init = getattr(config, "bias", "none"), getattr(config, "init_lora_weights", True)
    remedy = "Pass `teacher_model`, for example the student's name, so that the teacher has weights of its own."
    if bias != "none":
        raise ValueError(
            f"The student's adapter has `bias={bias!r}` and so trains weights of the model below it, which is to be "
            f"the teacher and must not change. Set `bias='none'`. Or: {remedy}"
        )
    if not isinstance(init, bool) and init not in ("gaussian", "eva", "orthogonal"):
        raise ValueError(
            f"The student's adapter has `init_lora_weights={init!r}`, which rewrites the model below it, so that "
            "switching the adapter off does not bring the student's start back. Set `init_lora_weights=True`. Or: "
            f"{remedy}"
        )
    # The head runs after the decoder, when the adapter is on again
    base = student.get_base_model()
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    if isinstance(head, BaseTunerLayer | AuxiliaryTrainingWrapper) or isinstance(embeddings, AuxiliaryTrainingWrapper):
        raise ValueError(
            "The student's adapter trains its embeddings or its output head (`modules_to_save`, "
            "`trainable_token_indices` or a LoRA layer there), so that it cannot be its own teacher with the adapter "
            f"switched off. Leave them out of the adapter. Or: {remedy}"
        )


def place_teacher(teacher: nn.Module, student: nn.Module, accelerator: Accelerator) -> nn.Module | None:
    """Put the teacher on its device, sharded like the student (FSDP2, ZeRO-3).

    Under FSDP2, which cannot shard integers, a quantized teacher is whole on every rank.

    Returns:
        The teacher, or `None` if it is the student's base model.
    """
    if teacher is student:
        return None
    if accelerator.state.deepspeed_plugin is not None:
        return prepare_deepspeed(teacher, accelerator)
    if accelerator.is_fsdp2 and getattr(teacher, "quantization_method", None) is None:
        # The plugin remembers which classes of layers it shards. The student's may not be the teacher's
        plugin = accelerator.state.fsdp_plugin
        of_student = (plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap)
        plugin.transformer_cls_names_to_wrap = None
        try:
            return fsdp2_prepare_model(accelerator, teacher)
        finally:
            plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = of_student
    if accelerator.is_fsdp2:
        return teacher.to(accelerator.device)
    return accelerator.prepare_model(teacher, evaluation_mode=True)


@contextmanager
def run_teacher(teacher: nn.Module | None, student: Any) -> Iterator[nn.Module]:
    """The teacher in evaluation mode: `teacher`, or if that is `None`, `student` with its adapter switched off."""
    if teacher is not None:
        yield teacher
        return
    with flags_restored(student):
        student.eval()
        with student.disable_adapter():
            yield student


@contextmanager
def recomputed_activations(teacher: nn.Module, enabled: bool) -> Iterator[None]:
    """Inside, the teacher keeps only the inputs of its layers for a backward pass. That pass must be inside, too.

    transformers checkpoints layers only in training mode. Here the layers themselves are in training mode. The modules
    inside them are not, so that they compute as in evaluation.
    """
    if not enabled:
        yield
        return
    layers = [module for module in teacher.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"`teacher_gradient_checkpointing` is True, but {type(teacher).__name__} has no layers that transformers "
            "can checkpoint. Set it to False."
        )
    names = ("training", "gradient_checkpointing", "_gradient_checkpointing_func")
    before = [{name: layer.__dict__[name] for name in names if name in layer.__dict__} for layer in layers]
    recompute = partial(checkpoint, use_reentrant=False)
    for layer in layers:
        layer.__dict__.update(zip(names, (True, True, recompute), strict=True))
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            for name in names:
                layer.__dict__.pop(name, None)
            layer.__dict__.update(own)


def disable_dropout(model: nn.Module, adapters: bool = True) -> None:
    """Set every dropout probability to 0.

    It may be in a module, in an attribute for functional calls (OPT), or in the configuration that layers read at each
    call (Falcon). Layers get a copy of the configuration, because the model's own is saved with the model.

    Args:
        adapters (`bool`): Whether a PEFT adapter's own dropout (`lora_dropout`) is switched off too.
    """
    without_dropout: dict[int, Any] = {}
    for path, module in model.named_modules():
        if "lora_dropout" in path and not adapters:
            continue
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in _dropout_rates(module):
            setattr(module, name, 0.0)
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and not isinstance(module, PreTrainedModel) and _dropout_rates(config):
            if id(config) not in without_dropout:
                without_dropout[id(config)] = copied = copy.copy(config)
                for name in _dropout_rates(config):
                    setattr(copied, name, 0.0)
            module.config = without_dropout[id(config)]


def _dropout_rates(holder: Any) -> list[str]:
    return [name for name, value in vars(holder).items() if "drop" in name and isinstance(value, float) and value > 0]
