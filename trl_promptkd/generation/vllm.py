"""The student's completions by vLLM, through TRL's own class, with its weights kept up to date."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from .._trl import is_vllm_available, vllm_generation_module
from .rollouts import own_random_state, rollout_seed, stop_ids, up_to_the_end


__all__ = ["VLLMRollouts", "check_vllm"]

# Fields of GenerationConfig that rollouts may have, and what SamplingParams calls them
_NAMES = {
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "min_new_tokens": "min_tokens",
    "stop_strings": "stop",
}


def check_vllm(args: Any, model: Any, samples: bool) -> None:
    """Reject `use_vllm` if it cannot work, before any weights are loaded.

    Raises:
        ImportError: if vLLM is not installed.
        ValueError: if the student never samples, or vLLM could not load it.
    """
    if not args.use_vllm:
        return
    if not samples:
        raise ValueError(
            "`use_vllm` is True, but the student samples nothing in this run. Set `use_vllm=False`, or let it sample "
            "(`lmbda` above 0 in PromptKDConfig, `response_source='student'` in PrimedDistillConfig)."
        )
    if not is_vllm_available():
        raise ImportError(
            "`use_vllm` is True, but vLLM is not installed. Install it with "
            '`pip install "trl_promptkd[vllm]"`, or set `use_vllm=False`: completions are then sampled with '
            "transformers."
        )
    name = model if isinstance(model, str) else getattr(model, "name_or_path", "")
    if not name:
        raise ValueError(
            "`use_vllm` is True, but `model` has no name that vLLM could load it by. Load the student with "
            "`from_pretrained`, or save it to a folder first and pass that folder."
        )


class VLLMRollouts:
    """
    Samples completions with vLLM as [`~trl_promptkd.generation.rollouts.Rollouts`] does with transformers.

    The engine computes in the dtype of the checkpoint that it loads. On a CPU, it is set to float32. Its default there
    is bfloat16, which samples from another distribution than the one that is trained. Weights are pushed by vLLM's own
    reloading on a CPU, as TRL's push fails on the layout of the CPU build.

    Args:
        student: The bare student, whose `name_or_path` vLLM loads.
        accelerator ([`~accelerate.Accelerator`]): The trainer's.
        processing_class: The tokenizer.
        generation_config ([`~transformers.GenerationConfig`]): How completions are sampled.
        args: A configuration with the fields of [`~trl_promptkd.trainer.sampling_config.SamplingConfig`].
        vocab_size (`int`): Number of ids that stand for tokens. The model may have more.
    """

    def __init__(
        self,
        student: nn.Module,
        accelerator: Accelerator,
        processing_class: PreTrainedTokenizerBase,
        generation_config: GenerationConfig,
        args: Any,
        vocab_size: int,
    ):
        self.accelerator, self.mode = accelerator, args.vllm_mode
        self.on_cpu = accelerator.device.type == "cpu"
        if self.on_cpu and self.mode == "server":
            raise ValueError(
                "`vllm_mode` is 'server', but weights can only be sent to a server from a GPU (through NCCL). Set "
                "`vllm_mode='colocate'`."
            )
        base: Any = student.get_base_model() if isinstance(student, PeftModel) else student
        if isinstance(student, PeftModel) and getattr(base, "quantization_method", None) is not None:
            raise ValueError(
                "`use_vllm` is True, but the student is quantized: its adapter cannot be merged for vLLM without "
                "rounding its weights. Set `use_vllm=False`, or load the student without quantization."
            )
        self.seed, self.group = args.seed, accelerator.process_index // args.vllm_tensor_parallel_size
        self.ends = stop_ids(generation_config)
        sampling = _sampling_params(args.generation_kwargs or {})
        size = base.config.get_text_config().vocab_size
        if vocab_size < size:  # ids that stand for no token
            sampling["logit_bias"] = dict.fromkeys(range(vocab_size, size), -100.0)
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.vllm_tensor_parallel_size
        module = vllm_generation_module()
        with _engine_is_built(module, self.on_cpu), _own_random_state(args.seed, accelerator.device):
            self.generation = module.VLLMGeneration(
                model=student,
                accelerator=accelerator,
                processing_class=processing_class,
                mode=args.vllm_mode,
                server_base_url=args.vllm_server_base_url,
                server_host=args.vllm_server_host,
                server_port=args.vllm_server_port,
                server_timeout=args.vllm_server_timeout,
                group_port=args.vllm_group_port,
                tensor_parallel_size=args.vllm_tensor_parallel_size,
                gpu_memory_utilization=args.vllm_gpu_memory_utilization,
                max_model_length=args.vllm_max_model_length,
                max_num_seqs=args.rollout_batch_size or rows,
                enable_sleep_mode=args.vllm_enable_sleep_mode,
                model_impl=args.vllm_model_impl,
                trust_remote_code=args.trust_remote_code,
                temperature=generation_config.temperature if generation_config.do_sample else 0.0,
                top_p=1.0 if generation_config.top_p is None else generation_config.top_p,
                top_k=generation_config.top_k or 0,
                max_completion_length=generation_config.max_new_tokens,
                logprobs=None,
                generation_kwargs={**sampling, "stop_token_ids": sorted(self.ends)},
            )

    def sync(self) -> None:
        """Push the student's weights to vLLM, with adapters merged. All ranks must take part."""
        with _base_weights_stay(self.generation.model):
            if self.on_cpu:
                self._reload()
            else:
                self.generation.sync_weights()

    def _reload(self) -> None:
        llm = self.generation.llm
        # Cloned: vLLM holds on to a tensor until its layer is complete, which may be after the adapter is unmerged
        weights = ((name, tensor.detach().clone()) for name, tensor in self.generation._iter_named_params())
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        llm.apply_model(_pack_embeddings)
        llm.reset_prefix_cache()

    def sample(self, model: nn.Module, prompt_ids: Sequence[Sequence[int]], step: int) -> list[list[int]]:
        """One completion per prompt, in their order, each up to and including its first end-of-text token.

        Args:
            model: Not used, as vLLM has its weights since the last [`~VLLMRollouts.sync`].
            prompt_ids: One list of token ids per prompt.
            step: Step of the run, which the random state depends on. A server has its own state.
        """
        together = self.mode == "server" or self.generation.tensor_parallel_size > 1
        if not prompt_ids and not together:
            return []
        prompts = [list(prompt) for prompt in prompt_ids]
        if together:  # TRL shares the answers out by equal numbers of prompts
            counts = self.accelerator.gather(torch.tensor([len(prompts)], device=self.accelerator.device))
            if not int(counts.max()):
                return []
            filler = prompts[0] if prompts else [min(self.ends, default=0)]
            prompts += [filler] * (int(counts.max()) - len(prompts))
        # The engines of one tensor-parallel group must draw the same
        seed = rollout_seed(self.seed, "student", step, self.group)
        with _own_random_state(seed, self.accelerator.device):
            _, completions, _, _ = self.generation.generate(prompts, None, 1)
        return [up_to_the_end(ids, self.ends) for ids in completions[: len(prompt_ids)]]


def _sampling_params(given: dict[str, Any]) -> dict[str, Any]:
    """A user's `generation_kwargs` under their names in vLLM.

    Raises:
        ValueError: if a setting has no name here. Without it, vLLM would sample from another distribution.
    """
    known = {
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "max_new_tokens",
        "eos_token_id",
        "use_cache",
        "pad_token_id",
    }
    unknown = sorted(given.keys() - known - _NAMES.keys())
    if unknown:
        raise ValueError(
            f"`generation_kwargs` has {unknown[0]!r}, which is not known to be the same in vLLM. With `use_vllm` "
            f"these are allowed: {sorted(known | _NAMES.keys())}."
        )
    return {name: given[key] for key, name in _NAMES.items() if key in given}


@contextmanager
def _engine_is_built(module: Any, on_cpu: bool) -> Iterator[None]:
    """On a CPU, adds arguments for the engine that TRL's class does not pass on. Afterwards, restores what changed."""
    llm, set_num_threads = module.LLM, torch.set_num_threads
    if on_cpu:
        module.LLM = lambda *args, **kwargs: llm(*args, **{**kwargs, "dtype": "float32", "enforce_eager": True})
    try:
        yield
    finally:
        module.LLM, torch.set_num_threads = llm, set_num_threads


@contextmanager
def _own_random_state(seed: int, device: torch.device) -> Iterator[None]:
    """As [`~trl_promptkd.generation.rollouts.own_random_state`], and seeds numpy.

    On a GPU, vLLM draws its requests' seeds from numpy.
    """
    with own_random_state(seed, device):
        np.random.seed(seed % 2**32)
        yield


@contextmanager
def _base_weights_stay(student: nn.Module) -> Iterator[None]:
    """Restores the base weights of an adapter. Merging and unmerging would change them by rounding at every push."""
    if not isinstance(student, PeftModel):
        yield
        return
    before = [(p, p.detach().clone()) for name, p in student.named_parameters() if ".base_layer." in name]
    try:
        yield
    finally:
        if any(getattr(module, "merged", False) for module in student.modules()):
            student.unmerge_adapter()
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)


def _pack_embeddings(model: nn.Module) -> None:
    """Repack the embeddings. Otherwise a tied output head keeps its old weights."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding):
            module.quant_method.process_weights_after_loading(module)
