"""Trials of a hyperparameter search in one trainer: each starts where the first did, and its settings reach all that uses them."""

import dataclasses
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers import set_seed

from ..field_checks import check_at_least_zero, check_positive
from ..models.soft_prompt import PromptEncoderConfig, SoftPrompt


__all__ = ["objective_for", "set_trial", "trials_start_here"]

# Fields that are read while a run goes on. Others have been used up when the trainer was made: to set them would do nothing
_OF_EVERY_TRAINER = (
    *("learning_rate", "weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps", "seed"),
    *("per_device_train_batch_size", "gradient_accumulation_steps"),
)
_OF_PROMPT = (
    *("prompt_learning_rate", "prompt_weight_decay", "prompt_lr_scheduler_type", "prompt_warmup_steps"),
    "prompt_max_grad_norm",
)


def objective_for(
    compute_objective: Callable[[dict[str, float]], float] | None, metric: str, direction: str | list[str]
) -> Callable[[dict[str, float]], float]:
    """What trials are compared by: what the user says, or else `metric`, which settings do not change the meaning of.

    The base class's default adds up all metrics of an evaluation, KLs and accuracies alike.

    Raises:
        ValueError: where `metric` is not to become small, or, when it is asked, not there.
    """
    if compute_objective is not None:
        return compute_objective
    if direction != "minimize":
        raise ValueError(
            f"`direction` is {direction!r}, but without a `compute_objective` trials are compared by `{metric}`, of which less is better. Set it to "
            "'minimize', or pass a function of the metrics."
        )

    def objective(metrics: dict[str, float]) -> float:
        if metric not in metrics:
            raise ValueError(
                f"Trials are compared by `{metric}`, which this evaluation does not have; it has {', '.join(sorted(metrics))}. Pass a "
                "`compute_objective`, a function of the metrics."
            )
        return metrics[metric]

    return objective


@contextmanager
def trials_start_here(
    trainer: Any,
    backend: Any,
    use_settings: Callable[[], None],
    soft_prompt: SoftPrompt | None = None,
) -> Iterator[None]:
    """Inside, `trainer.train(trial=...)` starts from the student, the soft prompt and the random state that there are now.

    Afterwards the trainer has them again, and its settings, as if there had been no search.

    Args:
        use_settings: Gives `trainer.args` to what the trainer has made of them.

    Raises:
        ValueError: where trials cannot be started anew.
    """
    name = getattr(backend, "value", backend)
    if name not in (None, "optuna"):
        raise ValueError(f"`backend` is {name!r}; trials have been made to work with 'optuna' only. Leave it away.")
    args, accelerator = trainer.args, trainer.accelerator
    if accelerator.num_processes > 1 or accelerator.state.deepspeed_plugin is not None or args.use_vllm:
        raise ValueError(
            "`hyperparameter_search` works on one process, without DeepSpeed and vLLM: nothing else has been made to start anew. Run it so, or make a "
            "trainer for each trial yourself."
        )
    if trainer.optimizer is not None or trainer.lr_scheduler is not None:
        raise ValueError(
            "The trainer has an optimizer already, of `optimizers` or of an earlier `train()`, which would go on from trial to trial. Make a new "
            "trainer without `optimizers` for the search."
        )
    student: Any = trainer.model
    kept = {module: _copies(module) for module in (student, soft_prompt) if module is not None}
    settings, prompt_config = dict(vars(args)), getattr(trainer, "prompt_encoder_config", None)
    random_state = _random_state()
    space: list[Any] = []

    def start() -> nn.Module:
        for module, values in kept.items():
            _put_back(module, values)
        if getattr(trainer, "neftune_hook_handle", None) is not None:
            trainer.neftune_hook_handle.remove()  # of a trial that was pruned
        # The next trial's accelerator is to prepare it as this one did
        extract_model_from_parallel(student, keep_fp32_wrapper=False)
        student.__dict__.pop("_is_accelerate_prepared", None)
        if prompt_config is not None:
            trainer.prompt_encoder_config = prompt_config
        vars(args).clear()
        vars(args).update(settings)
        if not space:
            space.append(getattr(trainer, "hp_space", None))
        trainer.hp_space = space[0]  # `set_trial` has used it up
        _set_random_state(random_state)
        return student

    trainer.model_init = start
    try:
        yield
    finally:
        trainer.model_init = trainer.hp_search_backend = None
        trainer.is_in_train = False
        trainer.model = trainer.model_wrapped = start()
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.create_accelerator_and_postprocess()
        use_settings()


def set_trial(trainer: Any, trial: Any, own: tuple[str, ...]) -> None:
    """Set what `trainer.hp_space` says for a trial, before the base class does: it leaves out what is no field of `trainer.args`, and makes a whole
    number of 0.5 where there was one before. Nothing is left to it but to prepare for these settings.

    Args:
        own: Fields of the trainer's own configuration that can be searched.

    Raises:
        ValueError: for fields that do nothing once a trainer is made, and for values that are refused anywhere else.
    """
    searched = trainer.hp_space(trial)
    trainer.hp_space = lambda trial: {}
    has_prompt = hasattr(trainer, "prompt_encoder_config")
    allowed = (*own, *(_OF_PROMPT if has_prompt else ()), *_OF_EVERY_TRAINER)
    for name in searched:
        if name not in allowed:
            raise ValueError(
                f"`hp_space` sets {name!r}, which is used when a trainer is made, or not at all. It can set {', '.join(allowed)}. For others make a "
                "trainer for each trial yourself."
            )
    of_prompt = {name: value for name, value in searched.items() if name in _OF_PROMPT}
    for name, value in searched.items():
        if name not in of_prompt:
            setattr(trainer.args, name, value)
    if of_prompt and not isinstance(trainer.prompt_encoder_config, PromptEncoderConfig):
        raise ValueError(
            f"`hp_space` sets {', '.join(of_prompt)}, which `prompt_encoder_config`, a {type(trainer.prompt_encoder_config).__name__} of PEFT's, does not "
            "have. Make the trainer with a `trl_promptkd.PromptEncoderConfig`."
        )
    if of_prompt:
        trainer.prompt_encoder_config = dataclasses.replace(trainer.prompt_encoder_config, **of_prompt)
    check_positive(trainer.args, "per_device_train_batch_size", "gradient_accumulation_steps")
    check_at_least_zero(trainer.args, "learning_rate", "seed")
    trainer.args.check_values()
    if "seed" in searched:
        set_seed(trainer.args.seed)


def _copies(module: nn.Module) -> dict[str, Tensor]:
    """What training changes, beside the device."""
    return {name: p.detach().to("cpu", copy=True) for name, p in module.named_parameters() if p.requires_grad}


@torch.no_grad()
def _put_back(module: nn.Module, values: dict[str, Tensor]) -> None:
    for name, parameter in module.named_parameters():
        if name in values:
            parameter.copy_(values[name])
            parameter.grad = None


def _random_state() -> tuple:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _set_random_state(state: tuple) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    if state[3] is not None:
        torch.cuda.set_rng_state_all(state[3])
