"""Settings of [`PrimedDistillTrainer`]."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trl import SFTConfig

from .._trl import rename_checkpointing
from ..field_checks import (
    check_ignored,
    check_kind,
    check_kinds,
    check_number,
    check_positive,
    check_share,
    check_training,
)
from ..generation import openai_server, teacher_server
from ..generation.servers import check_url
from .best_metric import choose_best_metric
from .precision import choose_precision
from .sampling_config import SamplingConfig


__all__ = ["PrimedDistillConfig"]

_PAPER_ALPHA = 0.6093348343631224

# Fields of SFTConfig that would be silently ignored: name -> (the only valid value, why or what to do instead)
_IGNORED = {
    "packing": (
        False,
        "a batch has a fixed number of rows, in two views of different lengths. `padding_free=True` runs them without "
        "padding",
    ),
    "assistant_only_loss": (False, "the loss covers the last answer of a conversation; make a row of each answer"),
    "loss_type": ("nll", "the loss is made of cross-entropy and the divergence that `kd_beta` selects"),
    "activation_offloading": (False, "parts of the backward pass are made within the forward pass"),
    "enable_jit_checkpoint": (False, "it saves in the middle of a step; `save_on_interrupt=True` does so at its end"),
    "label_smoothing_factor": (0.0, "the teacher's distribution is the smoothing; `alpha` weighs it"),
}


@dataclass
class PrimedDistillConfig(SamplingConfig, SFTConfig):
    """
    Configuration class for [`PrimedDistillTrainer`].

    This class includes only the fields that are specific to response priming. For the others, see
    [`~transformers.TrainingArguments`] and `trl.SFTConfig`. They keep their meaning. How answers are sampled, also by
    vLLM, is in [`~trl_promptkd.trainer.sampling_config.SamplingConfig`].

    Args:
        alpha (`float`, *optional*):
            Weight of the hard-label term in `alpha * CE + (1 - alpha) * kd_temperature**2 * divergence`. The default
            is the paper's 0.6093. With `response_source="student"` there are no hard labels, and the default is 0.
            With `teacher_answers_url` there are no soft labels, and the default is 1.
        kd_temperature (`float`, *optional*, defaults to `5.942267335064758`):
            Both models' logits are divided by it in the divergence, which is multiplied by its square. The
            cross-entropy stays at temperature 1.
        kd_beta (`float`, *optional*, defaults to `1.0`):
            The divergence. `1.0` is the reverse KL(student || teacher), as in the released code, and `0.0` the forward
            KL. Values between are the generalized Jensen-Shannon divergence, which goes to 0 towards both ends.
        skew (`float`, *optional*, defaults to `0.0`):
            Share of the first distribution of either KL that is mixed into its second one (DistiLLM). It bounds the
            divergence. 0.1 is a common choice.
        response_source (`str`, *optional*, defaults to `"dataset"`):
            Whose answers both models are compared on. `"dataset"`: the data's own. `"teacher"`: answers that the
            primed teacher writes once, before training. They are kept in `teacher_answers_dir`. `"student"`: the
            student's own samples, drawn anew at every step.
        teacher_model_name_or_path (`str` or `dict`, *optional*):
            The teacher, if none is passed to the trainer. A `dict` has several by name, as the trainer's
            `teacher_model`.
        teacher_model_init_kwargs (`dict`, *optional*):
            Arguments of `AutoModelForCausalLM.from_pretrained` for every teacher that is given by name, for example
            `{"quantization_config": {"load_in_4bit": True}}`.
        teacher_server (`str` or `dict`, *optional*):
            Address of a vLLM server in pooling mode that runs the teacher, such as `"http://host:8000"`. Only the
            output head of the teacher is then loaded here. A `dict` has the servers of several teachers by name.
        teacher_server_dtype (`str`, *optional*, defaults to `"bfloat16"`):
            Type in which the server sends hidden states: `"bfloat16"`, or `"float32"`, which takes twice the bytes.
        teacher_server_timeout (`float`, *optional*, defaults to `120.0`):
            Seconds after which a request to the server fails, all its tries included.
        teacher_max_length (`int`, *optional*):
            Longest row in tokens as the teacher sees it, with priming text and answer. `None`: no limit. `max_length`
            limits the row as the student sees it.
        overlong (`str`, *optional*, defaults to `"drop"`):
            What to do with rows that exceed either limit. `"drop"` leaves them out and reports how many. `"error"`
            raises an error. Rows are never cut.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Longest answer that the teacher or the student writes, in tokens. It comes on top of the prompt, and
            `max_length` then limits the prompt alone.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of sampling.
        teacher_answers_dir (`str`, *optional*):
            Folder in which the teacher's answers are kept and looked for. `None`: `output_dir/_teacher_answers`.
        teacher_answers_url (`str`, *optional*):
            URL of an OpenAI-compatible API, such as `http://localhost:8000/v1`. With `response_source="teacher"`, it
            writes the answers instead of a teacher here. The student is then trained on hard labels alone (`alpha` 1),
            and the teacher may have any tokenizer. `rollout_batch_size` rows are requested at once, by default 32. The
            key comes from the environment variable `OPENAI_API_KEY`.
        teacher_answers_model (`str`, *optional*):
            The teacher's name in that API. `None`: the only one that the API lists.
        padding_free (`bool`, *optional*, defaults to `False`):
            Whether student and teacher run the rows of a micro-batch end to end in one sequence, without padding. This
            saves work only if `per_device_train_batch_size` is above 1. A model that does not keep such rows apart is
            rejected before training. Unlike in TRL, `max_length` still holds, evaluation is padding-free too, and any
            attention implementation works. Only FlashAttention skips what is masked. Others compute the square of the
            whole micro-batch.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Whether to switch the student's own dropout off, which the teacher does not have either. An adapter's
            `lora_dropout` stays.
        loss_chunk_size (`int`, *optional*, defaults to `256`):
            Tokens whose logits exist at once. `None`: all. Under FSDP2 and ZeRO-3, those of a micro-batch exist at
            once.
        save_on_interrupt (`bool`, *optional*, defaults to `False`):
            On SIGTERM, finish the step, save a checkpoint and end the training. `train(resume_from_checkpoint=True)`
            resumes from it.
    """

    _FALLING_METRICS = ("ce", "kl/student_teacher", "kd", "loss")  # metrics of evaluations
    _VALID_DICT_FIELDS = [
        *SFTConfig._VALID_DICT_FIELDS,
        "teacher_model_init_kwargs",
        "generation_kwargs",
        "teacher_model_name_or_path",
        "teacher_server",
    ]

    dataset_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Kept for the base class. Rows are always prepared by this package."}
    )
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "The collator needs columns that the model's forward does not know."}
    )
    alpha: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the hard-label term. None: the paper's 0.6093, but 0 on student samples, and 1 with "
            "teacher_answers_url."
        },
    )
    kd_temperature: float = field(
        default=5.942267335064758,
        metadata={
            "help": "Both models' logits are divided by it in the divergence, which is multiplied by its square."
        },
    )
    kd_beta: float = field(
        default=1.0,
        metadata={"help": "1.0: reverse KL(student || teacher). 0.0: forward KL. Between: generalized JSD."},
    )
    skew: float = field(
        default=0.0, metadata={"help": "Share of the first distribution of either KL that is mixed into its second."}
    )
    response_source: str = field(
        default="dataset",
        metadata={"help": "Whose answers are trained on.", "choices": ["dataset", "teacher", "student"]},
    )
    # `Mapping`, because `check_kinds` reads every text as JSON if a field may be a `dict`
    teacher_model_name_or_path: Mapping[str, str | None] | str | None = field(
        default=None,
        metadata={"help": "The teacher, or JSON of several by name. None: the student's own starting weights."},
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of from_pretrained, if the teacher is given by name."}
    )
    teacher_server: Mapping[str, str] | str | None = field(
        default=None,
        metadata={
            "help": "Address of a vLLM server in pooling mode that runs the teacher, or JSON of several by name."
        },
    )
    teacher_server_dtype: str = field(
        default="bfloat16",
        metadata={"help": "Type in which the server sends hidden states.", "choices": ["bfloat16", "float32"]},
    )
    teacher_server_timeout: float = field(
        default=120.0,
        metadata={"help": "Seconds after which a request to that server fails, all its tries included."},
    )
    teacher_max_length: int | None = field(
        default=None,
        metadata={"help": "Longest row in tokens as the teacher sees it, priming text included. None: no limit."},
    )
    overlong: str = field(
        default="drop",
        metadata={"help": "Leave out and count, or reject, rows that are too long.", "choices": ["drop", "error"]},
    )
    max_new_tokens: int = field(
        default=256, metadata={"help": "Longest answer that the teacher or the student writes."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of sampling."})
    teacher_answers_dir: str | None = field(
        default=None, metadata={"help": "Folder of the teacher's answers. None: output_dir/_teacher_answers."}
    )
    teacher_answers_url: str | None = field(
        default=None, metadata={"help": "URL of an OpenAI-compatible API that writes the teacher's answers."}
    )
    teacher_answers_model: str | None = field(
        default=None, metadata={"help": "The teacher's name in that API. None: the only one that the API lists."}
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Switch the student's own dropout off. An adapter's stays."}
    )
    loss_chunk_size: int | None = field(
        default=256, metadata={"help": "Tokens whose logits exist at once. None: all."}
    )

    save_on_interrupt: bool = field(
        default=False, metadata={"help": "On SIGTERM, finish the step, save a checkpoint and end the training."}
    )

    def __post_init__(self):
        check_kinds(self, SFTConfig, SamplingConfig, PrimedDistillConfig)
        for name in ("teacher_model_name_or_path", "teacher_server"):
            value = getattr(self, name)
            are_several = isinstance(value, Mapping) or (isinstance(value, str) and value.startswith("{"))
            check_kind(name, value, dict | None if are_several else str | None)
        choose_precision(self)
        # On the student's own samples, the cross-entropy falls when the student collapses. There the loss is the
        # divergence alone
        choose_best_metric(self, "eval_loss" if self.response_source == "student" else "eval_ce")
        rename_checkpointing(self)
        super().__post_init__()
        if self.alpha is None:
            self.alpha = 0.0 if self.response_source == "student" else _PAPER_ALPHA
            if self.teacher_answers_url is not None:
                self.alpha = 1.0
        self.check_values()
        # Rows are tokenized by this package, for conversations and plain texts alike
        given = self.dataset_kwargs if isinstance(self.dataset_kwargs, dict) else {}
        self.dataset_kwargs = {**given, "skip_prepare_dataset": True}

    def check_values(self) -> None:
        """Reject values that are out of range or do not go together, and fields of the base classes that would have no
        effect."""
        check_training(self)
        check_positive(self, "kd_temperature", "teacher_max_length", "teacher_server_timeout", "loss_chunk_size")
        if isinstance(self.teacher_server, Mapping):
            for name, url in self.teacher_server.items():
                check_url(f"teacher_server[{name!r}]", url, teacher_server.KEY_VARIABLE, "http://host:8000")
        elif self.teacher_server is not None:
            check_url("teacher_server", self.teacher_server, teacher_server.KEY_VARIABLE, "http://host:8000")
        self.check_sampling()
        check_ignored(self, "primed distillation", _IGNORED)
        samples = self.response_source == "student"
        check_share(self, "alpha", "kd_beta")
        if samples and self.alpha:
            raise ValueError(
                f"`alpha` is {self.alpha} with `response_source='student'`: the student's own samples are no hard "
                "labels. Set `alpha=0` (or omit it), or train on `response_source='dataset'` or `'teacher'`."
            )
        self._check_answers_api()
        if self.padding_free and self.pad_to_multiple_of is not None:
            raise ValueError(
                f"`pad_to_multiple_of` is {self.pad_to_multiple_of} with `padding_free=True`, which leaves out "
                "all padding. Omit one of them."
            )
        check_number(self, "skew", lambda value: 0 <= value < 1, "at least 0 and below 1")
        if self.skew and 0 < self.kd_beta < 1:
            raise ValueError(
                f"`skew` is {self.skew} with `kd_beta={self.kd_beta}`: only the forward and the reverse KL "
                "(`kd_beta` 0 or 1) are skewed; the Jensen-Shannon divergence mixes both distributions already. Set "
                "`skew=0`."
            )

    def _check_answers_api(self) -> None:
        """Reject settings that do not work with answers from an API."""
        if self.teacher_answers_url is None:
            if self.teacher_answers_model is not None:
                raise ValueError(
                    f"`teacher_answers_model` is {self.teacher_answers_model!r}, but `teacher_answers_url` is None. "
                    "Set it to the address of the API that has this model."
                )
            return
        check_url(
            "teacher_answers_url", self.teacher_answers_url, openai_server.KEY_VARIABLE, "http://localhost:8000/v1"
        )
        if self.response_source != "teacher":
            raise ValueError(
                f"`teacher_answers_url` is set, but `response_source` is {self.response_source!r}. Set "
                "`response_source='teacher'`, or omit `teacher_answers_url`."
            )
        if self.alpha != 1:
            raise ValueError(
                f"`alpha` is {self.alpha} with `teacher_answers_url`: an API gives the teacher's answers, not its "
                "distributions, so there are hard labels alone. Set `alpha=1` (or omit it)."
            )
        if self.teacher_max_length is not None:
            raise ValueError(
                f"`teacher_max_length` is {self.teacher_max_length} with `teacher_answers_url`, but how many tokens a "
                "row has for a teacher behind an API is not known here. Omit it; `max_length` bounds the student's."
            )
        metric = self.metric_for_best_model or ""
        if any(metric.endswith(unknown) for unknown in ("kd", "kl/student_teacher", "teacher/top1_agreement")):
            raise ValueError(
                f"`metric_for_best_model` is {metric!r} with `teacher_answers_url`: of a teacher behind an API only "
                "the answers are known, so no evaluation has it. Set it to 'eval_ce' (or omit it)."
            )
        unsent = [name for name in self.generation_kwargs or {} if name != "do_sample"]
        unsent = [f"`generation_kwargs` holds {name!r}" for name in unsent]
        unsent += [f"`top_k` is {self.top_k}"] if self.top_k else []
        if unsent:
            raise ValueError(
                f"{unsent[0]}, which OpenAI's API does not know and a server might ignore. Omit it. With "
                "`teacher_answers_url`, sampling is set by `temperature`, `top_p`, `max_new_tokens`, `seed` and "
                "`generation_kwargs={'do_sample': False}`."
            )
