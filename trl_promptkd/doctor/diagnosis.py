"""All checks in their order, and what they say as a table or for machines."""

import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

from datasets import Dataset, IterableDataset
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
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
from . import data_checks, model_checks
from .case import Case, Finding
from .memory import memory


__all__ = ["diagnose", "passed", "print_table"]

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
    (model_checks.quantization, ("soft_prompt_gradient",)),
    (memory, ("chat_template", "priming")),
)
_ANSWERS_NEEDED = (
    "Set `lmbda=1.0` (PromptKD: the student's samples only) or `response_source` to 'student' or 'teacher' (response priming: a model "
    "writes the answers)."
)


def diagnose(
    model: Any,
    teacher: Any | None,
    dataset: Dataset | IterableDataset | Sequence[dict[str, Any]],
    processing_class: PreTrainedTokenizerBase,
    teacher_processing_class: PreTrainedTokenizerBase | None = None,
    *,
    prompt_encoder_config: Any = None,
    priming: str | PrimingTemplate | None = None,
    data_collator: Callable[[list[dict[str, Any]]], dict[str, Tensor]] | None = None,
    lmbda: float = 1.0,
    response_source: str = "dataset",
    max_length: int | None = 1024,
    max_new_tokens: int = 128,
    overlong: str = "error",
    per_device_train_batch_size: int = 8,
    gradient_accumulation_steps: int = 1,
    gradient_checkpointing: bool = True,
    teacher_gradient_checkpointing: bool = False,
    loss_chunk_size: int | None = 256,
    lora: bool = False,
    rows: int = 16,
) -> list[Finding]:
    """Check two models and a few rows for what goes wrong silently in distillation, with the functions that train.

    The teacher is frozen, as the trainers do it; nothing else is changed. The models are asked in their own dtype, without mixed
    precision, on the device they are on, which must be one.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The student.
        teacher ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*): `None` for self-distillation.
        dataset: As for the trainers; the first `rows` rows are looked at.
        processing_class: The tokenizer of both models; without a pad token, its end-of-text token pads.
        teacher_processing_class: The teacher's own; by default the one found beside the teacher.
        prompt_encoder_config: The soft prompt of [`PromptKDTrainer`]; by default the paper's.
        priming: The text of [`PrimedDistillTrainer`]; with it, that trainer is what is checked for, and no soft prompt.
        data_collator: One of your own, which gets the rows as they are.
        lmbda, response_source: Whose answers are trained on (PromptKD; response priming), as in the trainers' configurations.
        max_length, max_new_tokens, overlong, loss_chunk_size: As in the trainers' configurations, whose defaults these are.
        per_device_train_batch_size, gradient_accumulation_steps, gradient_checkpointing: The same.
        lora (`bool`): Whether an adapter is to be trained instead of all weights.
        teacher_gradient_checkpointing (`bool`): As in [`PromptKDConfig`].
        rows (`int`): How many rows to look at.

    Returns:
        `list` of [`Finding`], in the order of the checks; those that have nothing to look at (no priming text, ...) are not in it.

    Raises:
        ValueError: for arguments that are none.
    """
    if rows < 1:
        raise ValueError(f"`rows` is {rows}; at least 1 is needed.")
    raw = list(islice(dataset, rows))
    if not raw:
        raise ValueError("`dataset` is empty: there is nothing to look at. Check its path, split and filters.")
    prompt_encoder_config = PromptEncoderConfig() if prompt_encoder_config is None else prompt_encoder_config
    check_soft_prompt(prompt_encoder_config, processing_class)
    priming = resolve_priming(priming)
    if processing_class.pad_token is None:
        processing_class.pad_token = processing_class.eos_token
    if teacher is not None:
        freeze(teacher)
        if teacher_processing_class is None:
            teacher_processing_class = load_teacher_tokenizer(teacher.config._name_or_path)
    needed = lmbda < 1 if priming is None else response_source == "dataset"
    case = Case(
        student=model,
        teacher=model if teacher is None else teacher,
        tokenizer=processing_class,
        teacher_tokenizer=teacher_processing_class,
        raw=raw,
        prompt_encoder_config=prompt_encoder_config,
        priming=priming,
        answers_needed=_ANSWERS_NEEDED if needed else None,
        data_collator=data_collator,
        max_length=max_length,
        max_new_tokens=max_new_tokens,
        overlong=overlong,
        per_device_train_batch_size=per_device_train_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        gradient_checkpointing=gradient_checkpointing,
        teacher_gradient_checkpointing=teacher_gradient_checkpointing,
        loss_chunk_size=loss_chunk_size,
        lora=lora,
    )
    with flags_restored(model):
        model.eval()
        return _run(case)


def _run(case: Case) -> list[Finding]:
    """Every check whose needs are met; an exception is what a failed check has found."""
    findings: dict[str, Finding] = {}
    with tqdm(total=len(_CHECKS), unit="check", leave=False) as bar:
        for check, needs in _CHECKS:
            name = check.__name__
            bar.set_description(name)
            broken = [need for need in needs if need in findings and findings[need].status in ("fail", "skip")]
            finding: Finding | None
            if broken:
                finding = Finding(name, "skip", f"left out, as {' and '.join(broken)} did not pass")
            else:
                try:
                    finding = check(case)
                except Exception as error:  # a model, a collator or a template may raise anything
                    logger.info(f"The check {name} raised an exception.", exc_info=True)
                    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
                    finding = Finding(name, "fail", f"{kind}{error}", values={"exception": type(error).__name__})
            if finding is not None:
                findings[name] = finding
            bar.update()
    return list(findings.values())


def passed(findings: Sequence[Finding]) -> bool:
    """Whether nothing failed; warnings do not count."""
    return all(finding.status != "fail" for finding in findings)


def print_table(findings: Sequence[Finding], about: Mapping[str, Any]) -> None:
    """The findings for a reader, on standard output."""
    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = 140
    styles = {"pass": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}
    table = Table(title=", ".join(f"{name} {value}" for name, value in about.items() if value), box=box.SIMPLE)
    for column in ("check", "", "found", "what to do"):
        table.add_column(column, no_wrap=column in ("check", ""), ratio={"found": 3, "what to do": 2}.get(column))
    for finding in findings:
        status = Text(finding.status, style=styles[finding.status])
        table.add_row(Text(finding.name), status, Text(finding.found), Text(finding.advice))
    console.print(table)
    counts = {status: sum(finding.status == status for finding in findings) for status in styles}
    console.print(", ".join(f"{number} {status}" for status, number in counts.items() if number))
