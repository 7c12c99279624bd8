"""The soft prompt: its configuration, its parameters in one of PEFT's encoders, and its files.

The teacher is not wrapped. It may be quantized, already a PEFT model, or the student itself with its adapter switched
off. The saved files are a standard PEFT adapter nevertheless, which `PeftModel.from_pretrained(teacher, ...)` loads.
"""

import copy
import math
import os
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from peft import PromptTuningConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import SchedulerType

from .._trl import PromptEmbedding, PromptTuningInit, PTuningEncoder
from ..field_checks import check_at_least_zero, check_choice, check_kinds
from ..files import read_safetensors, whole_file
from .forward import input_embeddings


__all__ = ["ADAPTER_FOLDER", "PromptEncoderConfig", "SoftPrompt", "check_peft_config"]

ADAPTER_FOLDER = "teacher_prompt"  # within the student's folder, in checkpoints and on the Hub
PARAMETERS_FILE = "prompt_encoder.safetensors"
_INITS = {"text": "TEXT", "random": "RANDOM", "vocab": "SAMPLE_VOCAB"}
_ENCODERS = ("embedding", "mlp", "lstm")
# Without schedules that wait for metrics
_SCHEDULES = [s.value for s in SchedulerType if s not in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)]


@dataclass
class PromptEncoderConfig:
    """
    The teacher's soft prompt and how it is trained. The defaults are those of every released PromptKD script.

    Args:
        num_virtual_tokens (`int`, *optional*, defaults to `7`):
            Number of trainable embeddings before the teacher's input.
        prompt_init (`str`, *optional*, defaults to `"text"`):
            Where training starts. `"text"`: the embeddings of `prompt_init_text`, repeated or cut to
            `num_virtual_tokens`. `"vocab"`: the embeddings of randomly drawn tokens. `"random"`: normal noise with the
            standard deviation of the teacher's embeddings.
        prompt_init_text (`str`, *optional*, defaults to `"Suppose you are a student."`):
            Text for `prompt_init="text"`.
        encoder (`str`, *optional*, defaults to `"embedding"`):
            `"embedding"` trains the embeddings themselves (PEFT prompt tuning). `"mlp"` and `"lstm"` train a small
            network that produces them (PEFT P-tuning) and starts at the same embeddings.
        prompt_learning_rate (`float`, *optional*):
            Learning rate of the prompt. `None` takes the student's, as the paper does. A prompt that learns much
            faster than its student follows it instead of leading it. `0` keeps the prompt as it starts. A step then
            costs as much as one of plain on-policy distillation.
        prompt_weight_decay (`float`, *optional*, defaults to `0.01`):
            Weight decay of the prompt's AdamW.
        prompt_lr_scheduler_type (`str`, *optional*):
            Schedule of the prompt's learning rate. `None` takes the student's.
        prompt_warmup_steps (`int`, *optional*):
            Warm-up steps of that schedule. `None` takes the student's.
        prompt_max_grad_norm (`float`, *optional*, defaults to `1.0`):
            Norm to which the prompt's gradient is clipped. `0` turns clipping off.
    """

    num_virtual_tokens: int = field(
        default=7, metadata={"help": "Number of trainable embeddings before the teacher's input."}
    )
    prompt_init: str = field(
        default="text", metadata={"help": "Where the soft prompt's training starts.", "choices": list(_INITS)}
    )
    prompt_init_text: str = field(
        default="Suppose you are a student.", metadata={"help": "Text for `prompt_init='text'`."}
    )
    encoder: str = field(
        default="embedding",
        metadata={"help": "Train the embeddings, or a small network that produces them.", "choices": list(_ENCODERS)},
    )
    prompt_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the soft prompt. None: the student's. 0 keeps the prompt fixed."},
    )
    prompt_weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of the soft prompt."})
    prompt_lr_scheduler_type: str | None = field(
        default=None, metadata={"help": "Learning rate schedule of the soft prompt. None: the student's."}
    )
    prompt_warmup_steps: int | None = field(
        default=None, metadata={"help": "Warm-up steps of that schedule. None: the student's."}
    )
    prompt_max_grad_norm: float = field(
        default=1.0, metadata={"help": "Norm to which the soft prompt's gradient is clipped. 0 turns clipping off."}
    )

    def __post_init__(self):
        check_kinds(self, PromptEncoderConfig)
        if self.num_virtual_tokens < 1:
            raise ValueError(
                f"`num_virtual_tokens` is {self.num_virtual_tokens}, but a soft prompt needs at least 1 (the paper "
                "uses 7). For distillation without a soft prompt use TRL's `GKDTrainer` or `DistillationTrainer`."
            )
        if self.prompt_init == "text" and not self.prompt_init_text.strip():
            raise ValueError(
                f"`prompt_init_text` is {self.prompt_init_text!r}, which holds no text. Give a text, or set "
                "`prompt_init` to 'vocab' or 'random'."
            )
        check_at_least_zero(
            self, "prompt_learning_rate", "prompt_weight_decay", "prompt_warmup_steps", "prompt_max_grad_norm"
        )
        if self.prompt_lr_scheduler_type is not None:
            check_choice(self, "prompt_lr_scheduler_type", _SCHEDULES)

    def to_peft(
        self, teacher: PreTrainedModel | None = None, processing_class: PreTrainedTokenizerBase | str | None = None
    ) -> PromptTuningConfig | peft.PromptEncoderConfig:
        """PEFT's configuration of the same prompt: `PromptTuningConfig` for `encoder="embedding"`, else
        `peft.PromptEncoderConfig`.

        Args:
            teacher: Provides hidden size, heads and layers. Without it they stay `None`.
            processing_class: The teacher's tokenizer or its name, which PEFT records for `prompt_init="text"`.
        """
        name = None if teacher is None else teacher.config._name_or_path
        common: dict[str, Any] = {
            "task_type": "CAUSAL_LM",
            "num_virtual_tokens": self.num_virtual_tokens,
            "num_transformer_submodules": 1,
            "base_model_name_or_path": name,
        }
        config: PromptTuningConfig | peft.PromptEncoderConfig
        if self.encoder != "embedding":
            config = peft.PromptEncoderConfig(encoder_reparameterization_type=self.encoder.upper(), **common)
        else:
            if self.prompt_init == "text":
                tokenizer_name = getattr(processing_class, "name_or_path", processing_class)
                common["prompt_tuning_init_text"] = self.prompt_init_text
                common["tokenizer_name_or_path"] = tokenizer_name or name or "the teacher's tokenizer"
            config = PromptTuningConfig(prompt_tuning_init=_INITS[self.prompt_init], **common)
        return config if teacher is None else _filled(config, teacher)


def _filled(config: Any, teacher: PreTrainedModel) -> Any:
    """A PEFT configuration with the width of a model's embeddings, its layers and its heads.

    PEFT needs layers and heads to load the adapter, but uses neither. A model without them (Mamba, RWKV) gets 1.
    """
    about = teacher.config.get_text_config()
    width = embedding_width(input_embeddings(teacher))
    if config.token_dim not in (None, width):
        raise ValueError(
            f"`token_dim` of `prompt_encoder_config` is {config.token_dim}, but the teacher's embeddings have {width} "
            "numbers a token. Leave it at None, which takes the teacher's."
        )
    config.num_transformer_submodules = 1
    for name, value in (
        ("token_dim", width),
        ("encoder_hidden_size", width),
        ("num_layers", getattr(about, "num_hidden_layers", 1)),
        ("num_attention_heads", getattr(about, "num_attention_heads", 1)),
    ):
        if getattr(config, name, value) is None:
            setattr(config, name, value if isinstance(value, int) else 1)
    return config


def check_peft_config(config: Any) -> None:
    """Reject a PEFT configuration that is not a prompt before the input (LoRA, prefix tuning, ...)."""
    if type(config) not in (PromptTuningConfig, peft.PromptEncoderConfig):
        raise TypeError(
            f"`prompt_encoder_config` is a {type(config).__name__}, which does not describe a soft prompt before the "
            "teacher's input. Pass a `trl_promptkd.PromptEncoderConfig`, a `peft.PromptTuningConfig` or a "
            "`peft.PromptEncoderConfig`. (A LoRA configuration for the student goes into `peft_config`.)"
        )
    if not config.num_virtual_tokens or config.num_virtual_tokens < 1:
        raise ValueError(
            f"`num_virtual_tokens` is {config.num_virtual_tokens}, but a soft prompt needs at least 1 (the paper uses "
            "7)."
        )


class SoftPrompt(nn.Module):
    """
    The trainable embeddings before the teacher's input, in float32 whatever the teacher's dtype.

    Args:
        config ([`PromptEncoderConfig`], `peft.PromptTuningConfig` or `peft.PromptEncoderConfig`):
            What to build.
        teacher ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Provides hidden size and initial embeddings. It is not changed.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizes the initial text.

    Output shape: (`num_virtual_tokens`, `hidden`)
    """

    def __init__(self, config, teacher: PreTrainedModel, processing_class: PreTrainedTokenizerBase):
        super().__init__()
        embeddings: Any = input_embeddings(teacher)
        is_ours = isinstance(config, PromptEncoderConfig)
        if is_ours:
            self.peft_config = config.to_peft(teacher, processing_class)
            init, init_text = _INITS[config.prompt_init], config.prompt_init_text
        else:
            check_peft_config(config)
            self.peft_config = _filled(copy.deepcopy(config), teacher)
            init = getattr(config, "prompt_tuning_init", PromptTuningInit.RANDOM)
            init_text = getattr(config, "prompt_tuning_init_text", None)

        number = self.peft_config.num_virtual_tokens
        start = _initial_embeddings(PromptTuningInit(init), init_text, number, embeddings, processing_class)
        if isinstance(self.peft_config, PromptTuningConfig):
            # Without PEFT's own initialization, which would fetch a tokenizer by name
            blank = copy.copy(self.peft_config)
            blank.prompt_tuning_init = PromptTuningInit.RANDOM
            self.encoder = PromptEmbedding(blank, embeddings).float()
            self.encoder.embedding.weight.data.copy_(start)
        else:
            self.peft_config.encoder_dropout = 0.0  # the prompt must be the same in every pass
            self.encoder = PTuningEncoder(self.peft_config).float()
            if is_ours:  # PEFT's own configuration does not say where to start
                self._start_encoder_at(start)
        self.to(start.device)
        self.initial: Tensor
        self.register_buffer("initial", self().detach().clone(), persistent=True)

    def forward(self) -> Tensor:
        """The prompt's embeddings, `(num_virtual_tokens, hidden)` in float32."""
        return self.encoder(torch.arange(self.peft_config.num_virtual_tokens, device=self.device))

    @property
    def device(self) -> torch.device:
        return self.encoder.embedding.weight.device

    def drift(self) -> float:
        """Distance from the initial prompt, as a share of the initial prompt's norm."""
        return float((self().detach() - self.initial).norm() / self.initial.norm())

    @torch.no_grad()
    def _start_encoder_at(self, target: Tensor) -> None:
        """Make the network's output equal `target`, with the smallest change of its last layer."""
        last: Any = self.encoder.mlp_head[-1]
        features: list[Tensor] = []
        hook = last.register_forward_hook(lambda module, args, output: features.append(args[0].double()))
        missing = target.double() - self().double()
        hook.remove()
        change = torch.linalg.lstsq(features[0], missing, driver="gelsd" if target.device.type == "cpu" else None)
        last.weight += change.solution.T.to(last.weight.dtype)

    def save_adapter(self, folder: str) -> None:
        """Write the prompt to `folder`. `adapter_config.json` and `adapter_model.safetensors` are a standard PEFT
        adapter. `prompt_encoder.safetensors` has the parameters from which training resumes."""
        os.makedirs(folder, exist_ok=True)
        config = copy.copy(self.peft_config)
        config.inference_mode = True
        config.save_pretrained(folder)
        # A P-tuning adapter holds the network's output. Nothing else is needed to use the prompt
        write_safetensors({"prompt_embeddings": self().detach()}, os.path.join(folder, "adapter_model.safetensors"))
        write_safetensors(self.state_dict(), os.path.join(folder, PARAMETERS_FILE))

    def load_parameters(self, folder: str) -> None:
        """Load the prompt, with its encoder, from a `folder` that [`~SoftPrompt.save_adapter`] wrote.

        Raises:
            FileNotFoundError: if the folder holds no prompt.
            ValueError: if the prompt has another shape or type, or is not finite.
        """
        path = os.path.join(folder, PARAMETERS_FILE)
        advice = "Resume from another checkpoint, or start afresh without `resume_from_checkpoint`."
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"{path} is missing: this checkpoint was not written by PromptKDTrainer, or not completely. {advice}"
            )
        state, _ = read_safetensors(path, advice)
        expected, found = (
            {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in sorted(tensors.items())}
            for tensors in (self.state_dict(), state)
        )
        if found != expected:
            raise ValueError(
                f"{path} holds another soft prompt than this run's: found {found}, expected {expected}. Resume with "
                "the `PromptEncoderConfig` the run was started with."
            )
        if not all(tensor.isfinite().all() for tensor in state.values()):
            raise ValueError(f"{path} holds a soft prompt that is not finite. {advice}")
        self.load_state_dict(state)


def write_safetensors(tensors: dict[str, Tensor], path: str, metadata: dict[str, str] | None = None) -> None:
    """Write `tensors` to `path` atomically: after a crash it holds all of them, or what it held before."""
    with whole_file(path) as temporary:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata=metadata)


@torch.no_grad()
def _initial_embeddings(
    init: PromptTuningInit,
    init_text: str | None,
    num_virtual_tokens: int,
    embeddings: Any,
    processing_class: PreTrainedTokenizerBase,
) -> Tensor:
    """The embeddings a soft prompt starts from, `(num_virtual_tokens, hidden)` in float32."""
    device = next(embeddings.parameters()).device
    num_embeddings = getattr(embeddings, "num_embeddings", math.inf)
    # Rows beyond the tokenizer's ids are padding. Sorted, because the order of `get_vocab` changes
    ids = sorted(index for index in processing_class.get_vocab().values() if index < num_embeddings)
    real = torch.tensor(ids, device=device)
    if init == PromptTuningInit.TEXT:
        text_ids = text_token_ids(init_text, processing_class)
        repeats = -(-num_virtual_tokens // len(text_ids))
        return embeddings(torch.tensor((text_ids * repeats)[:num_virtual_tokens], device=device)).float()
    if init == PromptTuningInit.SAMPLE_VOCAB:
        return embeddings(real[torch.randint(len(real), (num_virtual_tokens,), device=device)]).float()
    # Measured on the module's output: some models scale it, so that it is not the weight (Gemma)
    scale = embeddings(real[:: max(len(real) // 4096, 1)]).float().std()
    return scale * torch.randn(num_virtual_tokens, embedding_width(embeddings), device=device)


def embedding_width(embeddings: Any) -> int:
    """Width of the embedding module's output. A quantized weight has another shape."""
    device = next(embeddings.parameters()).device
    return embeddings(torch.zeros(1, dtype=torch.long, device=device)).size(-1)


def text_token_ids(init_text: str | None, processing_class: PreTrainedTokenizerBase) -> list[int]:
    """The token ids of the initial text, without special tokens."""
    ids = processing_class(init_text or "", add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(
            f"`prompt_init_text` is {init_text!r}, which the tokenizer turns into no tokens at all. Give another "
            "text, or set `prompt_init` to 'vocab' or 'random'."
        )
    return ids
