"""The student's completions by vLLM, through TRL's own class, with its weights kept in step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ._trl import is_vllm_available, vllm_generation_module
from .rollouts import own_random_state


__all__ = ["VLLMRollouts", "check_vllm"]

# Fields of GenerationConfig that rollouts may have, and what SamplingParams calls them
_NAMES = {"min_p": "min_p", "repetition_penalty": "repetition_penalty", "min_new_tokens": "min_tokens"}


def check_vllm(args: Any, model: Any, samples: bool) -> None:
    """Refuse `use_vllm` where it cannot work, before any weights are loaded.

    Raises:
        ImportError: where vLLM is not installed.
        ValueError: where the student never samples, or vLLM could not load it.
    """
    if not args.use_vllm:
        return
    if not samples:
        raise ValueError(
            "`use_vllm` is True, but the student samples nothing in this run. Set `use_vllm=False`, or let it sample (`lmbda` above "
            "0 in PromptKDConfig, `response_source='student'` in PrimedDistillConfig)."
        )
    if not is_vllm_available():
        raise ImportError(
            "`use_vllm` is True, but vLLM is not installed (or not in a version that TRL supports). Install it with "
            "`pip install trl[vllm]`, or set `use_vllm=False`: completions are then sampled with transformers."
        )
    name = model if isinstance(model, str) else getattr(model, "name_or_path", "")
    if not name:
        raise ValueError(
            "`use_vllm` is True, but `model` has no name that vLLM could load it by. Load the student with `from_pretrained`, or save it "
            "to a folder first and pass that folder."
        )


class VLLMRollouts:
    """
    Samples completions with vLLM as [`~trl_promptkd.rollouts.sample_completions`] does with transformers.

    On a CPU, the engine is made to compute in float32 (by itself it takes bfloat16, another distribution than the one that is
    trained), and weights are pushed by vLLM's own reloading, as TRL's push fails on the layout that the CPU build gives them.

    Args:
        student: The bare student, whose `name_or_path` vLLM loads.
        accelerator ([`~accelerate.Accelerator`]): The trainer's.
        processing_class: The tokenizer.
        generation_config ([`~transformers.GenerationConfig`]): What completions are sampled with.
        args: A configuration with the fields of [`~trl_promptkd.sampling_config.SamplingConfig`].
        vocab_size (`int`, *optional*): Number of ids that stand for tokens, where the model has more.
    """

    def __init__(
        self,
        student: nn.Module,
        accelerator: Accelerator,
        processing_class: PreTrainedTokenizerBase,
        generation_config: GenerationConfig,
        args: Any,
        vocab_size: int | None = None,
    ):
        self.accelerator, self.mode = accelerator, args.vllm_mode
        self.on_cpu = accelerator.device.type == "cpu"
        if self.on_cpu and self.mode == "server":
            raise ValueError(
                "`vllm_mode` is 'server', but weights can only be sent to a server from a GPU (through NCCL). Set "
                "`vllm_mode='colocate'`."
            )
        self.stop_ids = set(generation_config.eos_token_id or [])
        sampling = _sampling_params(generation_config, args.generation_kwargs or {})
        if vocab_size is not None:
            sampling["allowed_token_ids"] = list(range(vocab_size))
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.vllm_tensor_parallel_size
        module = vllm_generation_module()
        with _float32_engine(module) if self.on_cpu else own_random_state(args.seed, accelerator.device):
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
                generation_kwargs={**sampling, "stop_token_ids": sorted(self.stop_ids)},
            )

    def sync(self) -> None:
        """Push the student's weights, adapters merged into them, to vLLM. All ranks must take part."""
        if not self.on_cpu:
            self.generation.sync_weights()
            return
        llm, student = self.generation.llm, self.generation.model
        # Cloned: vLLM holds on to a tensor until its layer is complete, which may be after the adapter is unmerged
        weights = ((name, tensor.detach().clone()) for name, tensor in self.generation._iter_named_params())
        try:
            llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            llm.apply_model(_pack_embeddings)
        finally:
            if isinstance(student, PeftModel) and any(getattr(m, "merged", False) for m in student.modules()):
                student.unmerge_adapter()
        llm.reset_prefix_cache()

    def sample(self, prompt_ids: Sequence[Sequence[int]], seed: int) -> list[list[int]]:
        """One completion for each prompt, in their order, each up to and including its first end-of-text token.

        Args:
            prompt_ids: One list of token ids a prompt.
            seed: The completions' own random state. A server has one of its own.
        """
        together = self.mode == "server" or self.generation.tensor_parallel_size > 1
        if not prompt_ids and not together:
            return []
        prompts = [list(prompt) for prompt in prompt_ids]
        if together:  # TRL shares the answers out by equal numbers of prompts
            count = self.accelerator.gather(torch.tensor([len(prompts)], device=self.accelerator.device))
            filler = prompts[0] if prompts else [min(self.stop_ids, default=0)]
            prompts += [filler] * (int(count.max()) - len(prompts))
        with own_random_state(seed, self.accelerator.device):
            _, completions, _, _ = self.generation.generate(prompts, None, 1)
        return [self._cut(list(ids)) for ids in completions[: len(prompt_ids)]]

    def _cut(self, ids: list[int]) -> list[int]:
        return ids[: next((i + 1 for i, token in enumerate(ids) if token in self.stop_ids), len(ids))]


def _sampling_params(generation_config: GenerationConfig, given: dict[str, Any]) -> dict[str, Any]:
    """What a user's `generation_kwargs` are called in vLLM.

    Raises:
        ValueError: for a setting that it has no name for here: left out, it would sample from another distribution.
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
            f"`generation_kwargs` has {unknown[0]!r}, which is not known to be the same in vLLM. With `use_vllm` these are allowed: "
            f"{sorted(known | _NAMES.keys())}."
        )
    return {name: given[key] for key, name in _NAMES.items() if key in given}


@contextmanager
def _float32_engine(module: Any) -> Iterator[None]:
    """While an engine is built on a CPU: arguments that TRL's class does not pass on, and what the build changes put back."""
    llm, set_num_threads, state = module.LLM, torch.set_num_threads, torch.random.get_rng_state()
    module.LLM = lambda *args, **kwargs: llm(*args, **{**kwargs, "dtype": "float32", "enforce_eager": True})
    try:
        yield
    finally:
        module.LLM, torch.set_num_threads = llm, set_num_threads
        torch.random.set_rng_state(state)


def _pack_embeddings(model: nn.Module) -> None:
    """A head that is tied to the embeddings goes on with its old weights otherwise."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding):
            module.quant_method.process_weights_after_loading(module)
