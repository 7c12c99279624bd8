"""How good a model's answers are: instruction following with several seeds, as the PromptKD paper does it, and GSM8K by the response
priming paper's rules.

Answers are written in batches of like lengths, each row from a random state of its own, so that they depend neither on the batch
size nor on where a run was interrupted. With an `output_dir` they stay on the disk, one file a data set and seed, under a hash of what
made them: a run that starts again writes only what is missing.
"""

import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from datasets import Dataset, IterableDataset
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .checks import check_positions
from .data import tokenize_row
from .files import read_text, remove_incomplete, whole_file
from .metrics import gsm8k_accuracy, instruction_scores, reference_number, rouge_scorer
from .rollouts import generate_completions, rollout_config, rollout_seed
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
    "evaluation_seed",
    "instruction_text",
    "real_vocab_size",
    "score_answers",
]

TASKS = ("instruct", "gsm8k")
TEMPLATES = ("chat", "paper", "plain")
PAPER_SEEDS = (10, 20, 30, 40, 50)

_SECONDS_A_PART = 30.0  # at most so much work is lost when a run is killed


@dataclass(frozen=True)
class EvaluationRows:
    """
    A data set to evaluate on.

    Args:
        prompt_ids: One list of token ids a row.
        references: Of each row; for `"instruct"` a list of right answers, for `"gsm8k"` the right number.
        left_out: How many rows were longer than the longest prompt that is allowed.
    """

    prompt_ids: list[list[int]]
    references: list[Any]
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
            answers may stand in `references`. Or TRL's `prompt` and `completion`, or `messages`, which are taken as they are.
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
    references: list[Any] = []
    left_out = 0
    rows = dataset.take(num_rows) if num_rows is not None else dataset
    for index, row in enumerate(rows):
        try:
            prompt_row, answers = _read_row(dict(row), template)
            ids = tokenize_row(prompt_row, tokenizer)["prompt_ids"]
            if not ids:
                raise ValueError("its prompt has no tokens. Filter such rows out.")
            reference = answers if task == "instruct" else reference_number(answers[0], "the right answer")
        except (TypeError, ValueError) as error:
            raise ValueError(f"Row {index} of `{name}`: {error}") from error
        if max_prompt_length is not None and len(ids) > max_prompt_length:
            left_out += 1
            continue
        prompts.append(ids)
        references.append(reference)
    if not prompts:
        if left_out:
            raise ValueError(
                f"`{name}` has no rows to evaluate on: all {left_out} prompts are longer than `max_prompt_length={max_prompt_length}`. Raise it."
            )
        raise ValueError(f"`{name}` is empty: it has no rows to evaluate on. Check its path, split and filters.")
    return EvaluationRows(prompts, references, left_out)


def _read_row(row: dict[str, Any], template: str) -> tuple[dict[str, Any], list[Any]]:
    """A row without its answer, as [`tokenize_row`] takes it, and its right answers."""
    for question, more, answer in (("instruction", "input", "output"), ("question", None, "answer")):
        if isinstance(row.get(question), str):
            answers = row.get("references") or row.get(answer)
            text, extra = row[question], (row.get(more) or "") if more else ""
            plain = f"{text}\n\n{extra}" if extra else text
            prompts = {
                "chat": [{"role": "user", "content": plain}],
                "paper": instruction_text(text, extra),
                "plain": plain,
            }
            return {"prompt": prompts[template]}, _answers(answers)
    if row.get("messages"):
        *prompt, last = row["messages"]
        if not prompt or last.get("role") != "assistant":
            raise ValueError("its `messages` must be a conversation that ends with an assistant message, the answer.")
        return {"prompt": prompt}, _answers(row.get("references") or last.get("content"))
    if row.get("prompt") is None:
        raise ValueError(
            f"it has none of `instruction`, `question`, `prompt` and `messages`; its columns are {sorted(row)}. Rename columns with "
            "`dataset.rename_column`."
        )
    answers = row.get("references") or row.get("completion")
    if isinstance(answers, list) and answers and isinstance(answers[0], Mapping):
        answers = answers[-1].get("content")
    return {"prompt": row["prompt"]}, _answers(answers)


def _answers(answers: Any) -> list[Any]:
    answers = list(answers) if isinstance(answers, list | tuple) else [answers]
    if not answers or not all(isinstance(answer, str | int | float) for answer in answers):
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


def evaluation_seed(seed: int, row: int) -> int:
    """The seed of one row's answer."""
    return rollout_seed(seed, "evaluation", row, 0)


def real_vocab_size(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The number of ids that stand for tokens, where the model has more; else `None`."""
    size = max(tokenizer.get_vocab().values()) + 1
    return size if size < model.config.get_text_config().vocab_size else None


def score_answers(task: str, answers: Sequence[str], references: Sequence[Any]) -> dict[str, Any]:
    """The task's metrics: `rougeL` and `exact_match`, or `accuracy` and `rules`."""
    if task == "instruct":
        return dict(instruction_scores(answers, references))
    return gsm8k_accuracy(answers, references)


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
        `task`, `template`, `settings`, and for each data set `sets[name]`: `rows`, `left_out`, `runs` (one a seed: `seed` and the metrics),
        `mean` and `std` (the sample's, over seeds; `None` for a single run), of each metric in percent.

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
        remove_incomplete(output_dir)
        said = {key: value for key, value in config.to_diff_dict().items() if key != "transformers_version"}
        source = {"model": weights_fingerprint(model, everything=True), "sampling": said}
    results = {}
    for name, rows in sets.items():
        runs = []
        for seed in [None] if seeds is None else seeds:
            path = None if output_dir is None else _answers_path(output_dir, name, seed, source, rows)
            answers = _write_answers(model, tokenizer, rows, config, seed, batch_size, path, _title(name, seed))
            runs.append({"seed": seed, **score_answers(task, answers, rows.references)})
        results[name] = {"rows": len(rows.prompt_ids), "left_out": rows.left_out, "runs": runs, **_summary(runs)}
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
    return template


def _summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = [name for name in runs[0] if name not in ("seed", "rules")]
    values = {name: [run[name] for run in runs] for name in names}
    return {
        "mean": {name: statistics.fmean(numbers) for name, numbers in values.items()},
        "std": {name: statistics.stdev(numbers) if len(runs) > 1 else None for name, numbers in values.items()},
    }


def _title(name: str, seed: int | None) -> str:
    return f"{name}, {'greedy' if seed is None else f'seed {seed}'}"


def _write_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: EvaluationRows,
    config: GenerationConfig,
    seed: int | None,
    batch_size: int,
    path: str | None,
    title: str,
) -> list[str]:
    """The model's answers as texts; those that `path` holds are taken, not written again."""
    known = {} if path is None else _read_answers(path, len(rows.prompt_ids))
    order = sorted(range(len(rows.prompt_ids)), key=lambda row: -len(rows.prompt_ids[row]))
    missing = [row for row in order if row not in known]
    vocab_size = real_vocab_size(model, tokenizer)
    saved = time.monotonic()
    with tqdm(total=len(order), initial=len(order) - len(missing), desc=title, unit="answer") as bar:
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            completions = generate_completions(
                model,
                [rows.prompt_ids[row] for row in batch],
                config,
                vocab_size=vocab_size,
                row_seeds=None if seed is None else [evaluation_seed(seed, row) for row in batch],
            )
            known.update(zip(batch, tokenizer.batch_decode(completions, skip_special_tokens=True), strict=True))
            ends = start + batch_size >= len(missing)
            if path is not None and (ends or time.monotonic() - saved > _SECONDS_A_PART):
                _save_answers(path, known, tokenizer, rows)
                saved = time.monotonic()
            bar.update(len(batch))
    return [known[row] for row in range(len(order))]


def _answers_path(folder: str, name: str, seed: int | None, source: Mapping[str, Any], rows: EvaluationRows) -> str:
    """The file of one data set's answers; another model, other prompts or other settings have another."""
    prompts = hashlib.blake2b(json.dumps(rows.prompt_ids).encode(), digest_size=16).hexdigest()
    key = answer_key({**source, "prompts": prompts, "seed": seed}, [])
    plain = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)[:80]
    return os.path.join(folder, f"{plain}-{'greedy' if seed is None else f'seed{seed}'}-{key[:16]}.jsonl")


def _save_answers(
    path: str, answers: Mapping[int, str], tokenizer: PreTrainedTokenizerBase, rows: EvaluationRows
) -> None:
    lines = [
        {"row": row, "prompt": tokenizer.decode(rows.prompt_ids[row]), "completion": answers[row]}
        for row in sorted(answers)
    ]
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def _read_answers(path: str, num_rows: int) -> dict[int, str]:
    """The answers that a file holds already.

    Raises:
        ValueError: for a file that holds anything else, naming it.
    """
    if not os.path.isfile(path):
        return {}
    known: dict[int, str] = {}
    for number, line in enumerate(read_text(path, "a model's answers").split("\n"), 1):
        if not line:
            continue
        try:
            entry = json.loads(line)
            row, text = entry["row"], entry["completion"]
            right = type(row) is int and 0 <= row < num_rows and isinstance(text, str)
        except (ValueError, TypeError, KeyError, RecursionError):
            right = False
        if not right:
            raise ValueError(
                f"{path}, line {number}, is no answer of this evaluation. Delete the file: its answers are then written again."
            )
        known[row] = text
    return known
