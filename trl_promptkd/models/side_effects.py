"""What a pass over a model must leave unchanged: random states, gradient flags, training modes."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


__all__ = ["flags_restored", "nothing_changed", "random_state_restored"]


@contextmanager
def flags_restored(model: nn.Module) -> Iterator[None]:
    """Afterwards, every parameter has the `requires_grad` that it had before, and every module its training mode.

    When PEFT switches an adapter on again, it sets `requires_grad` of all its weights, also of those the user froze.
    """
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():  # by name: FSDP2 may hold other tensors than before
            if parameter.requires_grad != flags.get(name, parameter.requires_grad):
                parameter.requires_grad_(flags[name])
        for module, mode in modes:
            module.training = mode


@contextmanager
def nothing_changed(trainer: Any) -> Iterator[None]:
    """Around an evaluation, so that training continues as it would have without it.

    A data loader, too, takes a seed from torch's global state each time it starts. And when a callback evaluates in
    the middle of a step, the metrics are logged, after which transformers takes the step for logged.
    """
    should_log = trainer.control.should_log
    with random_state_restored(trainer.accelerator.device), flags_restored(trainer.model):
        yield
    trainer.control.should_log |= should_log


@contextmanager
def random_state_restored(device: torch.device) -> Iterator[None]:
    """Afterwards, torch (on the CPU and on `device`), numpy and Python have the random states they had before."""
    states = random.getstate(), np.random.get_state()
    forked = device.type in ("cuda", "xpu")
    try:
        with torch.random.fork_rng(devices=[device] if forked else [], device_type=device.type if forked else "cuda"):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
