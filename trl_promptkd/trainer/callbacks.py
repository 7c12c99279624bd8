"""Metrics of written answers during training, by which the best checkpoint can be chosen."""

import os
from types import SimpleNamespace
from typing import Any

from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from pandas import DataFrame
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.utils import logging

from .._trl import print_prompt_completions_sample
from ..evaluation import (
    check_evaluation_settings,
    evaluation_config,
    evaluation_rows,
    evaluation_seeds,
    judged_texts,
    real_vocab_size,
    row_scores,
)
from ..generation.progress import rows_bar
from ..generation.rollouts import sample_completions
from ..models.limits import check_positions
from .checks import check_sharding
from .completions import save_table, send_table


__all__ = ["GenerationMetricsCallback"]

logger = logging.get_logger(__name__)


class GenerationMetricsCallback(TrainerCallback):
    """
    Lets the model write answers at each evaluation, and adds their scores to the evaluation's metrics, in percent.

    The metrics are `eval_rougeL` and `eval_exact_match`. For GSM8K, they are `eval_gsm8k_strict`,
    `eval_gsm8k_flexible` and `eval_gsm8k_paper` (the rules of [`~trl_promptkd.metrics.gsm8k_accuracy`]), and
    `eval_gsm8k`, which equals the last one. Thoughts (`<think>...</think>`) do not count.

    `metric_for_best_model="rougeL"` (or `"gsm8k"`) then chooses the best checkpoint by a score, as the PromptKD paper
    does. The trainer logs the scores with its other metrics. Answers have a random state of their own, so training is
    the same with and without them.

    ```python
    saves_best = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    trainer = PromptKDTrainer(..., args=PromptKDConfig(..., metric_for_best_model="rougeL", **saves_best))
    rows = load_dataset("json", data_files="dev.jsonl", split="train")
    trainer.add_callback(GenerationMetricsCallback(trainer, rows))
    trainer.train()
    ```

    It works with any [`~transformers.Trainer`] of a causal language model, also on several processes.
    `EarlyStoppingCallback` may use these metrics, whichever of the two callbacks comes first. Other callbacks that use
    them must be added after this one.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer whose model answers. The callback must be added to it.
        eval_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Raw rows, with `instruction`, `input` and `output`, with `question` and `answer`, with `prompt` and
            `completion`, or with `messages`.
        task (`str`, *optional*, defaults to `"instruct"`):
            `"instruct"` or `"gsm8k"`.
        seed (`int`, *optional*):
            Seed of sampled answers. Each evaluation draws the same random numbers. `None`: greedy answers.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of sampled answers.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Longest answer in tokens.
        batch_size (`int`, *optional*):
            Rows at once on one device. `None`: the trainer's `per_device_eval_batch_size`.
        num_rows (`int`, *optional*):
            Use only so many rows, the first ones. `None`: all.
        template (`str`, *optional*):
            `"chat"`, `"paper"` or `"plain"`. `None`: chosen as by [`~trl_promptkd.evaluation.evaluate_model`].
        num_completions_to_print (`int`, *optional*, defaults to `3`):
            How many answers to print at each evaluation. `None`: all.
        log_completions (`bool`, *optional*, defaults to `False`):
            Keep all answers as parquet files in `output_dir/eval_completions`. If the trainer reports to wandb or
            trackio, log them there as a table.

    Raises:
        ValueError: for rows or settings that cannot be scored, before training.
    """

    def __init__(
        self,
        trainer: Trainer,
        eval_dataset: Dataset | IterableDataset,
        task: str = "instruct",
        seed: int | None = None,
        temperature: float = 1.0,
        max_new_tokens: int = 256,
        batch_size: int | None = None,
        num_rows: int | None = None,
        template: str | None = None,
        num_completions_to_print: int | None = 3,
        log_completions: bool = False,
    ):
        if not isinstance(trainer, Trainer):
            raise TypeError(
                f"`trainer` is a {type(trainer).__name__}; it must be a Trainer. Make it first, then "
                "`trainer.add_callback(GenerationMetricsCallback(trainer, ...))`."
            )
        batch_size = trainer.args.per_device_eval_batch_size if batch_size is None else batch_size
        seeds = None if seed is None else [seed]
        self.tokenizer = tokenizer = _tokenizer_of(trainer)
        template = check_evaluation_settings(
            task,
            template,
            tokenizer,
            seeds=seeds,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            num_rows=num_rows,
        )
        check_sharding(trainer.accelerator)
        self.trainer, self.task, self.seed = trainer, task, seed
        self.num_completions_to_print, self.log_completions = num_completions_to_print, log_completions
        self.rows = evaluation_rows(eval_dataset, "eval_dataset", task, tokenizer, template, num_rows)
        longest = max_new_tokens + max(map(len, self.rows.prompt_ids))
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        check_positions("model", model, longest, "Lower `max_new_tokens`, or filter the longest rows out.")
        self.generation_config = evaluation_config(model, tokenizer, max_new_tokens, seed is None, temperature)
        self.vocab_size = real_vocab_size(model, tokenizer)
        self.row_seeds = None if seed is None else evaluation_seeds(seed, self.rows.prompt_ids)
        self.settings = SimpleNamespace(
            rollout_batch_size=batch_size,
            gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
        )

    def on_train_begin(self, args, state, control, **kwargs):
        """Move this callback before an `EarlyStoppingCallback`, which may use its metrics."""
        callbacks = self.trainer.callback_handler.callbacks
        first = next((i for i, other in enumerate(callbacks) if isinstance(other, EarlyStoppingCallback)), None)
        if first is not None and first < callbacks.index(self):
            callbacks.remove(self)
            callbacks.insert(first, self)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if metrics is None or not self._is_first_of_an_evaluation(metrics):
            return
        answers = self._answers()
        texts = judged_texts(self.tokenizer, self.rows.prompt_ids, answers)
        scores = row_scores(self.task, texts, self.rows.references)
        prefix = "eval_gsm8k_" if self.task == "gsm8k" else "eval_"
        named = {f"{prefix}{name}": sum(values) / len(values) for name, values in scores.items()}
        if self.task == "gsm8k":
            named["eval_gsm8k"] = named["eval_gsm8k_paper"]
        metrics.update(named)
        self.trainer.log(dict(named))  # the evaluation's own metrics have been logged already
        if state.is_world_process_zero:
            self._show(answers, scores)

    def _is_first_of_an_evaluation(self, metrics: dict[str, float]) -> bool:
        """Whether these are the metrics of the trainer's evaluation. If it has a `dict` of data sets, those of the
        first one."""
        names = self.trainer.eval_dataset
        first = f"_{next(iter(names))}" if isinstance(names, dict) and names else ""
        return "eval_runtime" in metrics or f"eval{first}_runtime" in metrics

    def _answers(self) -> list[str]:
        """The answers to all rows, on every process. Each process writes its share."""
        accelerator, tokenizer = self.trainer.accelerator, self.tokenizer
        rank, num_ranks = accelerator.process_index, accelerator.num_processes
        mine = range(rank, len(self.rows.prompt_ids), num_ranks)
        shows = accelerator.is_main_process and not self.trainer.args.disable_tqdm
        with rows_bar(len(mine), "Evaluation answers", shows):
            completions = sample_completions(
                self.trainer.model_wrapped,
                accelerator,
                [self.rows.prompt_ids[row] for row in mine],
                self.generation_config,
                self.seed or 0,
                self.settings,
                vocab_size=self.vocab_size,
                row_seeds=None if self.row_seeds is None else [self.row_seeds[row] for row in mine],
            )
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True) if completions else []
        written = gather_object(list(zip(mine, texts, strict=True)))
        return [text for _, text in sorted(written)]

    def _show(self, answers: list[str], scores: dict[str, list[float]]) -> None:
        """Print the first answers with their scores, and keep all of them if `log_completions` is set."""
        step = self.trainer.state.global_step
        num_printed = len(answers) if self.num_completions_to_print is None else self.num_completions_to_print
        shown = len(answers) if self.log_completions else num_printed
        if not shown:
            return
        prompts = self.tokenizer.batch_decode(self.rows.prompt_ids[:shown], skip_special_tokens=True)
        # The first rows: TRL would draw the rows to print from Python's global random state
        if num_printed:
            first = {name: values[:num_printed] for name, values in scores.items()}
            print_prompt_completions_sample(prompts[:num_printed], answers[:num_printed], first, None, step)
        if not self.log_completions:
            return
        columns = {"step": [step] * len(answers), "prompt": prompts, "completion": answers, **scores}
        table = DataFrame(columns)
        save_table(os.path.join(self.trainer.args.output_dir, "eval_completions"), step, table)
        send_table(self.trainer.args, "eval_completions", table)


def _tokenizer_of(trainer: Trainer) -> PreTrainedTokenizerBase:
    """The trainer's tokenizer, or that of its processor of texts and images."""
    given = trainer.processing_class
    tokenizer = given if isinstance(given, PreTrainedTokenizerBase) else getattr(given, "tokenizer", None)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        found = "none" if given is None else f"a {type(given).__name__}"
        raise ValueError(
            f"The trainer's `processing_class` is {found}; it must be a tokenizer, which reads and writes the "
            "answers. Make the trainer with `processing_class=tokenizer`."
        )
    return tokenizer
