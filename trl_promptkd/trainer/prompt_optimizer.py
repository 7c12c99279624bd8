"""Training the soft prompt: its gradient, optimizer and schedule, and their file in a checkpoint."""

import json
import math
import os
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType
from transformers.utils import logging

from ..files import read_safetensors
from ..losses.chunked import StateGradient
from ..models.soft_prompt import PromptEncoderConfig, SoftPrompt, write_safetensors


__all__ = ["PromptOptimizer"]

logger = logging.get_logger(__name__)

_STATE_FILE = "prompt_training_state.safetensors"
_MAX_SKIPPED_IN_A_ROW = 5
_NEED_METRICS = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)


class PromptOptimizer:
    """
    AdamW for the soft prompt, with its own schedule and clipping.

    The prompt is replicated on all ranks. Gradients are summed over ranks, and the loss that they come from is divided
    by the token count of all ranks. Every rank therefore takes the same step.

    Args:
        soft_prompt ([`SoftPrompt`]): The prompt to train.
        config ([`PromptEncoderConfig`]): Learning rate, weight decay, schedule and clipping. If a field is `None`,
            that of `args` is taken. A configuration of PEFT's has no such fields, and the defaults are taken.
        args ([`PromptKDConfig`]): The student's settings, whose Adam coefficients are the prompt's too.
        num_training_steps (`int`): Length of the schedule.
        accelerator ([`~accelerate.Accelerator`]): Sums gradients over ranks.
    """

    def __init__(
        self,
        soft_prompt: SoftPrompt,
        config: Any,
        args,
        num_training_steps: int,
        accelerator: Accelerator,
    ):
        config = config if isinstance(config, PromptEncoderConfig) else PromptEncoderConfig()
        self.soft_prompt = soft_prompt
        self.accelerator = accelerator
        self.max_grad_norm = config.prompt_max_grad_norm
        self.skipped = self.skipped_in_a_row = 0
        for parameter in soft_prompt.parameters():
            parameter.grad = None  # left by a window that failed (`auto_find_batch_size`) or was broken off
        # Under float16, small gradients through the teacher would vanish without a factor. The student's own factor is
        # too large for the prompt's gradient, and only falls when the student's gradients overflow.
        self.loss_scale = 1.0 if accelerator.scaler is None else 1024.0
        learning_rate = args.learning_rate if config.prompt_learning_rate is None else config.prompt_learning_rate
        self.optimizer = torch.optim.AdamW(
            soft_prompt.parameters(),
            lr=learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=config.prompt_weight_decay,
        )
        own_schedule = config.prompt_lr_scheduler_type is not None
        schedule = SchedulerType(config.prompt_lr_scheduler_type if own_schedule else args.lr_scheduler_type)
        if schedule in _NEED_METRICS:
            raise ValueError(
                f"The soft prompt cannot follow the schedule {schedule.value!r}, which waits for metrics. Set "
                "`prompt_lr_scheduler_type` to another one, such as 'constant_with_warmup'."
            )
        warmup_steps = config.prompt_warmup_steps
        self.scheduler = get_scheduler(
            schedule,
            optimizer=self.optimizer,
            num_warmup_steps=args.get_warmup_steps(num_training_steps) if warmup_steps is None else warmup_steps,
            num_training_steps=num_training_steps,
            scheduler_specific_kwargs=None if own_schedule else args.lr_scheduler_kwargs,
        )

    @property
    def learns(self) -> bool:
        """Whether the prompt is trained. With a learning rate of 0 it stays as it is, and costs as much as a text."""
        return bool(self.optimizer.defaults["lr"] > 0)

    @property
    def learning_rate(self) -> float:
        return self.scheduler.get_last_lr()[0]

    def accumulate(self, gradient: StateGradient, num_tokens: Tensor) -> None:
        """Add to the prompt's gradient. It comes from a loss's gradient with respect to the teacher's hidden states.

        Args:
            gradient: That of the loss summed over tokens.
            num_tokens: Number of tokens by which this sum is divided.
        """
        parameters = list(self.soft_prompt.parameters())
        states, outer = gradient.tensors[0], gradient.gradients[0] * (self.loss_scale / num_tokens)
        gradients = torch.autograd.grad(states, parameters, outer.to(states.dtype))
        for parameter, gradient_of_it in zip(parameters, gradients, strict=True):
            part = gradient_of_it / self.loss_scale
            parameter.grad = part if parameter.grad is None else parameter.grad + part

    def step(self) -> float:
        """One step with what has been accumulated on all ranks.

        Returns:
            `float`: the gradient's norm before clipping.

        Raises:
            FloatingPointError: after five skipped steps in a row. A step is skipped if its gradient is not finite.
        """
        for parameter in self.soft_prompt.parameters():
            parameter.grad = self.accelerator.reduce(parameter.grad, reduction="sum")
        limit = self.max_grad_norm or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(self.soft_prompt.parameters(), limit))
        if math.isfinite(norm):
            self.skipped_in_a_row = 0
            self.optimizer.step()
            self.scheduler.step()
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
            self.loss_scale = max(1.0, self.loss_scale / 2)
            logger.warning(f"The soft prompt's gradient is {norm}; this step of the prompt is skipped.")
            if self.skipped_in_a_row >= _MAX_SKIPPED_IN_A_ROW:
                raise FloatingPointError(
                    f"The soft prompt's gradient was not finite in {_MAX_SKIPPED_IN_A_ROW} steps in a row. Check the "
                    "teacher's logits for NaN or infinities; load it in bfloat16 or float32 if it is in float16."
                )
        self.optimizer.zero_grad()
        return norm

    def save(self, checkpoint: str) -> None:
        """Write Adam's moments, the schedule and the loss scale to `checkpoint`, as safetensors."""
        tensors: dict[str, Tensor] = {}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
        metadata = {"scheduler": json.dumps(self._schedule()), "loss_scale": json.dumps(self.loss_scale)}
        write_safetensors(tensors, os.path.join(checkpoint, _STATE_FILE), metadata)

    def load(self, checkpoint: str) -> None:
        """Resume from what [`~PromptOptimizer.save`] wrote.

        Raises:
            FileNotFoundError: if the checkpoint has no such file. Starting anew would not be resuming.
            ValueError: if the file belongs to another prompt or another schedule.
        """
        path = os.path.join(checkpoint, _STATE_FILE)
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"{checkpoint} has no {_STATE_FILE}: it was not written by PromptKDTrainer, or not completely. Resume "
                "from another checkpoint, or start anew without `resume_from_checkpoint`."
            )
        tensors, metadata = read_safetensors(path, "Resume from another checkpoint.")
        parameters = list(self.soft_prompt.parameters())
        shapes = {
            f"{index}.{name}": tuple(parameter.shape) if name != "step" else ()
            for index, parameter in enumerate(parameters)
            for name in ("step", "exp_avg", "exp_avg_sq")
        }
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found not in ({}, shapes):  # before the first step there are no tensors
            raise ValueError(
                f"{path} holds another soft prompt than this run's: found {found}, expected {shapes}. Resume with the "
                "`PromptEncoderConfig` the run was started with."
            )
        schedule, here = json.loads(metadata["scheduler"]), self._schedule()
        if schedule.keys() != here.keys():
            raise ValueError(
                f"`scheduler` in {path} has {sorted(schedule)}, and this run's has {sorted(here)}. Resume with the "
                "schedule the run was started with, or from another checkpoint."
            )
        state = self.optimizer.state_dict()
        for name, tensor in tensors.items():
            index, key = name.split(".")
            state["state"].setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict(state)
        self.loss_scale = json.loads(metadata["loss_scale"])
        # The lambdas come from this run's settings and stay
        self.scheduler.load_state_dict(schedule | {"lr_lambdas": [None]})
        for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def _schedule(self) -> dict[str, Any]:
        return {key: value for key, value in self.scheduler.state_dict().items() if key != "lr_lambdas"}
