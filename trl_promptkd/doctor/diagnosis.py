"""All checks in their order."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from datasets import Dataset, IterableDataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..data.priming import PrimingTemplate, resolve_priming
from ..models.side_effects import flags_restored
from ..models.soft_prompt import PromptEncoderConfig
from ..models.teacher import freeze
from ..models.tokenizer import load_teacher_tokenizer
from ..trainer.checks import check_soft_prompt
from ..trainer.primed_distill_config import PrimedDistillConfig
from ..trainer.promptkd_config import PromptKDConfig
from . import data_checks, model_checks
from .case import Case, Finding, failing
from .memory import memory


__all__ = ["diagnose", "passed"]

logger = logging.get_logger(__name__)

# What is checked, in this order, and which checks must not have failed before
_CHECKS: tuple[tuple[Callable[[Case], Finding | None], tuple[str, ...]], ...] = (
    (data_checks.tokenizers, ()),
    (data_checks.vocabulary, ("tokenizers",)),
    (data_checks.special_tokens, ()),
    (data_checks.data, ()),
    (data_checks.chat_template, ("data",)),
    (data_checks.priming, ("chat_template",)),
    (data_checks.lengths, ("chat_template", "priming")),
    (data_checks.trained_tokens, ("special_tokens", "lengths")),
    (data_checks.positions, ("chat_template", "priming")),
    (model_checks.finite_logits, ("vocabulary", "special_tokens", "positions")),
    (model_checks.sampling, ("finite_logits",)),
    (model_checks.repeatability, ("finite_logits",)),
    (model_checks.padding_student, ("finite_logits",)),
    (model_checks.padding_teacher, ("repeatability",)),
    (model_checks.padding_soft_prompt, ("repeatability",)),
    (model_checks.soft_prompt_gradient, ("repeatability",)),
    (model_checks.window_split, ("repeatability",)),
    (model_checks.quality, ("finite_logits",)),
    (memory, ("chat_template", "priming")),
)


def diagnose(
    model: Any,
    teacher: Any | None,
    dataset: Dataset | IterableDataset | Sequence[dict[str, Any]],
    processing_class: PreTrainedTokenizerBase,
    teacher_processing_class: PreTrainedTokenizerBase | None = None,
    *,
    args: PromptKDConfig | PrimedDistillConfig | None = None,
    prompt_encoder_config: Any = None,
    priming: str | PrimingTemplate | None = None,
    data_collator: Callable[[list[dict[str, Any]]], dict[str, Tensor]] | None = None,
    lora: bool = False,
    rows: int = 16,
) -> list[Finding]:
    """Check two models and a few rows for silent faults of distillation, with the functions of the trainers.

    The teacher is frozen, as by the trainers. Nothing else is changed, except that a tokenizer without a pad token
    gets its end-of-text token as one. The models run in their own dtype, without mixed precision, on their device.
    Both must be on the same one.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The student.
        teacher ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*): `None` for self-distillation.
        dataset: As for the trainers. Only the first `rows` rows are checked.
        processing_class: The tokenizer of both models.
        teacher_processing_class: The teacher's own tokenizer. By default the one saved with the teacher.
        args ([`PromptKDConfig`] or [`PrimedDistillConfig`], *optional*): Settings of the run. The class selects the
            trainer to check for. By default the defaults of [`PrimedDistillTrainer`] if there is a `priming` text,
            else those of [`PromptKDTrainer`].
        prompt_encoder_config: The soft prompt of [`PromptKDTrainer`]. By default a `PromptEncoderConfig()`.
        priming: The text of [`PrimedDistillTrainer`].
        data_collator: A collator of your own. It gets the unchanged rows.
        lora (`bool`): Whether an adapter is trained instead of all weights.
        rows (`int`): How many rows to check.

    Returns:
        `list` of [`Finding`], in the order of the checks. Checks without anything to look at, such as without a
        priming text, are not in it.

    Raises:
        ValueError: if there are no rows, or `priming` and `args` are of different trainers.
    """
    if rows < 1:
        raise ValueError(f"`rows` is {rows}; at least 1 is needed.")
    raw = list(islice(dataset, rows))
    if not raw:
        raise ValueError("`dataset` is empty: there is nothing to look at. Check its path, split and filters.")
    prompt_encoder_config = PromptEncoderConfig() if prompt_encoder_config is None else prompt_encoder_config
    check_soft_prompt(prompt_encoder_config, processing_class)
    priming = resolve_priming(priming)
    if args is None:
        # Its own precision is a run's; here the models are in theirs
        args = PromptKDConfig(bf16=False) if priming is None else PrimedDistillConfig(bf16=False)
    if priming is not None and isinstance(args, PromptKDConfig):
        raise ValueError(
            "`priming` is given, but `args` is a PromptKDConfig. Pass a PrimedDistillConfig, or omit `priming`."
        )
    if processing_class.pad_token is None:
        processing_class.pad_token = processing_class.eos_token
    if teacher is not None:
        freeze(teacher)
        if teacher_processing_class is None:
            teacher_processing_class = load_teacher_tokenizer(teacher.config._name_or_path)
    case = Case(
        student=model,
        teacher=model if teacher is None else teacher,
        tokenizer=processing_class,
        teacher_tokenizer=teacher_processing_class,
        raw=raw,
        args=args,
        prompt_encoder_config=prompt_encoder_config,
        priming=priming,
        data_collator=data_collator,
        lora=lora,
    )
    with flags_restored(model):
        model.eval()
        return _run(case)


def _run(case: Case) -> list[Finding]:
    """Run every check whose needs are met. An exception is the finding of a failed check."""
    findings: dict[str, Finding] = {}
    for check, needs in tqdm(_CHECKS, unit="check", leave=False):
        broken = [need for need in needs if need in findings and findings[need].status in ("fail", "skip")]
        try:
            left_out = Finding("", "skip", f"left out, as {' and '.join(broken)} did not pass")
            finding = left_out if broken else check(case)
        except Exception as error:  # a model, a collator or a template may raise anything
            logger.info(f"The check {check.__name__} raised an exception.", exc_info=True)
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            finding = failing(f"{kind}{error}", "", exception=type(error).__name__)
        if finding is not None:
            findings[check.__name__] = replace(finding, name=check.__name__)
    return list(findings.values())


def passed(findings: Sequence[Finding]) -> bool:
    """Whether no check failed. Warnings do not count."""
    return all(finding.status != "fail" for finding in findings)
