"""A model's answers to prompts, each from its own random state, in files from which a run resumes."""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..files import content_hash, read_text, remove_incomplete, text_hash, write_text
from ..generation.rollouts import generate_completions, rollout_config, rollout_seed, stop_ids
from ..generation.store import compute_missing
from ..generation.teacher_answers import weights_fingerprint
from .rows import EvaluationRows


__all__ = [
    "answers_path",
    "evaluation_config",
    "evaluation_seeds",
    "hash_of",
    "judged_texts",
    "model_source",
    "real_vocab_size",
    "write_answers",
]

_SECONDS_TO_WRITE = 3600.0  # a file that is still half-written then was left by a run that was killed
_THINK_TOKENS = 16  # `<think>` and the blank lines after it are no more, in any tokenizer
_NOT_OF_THE_MODEL = ("_name_or_path", "transformers_version")


def evaluation_config(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    greedy: bool,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
) -> GenerationConfig:
    """How answers are generated: sampled or greedy, up to a token that ends the model's turns."""
    # transformers warns of settings that greedy decoding does not look at
    unused = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    settings = SimpleNamespace(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        generation_kwargs=unused if greedy else None,
    )
    return rollout_config(model, model, tokenizer, settings)


def evaluation_seeds(seed: int, prompt_ids: Sequence[Sequence[int]]) -> list[int]:
    """A seed for the answer to each prompt. It depends on the prompt, and on how many equal ones came before it."""
    asked: Counter[str] = Counter()
    seeds = []
    for ids in prompt_ids:
        prompt = text_hash(json.dumps(list(ids)))
        seeds.append(rollout_seed(seed, f"evaluation/{prompt}", asked[prompt], 0))
        asked[prompt] += 1
    return seeds


def real_vocab_size(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The number of ids that stand for tokens if the model has more ids, else `None`."""
    size = max(tokenizer.get_vocab().values()) + 1
    return size if size < model.config.get_text_config().vocab_size else None


def write_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: EvaluationRows,
    config: GenerationConfig,
    row_seeds: Sequence[int] | None,
    batch_size: int,
    path: str | None,
    title: str,
) -> list[dict[str, Any]]:
    """The model's answers. Those that `path` already holds are read, not generated again.

    Args:
        row_seeds: A seed for the answer to each row, see [`evaluation_seeds`]. `None` for greedy answers.

    Returns:
        For each row `row`, `prompt`, `completion` and `ended`: whether it ended by itself, before `max_new_tokens`.
    """
    known: dict[int, dict[str, Any]] = {}
    if path is not None:
        remove_incomplete(os.path.dirname(path), os.path.basename(path), older_than=_SECONDS_TO_WRITE)
        known = _read_answers(path, len(rows.prompt_ids))
    vocab_size = real_vocab_size(model, tokenizer)
    ends = stop_ids(config)

    def answer(batch: list[int]) -> dict[int, dict[str, Any]]:
        completions = generate_completions(
            model,
            [rows.prompt_ids[row] for row in batch],
            config,
            vocab_size=vocab_size,
            row_seeds=None if row_seeds is None else [row_seeds[row] for row in batch],
        )
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        return {
            row: {
                "row": row,
                "prompt": tokenizer.decode(rows.prompt_ids[row]),
                "completion": text,
                "ended": bool(ends.intersection(ids[-1:])),
            }
            for row, text, ids in zip(batch, texts, completions, strict=True)
        }

    def keep(answers: dict[int, dict[str, Any]]) -> None:
        known.update(answers)
        if path is None:
            return
        merged = {**_read_answers(path, len(rows.prompt_ids)), **known}  # another run of this evaluation may write too
        write_text(path, "".join(json.dumps(merged[row]) + "\n" for row in sorted(merged)))

    lengths = dict(enumerate(map(len, rows.prompt_ids)))
    compute_missing(lengths, known.keys(), answer, keep, batch_size, title)
    return [known[row] for row in lengths]


def judged_texts(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[Sequence[int]], texts: Sequence[str]
) -> list[str]:
    """Answers as they are scored: with the `<think>` that the chat template opened at the end of their prompts.

    Without it, thoughts that were cut at `max_new_tokens` would look like an answer.
    """
    ends = [tokenizer.decode(list(ids[-_THINK_TOKENS:])).rstrip() for ids in prompt_ids]
    return [f"<think>{text}" if end.endswith("<think>") else text for end, text in zip(ends, texts, strict=True)]


def answers_path(folder: str, name: str, seed: int | None, source: Mapping[str, Any], rows: EvaluationRows) -> str:
    """The file of one data set's answers. Another model, other prompts or other settings have another file."""
    key = content_hash(
        [{**source, "prompts": hash_of(rows.prompt_ids), "seed": seed}, []], ensure_ascii=True, default=str
    )
    plain = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)[:80]
    return os.path.join(folder, f"{plain}-{'greedy' if seed is None else f'seed{seed}'}-{key[:16]}.jsonl")


def _read_answers(path: str, num_rows: int) -> dict[int, dict[str, Any]]:
    """The answers that a file already holds."""
    known: dict[int, dict[str, Any]] = {}
    if not os.path.isfile(path):
        return known
    for number, line in enumerate(read_text(path, "a model's answers").split("\n"), 1):
        if not line:
            continue
        try:
            entry = json.loads(line)
            kinds = [type(entry[name]) for name in ("row", "prompt", "completion", "ended")]
            is_right = kinds == [int, str, str, bool] and 0 <= entry["row"] < num_rows
        except (ValueError, TypeError, KeyError, RecursionError):
            is_right = False
        if not is_right:
            raise ValueError(
                f"{path}, line {number}, is no answer of this evaluation. Delete the file: its answers are then "
                "written again."
            )
        known[entry["row"]] = entry
    return known


def model_source(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What determines a model's answers besides prompts and sampling."""
    adapters = {
        name: [module.active_adapters, module.disable_adapters, getattr(module, "scaling", None)]
        for name, module in model.named_modules()
        if isinstance(getattr(module, "disable_adapters", None), bool)  # a layer of PEFT's; models have such a method
    }
    return {
        "model": weights_fingerprint(model, everything=True),
        "config": {key: value for key, value in model.config.to_dict().items() if key not in _NOT_OF_THE_MODEL},
        # PEFT switches a soft prompt off by taking another `forward`
        "adapters": {"layers": adapters, "forward": getattr(model.forward, "__qualname__", None)},
        "tokenizer": hash_of(_tokenizer_source(tokenizer)),
        "vocab_size": real_vocab_size(model, tokenizer),
    }


def _tokenizer_source(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    about = [type(tokenizer).__name__, sorted(tokenizer.all_special_ids), tokenizer.clean_up_tokenization_spaces]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [*about, sorted(tokenizer.get_vocab().items())]
    parts = json.loads(backend.to_str())
    return [*about, {name: part for name, part in parts.items() if name not in ("truncation", "padding")}]


def hash_of(value: Any) -> str:
    return text_hash(json.dumps(value, sort_keys=True))
