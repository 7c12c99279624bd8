"""Settings of [`PromptKDTrainer`]."""

from dataclasses import dataclass, field
from typing import Any

from transformers.utils import logging
from trl import SFTConfig

from .._trl import GKDConfig, rename_checkpointing
from ..field_checks import (
    check_at_least_zero,
    check_ignored,
    check_kinds,
    check_number,
    check_positive,
    check_share,
    check_training,
)
from .best_metric import choose_best_metric
from .precision import choose_precision
from .sampling_config import SamplingConfig


__all__ = ["PromptKDConfig"]

logger = logging.get_logger(__name__)

# Fields of SFTConfig that would be silently ignored: name -> (the only valid value, why or what to do instead)
_IGNORED = {
    "packing": (False, "rows are distilled one by one; sequences hold sampled completions of unknown length"),
    "padding_free": (False, "batches are padded"),
    "assistant_only_loss": (False, "the loss covers the last answer of a conversation"),
    "loss_type": ("nll", "the loss is the divergence that `beta` selects"),
    "activation_offloading": (False, "parts of the backward pass are made within the forward pass"),
    "enable_jit_checkpoint": (False, "it saves in the middle of a step; `save_on_interrupt=True` does so at its end"),
    "label_smoothing_factor": (0.0, "there are no hard labels"),
}


@dataclass
class PromptKDConfig(SamplingConfig, GKDConfig):
    """
    Configuration class for [`PromptKDTrainer`].

    The fields of TRL's `GKDConfig` keep their names and their meaning. For those of `trl.SFTConfig` and
    [`~transformers.TrainingArguments`], see these classes. How completions are sampled, also by vLLM, is in
    [`~trl_promptkd.trainer.sampling_config.SamplingConfig`]. The soft prompt's own settings are in
    [`PromptEncoderConfig`]. The defaults are the paper's.

    Args:
        lmbda (`float`, *optional*, defaults to `1.0`):
            Share of rows whose completion the student samples, drawn row by row. The other rows are trained on the
            data's answers, or on the teacher's with `seq_kd`.
        beta (`float`, *optional*, defaults to `1.0`):
            Divergence of the student's loss. `1.0` is the reverse KL(student || teacher), and `0.0` the forward KL.
            Values between are the generalized Jensen-Shannon divergence. It goes to 0 towards both ends, and does not
            turn into either KL there.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of sampling.
        max_new_tokens (`int`, *optional*, defaults to `128`):
            Longest completion that the student or the teacher samples, in tokens.
        seq_kd (`bool`, *optional*, defaults to `False`):
            Let the teacher write the completions of the rows that the student does not sample.
        teacher_model_name_or_path (`str`, *optional*):
            The teacher, if none is passed to the trainer. `None`: the student's own starting weights.
        teacher_model_init_kwargs (`dict`, *optional*):
            Arguments of `from_pretrained` for a teacher that is given by name.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Switch the student's dropout off, also that of its adapter (`lora_dropout`).
        loss_temperature (`float`, *optional*, defaults to `1.0`):
            Both models' logits are divided by it in every divergence. Losses and logged values are in nats at this
            temperature, without a factor of its square.
        prompt_divergence (`str`, *optional*, defaults to `"reverse"`):
            Direction of the soft prompt's loss. `"reverse"` is KL(prompted || student) + w KL(prompted || plain).
            `"forward"` has both terms the other way round.
        regularization_coef (`float`, *optional*, defaults to `1.0`):
            `w` at the first step. It says how strongly the prompted teacher is held to the plain one. With `0.0`, the
            plain teacher only runs on steps that are logged.
        regularization_schedule (`str`, *optional*, defaults to `"linear"`):
            `"linear"` lets `w` fall to 0 at the end of training. `"constant"` keeps it.
        prompt_update (`str`, *optional*, defaults to `"sequential"`):
            Which prompt the student learns from. `"sequential"`, the paper's: the prompt steps in the window's last
            micro-batch. The student learns from the new prompt in this micro-batch, and from the old one in the
            others. `"simultaneous"`: the student learns from the old prompt in all micro-batches. This saves one
            teacher pass, and the split of a window into micro-batches makes no difference at all.
        prompt_share (`float`, *optional*, defaults to `1.0`):
            Share of a window's rows, rounded up, from which the prompt's gradient is taken: the first ones in the
            data's order. `1.0` is the paper's. With less, the other rows need neither the plain teacher nor a
            backward pass through the prompted one. With `"sequential"`, the prompt steps in the micro-batch that
            holds the last such row. The student learns from the new prompt in it and in all later ones.
        teacher_gradient_checkpointing (`bool`, *optional*, defaults to `False`):
            Keep only the inputs of the teacher's layers for the soft prompt's backward pass, and recompute the rest.
            This takes less memory and one more forward pass. `gradient_checkpointing` is the student's.
        overlong (`str`, *optional*, defaults to `"error"`):
            What to do with rows whose prompt does not fit into `max_length`. `"error"` raises an error that says how
            many there are. `"drop"` leaves them out and reports how many. `max_length` limits prompt and answer of the
            data. A sampled completion of up to `max_new_tokens` comes on top of the prompt.
        loss_chunk_size (`int`, *optional*, defaults to `256`):
            Tokens whose logits exist at once, in every pass. `None`: all. Under FSDP2 and ZeRO-3, those of a
            micro-batch exist at once.
        save_on_interrupt (`bool`, *optional*, defaults to `False`):
            On SIGTERM, finish the step, save a checkpoint and end the training. `train(resume_from_checkpoint=True)`
            resumes from it.
    """

    # Metrics of evaluations. The first one chooses the best checkpoint
    _FALLING_METRICS = ("forward_kl", "reverse_kl", "loss")
    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs", "generation_kwargs"]

    dataset_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Kept for the base class. Rows are always prepared by this package."}
    )
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "The collator needs columns that the model's forward does not know."}
    )
    lmbda: float = field(
        default=1.0, metadata={"help": "Share of rows whose completion the student samples, drawn row by row."}
    )
    beta: float = field(
        default=1.0,
        metadata={"help": "1.0: reverse KL(student || teacher). 0.0: forward KL. Between: generalized JSD."},
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of sampling."})
    max_new_tokens: int = field(
        default=128, metadata={"help": "Longest completion that the student or the teacher samples."}
    )
    seq_kd: bool = field(
        default=False,
        metadata={"help": "Let the teacher write the completions of the rows that the student does not sample."},
    )
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The teacher. None: the student's own starting weights."}
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of from_pretrained, if the teacher is given by name."}
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Switch the student's dropout off, also that of its adapter."}
    )
    loss_temperature: float = field(
        default=1.0, metadata={"help": "Both models' logits are divided by it in every divergence."}
    )
    prompt_divergence: str = field(
        default="reverse",
        metadata={"help": "Direction of the soft prompt's loss.", "choices": ["reverse", "forward"]},
    )
    regularization_coef: float = field(
        default=1.0, metadata={"help": "Weight of KL(prompted || plain) in the soft prompt's loss at the first step."}
    )
    regularization_schedule: str = field(
        default="linear",
        metadata={"help": "Whether that weight falls to 0 over the training.", "choices": ["linear", "constant"]},
    )
    prompt_update: str = field(
        default="sequential",
        metadata={
            "help": "Whether the student learns from the prompt after or before its update.",
            "choices": ["sequential", "simultaneous"],
        },
    )
    prompt_share: float = field(
        default=1.0,
        metadata={"help": "Share of a window's rows from which the soft prompt's gradient is taken. Paper: 1.0."},
    )
    teacher_gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute the teacher's activations in the soft prompt's backward pass."}
    )
    overlong: str = field(
        default="error",
        metadata={"help": "Reject or leave out rows whose prompt exceeds `max_length`.", "choices": ["error", "drop"]},
    )
    loss_chunk_size: int | None = field(
        default=256, metadata={"help": "Tokens whose logits exist at once. None: all."}
    )

    save_on_interrupt: bool = field(
        default=False, metadata={"help": "On SIGTERM, finish the step, save a checkpoint and end the training."}
    )

    def __post_init__(self):
        check_kinds(self, SFTConfig, SamplingConfig, PromptKDConfig)
        choose_precision(self)
        check_share(self, "lmbda", "beta")
        by_loss = self.metric_for_best_model in ("loss", "eval_loss")
        if choose_best_metric(self, "eval_forward_kl") and by_loss:
            logger.warning(
                f"`metric_for_best_model` is {self.metric_for_best_model!r}: the distance to the prompted teacher, "
                "which also falls when the prompt follows its student. Set it to 'eval_forward_kl' (the default), "
                "or to a task metric."
            )
        rename_checkpointing(self)
        super().__post_init__()
        self.check_values()
        if self.seq_kd and self.lmbda == 1:
            logger.warning(
                "`seq_kd` is True and `lmbda` 1.0: all rows are sampled by the student, none by the teacher. Lower "
                "`lmbda`."
            )
        # Rows are tokenized by this package, for conversations and plain texts alike
        given = self.dataset_kwargs if isinstance(self.dataset_kwargs, dict) else {}
        self.dataset_kwargs = {**given, "skip_prepare_dataset": True}

    def check_values(self) -> None:
        """Reject values that are out of range, and fields of the base classes that would be ignored."""
        check_training(self)
        check_share(self, "lmbda", "beta")
        check_positive(self, "loss_temperature", "loss_chunk_size")
        check_number(self, "prompt_share", lambda share: 0 < share <= 1, "above 0 and at most 1")
        check_at_least_zero(self, "regularization_coef")
        self.check_sampling()
        check_ignored(self, "PromptKD", _IGNORED)
