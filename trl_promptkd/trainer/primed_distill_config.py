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

# Fields of SFTConfig that would be ignored without a word: name -> (the value that is right here, what to do instead)
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

    This class includes only what is specific to response priming. For the rest, see
    [`~transformers.TrainingArguments`] and `trl.SFTConfig`, whose fields keep their meaning; how answers are sampled
    is in [`~trl_promptkd.trainer.sampling_config.SamplingConfig`], vLLM included.

    Args:
        alpha (`float`, *optional*):
            Weight of the hard-label term: `alpha * CE + (1 - alpha) * kd_temperature**2 * divergence`. By default the
            paper's 0.6093; with `response_source="student"`, which has no hard labels, 0; with `teacher_answers_url`,
            which has no soft ones, 1.
        kd_temperature (`float`, *optional*, defaults to `5.942267335064758`):
            Both models' logits are divided by it in the divergence, which is multiplied by its square. The
            cross-entropy stays at temperature 1.
        kd_beta (`float`, *optional*, defaults to `1.0`):
            The divergence: `1.0` the reverse KL(student || teacher), as in the released code, `0.0` the forward KL,
            between them the generalized Jensen-Shannon divergence, which goes to 0 towards both ends.
        skew (`float`, *optional*, defaults to `0.0`):
            Share of the first distribution of either KL that is mixed into its second one (DistiLLM), which bounds the
            divergence; 0.1 is a common choice.
        response_source (`str`, *optional*, defaults to `"dataset"`):
            Whose answers both models are compared on: `"dataset"`, the data's own; `"teacher"`, answers that the
            primed teacher writes once, before training, kept in `teacher_answers_dir`; `"student"`, the student's own
            samples, drawn anew at every step.
        teacher_model_name_or_path (`str` or `dict`, *optional*):
            The teacher, if none is passed to the trainer. A `dict` has several by name; see the trainer's
            `teacher_model`.
        teacher_model_init_kwargs (`dict`, *optional*):
            For `AutoModelForCausalLM.from_pretrained`, if the teacher is given by name; for example
            `{"quantization_config": {"load_in_4bit": True}}`. It holds for all that are.
        teacher_server (`str` or `dict`, *optional*):
            Where the teacher runs, instead of here: the address of a vLLM server in pooling mode, such as
            `"http://host:8000"`. Of the teacher's weights, only the output head is loaded. A `dict` has the servers
            of several teachers by name.
        teacher_server_dtype (`str`, *optional*, defaults to `"bfloat16"`):
            What the hidden states travel in: `"bfloat16"`, or `"float32"`, which takes twice the bytes.
        teacher_server_timeout (`float`, *optional*, defaults to `120.0`):
            Seconds after which a request to the server fails, with all its tries.
        teacher_max_length (`int`, *optional*):
            Longest row in tokens as the teacher sees it, priming and answer included. `None` for no limit.
            `max_length` bounds it as the student sees it.
        overlong (`str`, *optional*, defaults to `"drop"`):
            What to do with rows that exceed either: `"drop"` leaves them out and reports how many, `"error"` refuses
            them. Nothing is ever cut.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Longest answer that the teacher or the student writes. It comes on top of the prompt; `max_length` then
            bounds the prompt alone.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of sampling.
        teacher_answers_dir (`str`, *optional*):
            Where the teacher's answers are kept, and looked for; `output_dir/_teacher_answers` by default.
        teacher_answers_url (`str`, *optional*):
            With `response_source="teacher"`: an OpenAI-compatible API, such as `http://localhost:8000/v1`, that writes
            the answers instead of a teacher here. The student is then trained on hard labels alone (`alpha` 1), and
            the teacher may have any tokenizer. Rows are asked for `rollout_batch_size` at once, by default 32. A key
            comes from the environment variable `OPENAI_API_KEY`.
        teacher_answers_model (`str`, *optional*):
            The teacher's name there. `None` takes the only one that the API lists.
        padding_free (`bool`, *optional*, defaults to `False`):
            Whether student and teacher run the rows of a micro-batch end to end in one sequence, without padding. It
            needs `per_device_train_batch_size` above 1 to save anything. A model that does not keep such rows apart is
            refused before training. Unlike in TRL, `max_length` holds, evaluation does the same, and any attention
            implementation will do. Only FlashAttention skips what is masked: others compute the micro-batch's square.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Whether to switch the student's own dropout off, which the teacher does not have either. An adapter's
            `lora_dropout` stays.
        loss_chunk_size (`int`, *optional*, defaults to `256`):
            Tokens whose logits exist at once. `None` for all. Under FSDP2 and ZeRO-3, those of a micro-batch exist at
            once.
        save_on_interrupt (`bool`, *optional*, defaults to `False`):
            On SIGTERM, finish the step, save a checkpoint and end the training; `train(resume_from_checkpoint=True)`
            resumes from it.
    """

    _FALLING_METRICS = ("ce", "kl/student_teacher", "kd", "loss")  # of evaluations
    _VALID_DICT_FIELDS = [
        *SFTConfig._VALID_DICT_FIELDS,
        "teacher_model_init_kwargs",
        "generation_kwargs",
        "teacher_model_name_or_path",
        "teacher_server",
    ]

    dataset_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Kept for the base class; rows are always prepared by this package."}
    )
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "The collator needs columns that the model's forward does not know."}
    )
    alpha: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the hard-label term. None: the paper's 0.6093, 0 on student samples, 1 with "
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
        default=0.0, metadata={"help": "Share of the first distribution of either KL mixed into its second one."}
    )
    response_source: str = field(
        default="dataset",
        metadata={"help": "Whose answers are trained on.", "choices": ["dataset", "teacher", "student"]},
    )
    # `Mapping`: if a field may be a `dict`, `check_kinds` takes each text for JSON
    teacher_model_name_or_path: Mapping[str, str | None] | str | None = field(
        default=None,
        metadata={"help": "The teacher, or JSON of several by name. None: the student's own starting weights."},
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "For from_pretrained, if the teacher is given by name."}
    )
    teacher_server: Mapping[str, str] | str | None = field(
        default=None,
        metadata={
            "help": "Address of a vLLM server in pooling mode that runs the teacher, or JSON of several by name."
        },
    )
    teacher_server_dtype: str = field(
        default="bfloat16",
        metadata={"help": "What hidden states travel in.", "choices": ["bfloat16", "float32"]},
    )
    teacher_server_timeout: float = field(
        default=120.0,
        metadata={"help": "Seconds after which a request to that server fails, tries included."},
    )
    teacher_max_length: int | None = field(
        default=None,
        metadata={"help": "Longest row in tokens as the teacher sees it, priming included; None: no limit."},
    )
    overlong: str = field(
        default="drop",
        metadata={"help": "Leave out and count, or refuse, rows that are too long.", "choices": ["drop", "error"]},
    )
    max_new_tokens: int = field(
        default=256, metadata={"help": "Longest answer that the teacher or the student writes."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of sampling."})
    teacher_answers_dir: str | None = field(
        default=None, metadata={"help": "Where the teacher's answers are kept; None: output_dir/_teacher_answers."}
    )
    teacher_answers_url: str | None = field(
        default=None, metadata={"help": "An OpenAI-compatible API that writes the teacher's answers."}
    )
    teacher_answers_model: str | None = field(
        default=None, metadata={"help": "The teacher's name there; None: the only one that the API lists."}
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Switch the student's own dropout off; an adapter's stays."}
    )
    loss_chunk_size: int | None = field(
        default=256, metadata={"help": "Tokens whose losses are computed at once; None: all."}
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
        # On the student's own samples the cross-entropy falls when the student collapses. The loss is the divergence
        # alone there.
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
        """Refuse values out of range or that do not go together, and fields of the base classes that would have no
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
        """Refuse what answers from an API cannot have."""
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
