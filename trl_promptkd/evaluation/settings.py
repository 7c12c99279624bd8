"""Checks of an evaluation's settings before it reads rows or loads weights."""

from collections.abc import Sequence
from types import SimpleNamespace

from transformers import PreTrainedTokenizerBase

from ..field_checks import check_choice, check_number, check_positive
from ..metrics import rouge_scorer
from .rows import TASKS, TEMPLATES


__all__ = ["check_evaluation_settings"]


def check_evaluation_settings(
    task: str | None,
    template: str | None,
    tokenizer: PreTrainedTokenizerBase,
    seeds: Sequence[int] | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    **numbers: int | None,
) -> str:
    """Reject settings that cannot be used for an evaluation. `numbers` must be above 0 or `None`.

    Args:
        task: `"instruct"` or `"gsm8k"`. `None` for a score of the user's own.

    Returns:
        `template`, or the default one if it is `None`.

    Raises:
        ValueError: naming the setting, its value and what is allowed.
        ImportError: if the package that scores the answers is not installed.
    """
    sampling = {"temperature": (temperature, 1.0), "top_p": (top_p, 1.0), "top_k": (top_k, 0)}
    args = SimpleNamespace(task=task, template=template, temperature=temperature, top_p=top_p, top_k=top_k, **numbers)
    if task is not None:
        check_choice(args, "task", TASKS)
    if template is not None:
        check_choice(args, "template", TEMPLATES)
    check_positive(args, *numbers)
    check_number(args, "temperature", lambda value: value > 0, "above 0", " Omit the seeds for greedy answers.")
    check_number(args, "top_p", lambda value: 0 < value <= 1, "above 0 and at most 1")
    check_number(args, "top_k", lambda value: value >= 0, "0 (all tokens) or above")
    if task == "instruct":
        rouge_scorer()
    if tokenizer.pad_token_id is None:
        raise ValueError("The tokenizer has no pad token. Set `tokenizer.pad_token = tokenizer.eos_token`.")
    if template == "chat" and tokenizer.chat_template is None:
        raise ValueError("`template` is 'chat', but the tokenizer has no chat template. Choose 'paper' or 'plain'.")
    if seeds is not None and (not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0):
        raise ValueError(
            f"`seeds` are {list(seeds)}; they must be different whole numbers from 0 on, at least one. Omit them "
            "(None) for greedy answers."
        )
    for name, (value, default) in sampling.items():
        if seeds is None and value != default:
            raise ValueError(
                f"`{name}` is {value}, but answers are greedy, which it does not change. Give seeds to sample with "
                "it, or omit it."
            )
    fallback = "paper" if task == "instruct" else "plain"
    return template or (fallback if tokenizer.chat_template is None else "chat")
