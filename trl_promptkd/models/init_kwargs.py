"""Arguments of `from_pretrained` that users give in `model_init_kwargs` and `teacher_model_init_kwargs`."""

import importlib.util
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers import BitsAndBytesConfig


__all__ = ["check_bitsandbytes", "check_init_kwargs", "from_pretrained_kwargs", "hub_kwargs"]

# Arguments that say where files are. None of them allows code to run
_HUB_KWARGS = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "force_download", "proxies")


def check_init_kwargs(field: str, init_kwargs: Mapping[str, Any] | None) -> None:
    """Reject arguments that `from_pretrained` would misread or ignore, such as an unknown `dtype`, two of them, or a
    quantization that quantizes nothing."""
    kwargs = init_kwargs or {}
    for name in ("dtype", "torch_dtype"):
        dtype = kwargs.get(name)
        if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(
                f"`{field}[{name!r}]` is {dtype!r}; it must be the name of a torch dtype, such as 'bfloat16' or "
                "'float32', or 'auto'."
            )
    if {"dtype", "torch_dtype"} <= kwargs.keys():
        raise ValueError(
            f"`{field}` holds 'dtype' {kwargs['dtype']!r} and 'torch_dtype' {kwargs['torch_dtype']!r}, which are two "
            "names of one setting. Leave 'torch_dtype' out."
        )
    for name in kwargs.keys() & {"load_in_4bit", "load_in_8bit"}:
        raise ValueError(
            f"`{field}` holds {name!r}, which transformers no longer takes there. Write "
            f"`{field}={{'quantization_config': {{{name!r}: True}}}}`."
        )
    quantization = kwargs.get("quantization_config")
    if not isinstance(quantization, Mapping) or quantization.get("quant_method", "bitsandbytes") != "bitsandbytes":
        return
    known = {*inspect.signature(BitsAndBytesConfig).parameters, "quant_method"}
    unknown = sorted(name for name in quantization if name not in known and not name.startswith("_"))
    if unknown or not (quantization.get("load_in_4bit") or quantization.get("load_in_8bit")):
        problem = f"holds {unknown[0]!r}, which bitsandbytes does not know" if unknown else "quantizes nothing"
        raise ValueError(
            f"`{field}['quantization_config']` {problem}. Set 'load_in_4bit' or 'load_in_8bit' to True, and besides "
            "them only arguments of transformers' BitsAndBytesConfig."
        )
    check_bitsandbytes(f"{field}['quantization_config']")


def check_bitsandbytes(field: str) -> None:
    """Reject a quantization if bitsandbytes is not installed.

    Raises:
        ImportError: saying how to install it.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            f"`{field}` is set, but bitsandbytes is not installed. Install it with "
            '`pip install "trl_promptkd[quantization]"`.'
        )


def from_pretrained_kwargs(field: str, init_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """A user's arguments, checked. The dtype is under the key `dtype`, as a torch dtype or "auto": TRL takes few other
    forms."""
    check_init_kwargs(field, init_kwargs)
    kwargs = dict(init_kwargs or {})
    if "torch_dtype" in kwargs:
        kwargs["dtype"] = kwargs.pop("torch_dtype")
    if isinstance(kwargs.get("dtype"), str) and kwargs["dtype"] != "auto":
        kwargs["dtype"] = getattr(torch, kwargs["dtype"])
    return kwargs


def hub_kwargs(init_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """The arguments that say where files are."""
    return {key: value for key, value in (init_kwargs or {}).items() if key in _HUB_KWARGS}
