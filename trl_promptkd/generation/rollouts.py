"""Completions sampled for a whole accumulation window at once, from their own random state.

That state depends only on the seed, the step and the rank. (A vLLM server has its own.) A resumed run therefore
samples what the uninterrupted one would have sampled, and sampling does not change the global state.
"""

import copy
import hashlib
from collections.abc import Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import GenerationMode

from .._trl import sampling_loop, unwrap_model_for_generation
from ..data import pad_rows
from ..models.forward import is_sharded, prompted_embeddings, without_router_logits
from ..models.side_effects import flags_restored, random_state_restored
from .progress import FinishedRows, open_bar, rows_bar


__all__ = [
    "Rollouts",
    "generate_completions",
    "have_ended",
    "own_random_state",
    "rollout_config",
    "rollout_seed",
    "sample_completions",
    "stop_ids",
    "up_to_the_end",
]


def rollout_config(
    student: PreTrainedModel,
    teacher: PreTrainedModel | list[Any],
    processing_class: PreTrainedTokenizerBase,
    args: Any,
) -> GenerationConfig:
    """How completions are sampled: as `args` say, up to an end-of-text token of either model or the tokenizer.

    The tokens of the teacher, or of several, are included. An instruction-tuned teacher ends a turn with a token at
    which a base student does not stop.
    """
    stop_ids = {processing_class.eos_token_id}
    for model in (student, *(teacher if isinstance(teacher, list) else [teacher])):
        published = model.generation_config.eos_token_id
        stop_ids |= set(published if isinstance(published, list) else [published])
    settings = {
        "max_new_tokens": args.max_new_tokens,
        "do_sample": True,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "use_cache": True,
        "pad_token_id": processing_class.pad_token_id,
        "eos_token_id": sorted(stop_ids - {None}) or None,
    }
    return GenerationConfig(**{**settings, **(args.generation_kwargs or {})})


def stop_ids(generation_config: GenerationConfig) -> set[int]:
    """The tokens that end a completion."""
    eos = generation_config.eos_token_id
    return set(eos if isinstance(eos, list) else [] if eos is None else [eos])


def up_to_the_end(ids: Sequence[int], ends: set[int]) -> list[int]:
    """A completion up to and including its first token of `ends`."""
    return list(ids[: next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))])


def rollout_seed(seed: int, purpose: str, step: int, rank: int) -> int:
    """A seed for one use of randomness, unrelated to those of neighbouring steps and ranks."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@contextmanager
def own_random_state(seed: int, device: torch.device):
    """Inside, torch draws from `seed`. Afterwards its global state is restored."""
    with random_state_restored(device):
        torch.manual_seed(seed)
        yield


class _RealIdsOnly(LogitsProcessor):
    """Keeps a model with a padded vocabulary from sampling an id that stands for no token.

    transformers' `SuppressTokensLogitsProcessor` would replace the user's own `suppress_tokens`.
    """

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        padding = torch.arange(scores.size(-1), device=scores.device) >= self.vocab_size
        return scores.masked_fill(padding, float("-inf")) if scores.size(-1) > self.vocab_size else scores


class _Draw(LogitsProcessor):
    """Draws a token by the inverse of the distribution function, and gives the others zero probability.

    On a CPU, `torch.multinomial` draws an exponential random number for every entry of the vocabulary, one after the
    other. That is a fifth of the time of a small model's rollouts. Here it is one uniform number per row.

    Args:
        row_seeds: Seeds of a batch's rows. Each row then draws from its own state, whatever the other rows are. `None`
            draws from torch's state.
        num_tokens: Length of the longest completion.
    """

    def __init__(self, row_seeds: Sequence[int] | None = None, num_tokens: int = 0):
        self.numbers, self.step = None, 0
        if row_seeds is not None:
            states = [torch.Generator().manual_seed(seed) for seed in row_seeds]
            self.numbers = torch.stack(
                [torch.rand(num_tokens, dtype=torch.float64, generator=state) for state in states]
            )

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        distribution = scores.double().softmax(dim=-1).cumsum(dim=-1)
        if self.numbers is None:
            uniform = torch.rand(len(scores), 1, dtype=torch.float64, device=scores.device)
        else:
            uniform = self.numbers[:, self.step : self.step + 1].to(scores.device)
            self.step += 1
        uniform = uniform * distribution[:, -1:]
        # `right`: an entry without probability is never the first whose distribution function exceeds the number
        drawn = torch.searchsorted(distribution, uniform, right=True).clamp(max=scores.size(-1) - 1)
        return torch.full_like(scores, float("-inf")).scatter_(-1, drawn, 0.0)


class _StopStrings(StoppingCriteria):
    """
    Ends a row at a stop string, and keeps its position. `generate` fills the rest with padding, which may look like
    tokens.

    transformers' own criterion fails on tokenizers that do not know each letter, and also searches the prompt.

    Args:
        width: Number of columns of the prompts. A stop string in them ends nothing.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str], width: int):
        self.tokenizer, self.strings, self.width = tokenizer, strings, width
        # A letter may take four tokens, one a byte
        self.window = 4 * max(map(len, strings)) + 1
        self.lengths: dict[int, int] = {}  # row -> tokens up to the end of its first stop string

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        new = input_ids[:, self.width :]
        texts = self.tokenizer.batch_decode(new[:, -self.window :])
        for row, text in enumerate(texts):
            if row not in self.lengths and any(string in text for string in self.strings):
                self.lengths[row] = new.size(1)
        return torch.tensor([row in self.lengths for row in range(len(texts))], device=input_ids.device)


def _stop_strings(generation_config: GenerationConfig) -> list[str]:
    strings = generation_config.stop_strings or []
    return [strings] if isinstance(strings, str) else list(strings)


def have_ended(
    completions: Sequence[Sequence[int]], generation_config: GenerationConfig, tokenizer: PreTrainedTokenizerBase
) -> list[bool]:
    """Which completions ended by themselves, with an end-of-text token or a stop string."""
    ends, strings = stop_ids(generation_config), _stop_strings(generation_config)
    texts = tokenizer.batch_decode(completions) if strings and completions else [""] * len(completions)
    return [
        bool(ends.intersection(ids[-1:])) or any(string in text for string in strings)
        for ids, text in zip(completions, texts, strict=True)
    ]


def _sample_by_drawing(model, input_ids, logits_processor, stopping_criteria, generation_config, draw, **kwargs):
    """transformers' own sampling loop, with [`_Draw`] after temperature, top-k and so on."""
    generation_config.do_sample = False
    processors = LogitsProcessorList([*logits_processor, draw])
    return sampling_loop(model, input_ids, processors, stopping_criteria, generation_config, **kwargs)


@torch.no_grad()
def generate_completions(
    model: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    generation_config: GenerationConfig,
    batch_size: int | None = None,
    vocab_size: int | None = None,
    in_step: bool = False,
    soft_prompt: Tensor | None = None,
    row_seeds: Sequence[int] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[list[int]]:
    """Sample one completion for each prompt, with a KV cache, in evaluation mode.

    Args:
        model: A model with `generate`, not wrapped for data parallelism. Its own `generation_config` is ignored. A
            published repetition penalty or top-k would sample from another distribution than the one that is trained.
        prompt_ids: One list of token ids per prompt.
        generation_config: Sampling settings. `pad_token_id` and `eos_token_id` must be set.
        batch_size: Prompts per batch. `None` for all at once.
        vocab_size: Number of ids that stand for tokens, if the model has more.
        in_step: Continue until the last rank's completions have ended. Needed if every rank holds a part of the
            weights that the others need.
        soft_prompt (`Tensor` of shape `(num_virtual_tokens, hidden)`, *optional*): Stands directly before each
            prompt's first token.
        row_seeds: One seed per prompt, from which its completion alone is sampled. It then depends neither on
            `batch_size` nor on the other prompts. `None` samples all from torch's random state.
        tokenizer: Needed if `generation_config` has `stop_strings`.

    Returns:
        One list of token ids per prompt, in their order, each up to and including its first end-of-text token or stop
        string.
    """
    ends = stop_ids(generation_config)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    processors = LogitsProcessorList([] if vocab_size is None else [_RealIdsOnly(vocab_size)])
    batch_size = batch_size or len(prompt_ids)
    draws = generation_config.get_generation_mode() == GenerationMode.SAMPLE
    draws = draws and (model.device.type == "cpu" or row_seeds is not None)
    published, strings = base.generation_config, _stop_strings(generation_config)
    if strings:
        generation_config = copy.deepcopy(generation_config)
        generation_config.stop_strings = None  # `_StopStrings` looks for them
    completions: list[list[int]] = [[] for _ in prompt_ids]
    order = sorted(range(len(prompt_ids)), key=lambda row: -len(prompt_ids[row]))  # rows are padded to their likes
    try:
        base.generation_config = generation_config
        with flags_restored(model):
            model.eval()
            for start in range(0, len(prompt_ids), batch_size):
                rows = order[start : start + batch_size]
                prompts = [prompt_ids[row] for row in rows]
                batch = pad_rows(prompts, [[]] * len(prompts), generation_config.pad_token_id)
                ids, mask = (batch[name].to(model.device) for name in ("prompts", "prompt_attention_mask"))
                inputs, width = {"input_ids": ids}, ids.size(1)
                if soft_prompt is not None:  # `generate` then returns the new tokens alone
                    embeds, mask = prompted_embeddings(model, ids, mask, soft_prompt)
                    inputs, width = {"inputs_embeds": embeds}, 0
                seeds = None if row_seeds is None else [row_seeds[row] for row in rows]
                draw = _Draw(seeds, generation_config.max_new_tokens) if draws else None
                stops = [_StopStrings(tokenizer, strings, width)] if strings else []
                criteria, bar = StoppingCriteriaList(stops), open_bar()
                if bar is not None:
                    stopped = stops[0].lengths if stops else ()
                    limit = generation_config.max_new_tokens
                    criteria.append(FinishedRows(bar, len(rows), width, limit, ends, stopped))
                sequences = model.generate(
                    **inputs,
                    **without_router_logits(model),
                    attention_mask=mask,
                    generation_config=generation_config,
                    logits_processor=processors,
                    stopping_criteria=criteria,
                    # `generate` keeps `synced_gpus` from a loop of one's own
                    custom_generate=partial(_sample_by_drawing, draw=draw, synced_gpus=in_step) if draws else None,
                    synced_gpus=in_step,
                )
                for index, (row, new) in enumerate(zip(rows, sequences[:, width:].tolist(), strict=True)):
                    length = stops[0].lengths.get(index) if stops else None
                    completions[row] = up_to_the_end(new[:length], ends)
                if bar is not None:
                    bar.end_batch(len(rows))
    finally:
        base.generation_config = published
    return completions


def sample_completions(
    model: nn.Module,
    accelerator: Accelerator,
    prompt_ids: Sequence[Sequence[int]],
    generation_config: GenerationConfig,
    seed: int,
    args: Any,
    vocab_size: int | None = None,
    row_seeds: Sequence[int] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[list[int]]:
    """[`generate_completions`] for a trainer's model, which may be wrapped and use checkpointing or mixed precision.

    Args:
        seed: Seed of the completions' own random state, see [`rollout_seed`].
        args: Has `rollout_batch_size` and `gradient_checkpointing_kwargs`.
        row_seeds, tokenizer: As in [`generate_completions`].
    """
    in_step = accelerator.num_processes > 1 and is_sharded(model)
    num_rows = len(prompt_ids)
    if in_step:
        # All ranks generate equally many tokens of equally many batches; what fills a rank up is dropped
        most = max(gather_object([num_rows]))
        prompt_ids = [*prompt_ids, *[[generation_config.pad_token_id]] * (most - num_rows)]
        row_seeds = None if row_seeds is None else [*row_seeds, *[0] * (most - num_rows)]
    if not prompt_ids:
        return []
    checkpointing = args.gradient_checkpointing_kwargs
    # `PeftModel.generate` goes past the forward that accelerate has wrapped in autocast
    with (
        own_random_state(seed, accelerator.device),
        accelerator.autocast(),
        unwrap_model_for_generation(model, accelerator, gradient_checkpointing_kwargs=checkpointing) as unwrapped,
    ):
        completions = generate_completions(
            unwrapped,
            prompt_ids,
            generation_config,
            args.rollout_batch_size,
            vocab_size,
            in_step,
            row_seeds=row_seeds,
            tokenizer=tokenizer,
        )
    return completions[:num_rows]


class Rollouts:
    """
    Samples completions with transformers. [`~trl_promptkd.generation.vllm.VLLMRollouts`] does so with vLLM.

    Args:
        model: The bare student. Not used here. vLLM loads the model by its name.
        accelerator ([`~accelerate.Accelerator`]): The trainer's.
        processing_class: The tokenizer.
        generation_config ([`~transformers.GenerationConfig`]): How completions are sampled.
        args: A configuration with the fields of [`~trl_promptkd.trainer.sampling_config.SamplingConfig`].
        vocab_size (`int`): Number of ids that stand for tokens. The model may have more.
        writer (`str`): The model that samples. Two writers have different random states.
    """

    def __init__(
        self,
        model: nn.Module,
        accelerator: Accelerator,
        processing_class: PreTrainedTokenizerBase,
        generation_config: GenerationConfig,
        args: Any,
        vocab_size: int,
        writer: str = "student",
    ):
        self.accelerator, self.processing_class, self.writer = accelerator, processing_class, writer
        self.generation_config, self.args, self.vocab_size = generation_config, args, vocab_size

    def sync(self) -> None:
        """Does nothing, as the trained model itself samples."""

    def sample(self, model: nn.Module, prompt_ids: Sequence[Sequence[int]], step: int) -> list[list[int]]:
        """One completion per prompt, in their order, each up to and including its first end-of-text token.

        Args:
            model: The trainer's model, which may be wrapped and use checkpointing or mixed precision.
            prompt_ids: One list of token ids per prompt.
            step: Step of the run, which the random state depends on.
        """
        seed = rollout_seed(self.args.seed, self.writer, step, self.accelerator.process_index)
        shows = self.accelerator.is_main_process and not self.args.disable_tqdm
        with rows_bar(len(prompt_ids), f"Sampling ({self.writer})", shows):
            return sample_completions(
                model,
                self.accelerator,
                prompt_ids,
                self.generation_config,
                seed,
                self.args,
                vocab_size=self.vocab_size,
                tokenizer=self.processing_class,
            )
