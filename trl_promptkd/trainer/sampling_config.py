"""The fields that say how completions are sampled. Both configurations have them."""

import difflib
from dataclasses import dataclass, field
from typing import Any

from transformers import GenerationConfig

from ..field_checks import check_at_least_zero, check_number, check_positive


__all__ = ["SamplingConfig"]

# Names that `generation_kwargs` must not hold, and why
_NOT_IN_GENERATION_KWARGS = {
    "max_new_tokens": "rows are measured with the field `max_new_tokens`. Set that",
    "max_length": "a completion's length does not depend on its prompt's. Set the field `max_new_tokens`",
    "num_return_sequences": "every prompt gets one completion. Omit it",
    "return_dict_in_generate": "only token ids are read. Omit it",
}


@dataclass
class SamplingConfig:
    """
    How the student's (or the teacher's) completions are sampled.

    Args:
        top_k (`int`, *optional*, defaults to `0`):
            Sample among the `top_k` likeliest tokens. `0`: all.
        top_p (`float`, *optional*, defaults to `1.0`):
            Sample among the likeliest tokens that hold this probability together.
        generation_kwargs (`dict`, *optional*):
            More settings for [`~transformers.GenerationConfig`], such as `{"do_sample": False}` or
            `{"stop_strings": ["Question:"]}`. With `use_vllm`, only settings that vLLM has too are allowed.
        rollout_batch_size (`int`, *optional*):
            Rows sampled at once on one device. `None`: a whole accumulation window.
        log_completions (`bool`, *optional*, defaults to `False`):
            Print prompts and the student's samples at every logging step, with length, end and KL of each. Log them to
            wandb and trackio if `report_to` names these. Keep all of them as parquet files in
            `output_dir/completions`.
        num_completions_to_print (`int`, *optional*, defaults to `4`):
            How many of them to print, and to log to wandb and trackio. `None`: all.
        use_vllm (`bool`, *optional*, defaults to `False`):
            Let vLLM sample the student's completions (not the teacher's). vLLM loads the student itself, so the
            student must have a name on the Hub or a folder. Its weights are pushed to vLLM before every window.
        vllm_mode (`str`, *optional*, defaults to `"colocate"`):
            `"colocate"`: an engine in the training process, on its device. `"server"`: a server that `vllm serve` runs
            elsewhere, with `--weight-transfer-config` as in TRL's documentation.
        vllm_server_base_url (`str`, *optional*):
            URL of the server. Overrides host and port.
        vllm_server_host (`str`, *optional*, defaults to `"0.0.0.0"`):
            Host of the server.
        vllm_server_port (`int`, *optional*, defaults to `8000`):
            Port of the server.
        vllm_server_timeout (`float`, *optional*, defaults to `240.0`):
            Seconds to wait for the server to be up.
        vllm_group_port (`int`, *optional*, defaults to `51216`):
            Port through which the weights are sent to the server.
        vllm_gpu_memory_utilization (`float`, *optional*, defaults to `0.3`):
            Share of the GPU's memory for a colocated engine.
        vllm_max_model_length (`int`, *optional*):
            Longest prompt and completion together, in tokens. `None`: the model's limit.
        vllm_tensor_parallel_size (`int`, *optional*, defaults to `1`):
            GPUs that a colocated engine is spread over.
        vllm_enable_sleep_mode (`bool`, *optional*, defaults to `False`):
            Let a colocated engine give its memory back while the student is trained.
        vllm_model_impl (`str`, *optional*, defaults to `"auto"`):
            Whose model code vLLM runs: `"vllm"`, `"transformers"`, or `"auto"` for its own if there is any.
    """

    top_k: int = field(default=0, metadata={"help": "Sample among the likeliest tokens. 0: all."})
    top_p: float = field(
        default=1.0, metadata={"help": "Sample among the likeliest tokens that hold this probability together."}
    )
    generation_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "More settings for transformers' GenerationConfig."}
    )
    rollout_batch_size: int | None = field(
        default=None, metadata={"help": "Rows sampled at once on one device. None: a whole accumulation window."}
    )
    log_completions: bool = field(
        default=False, metadata={"help": "Print and keep the student's samples at every logging step."}
    )
    num_completions_to_print: int | None = field(
        default=4, metadata={"help": "How many completions to print, and to log to wandb and trackio. None: all."}
    )
    use_vllm: bool = field(default=False, metadata={"help": "Let vLLM sample the student's completions."})
    vllm_mode: str = field(
        default="colocate",
        metadata={"help": "An engine in the training process, or a server.", "choices": ["colocate", "server"]},
    )
    vllm_server_base_url: str | None = field(
        default=None, metadata={"help": "URL of the vLLM server. Overrides host and port."}
    )
    vllm_server_host: str = field(default="0.0.0.0", metadata={"help": "Host of the vLLM server."})
    vllm_server_port: int = field(default=8000, metadata={"help": "Port of the vLLM server."})
    vllm_server_timeout: float = field(default=240.0, metadata={"help": "Seconds to wait for the server to be up."})
    vllm_group_port: int = field(default=51216, metadata={"help": "Port that the weights are sent through."})
    vllm_gpu_memory_utilization: float = field(
        default=0.3, metadata={"help": "Share of the GPU's memory for a colocated engine."}
    )
    vllm_max_model_length: int | None = field(
        default=None, metadata={"help": "Longest prompt and completion together, in tokens. None: the model's limit."}
    )
    vllm_tensor_parallel_size: int = field(
        default=1, metadata={"help": "GPUs that a colocated engine is spread over."}
    )
    vllm_enable_sleep_mode: bool = field(
        default=False, metadata={"help": "Let a colocated engine give memory back while the student is trained."}
    )
    vllm_model_impl: str = field(
        default="auto",
        metadata={
            "help": "Whose model code vLLM runs. auto: its own if there is any.",
            "choices": ["auto", "vllm", "transformers"],
        },
    )

    def check_sampling(self) -> None:
        """Reject settings with which nothing can be sampled.

        Raises:
            ValueError: naming the field, its value and what is allowed.
        """
        greedy = " For greedy decoding set generation_kwargs={'do_sample': False}."
        check_number(self, "temperature", lambda value: value > 0, "above 0", greedy)
        check_positive(self, "max_new_tokens", "rollout_batch_size")
        check_number(self, "top_p", lambda value: 0 < value <= 1, "above 0 and at most 1")
        check_number(self, "top_k", lambda value: value >= 0, "0 (all tokens) or above")
        check_at_least_zero(self, "num_completions_to_print")
        check_positive(self, "vllm_server_port", "vllm_group_port", "vllm_server_timeout")
        check_positive(self, "vllm_max_model_length", "vllm_tensor_parallel_size")
        check_number(self, "vllm_gpu_memory_utilization", lambda value: 0 < value <= 1, "above 0 and at most 1")
        self._check_generation_kwargs()

    def _check_generation_kwargs(self) -> None:
        known = sorted(vars(GenerationConfig()))
        for name in self.generation_kwargs or {}:
            if name in _NOT_IN_GENERATION_KWARGS:
                raise ValueError(f"`generation_kwargs` holds {name!r}, but {_NOT_IN_GENERATION_KWARGS[name]}.")
            if name not in known:
                close = difflib.get_close_matches(str(name), known, 1)
                raise ValueError(
                    f"`generation_kwargs` holds {name!r}, which transformers' GenerationConfig does not know and "
                    "would ignore."
                    + (f" Did you mean {close[0]!r}?" if close else " See its documentation for the names.")
                )
