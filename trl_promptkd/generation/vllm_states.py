"""A teacher's hidden states from vLLM in this process."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._trl import is_vllm_available


__all__ = ["VLLMStates", "check_engine"]

# What makes the engine give hidden states, and those of the named teacher
_RESERVED = (
    *("model", "runner", "convert", "pooler_config", "task", "dtype", "revision"),
    *("enable_prefix_caching", "enable_chunked_prefill"),
)


def check_engine(engine_kwargs: Mapping[str, Any] | None) -> None:
    """Reject settings that [`VLLMStates`] could not start with, before anything is loaded.

    Raises:
        ImportError: if vLLM is not installed.
        ValueError: for arguments that users may not set.
    """
    taken = sorted(set(engine_kwargs or {}) & set(_RESERVED))
    if taken:
        raise ValueError(
            f"`vllm_kwargs` holds {taken[0]!r}, which is set here, as the engine must give the named teacher's hidden "
            "states. Remove it. The dtype and the revision belong in `teacher_model_init_kwargs`."
        )
    if not is_vllm_available():
        raise ImportError(
            "`backend` is 'vllm', but vLLM is not installed. Install it with `pip install \"trl-promptkd[vllm]\"`, or "
            "use `backend='transformers'`."
        )


class VLLMStates:
    """
    vLLM's pooling runner. It returns the last hidden states of all tokens of a row, after the final norm.

    Args:
        model (`str`): The teacher, a Hub id or a folder.
        dtype (`torch.dtype`): Dtype of the computation.
        max_length (`int`): Length of the longest row, in tokens.
        revision (`str`, *optional*), trust_remote_code (`bool`): Arguments of `vllm.LLM`.
        engine_kwargs (`Mapping`, *optional*): More arguments of `vllm.LLM`, such as `tensor_parallel_size`.
    """

    def __init__(
        self,
        model: str,
        dtype: torch.dtype,
        max_length: int,
        revision: str | None = None,
        trust_remote_code: bool = False,
        engine_kwargs: Mapping[str, Any] | None = None,
    ):
        from vllm import LLM
        from vllm.config import PoolerConfig

        settings: dict[str, Any] = {
            "runner": "pooling",
            "convert": "embed",
            "pooler_config": PoolerConfig(task="token_embed", use_activation=False),
            "dtype": dtype,
            "revision": revision,
            "trust_remote_code": trust_remote_code,
            "enable_prefix_caching": False,  # a prefix that is not computed again would have no states
            "enable_chunked_prefill": False,  # vLLM 0.31 never returns from a row that it computes in parts
            "max_model_len": max_length,
        }
        self.engine = LLM(model, **settings | dict(engine_kwargs or {}))

    def states(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """The hidden states of whole rows of token ids: `(tokens, hidden)` for each row, on the CPU.

        Raises:
            RuntimeError: if vLLM returns another number of states than a row has tokens.
        """
        prompts: Any = [{"prompt_token_ids": list(row)} for row in rows]
        outputs = self.engine.encode(prompts, pooling_task="token_embed", use_tqdm=False)
        found = [output.outputs.data.clone() for output in outputs]  # inference tensors otherwise
        lengths, expected = [len(states) for states in found], list(map(len, rows))
        if lengths != expected:
            raise RuntimeError(
                f"vLLM gave {lengths} states for rows of {expected} tokens. Its version is not supported."
            )
        return found
