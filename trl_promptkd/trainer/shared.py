"""What both trainers do the same way. Functions whose first argument is `self` are methods of both."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils import is_peft_model
from torch import nn
from trl import SFTTrainer

from .._trl import keep_four_bit_weights_differentiable, old_names_of_checkpointing
from ..generation.rollouts import Rollouts
from ..generation.vllm import VLLMRollouts
from ..models.side_effects import flags_restored
from ..models.student import check_trains, student_by_name
from ..models.teacher import disable_dropout
from .checks import check_sharding, loaded_settings, restore_settings
from .logged_metrics import Means


__all__ = [
    "evaluation_loop",
    "hyperparameter_search",
    "load_best_model",
    "load_from_checkpoint",
    "prepared_student",
    "student_rollouts",
]


@contextmanager
def prepared_student(
    trainer: Any, model: Any, args: Any, quantization_config: Any = None, adapter_dropout: bool = False
) -> Iterator[tuple[Any, Any]]:
    """Put this around the base class's `__init__`. It yields what that gets as `model` and `quantization_config`.

    Afterwards, the student has the settings that it was loaded with again. It is checked, and its dropout is switched
    off if `args` say so.

    Args:
        adapter_dropout (`bool`): Whether an adapter's own dropout stays.
    """
    with student_by_name(model, args, quantization_config) as (loaded, quantization_config):
        settings = loaded_settings(loaded, args)
        with old_names_of_checkpointing(), _base_class_pads(args):
            yield loaded, quantization_config
    restore_settings(trainer.model, settings)
    trainer.aux_loss_enabled = False
    check_trains(trainer.model)
    check_sharding(trainer.accelerator)
    if args.disable_dropout:
        disable_dropout(trainer.model, adapters=not adapter_dropout)
    keep_four_bit_weights_differentiable(trainer.model)


@contextmanager
def _base_class_pads(args: Any) -> Iterator[None]:
    """Inside, `padding_free` is False. Otherwise the base class would forbid `max_length`, and any collator but its
    own, which joins rows end to end. Here the forward pass does that."""
    padding_free, args.padding_free = args.padding_free, False
    try:
        yield
    finally:
        args.padding_free = padding_free


def student_rollouts(trainer: Any) -> Rollouts | VLLMRollouts:
    """The object that samples the student's completions, as the trainer's `generation_config` says."""
    return (VLLMRollouts if trainer.args.use_vllm else Rollouts)(
        trainer.model,
        trainer.accelerator,
        trainer.processing_class,
        trainer.generation_config,
        trainer.args,
        trainer.shared_vocab_size,
    )


def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
    """As in the base class, but with means over the tokens of the whole set. The base class averages batch means."""
    self._eval_means, self._eval_batches = Means(), 0
    self.rollouts.sync()
    output = SFTTrainer.evaluation_loop(
        self, dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs
    )
    if not self.is_in_train and self.model_wrapped is self.model:
        # The base class may have prepared the student for evaluation only. `train()` would then not wrap it in DDP
        self.model.__dict__.pop("_is_accelerate_prepared", None)
    means = self._eval_means.report(self.accelerator)
    output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
    return output


def hyperparameter_search(self, *args: Any, **kwargs: Any):
    """Not supported. Most settings are used when a trainer is made, so each trial needs a trainer of its own."""
    raise NotImplementedError(
        "`hyperparameter_search` is not supported: most settings are used when a trainer is made, so a trial needs a "
        "trainer of its own. `examples/search.py` makes one for each trial, with Optuna, and resumes a search that "
        "was stopped."
    )


def load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
    """As in the base class. That would take `teacher_prompt/` for a second adapter of the student."""
    with flags_restored(self.model):  # PEFT makes all weights of an adapter trainable
        if is_peft_model(self.model) and not self.is_fsdp_enabled:
            name = self.model.active_adapters[0]
            folder = resume_from_checkpoint if name == "default" else os.path.join(resume_from_checkpoint, name)
            self.model.load_adapter(folder, name, is_trainable=True)
        else:
            SFTTrainer._load_from_checkpoint(self, resume_from_checkpoint, model)


def load_best_model(self) -> None:
    """As in the base class. PEFT would make all weights of an adapter trainable."""
    with flags_restored(self.model):
        SFTTrainer._load_best_model(self)
