"""How good a model's answers are.

Instruction following is scored with several seeds, as in the PromptKD paper. GSM8K is scored by the rules of
lm-evaluation-harness and of the response priming paper. Each answer has a random state of its own. It depends neither
on the batch size, nor on the other rows, nor on when a run was interrupted. With an `output_dir`, answers are kept on
disk under a hash of what made them.
"""

import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..generation.teacher_answers import sampling_source
from ..models.limits import check_positions
from .answers import (
    answers_path,
    evaluation_config,
    evaluation_seeds,
    hash_of,
    judged_texts,
    model_source,
    real_vocab_size,
    write_answers,
)
from .ranking import SCORERS, PrimedRows, Scorer, primed_rows, rank_priming
from .rows import TASKS, TEMPLATES, EvaluationRows, evaluation_rows, row_scores
from .settings import check_evaluation_settings


__all__ = [
    "PAPER_SEEDS",
    "SCORERS",
    "TASKS",
    "TEMPLATES",
    "EvaluationRows",
    "PrimedRows",
    "Scorer",
    "check_evaluation_settings",
    "evaluate_model",
    "evaluation_config",
    "evaluation_rows",
    "evaluation_seeds",
    "judged_texts",
    "primed_rows",
    "rank_priming",
    "real_vocab_size",
    "row_scores",
]

PAPER_SEEDS = (10, 20, 30, 40, 50)


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
    """Generate a model's answers and score them.

    Args:
        model (`PreTrainedModel` or `PeftModel`): On its device.
        tokenizer (`PreTrainedTokenizerBase`): The model's.
        datasets (`dict`): Data sets by name, raw or as [`evaluation_rows`] returns them.
        task (`str`, *optional*, defaults to `"instruct"`): `"instruct"` or `"gsm8k"`.
        template (`str`, *optional*): `"chat"`, `"paper"` or `"plain"`. By default `"chat"` if the tokenizer has a chat
            template, else `"paper"` for instructions and `"plain"` for GSM8K. `"plain"` is the bare question, as the
            student of response priming sees it.
        seeds (`list` of `int`, *optional*): Sample once with each seed. The PromptKD paper's are [`PAPER_SEEDS`].
            `None` decodes greedily.
        temperature, top_p, top_k: Sampling settings. The defaults are the PromptKD paper's: the model's own
            distribution.
        max_new_tokens (`int`, *optional*, defaults to `256`): Longest answer, in tokens.
        batch_size (`int`, *optional*, defaults to `8`): Rows per batch.
        num_rows (`int`, *optional*): Use only the first rows of each data set.
        max_prompt_length (`int`, *optional*): Omit longer prompts. The result has their number.
        output_dir (`str`, *optional*): Folder for the answers. A run that starts again resumes from it.

    Returns:
        `task`, `template`, `settings`, and for each data set `sets[name]`:

        - `rows`, `left_out`: how many rows were evaluated, and how many omitted.
        - `data_hash`: hash of prompts and right answers.
        - `runs`: one per seed, with `seed`, the metrics in percent, and `terminated_share`. That is the share of
            answers that ended by themselves.
        - `mean`, `std`: mean and sample standard deviation of the metrics over the seeds. `std` is `None` for a single
            run.
        - `terminated_share`: its mean over the seeds.

    Raises:
        ValueError: if settings or rows cannot be evaluated. The message names them.
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
        source = {**model_source(model, tokenizer), "sampling": sampling_source(config)}
    results = {}
    for name, rows in sets.items():
        runs: list[dict[str, Any]] = []
        for seed in [None] if seeds is None else seeds:
            path = None if output_dir is None else answers_path(output_dir, name, seed, source, rows)
            title = f"{name}, {'greedy' if seed is None else f'seed {seed}'}"
            row_seeds = None if seed is None else evaluation_seeds(seed, rows.prompt_ids)
            answers = write_answers(model, tokenizer, rows, config, row_seeds, batch_size, path, title)
            texts = judged_texts(tokenizer, rows.prompt_ids, [answer["completion"] for answer in answers])
            found = row_scores(task, texts, rows.references)
            scores = {metric: statistics.fmean(numbers) for metric, numbers in found.items()}
            terminated = statistics.fmean(answer["ended"] for answer in answers)
            runs.append({"seed": seed, **scores, "terminated_share": terminated})
        values = {metric: [run[metric] for run in runs] for metric in scores}
        results[name] = {
            "rows": len(rows.prompt_ids),
            "left_out": rows.left_out,
            "data_hash": hash_of([rows.prompt_ids, rows.references])[:16],
            "runs": runs,
            "mean": {metric: statistics.fmean(numbers) for metric, numbers in values.items()},
            "std": {
                metric: statistics.stdev(numbers) if len(runs) > 1 else None for metric, numbers in values.items()
            },
            "terminated_share": statistics.fmean(run["terminated_share"] for run in runs),
        }
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seeds": None if seeds is None else list(seeds)}
    if seeds is not None:
        settings |= {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    return {"task": task, "template": template, "settings": settings, "sets": results}
