"""The student: loading an adapter by name, and the check that there is something to train."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import find_adapter_config_file

from .._trl import AuxiliaryTrainingWrapper, BaseTunerLayer, create_model_from_path
from .init_kwargs import from_pretrained_kwargs, hub_kwargs


__all__ = ["adapter_config", "check_trains", "student_by_name"]


def adapter_config(name: Any, init_kwargs: Mapping[str, Any] | None = None) -> PeftConfig | None:
    """The configuration of the PEFT adapter in a folder or a Hub repository, or `None` if there is none."""
    if not isinstance(name, str) or not name:
        return None
    kwargs = hub_kwargs(init_kwargs)
    try:
        found = find_adapter_config_file(name, **kwargs)
    except OSError:  # loading the model will say why
        found = None
    return None if found is None else PeftConfig.from_pretrained(name, **kwargs)


@contextmanager
def student_by_name(model: Any, args: Any, quantization_config: Any = None) -> Iterator[tuple[Any, Any]]:
    """Yield what TRL's `__init__` gets as `model` and `quantization_config`. Inside, `args` are as TRL expects them.

    TRL loads a model by name, but not an adapter, and knows only `dtype`. An adapter is loaded here with its base
    model, and is trainable. `model_init_kwargs` are then for the base model.
    """
    given = args.model_init_kwargs
    config = adapter_config(model, given)
    try:
        if config is None:
            args.model_init_kwargs = from_pretrained_kwargs("model_init_kwargs", given) or None
        else:
            model = _load_adapter(model, config, args, quantization_config)
            args.model_init_kwargs = quantization_config = None  # both have been used
        yield model, quantization_config
    finally:
        args.model_init_kwargs = given


def _load_adapter(name: str, config: PeftConfig, args: Any, quantization_config: Any) -> PeftModel:
    kwargs = from_pretrained_kwargs("model_init_kwargs", args.model_init_kwargs)
    of_adapter = hub_kwargs(kwargs)
    for key in ("revision", "subfolder"):  # these are for the adapter
        kwargs.pop(key, None)
    if config.revision is not None:
        kwargs["revision"] = config.revision
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):  # as in TRL
        kwargs["device_map"] = None
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    base = create_model_from_path(config.base_model_name_or_path, architecture=AutoModelForCausalLM, **kwargs)
    return PeftModel.from_pretrained(base, name, is_trainable=True, **of_adapter)


def check_trains(model: nn.Module) -> None:
    """Reject a student that training would not change. Such a run would log losses and end without an error."""
    idle = _idle_parameters(model)
    if any(parameter.requires_grad and id(parameter) not in idle for parameter in model.parameters()):
        return
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"`model`, the student, is a {type(model).__name__} without trainable weights: all of them have "
            "`requires_grad=False`. Call `model.requires_grad_(True)`, or pass a `peft_config` to train an adapter."
        )
    config = model.active_peft_config
    raise ValueError(
        f"`model`, the student, has no trainable weights: its active adapter {model.active_adapter!r} is frozen "
        f"(`PeftModel.from_pretrained` does so; `inference_mode={config.inference_mode}`), merged, switched off, or "
        "reaches no layer. Load it with `PeftModel.from_pretrained(model, folder, is_trainable=True)`, set "
        "`inference_mode=False` in a new one, or choose the adapter to train by `model.set_adapter(name)`."
    )


def _idle_parameters(model: nn.Module) -> set[int]:
    """The `id`s of adapter weights that a forward pass does not use: inactive, merged or switched-off ones."""
    idle: set[int] = set()
    for module in model.modules():
        if not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            continue
        for layer_name in module.adapter_layer_names:
            for adapter, part in getattr(module, layer_name, {}).items():
                used = adapter in module.active_adapters and adapter not in module.merged_adapters
                if module.disable_adapters or not used:
                    parameters = part.parameters() if isinstance(part, nn.Module) else [part]
                    idle |= set(map(id, parameters))
    return idle
