"""Checks of a trainer's arguments, most of them before any weights are loaded."""

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import (
    AutoConfig,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers.utils import logging

from ..models.forward import TokenStates
from ..models.init_kwargs import check_init_kwargs, hub_kwargs
from ..models.joined_logits import JoinedLogits
from ..models.soft_prompt import PromptEncoderConfig, check_peft_config, text_token_ids
from ..models.student import adapter_config, check_trains
from ..models.teacher import each_teacher


__all__ = [
    "check_arguments",
    "check_finite",
    "check_found",
    "check_own_teacher",
    "check_sharding",
    "check_soft_prompt",
    "loaded_settings",
    "names_processing_class",
    "restore_settings",
]

logger = logging.get_logger(__name__)

_CHANGED_SETTINGS = ("output_router_logits", "router_aux_loss_coef", "use_cache")
# Heads that do not predict the next token. Loading such a checkpoint as a language model gives it a random head
_OTHER_HEADS = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MaskedLM", "MultipleChoice")


def names_processing_class(init: Callable[..., None]) -> Callable[..., None]:
    """Wrap a trainer's `__init__`. For `tokenizer=`, which trainers once had, the error names `processing_class`."""

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        if "tokenizer" in kwargs:
            raise TypeError("`tokenizer` is no argument of this trainer. Pass it as `processing_class`.")
        init(self, *args, **kwargs)

    return checked


def check_arguments(
    args_class: Any,
    args: Any,
    model: Any,
    teacher_model: Any,
    peft_config: Any,
    formatting_func: Any,
    data_collator: Any,
    callbacks: Any,
) -> None:
    """Reject arguments of a trainer that are not supported, or do not go together.

    Raises:
        TypeError, ValueError: naming the argument, what it is, and what to pass instead.
    """
    if not isinstance(args, args_class):
        raise TypeError(f"`args` is a {type(args).__name__}; it must be a `trl_promptkd.{args_class.__name__}`.")
    if model is None:
        raise ValueError("`model`, the student, is required: a name, a model or a PEFT model.")
    if data_collator is not None and not callable(data_collator):
        raise TypeError(
            f"`data_collator` is a {type(data_collator).__name__}; it must be callable with a list of rows and "
            "return a batch. Omit it for the trainer's own."
        )
    for callback in callbacks or []:
        if not issubclass(callback if isinstance(callback, type) else type(callback), TrainerCallback):
            raise TypeError(f"`callbacks` holds {callback!r}; it must hold `transformers.TrainerCallback`s only.")
    if formatting_func is not None:
        raise ValueError(
            "`formatting_func` is not supported: it makes plain texts, and distillation needs to know where a prompt "
            "ends. Build `prompt` and `completion` columns with `dataset.map` instead."
        )
    if peft_config is not None and not isinstance(peft_config, PeftConfig):
        raise TypeError(
            f"`peft_config` is a {type(peft_config).__name__}; it must be one of PEFT's, such as `peft.LoraConfig()`."
        )
    if peft_config is not None and peft_config.task_type not in (None, "CAUSAL_LM"):
        raise ValueError(
            f"`peft_config` has `task_type={str(peft_config.task_type)!r}`; the student is a language model. Set "
            "`task_type='CAUSAL_LM'`."
        )
    check_init_kwargs("model_init_kwargs", args.model_init_kwargs)
    check_init_kwargs("teacher_model_init_kwargs", args.teacher_model_init_kwargs)
    adapter = _student_adapter(model, args.model_init_kwargs, peft_config)
    _check_model("model", model, args.model_init_kwargs, args.trust_remote_code)
    teachers = each_teacher(teacher_model)
    for argument, one in teachers.items():
        _check_model(argument, one, args.teacher_model_init_kwargs, args.trust_remote_code)
        _check_adapters(model, one, adapter or peft_config)
    if not isinstance(model, str) and peft_config is None:
        check_trains(model)
    quantization = (args.model_init_kwargs or {}).get("quantization_config", {})
    given = dict(quantization) if isinstance(quantization, Mapping) else quantization.to_dict()
    in_few_bits = given.get("load_in_4bit") or given.get("load_in_8bit")
    if isinstance(model, str) and in_few_bits and adapter is None and peft_config is None:
        raise ValueError(
            f"`model_init_kwargs` has the `quantization_config` {given}, and quantized weights cannot be trained. "
            "Pass a `peft_config`, such as `LoraConfig(task_type='CAUSAL_LM')`, to train an adapter, or load the "
            "student without quantization."
        )
    if args.torch_compile:
        raise ValueError(
            "`torch_compile` is True, but this trainer runs a model's decoder and its output head apart, which a "
            "compiled model cannot do. Set it to False."
        )
    if args.teacher_model_init_kwargs and not any(isinstance(one, str) for one in teachers.values()):
        raise ValueError(
            "`teacher_model_init_kwargs` is set, but `teacher_model` is not loaded by the trainer. Pass the teacher's "
            "name, or omit `teacher_model_init_kwargs`."
        )
    if args.chat_template_path is not None and not args.chat_template_path.endswith((".jinja", ".j2")):
        raise ValueError(
            f"`chat_template_path` is {args.chat_template_path!r}; only a .jinja or .j2 file is supported. A template "
            "taken from another model may add tokens that the teacher does not know."
        )


def _check_adapters(model: Any, teacher_model: Any, adapter: PeftConfig | None) -> None:
    """Reject a teacher that would be trained with its student, and adapters that have no effect in the passes here."""
    base, teacher_base = (m.get_base_model() if isinstance(m, PeftModel) else m for m in (model, teacher_model))
    if not isinstance(model, str) and teacher_base is base:
        raise ValueError(
            "`teacher_model` is the very object that is trained as `model` (or the one below its adapter): the "
            "teacher would change with its student. For self-distillation set `teacher_model=None`; the student's "
            "starting weights are then kept as the teacher."
        )
    if isinstance(teacher_model, PeftModel) and teacher_model.active_peft_config.is_prompt_learning:
        raise ValueError(
            "`teacher_model` already carries a soft prompt (PEFT prompt learning). Pass the model below it: "
            "`teacher_model.get_base_model()`."
        )
    adapter = model.active_peft_config if isinstance(model, PeftModel) else adapter
    if adapter is not None and adapter.is_prompt_learning:
        raise ValueError(
            f"The student is to be trained with a {type(adapter).__name__}, prompt learning for the *student*, whose "
            "forward pass is not exact under padding. Use LoRA or another weight adapter. (A soft prompt for the "
            "teacher is `prompt_encoder_config` of PromptKDTrainer.)"
        )
    if getattr(adapter, "alora_invocation_tokens", None):
        raise ValueError(
            "The student's adapter is an activated LoRA (`alora_invocation_tokens`), which only acts inside PEFT's "
            "own forward pass and would learn nothing here. Use a plain LoraConfig."
        )


def _check_model(argument: str, model: Any, init_kwargs: Any, trust_remote_code: bool) -> None:
    """Reject anything that is not a decoder-only language model. For a name, its configuration is read if possible."""
    if model is None:
        return
    wanted = "a name, a folder (as a `str`), a causal language model or a PEFT model of one"
    if isinstance(model, str):
        if not model:
            raise ValueError(f"`{argument}` is an empty text; it must be {wanted}.")
        if model.startswith(("/", "./", "../", "~")) and not os.path.isdir(model):
            raise FileNotFoundError(
                f"`{argument}` is {model!r}, and there is no such folder. Check the path (relative ones start at "
                f"{os.getcwd()}, and `~` is not replaced)."
            )
        name, kwargs, adapter = model, dict(init_kwargs or {}), adapter_config(model, init_kwargs)
        if adapter is not None:  # revision and subfolder of the adapter do not hold for the model below it
            name, kwargs = adapter.base_model_name_or_path, kwargs | {"revision": adapter.revision, "subfolder": ""}
        config = _published_config(name, kwargs, trust_remote_code)
        names = getattr(config, "architectures", None) or []
    else:
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        config, names = getattr(base, "config", None), [type(base).__name__]
        if config is None or not hasattr(base, "get_decoder"):
            raise TypeError(f"`{argument}` is a {type(model).__name__}; it must be {wanted}.")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"`{argument}` is an encoder-decoder model ({type(config).__name__}); only decoder-only language models "
            "are supported: a prompt and its completion must be one sequence. Choose another model."
        )
    other_head = any(head in name for name in names for head in _OTHER_HEADS)
    if other_head or (not isinstance(model, str) and base.get_output_embeddings() is None):
        raise ValueError(
            f"`{argument}` is a {names[0]}, which does not predict next tokens. Choose a model with a language "
            "model's head (`AutoModelForCausalLM`)."
        )


def _student_adapter(model: Any, init_kwargs: Any, peft_config: Any) -> PeftConfig | None:
    """The configuration of the adapter that `model` names, or `None`. A second adapter above the first is rejected."""
    adapter = adapter_config(model, init_kwargs)
    if adapter is not None and not adapter.base_model_name_or_path:
        raise ValueError(
            f"`model` is {model!r}, an adapter whose adapter_config.json does not name the model below it. Set "
            "`base_model_name_or_path` there to its name or folder."
        )
    if peft_config is not None and (adapter is not None or isinstance(model, PeftModel)):
        raise ValueError(
            f"`model` is {'an adapter' if adapter is None else repr(model) + ', an adapter'}, and `peft_config` is "
            "set too, which would put another adapter above it. Leave `peft_config` out to train the adapter "
            "further. Or merge it first (`model.merge_and_unload()`) and pass what comes out."
        )
    return adapter


def check_found(argument: str, name: Any, init_kwargs: Any, trust_remote_code: bool) -> None:
    """Reject a name that no model has, before the weights of the other model are loaded.

    Raises:
        OSError: with the first line of `transformers`' message.
    """
    if not isinstance(name, str) or {"gguf_file", "config"} & set(init_kwargs or {}):
        return
    kwargs = _config_kwargs(init_kwargs or {}, trust_remote_code)
    try:
        AutoConfig.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        if adapter_config(name, init_kwargs) is not None:
            return  # an adapter, which is loaded with the model below it
        if isinstance(error, ValueError):
            raise
        raise OSError(
            f"`{argument}` is {name!r}, which cannot be loaded. Check the name, and that the Hub can be reached. "
            f"({str(error).splitlines()[0]})"
        ) from error


def _config_kwargs(init_kwargs: Any, trust_remote_code: bool) -> dict[str, Any]:
    of_code = {key: init_kwargs[key] for key in ("trust_remote_code", "code_revision") if key in init_kwargs}
    return {"trust_remote_code": trust_remote_code, **of_code, **hub_kwargs(init_kwargs)}


def _published_config(name: str, init_kwargs: Any, trust_remote_code: bool) -> Any:
    """A model's configuration, or `None` if it cannot be read. Loading the model will say why."""
    if "gguf_file" in init_kwargs:
        return None
    try:
        return AutoConfig.from_pretrained(name, **_config_kwargs(init_kwargs, trust_remote_code))
    except Exception:
        return None


def loaded_settings(model: Any, args: Any) -> dict[str, Any]:
    """The settings that the base classes change in the student's configuration, with their values as loaded.

    TRL switches the load-balancing loss of a mixture of experts on. Nothing here computes it, and a student that is
    saved with it fails in padded generation. transformers switches the KV cache off, which would make a saved student
    slow.

    Args:
        model: The student, or its name.
        args: Has `model_init_kwargs` and `trust_remote_code`.
    """
    init_kwargs = (args.model_init_kwargs or {}) if isinstance(model, str) else {}
    config = _published_config(model, init_kwargs, args.trust_remote_code) if isinstance(model, str) else model.config
    settings = {"output_router_logits": False, "use_cache": True}  # the defaults, if the configuration cannot be read
    if config is not None:
        text_config = config.get_text_config()
        settings |= {name: getattr(text_config, name) for name in _CHANGED_SETTINGS if hasattr(text_config, name)}
    return settings | {name: init_kwargs[name] for name in _CHANGED_SETTINGS if name in init_kwargs}


def restore_settings(model: Any, settings: Mapping[str, Any]) -> None:
    """Set the student's configuration back to what [`loaded_settings`] found."""
    for config in (model.config, model.config.get_text_config()):
        for name, value in settings.items():
            if hasattr(config, name):
                setattr(config, name, value)


def check_soft_prompt(prompt_encoder_config: Any, processing_class: PreTrainedTokenizerBase) -> None:
    """Reject a soft prompt of an unsupported kind, or one whose initial text has no tokens."""
    if not isinstance(prompt_encoder_config, PromptEncoderConfig):
        check_peft_config(prompt_encoder_config)
    elif prompt_encoder_config.prompt_init == "text":
        text_token_ids(prompt_encoder_config.prompt_init_text, processing_class)


def check_sharding(accelerator: Accelerator) -> None:
    """Reject FSDP's first version, whose weights cannot be used outside its wrapper."""
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError(
            "FSDP is set up with `fsdp_version: 1`, which is not supported. Set `fsdp_version: 2` in accelerate's "
            "configuration (see examples/accelerate_configs/fsdp2.yaml), or `FSDP_VERSION=2`."
        )


def check_own_teacher(args: Any, accelerator: Accelerator) -> None:
    """Reject settings of PromptKD that do not work if the student below its adapter is the teacher."""
    if accelerator.is_fsdp2 and args.prompt_update == "sequential":
        raise ValueError(
            "`prompt_update` is 'sequential' and the student is its own teacher below its adapter. Under FSDP2, its "
            "weights cannot be run again between a backward pass and another within one step. Set "
            "`prompt_update='simultaneous'`, or pass `teacher_model`."
        )
    if args.teacher_gradient_checkpointing and not args.disable_dropout:
        raise ValueError(
            "`teacher_gradient_checkpointing` is True and `disable_dropout` False, but the teacher is the student "
            "below its adapter, and would have its dropout. Change one of them, or pass `teacher_model`."
        )


def check_finite(loss: Tensor, when: str, **models: Any) -> None:
    """Stop before a loss that is not finite reaches the student's weights or the log, which would show another number.

    Args:
        loss: A scalar.
        when: Such as "at step 3", for the message.
        models: The output of each model. [`TokenStates`], and those within [`JoinedLogits`], are searched for hidden
            states that are not finite. Anything else is ignored.

    Raises:
        FloatingPointError: naming the models whose hidden states are not finite already.
    """
    if torch.isfinite(loss):
        return
    said = {name.replace("_", " "): one for name, one in models.items()}
    for one in models.values():
        if isinstance(one, JoinedLogits):
            said |= {part: states for part, (_, states) in one.parts.items()}
    broken = [
        name
        for name, states in said.items()
        if isinstance(states, TokenStates) and not torch.isfinite(states.hidden_states).all()
    ]
    found = f"Not finite already: the hidden states of the {' and of the '.join(broken)}." if broken else ""
    raise FloatingPointError(
        f"The loss is {loss.item()} {when}. "
        f"{found or 'The hidden states of both models are finite; their logits, or how far apart they are, are not.'} "
        "Check the weights for NaN or infinities; load the teacher in bfloat16 or float32 if it is in float16; "
        "lower the learning rate if it was finite before."
    )
