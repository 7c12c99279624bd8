"""How good a model's answers are: instruction following with several seeds, as the PromptKD paper does it, and GSM8K by the response
priming paper's rules.

Answers are written in batches of like lengths, each row from a random state of its own, so that they depend neither on the batch
size, nor on the other rows, nor on where a run was interrupted. With an `output_dir` they stay on the disk, one file a data set and seed,
under a hash of what made them: a run that starts again writes only what is missing.
"""

import hashlib
import json
import math
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

from datasets import Dataset, IterableDataset
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .checks import check_positions
from .data import tokenize_row
from .files import read_text, remove_incomplete, whole_file
from .metrics import (
    gsm8k_accuracy,
    gsm8k_row_scores,
    instruction_row_scores,
    instruction_scores,
    reference_number,
    rouge_scorer,
)
from .rollouts import generate_completions, rollout_config, rollout_seed, stop_ids
from .teacher_answers import answer_key, weights_fingerprint


__all__ = [
    "PAPER_SEEDS",
    "TASKS",
    "TEMPLATES",
    "EvaluationRows",
    "check_evaluation_settings",
    "evaluate_model",
    "evaluation_config",
    "evaluation_rows",
    "evaluation_seeds",
    "instruction_text",
    "model_source",
    "real_vocab_size",
    "row_scores",
    "score_answers",
]

TASKS = ("instruct", "gsm8k")
TEMPLATES = ("chat", "paper", "plain")
PAPER_SEEDS = (10, 20, 30, 40, 50)

_SECONDS_A_PART = 30.0  # at most so much work is lost when a run is killed
_SECONDS_TO_WRITE = 3600.0  # a file that is still half-written then was left by a run that was killed


@dataclass(frozen=True)
class EvaluationRows:
    """
    A data set to evaluate on.

    Args:
        prompt_ids: One list of token ids a row.
        references: Of each row its right answers: texts for `"instruct"`, numbers for `"gsm8k"`.
        left_out: How many rows were longer than the longest prompt that is allowed.
    """

    prompt_ids: list[list[int]]
    references: list[list[Any]]
    left_out: int = 0


def instruction_text(instruction: str, input_text: str = "") -> str:
    """An instruction in the template of Alpaca, MiniLLM and PromptKD."""
    if not input_text:
        return (
            "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{instruction}\n\n### Response:\n"
        )
    return (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that "
        f"appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input_text}\n\n### Response:\n"
    )


def evaluation_rows(
    dataset: Dataset | IterableDataset,
    name: str,
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    num_rows: int | None = None,
    max_prompt_length: int | None = None,
) -> EvaluationRows:
    """Prompts and right answers of a data set.

    Args:
        dataset: With `instruction`, `input` (may be missing) and `output` (a text or a list of them), or `question` and `answer`; all right
            answers may stand in `references`. Or TRL's `prompt` and `completion`, or `messages`, which are taken as they are. `tools` and
            `chat_template_kwargs` reach the chat template, as in training.
        name: What it is called in messages.
        task: `"instruct"` or `"gsm8k"`.
        template: Of instructions and questions: `"chat"` (the tokenizer's), `"paper"` ([`instruction_text`]) or `"plain"`.
        num_rows: Take the first ones only.
        max_prompt_length: Leave rows out whose prompt has more tokens.

    Raises:
        TypeError, ValueError: for what is no such data set, naming the row.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(
            f"`{name}` is a {type(dataset).__name__}; it must be a `datasets.Dataset` or `datasets.IterableDataset`. Use "
            "`load_dataset(name, split=...)`, or `Dataset.from_list(rows)` for rows in memory."
        )
    prompts: list[list[int]] = []
    references: list[list[Any]] = []
    left_out = 0
    rows = dataset.take(num_rows) if num_rows is not None else dataset
    for index, row in enumerate(rows):
        try:
            prompt_row, answers = _read_row(dict(row), template)
            ids = tokenize_row(prompt_row, tokenizer)["prompt_ids"]
            if not ids:
                raise ValueError("its prompt has no tokens. Filter such rows out.")
            right = answers if task == "instruct" else [reference_number(text, "the right answer") for text in answers]
        except (TypeError, ValueError) as error:
            raise ValueError(f"Row {index} of `{name}`: {error}") from error
        if max_prompt_length is not None and len(ids) > max_prompt_length:
            left_out += 1
            continue
        prompts.append(ids)
        references.append(right)
    if not prompts:
        if left_out:
            raise ValueError(
                f"`{name}` has no rows to evaluate on: all {left_out} prompts are longer than `max_prompt_length={max_prompt_length}`. Raise it."
            )
        raise ValueError(f"`{name}` is empty: it has no rows to evaluate on. Check its path, split and filters.")
    return EvaluationRows(prompts, references, left_out)


def _read_row(row: dict[str, Any], template: str) -> tuple[dict[str, Any], list[Any]]:
    """A row without its answer, as [`tokenize_row`] takes it, and its right answers."""
    of_template = {name: row[name] for name in ("tools", "chat_template_kwargs") if row.get(name) is not None}
    for question, more, answer in (("instruction", "input", "output"), ("question", None, "answer")):
        if isinstance(row.get(question), str):
            text, extra = row[question], (row.get(more) or "") if more else ""
            if not text.strip():
                raise ValueError(f"its `{question}` is {text!r}, which asks nothing. Filter such rows out.")
            plain = f"{text}\n\n{extra}" if extra else text
            prompts = {
                "chat": [{"role": "user", "content": plain}],
                "paper": instruction_text(text, extra),
                "plain": plain,
            }
            return {"prompt": prompts[template], **of_template}, _answers(row, answer)
    if row.get("messages"):
        *before, last = row["messages"]
        if isinstance(last, Mapping) and last.get("role") == "assistant" and before:
            return {"prompt": before, **of_template}, _answers({"completion": last.get("content"), **_references(row)})
        if not isinstance(last, Mapping) or last.get("role") == "assistant" or not _references(row):
            raise ValueError(
                "its `messages` are no conversation that ends with an assistant message, the answer. Filter such rows out, or give "
                "right answers in `references`."
            )
        return {"prompt": row["messages"], **of_template}, _answers(row)
    if row.get("prompt") is None:
        raise ValueError(
            f"it has none of `instruction`, `question`, `prompt` and `messages`; its columns are {sorted(row)}. Rename columns with "
            "`dataset.rename_column`."
        )
    return {"prompt": row["prompt"], **of_template}, _answers(row, "completion", "output", "answer")


def _references(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"references": row["references"]} if row.get("references") else {}


def _answers(row: Mapping[str, Any], *columns: str) -> list[str]:
    """The right answers of a row: its `references`, else what stands in the first of `columns` (`completion`) that it has."""
    found = (row.get(column) for column in columns or ("completion",))
    answers = row.get("references") or next((answer for answer in found if answer is not None), None)
    if isinstance(answers, list) and answers and isinstance(answers[0], Mapping):
        answers = answers[-1].get("content")
    answers = list(answers) if isinstance(answers, list | tuple) else [answers]
    texts = [isinstance(answer, str | int | float) and not isinstance(answer, bool) for answer in answers]
    if not answers or not all(texts):
        raise ValueError(
            f"its right answer is {answers[0] if len(answers) == 1 else answers!r}; it must be a text or a list of texts, in `output`, `answer`, "
            "`completion`, `references` or the last message. Filter such rows out."
        )
    return [answer if isinstance(answer, str) else str(answer) for answer in answers]


def evaluation_config(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    greedy: bool,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
) -> GenerationConfig:
    """How answers are written: sampled, or greedily, until a token that ends the model's turns."""
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
    """The seeds of the answers to some prompts, of each prompt and nothing else; equal prompts are told apart by how many came before."""
    asked: Counter[str] = Counter()
    seeds = []
    for ids in prompt_ids:
        prompt = hashlib.blake2b(json.dumps(list(ids)).encode(), digest_size=16).hexdigest()
        seeds.append(rollout_seed(seed, f"evaluation/{prompt}", asked[prompt], 0))
        asked[prompt] += 1
    return seeds


def real_vocab_size(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The number of ids that stand for tokens, where the model has more; else `None`."""
    size = max(tokenizer.get_vocab().values()) + 1
    return size if size < model.config.get_text_config().vocab_size else None


def score_answers(task: str, answers: Sequence[str], references: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """The task's metrics: `rougeL` and `exact_match`, or `accuracy` and `rules`."""
    if task == "instruct":
        return dict(instruction_scores(answers, references))
    return gsm8k_accuracy(answers, _nearest_numbers(answers, references))


def row_scores(task: str, answers: Sequence[str], references: Sequence[Sequence[Any]]) -> dict[str, list[float]]:
    """The task's metrics of each row in percent, whose means are those of [`score_answers`]: `rougeL` and `exact_match`, or `accuracy`."""
    if task == "instruct":
        found = instruction_row_scores(answers, references)
        return {name: [row[name] for row in found] for name in ("rougeL", "exact_match")}
    rows = gsm8k_row_scores(answers, _nearest_numbers(answers, references))
    return {"accuracy": [100.0 * row["correct"] for row in rows]}


def _nearest_numbers(answers: Sequence[str], references: Sequence[Sequence[float]]) -> list[float]:
    """Of each row's right numbers the one nearest to its answer: it is right if any of them is."""
    first = [numbers[0] for numbers in references]
    if all(len(numbers) == 1 for numbers in references):
        return first
    found = [row["value"] for row in gsm8k_row_scores(answers, first)]
    return [
        numbers[0] if value is None else min(numbers, key=lambda number: abs(number - value))
        for numbers, value in zip(references, found, strict=True)
    ]


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    datasets: Mapping[str, Dataset | IterableDataset | EvaluationRows],
    task: str = "instruct",
    template: str | None = None,
    seeds: Sequence[int] | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    num_rows: int | None = None,
    max_prompt_length: int | None = None,
    output_dir: str | None = None,
) -> dict[str, Any]:
    """Let a model answer, and score its answers.

    Args:
        model (`PreTrainedModel` or `PeftModel`): On its device.
        tokenizer (`PreTrainedTokenizerBase`): The model's.
        datasets (`dict`): Name -> rows, as they are or as [`evaluation_rows`] has read them.
        task (`str`, *optional*, defaults to `"instruct"`): Or `"gsm8k"`.
        template (`str`, *optional*): `"chat"`, `"paper"` or `"plain"`. `None`: `"chat"` where the tokenizer has a chat template; else `"paper"` for
            instructions and `"plain"` for GSM8K (the bare question, as response priming's student sees it).
        seeds (`list` of `int`, *optional*): Sample once for each of them; the paper's are [`PAPER_SEEDS`]. `None`: greedy answers.
        temperature, top_p, top_k: Of the samples. The defaults are the paper's: the model's own distribution.
        max_new_tokens (`int`, *optional*, defaults to `256`): Longest answer.
        batch_size (`int`, *optional*, defaults to `8`): Rows at once.
        num_rows (`int`, *optional*): Of each data set, the first ones only.
        max_prompt_length (`int`, *optional*): Leave longer prompts out (they are counted).
        output_dir (`str`, *optional*): Keeps the answers; a run that starts again goes on where it was.

    Returns:
        `task`, `template`, `settings`, and for each data set `sets[name]`: `rows`, `left_out`, `data_hash` (of prompts and right answers), `runs`
        (one a seed: `seed`, the metrics, and `terminated_share`, the share of answers that ended by themselves and were not cut at
        `max_new_tokens`), `mean` and `std` (the sample's, over seeds; `None` for a single run), of each metric in percent, and the mean
        `terminated_share`.

    Raises:
        ValueError: for settings or rows that cannot be evaluated, naming them.
    """
    template = check_evaluation_settings(
        task,
        template,
        tokenizer,
        seeds,
        temperature,
        top_p,
        top_k,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        num_rows=num_rows,
        max_prompt_length=max_prompt_length,
    )
    if not datasets:
        raise ValueError("`datasets` is empty. Give at least one data set.")
    sets = {
        name: dataset
        if isinstance(dataset, EvaluationRows)
        else evaluation_rows(dataset, name, task, tokenizer, template, num_rows, max_prompt_length)
        for name, dataset in datasets.items()
    }
    longest = max_new_tokens + max(len(ids) for rows in sets.values() for ids in rows.prompt_ids)
    check_positions(
        "model", model, longest, "Lower `max_new_tokens` or `max_prompt_length` (longer prompts are left out)."
    )
    config = evaluation_config(model, tokenizer, max_new_tokens, seeds is None, temperature, top_p, top_k)
    source = {}
    if output_dir is not None:
        os.makedirs(output_dir, exist_ok=True)
        said = {key: value for key, value in config.to_diff_dict().items() if key != "transformers_version"}
        source = {**model_source(model, tokenizer), "sampling": said}
    results = {}
    for name, rows in sets.items():
        runs = []
        for seed in [None] if seeds is None else seeds:
            path = None if output_dir is None else _answers_path(output_dir, name, seed, source, rows)
            answers = _write_answers(model, tokenizer, rows, config, seed, batch_size, path, _title(name, seed))
            scores = score_answers(task, [answer.text for answer in answers], rows.references)
            terminated = sum(answer.ended for answer in answers) / len(answers)
            runs.append({"seed": seed, **scores, "terminated_share": terminated})
        results[name] = {
            "rows": len(rows.prompt_ids),
            "left_out": rows.left_out,
            "data_hash": _hash([rows.prompt_ids, rows.references])[:16],
            "runs": runs,
            **_summary(runs),
        }
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seeds": None if seeds is None else list(seeds)}
    if seeds is not None:
        settings |= {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    return {"task": task, "template": template, "settings": settings, "sets": results}


def check_evaluation_settings(
    task: str,
    template: str | None,
    tokenizer: PreTrainedTokenizerBase,
    seeds: Sequence[int] | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    **numbers: int | None,
) -> str:
    """Refuse settings that nothing can be evaluated with, before anything is.

    Args:
        numbers: By name; each must be above 0, or `None`.

    Returns:
        The template; for `None` the one that is chosen.

    Raises:
        ValueError: naming the setting, its value and what is allowed.
        ImportError: where what scores the answers is not installed.
    """
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"`{name}` is {number}; it must be above 0.")
    for name, choice, allowed in (("task", task, TASKS), ("template", template, (None, *TEMPLATES))):
        if choice not in allowed:
            raise ValueError(f"`{name}` is {choice!r}; it must be {' or '.join(map(repr, allowed))}.")
    if task == "instruct":
        rouge_scorer()
    if tokenizer.pad_token_id is None:
        raise ValueError("The tokenizer has no pad token. Set `tokenizer.pad_token = tokenizer.eos_token`.")
    if template is None:
        fallback = "paper" if task == "instruct" else "plain"
        template = fallback if tokenizer.chat_template is None else "chat"
    if template == "chat" and tokenizer.chat_template is None:
        raise ValueError("`template` is 'chat', but the tokenizer has no chat template. Choose 'paper' or 'plain'.")
    if seeds is not None and (not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0):
        raise ValueError(
            f"`seeds` are {list(seeds)}; they must be different whole numbers from 0 on, at least one. Leave them away (None) for greedy answers."
        )
    checks: list[tuple[str, float, Callable[[float], bool], str]] = [
        ("temperature", temperature, lambda value: value > 0, "above 0 (leave the seeds away for greedy answers)"),
        ("top_p", top_p, lambda value: 0 < value <= 1, "above 0 and at most 1"),
        ("top_k", top_k, lambda value: value >= 0, "0 (all tokens) or above"),
    ]
    for name, value, holds, wanted in checks:
        if not (math.isfinite(value) and holds(value)):
            raise ValueError(f"`{name}` is {value}; it must be {wanted}.")
        default = 0 if name == "top_k" else 1.0
        if seeds is None and value != default:
            raise ValueError(
                f"`{name}` is {value}, but answers are greedy, which it changes nothing of. Give seeds to sample with it, or leave it away."
            )
    return template


def model_source(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What decides on a model's answers besides the prompts and how they are sampled: weights, configuration, which adapters are on and how
    strong, and the tokenizer that reads the answers."""
    adapters = {
        name: [module.active_adapters, module.disable_adapters, getattr(module, "scaling", None)]
        for name, module in model.named_modules()
        if isinstance(
            getattr(module, "disable_adapters", None), bool
        )  # PEFT's layers; models have a method of that name
    }
    config = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_OF_THE_MODEL}
    return {
        "model": weights_fingerprint(model, everything=True),
        "config": config,
        # PEFT switches a soft prompt off by taking another `forward`
        "adapters": {"layers": adapters, "forward": getattr(model.forward, "__qualname__", None)},
        "tokenizer": _hash(_tokenizer_source(tokenizer)),
        "vocab_size": real_vocab_size(model, tokenizer),
    }


_NOT_OF_THE_MODEL = ("_name_or_path", "transformers_version")


def _tokenizer_source(tokenizer: PreTrainedTokenizerBase) -> Any:
    about = [type(tokenizer).__name__, sorted(tokenizer.all_special_ids), tokenizer.clean_up_tokenization_spaces]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [*about, sorted(tokenizer.get_vocab().items())]
    parts = json.loads(backend.to_str())
    return [*about, {name: part for name, part in parts.items() if name not in ("truncation", "padding")}]


def _hash(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def _summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = [name for name in runs[0] if name not in ("seed", "rules", "terminated_share")]
    values = {name: [run[name] for run in runs] for name in names}
    return {
        "mean": {name: statistics.fmean(numbers) for name, numbers in values.items()},
        "std": {name: statistics.stdev(numbers) if len(runs) > 1 else None for name, numbers in values.items()},
        "terminated_share": statistics.fmean(run["terminated_share"] for run in runs),
    }


def _title(name: str, seed: int | None) -> str:
    return f"{name}, {'greedy' if seed is None else f'seed {seed}'}"


class _Answer(NamedTuple):
    text: str
    ended: bool  # by itself, before `max_new_tokens`


def _write_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: EvaluationRows,
    config: GenerationConfig,
    seed: int | None,
    batch_size: int,
    path: str | None,
    title: str,
) -> list[_Answer]:
    """The model's answers; those that `path` holds are taken, not written again."""
    if path is not None:
        remove_incomplete(os.path.dirname(path), os.path.basename(path), older_than=_SECONDS_TO_WRITE)
    known = {} if path is None else _read_answers(path, len(rows.prompt_ids))
    order = sorted(range(len(rows.prompt_ids)), key=lambda row: -len(rows.prompt_ids[row]))
    missing = [row for row in order if row not in known]
    vocab_size = real_vocab_size(model, tokenizer)
    seeds = None if seed is None else evaluation_seeds(seed, rows.prompt_ids)
    ends = stop_ids(config)
    saved = time.monotonic()
    with tqdm(total=len(order), initial=len(order) - len(missing), desc=title, unit="answer") as bar:
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            completions = generate_completions(
                model,
                [rows.prompt_ids[row] for row in batch],
                config,
                vocab_size=vocab_size,
                row_seeds=None if seeds is None else [seeds[row] for row in batch],
            )
            texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
            ended = [bool(ends.intersection(ids[-1:])) for ids in completions]
            known.update(zip(batch, map(_Answer, texts, ended), strict=True))
            is_last = start + batch_size >= len(missing)
            if path is not None and (is_last or time.monotonic() - saved > _SECONDS_A_PART):
                _save_answers(path, known, tokenizer, rows)
                saved = time.monotonic()
            bar.update(len(batch))
    return [known[row] for row in range(len(order))]


def _answers_path(folder: str, name: str, seed: int | None, source: Mapping[str, Any], rows: EvaluationRows) -> str:
    """The file of one data set's answers; another model, other prompts or other settings have another."""
    key = answer_key({**source, "prompts": _hash(rows.prompt_ids), "seed": seed}, [])
    plain = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)[:80]
    return os.path.join(folder, f"{plain}-{'greedy' if seed is None else f'seed{seed}'}-{key[:16]}.jsonl")


def _save_answers(
    path: str, answers: Mapping[int, _Answer], tokenizer: PreTrainedTokenizerBase, rows: EvaluationRows
) -> None:
    """Write the answers, and those that another run of this evaluation has written there meanwhile."""
    answers = {**_read_answers(path, len(rows.prompt_ids)), **answers}
    lines = [
        {
            "row": row,
            "prompt": tokenizer.decode(rows.prompt_ids[row]),
            "completion": answers[row].text,
            "ended": answers[row].ended,
        }
        for row in sorted(answers)
    ]
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def _read_answers(path: str, num_rows: int) -> dict[int, _Answer]:
    """The answers that a file holds already.

    Raises:
        ValueError: for a file that holds anything else, naming it.
    """
    if not os.path.isfile(path):
        return {}
    known: dict[int, _Answer] = {}
    for number, line in enumerate(read_text(path, "a model's answers").split("\n"), 1):
        if not line:
            continue
        try:
            entry = json.loads(line)
            row, answer = entry["row"], _Answer(entry["completion"], entry["ended"])
            right = type(row) is int and 0 <= row < num_rows
            right = right and isinstance(answer.text, str) and isinstance(answer.ended, bool)
        except (ValueError, TypeError, KeyError, RecursionError):
            right = False
        if not right:
            raise ValueError(
                f"{path}, line {number}, is no answer of this evaluation. Delete the file: its answers are then written again."
            )
        known[row] = answer
    return known
