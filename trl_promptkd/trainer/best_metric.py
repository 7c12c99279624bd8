"""The evaluation metric that chooses the best checkpoint: its default, and the check that evaluations have it."""

from collections.abc import Sequence
from typing import Any

from transformers import EarlyStoppingCallback
from transformers.trainer_utils import SaveStrategy, SchedulerType


__all__ = ["check_best_metric", "choose_best_metric"]

_BY_METRIC = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)


def choose_best_metric(config: Any, default: str) -> bool:
    """Set `metric_for_best_model` to `default` if a setting needs it and the user named none. If lower values of the
    metric are better, set `greater_is_better` to `False`, unless the user has set it.

    Call this before `TrainingArguments.__post_init__`. That takes `loss` by default, and assumes that higher values of
    all other metrics are better.

    Returns:
        `bool`: Whether a setting needs the metric.
    """
    needed = config.load_best_model_at_end or config.save_strategy == SaveStrategy.BEST
    needed = needed or config.lr_scheduler_type in _BY_METRIC
    if config.metric_for_best_model is None and needed:
        config.metric_for_best_model = default
    name = config.metric_for_best_model or ""
    if config.greater_is_better is None and any(f"_{m}/" in f"_{name}/" for m in config._FALLING_METRICS):
        config.greater_is_better = False
    return needed


def check_best_metric(args: Any, eval_dataset: Any, callbacks: Sequence[Any] | None) -> None:
    """Reject a metric that no evaluation will have, before the first evaluation.

    Raises:
        ValueError: for early stopping without a metric. With several evaluation sets, also for a metric without the
            name of a set.
    """
    metric, falling = args.metric_for_best_model, args._FALLING_METRICS
    kinds = [callback if isinstance(callback, type) else type(callback) for callback in callbacks or []]
    if metric is None and any(issubclass(kind, EarlyStoppingCallback) for kind in kinds):
        raise ValueError(
            "`callbacks` holds an EarlyStoppingCallback, but `metric_for_best_model` is None. Set it to the metric "
            f"to stop by, such as 'eval_{falling[0]}'."
        )
    if isinstance(eval_dataset, dict) and metric in {*falling, *(f"eval_{name}" for name in falling)}:
        there = [f"eval_{part}_{name}" for part in eval_dataset for name in falling]
        raise ValueError(
            f"`metric_for_best_model` is {metric!r}, but `eval_dataset` is a dict, whose metrics have its keys in "
            f"their names. Set it to one of {', '.join(map(repr, there))}."
        )
