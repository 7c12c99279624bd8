"""A rough estimate of what a run needs, from the models' shapes and the settings.

`docs/doctor.md` explains the estimate.
"""

from typing import Any

import psutil
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .case import Case, Finding, passing, warning


__all__ = ["available_memory", "estimate_memory", "memory"]

_LORA_RANK = 16
_LOSS_TENSORS = 5  # of (loss_chunk_size x vocabulary) in float32, at the loss's peak
_PROCESS = 0.8e9  # bytes of an interpreter with torch, transformers and datasets


def memory(case: Case) -> Finding:
    """A run that does not fit stops at its first step, or is killed without a message."""
    parts = estimate_memory(case)
    needed, there = parts["total"], available_memory(case.student.device)
    told = ", ".join(f"{name} {size:.2f}" for name, size in parts.items() if name != "total" and size)
    window = case.args.per_device_train_batch_size * case.args.gradient_accumulation_steps
    found = f"about {needed:.1f} GB of {there:.1f} GB for a window of {window} rows ({told})"
    if needed <= there:
        return passing(found, **parts, available=there)
    return warning(
        found,
        "Lower `per_device_train_batch_size` or `max_new_tokens`, train an adapter (`peft_config`), quantize the "
        "teacher, or set `gradient_checkpointing` and `teacher_gradient_checkpointing`.",
        **parts,
        available=there,
    )


def estimate_memory(case: Case) -> dict[str, float]:
    """GB by use. `total` counts only the larger one of rollouts and losses, as they do not overlap in time."""
    student, teacher, args = case.student, case.teacher, case.args
    answer = max(args.max_new_tokens, *(len(row["completion_ids"]) for row in case.views))
    tokens = max(len(row["prompt_ids"]) for row in case.views) + answer
    teacher_tokens = max(len(row["teacher_prompt_ids"]) for row in case.views) + answer
    teacher_tokens += 0 if case.soft_prompt is None else len(case.soft_prompt)
    rows = args.per_device_train_batch_size
    window = rows * args.gradient_accumulation_steps

    config = student.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * head_size * tokens * window * student.dtype.itemsize
    drawing = 28 * config.vocab_size * window  # the logits, and their distribution in float64
    chunk = args.loss_chunk_size or rows * answer
    loss = _LOSS_TENSORS * 4 * min(chunk, rows * answer) * config.vocab_size
    activations = _activations(student, rows * tokens, args.gradient_checkpointing)
    if case.soft_prompt is not None:  # a primed teacher runs without a gradient
        activations += _activations(teacher, rows * teacher_tokens, args.teacher_gradient_checkpointing)

    adapter = _LORA_RANK * _features(student)
    trained = 4 * adapter if case.lora else student.get_memory_footprint(return_buffers=False)
    shared = case.is_self_distillation and case.lora
    parts = {
        "student": student.get_memory_footprint() + (trained if case.lora else 0),
        "gradients": trained,
        "AdamW": 2 * trained,
        "teacher": 0.0 if shared else teacher.get_memory_footprint(),
        "rollouts": cache + drawing if case.is_sampled else 0.0,
        "activations": activations,
        "logits": loss,
        "process": 0.0 if student.device.type == "cuda" else _PROCESS,
    }
    smaller_peak = min(parts["rollouts"], parts["activations"] + parts["logits"])
    return {**{name: size / 1e9 for name, size in parts.items()}, "total": (sum(parts.values()) - smaller_peak) / 1e9}


def available_memory(device: torch.device) -> float:
    """GB that this process uses or could still get."""
    if device.type == "cuda":
        return (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)) / 1e9
    return (psutil.virtual_memory().available + psutil.Process().memory_info().rss) / 1e9


def _features(model: Any) -> int:
    """The sum of input and output widths of all linear layers below the output head."""
    layers = [module for module in model.get_decoder().modules() if isinstance(module, nn.Linear | Conv1D)]
    return sum(m.nx + m.nf if isinstance(m, Conv1D) else m.in_features + m.out_features for m in layers)


def _activations(model: Any, tokens: int, checkpointing: bool) -> float:
    """Bytes kept for a backward pass, estimated by inputs and outputs of linear layers.

    Under checkpointing, the input of each layer, and the activations of one.
    """
    config = model.config.get_text_config()
    features, layers = _features(model), config.num_hidden_layers
    kept = layers * config.hidden_size + features / layers if checkpointing else features
    return kept * tokens * model.dtype.itemsize
