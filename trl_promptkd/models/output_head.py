"""A model's output head alone, which turns hidden states that were computed elsewhere into logits."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from .._trl import models_are_whole, names_in_model
from .forward import below_the_head
from .init_kwargs import from_pretrained_kwargs, hub_kwargs
from .student import adapter_config


__all__ = ["head_kwargs", "hidden_size", "load_output_head", "move_output_head"]

_CODE_KWARGS = ("trust_remote_code", "code_revision")
_DTYPES = ("F16", "BF16", "F32", "F64")  # names in safetensors
_FIELD = "teacher_model_init_kwargs"


def load_output_head(
    name_or_path: str, init_kwargs: Mapping[str, Any] | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A causal language model of which only the output head is loaded. Everything else is on the meta device.

    [`~trl_promptkd.models.forward.TokenStates`] turns hidden states into logits with it. The model's own forward pass
    does that, so its scaling, soft-capping and biases are included. If a checkpoint has several files, only those that
    hold the head are downloaded and read.

    Args:
        name_or_path (`str`): Hub id or folder with safetensors files, in which the head is not quantized.
        init_kwargs (`Mapping`, *optional*): `dtype` (by default the configuration's), and arguments that say where
            files are, such as `revision` and `token`.
        trust_remote_code (`bool`): Whether code from the repository may run, unless `init_kwargs` says otherwise.

    Returns:
        The frozen model, in evaluation mode, with its `generation_config`.

    Raises:
        OSError: if there is no such model, or if it has no safetensors files.
        ValueError: for arguments that have no effect on a head, and for an adapter. Also if the head is not in the
            files, is quantized, or has another shape than the configuration says.
    """
    kwargs = head_kwargs(init_kwargs)
    kwargs.setdefault("trust_remote_code", trust_remote_code)
    files = hub_kwargs(kwargs)
    if adapter_config(name_or_path, kwargs) is not None:
        raise ValueError(
            f"The teacher {name_or_path!r} is an adapter, but a teacher that runs elsewhere must be whole. Merge it "
            "(`model.merge_and_unload().save_pretrained(folder)`), and use that folder there and here."
        )
    try:
        of_code = {key: kwargs[key] for key in _CODE_KWARGS if key in kwargs}
        config = AutoConfig.from_pretrained(name_or_path, **of_code, **files)
        model = _empty_model(config, kwargs.get("dtype", "auto"), of_code)
        _load_head(model, name_or_path, files)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"The output head of the teacher {name_or_path!r} could not be loaded. Check the name (a Hub id or a "
            f"folder), that you have access to it, and that its files are whole. ({str(error).splitlines()[0]})"
        ) from error
    with suppress(OSError):  # many models have none
        model.generation_config = GenerationConfig.from_pretrained(name_or_path, **files)
    return model.requires_grad_(False).eval()


def head_kwargs(init_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """A user's arguments for [`load_output_head`], checked.

    Raises:
        ValueError: naming an argument that has no effect on a head.
    """
    kwargs = from_pretrained_kwargs(_FIELD, init_kwargs)
    unknown = sorted(kwargs.keys() - hub_kwargs(kwargs).keys() - {"dtype", *_CODE_KWARGS})
    if unknown:
        raise ValueError(
            f"`{_FIELD}` holds {unknown[0]!r}, which has no effect: only the teacher's output head is loaded here. "
            "Remove it. How the teacher itself is loaded is decided where it runs."
        )
    return kwargs


def move_output_head(model: PreTrainedModel, device: torch.device) -> None:
    """Move the loaded weights to `device`. `model.to` fails, because the other weights have no values."""
    for parameter in model.parameters():
        if not parameter.is_meta:
            parameter.data = parameter.data.to(device)
    for name, buffer in list(model.named_buffers()):
        if not buffer.is_meta:
            _set(model, name, buffer.to(device))


def hidden_size(model: Any) -> int:
    """The width of the hidden states that a model's output head takes."""
    return model.get_output_embeddings().weight.size(-1)


def _empty_model(config: Any, dtype: Any, of_code: Mapping[str, Any]) -> PreTrainedModel:
    """The model without values, built as if it were not quantized."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if dtype == "auto":
        dtype = config.get_text_config().dtype or torch.float32
    with models_are_whole(), init_empty_weights():
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, **of_code)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            model = AutoModelForImageTextToText.from_config(config, dtype=dtype, **of_code)
    model.tie_weights()  # on the meta device, weights that were tied are tensors of their own
    return model


def _load_head(model: PreTrainedModel, name_or_path: str, files: Mapping[str, Any]) -> None:
    """Load the weights that turn hidden states into logits."""
    head = model.get_output_embeddings()
    wanted = {id(parameter) for parameter in head.parameters()}
    below = {id(value) for module in below_the_head(model) for value in module.state_dict(keep_vars=True).values()}
    empty = model.state_dict(keep_vars=True)
    aliases: dict[int, list[str]] = {}  # names of each tensor. The head's own name comes first
    for name, value in empty.items():
        if id(value) not in below - wanted:
            is_own = model.get_submodule(name.rpartition(".")[0]) is head
            aliases.setdefault(id(value), []).insert(0 if is_own else len(aliases.get(id(value), [])), name)
    places, opened = _places(name_or_path, files), {}
    keys = names_in_model(model, places)
    for names in aliases.values():
        key = _key_of(names, keys)
        if key is None:
            raise ValueError(
                f"{name_or_path!r} holds no weight {names[0]!r}, which the output head of {type(model).__name__} "
                "needs. Choose a checkpoint with the whole model."
            )
        file = places[key]
        if file not in opened:
            opened[file] = safe_open(_path(name_or_path, file, files), framework="pt")
        stored, expected = opened[file].get_slice(key), empty[names[0]]
        if stored.get_dtype() not in _DTYPES or list(stored.get_shape()) != list(expected.shape):
            raise ValueError(
                f"The weight {key!r} of the teacher {name_or_path!r} is {stored.get_dtype()} of shape "
                f"{stored.get_shape()}, but the output head needs floating point numbers of shape "
                f"{list(expected.shape)}. If the head is quantized, name the checkpoint it was made from."
            )
        value = opened[file].get_tensor(key).to(expected.dtype)
        for name in names:
            _set(model, name, value)


def _places(name_or_path: str, files: Mapping[str, Any]) -> dict[str, str]:
    """The name of each weight in a checkpoint -> the file that holds it."""
    try:
        index = _path(name_or_path, SAFE_WEIGHTS_INDEX_NAME, files)
    except OSError:
        with safe_open(_path(name_or_path, SAFE_WEIGHTS_NAME, files), framework="pt") as file:
            return dict.fromkeys(file.keys(), SAFE_WEIGHTS_NAME)
    with open(index, encoding="utf-8") as file:
        return json.load(file)["weight_map"]


def _path(name_or_path: str, file: str, files: Mapping[str, Any]) -> str:
    return cached_file(name_or_path, file, **files)


def _key_of(names: Sequence[str], keys: Mapping[str, str]) -> str | None:
    """The name of a weight in a checkpoint: one of its names in the model, or the only name that ends like one.

    Names begin differently in the checkpoint of a model that was saved without its head.
    """
    for name in names:
        parts = name.split(".")
        for start in range(max(len(parts) - 1, 1)):  # an ending has at least the names of module and weight
            end = ".".join(parts[start:])
            found = [other for other in keys if other == end or other.endswith(f".{end}")]
            if end in found or len(found) == 1:
                return keys[end if end in found else found[0]]
    return None


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    is_parameter = isinstance(getattr(module, own), nn.Parameter)
    setattr(module, own, nn.Parameter(value, requires_grad=False) if is_parameter else value)
