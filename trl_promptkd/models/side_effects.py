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
    """Restore each parameter's `requires_grad` and each module's training mode afterwards.

    When PEFT switches an adapter on again, it sets `requires_grad` of all its weights, even of those the user froze.
    """
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():  # by name, as FSDP2 may have replaced the tensors
            if parameter.requires_grad != flags.get(name, parameter.requires_grad):
                parameter.requires_grad_(flags[name])
        for module, mode in modes:
            module.training = mode


@contextmanager
def nothing_changed(trainer: Any) -> Iterator[None]:
    """Put this around an evaluation, and training continues as it would have without it.

    Even a data loader takes a seed from torch's global random state each time it starts. If a callback evaluates in
    the middle of a step, the metrics are logged. transformers then believes that the step was logged.
    """
    should_log = trainer.control.should_log
    with random_state_restored(trainer.accelerator.device), flags_restored(trainer.model):
        yield
    trainer.control.should_log |= should_log


@contextmanager
def random_state_restored(device: torch.device) -> Iterator[None]:
    """Restore the random states of torch (on the CPU and on `device`), numpy and Python afterwards."""
    states = random.getstate(), np.random.get_state()
    forked = device.type in ("cuda", "xpu")
    try:
        with torch.random.fork_rng(devices=[device] if forked else [], device_type=device.type if forked else "cuda"):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
