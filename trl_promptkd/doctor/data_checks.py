"""Checks of tokenizers and rows, which run no model.

Each function is one check. It takes a [`Case`] and returns what it found. If it raises, the check has failed, see
`diagnosis.py`.
"""

from typing import Any

import torch
from datasets import Dataset
from pandas import DataFrame
from torch import Tensor

from ..data import DataCollatorForPromptCompletion, check_columns, masked_rows, split_row
from ..data.primed import DataCollatorForPrimedDistillation
from ..data.rows import is_blank
from ..generation.rollouts import stop_ids
from ..models.limits import check_positions
from ..models.tokenizer import check_same_tokenizer
from ..trainer.promptkd_config import PromptKDConfig
from .case import Case, Finding, failing, passing, warning


def tokenizers(case: Case) -> Finding:
    """Distributions over different token ids can be compared without any error, but the result is meaningless."""
    size = len(case.tokenizer)
    if case.is_self_distillation:
        return passing(f"{size} tokens; the student is its own teacher")
    if case.teacher_tokenizer is None:
        return warning(
            "there is no tokenizer beside the teacher to compare with",
            "Make sure that both models were trained with one tokenizer; if not, training compares unrelated tokens.",
        )
    check_same_tokenizer(case.tokenizer, case.teacher_tokenizer)
    return passing(f"{size} tokens, the same for both models")


def vocabulary(case: Case) -> Finding:
    """Models of one family pad their vocabularies differently. Padding must not take part in a loss."""
    student, teacher = (model.config.get_text_config().vocab_size for model in (case.student, case.teacher))
    sizes = f"{student} entries in the student, {teacher} in the teacher"
    return passing(f"{sizes}: compared on the {case.vocab_size} real ids")


def special_tokens(case: Case) -> Finding:
    """Without an end-of-text token that generation stops at, a student never learns to stop."""
    tokenizer = case.tokenizer
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    if eos is None:
        return failing(
            "the tokenizer has no end-of-text token, so that answers would not end",
            "Set `tokenizer.eos_token` to the token that ends an answer.",
        )
    found = f"end of text {tokenizer.eos_token!r} ({eos}), pad {tokenizer.pad_token!r} ({pad})"
    for role, model in (("student", case.student), ("teacher", case.teacher)):
        others = {index: tokenizer.convert_ids_to_tokens(index) for index in sorted(stop_ids(model.generation_config))}
        if others and eos not in others:
            return warning(
                f"{found}; the {role} was published to stop at {others} instead",
                "Samples stop at any of them, but answers in the data end with the tokenizer's. Set `eos_token` (and "
                "the student's `generation_config.eos_token_id`) to the token that ends a turn.",
            )
    return passing(found)


def data(case: Case) -> Finding:
    """Rows without prompts or answers train on nothing, without any error."""
    check_columns(Dataset.from_list(case.raw[:1], on_mixed_types="use_json"), "dataset", case.answers_needed)
    total, pairs = len(case.raw), list(map(_parts, case.raw))
    nothing = sum(prompt is None for prompt, _ in pairs)
    if nothing:
        return failing(
            f"the prompt of {nothing} of {total} rows is None", "Filter such rows out with `dataset.filter`."
        )
    unanswered = sum(answer is None for _, answer in pairs)
    blank = sum(answer is not None and is_blank(answer) for _, answer in pairs)
    wanting = f"of {total} rows, {unanswered} have no answer and {blank} an empty one"
    if case.answers_needed is not None and (unanswered or blank == total):
        return failing(wanting, case.answers_needed)
    if 0 < unanswered < total or blank:
        return warning(wanting, "An empty answer trains the student to stop at once. Filter such rows out.")
    kind = "conversations" if case.is_conversational else "texts"
    writes = "" if case.answers_needed is not None else "; a model writes what is trained on"
    return passing(f"{total} rows of {kind}, {'prompts only' if unanswered else 'answered'}{writes}")


def _parts(row: dict[str, Any]) -> tuple[Any, Any]:
    """A row's prompt and answer. For already tokenized rows, placeholder words."""
    if row.get("prompt_ids") is not None:
        return "tokenized", "tokenized" if row.get("completion_ids") else None
    return split_row(row)


def chat_template(case: Case) -> Finding:
    """A template may write a prompt differently once an answer follows, or add a second beginning-of-text token."""
    bos, total = case.tokenizer.bos_token_id, len(case.raw)
    doubled = sum(bos is not None and row["prompt_ids"][:2] == [bos, bos] for row in case.tokenized)
    if doubled:
        return warning(
            f"{doubled} of {total} prompts begin with {case.tokenizer.bos_token!r} twice",
            "A text that has been through the chat template already gets another from the tokenizer. Pass "
            "conversations (lists of messages) instead, or take the token out of the texts.",
        )
    if not case.is_conversational:
        return passing("not used: the prompts are plain texts")
    answered = sum(bool(row["completion_ids"]) for row in case.tokenized)
    rewritten = sum(_parts(row)[1] is not None for row in case.raw) - answered
    if rewritten:
        return warning(
            f"in {rewritten} of {total} rows the prompt is written differently once an answer follows it",
            "A model writes the answers that are trained on, so training works, but evaluation cannot use the data's "
            "answers either. To use them, use a template that keeps prompts as they are (TRL ships patched ones).",
        )
    return passing(f"a prompt is written the same with and without its answer ({answered} rows)")


def priming(case: Case) -> Finding | None:
    """A template may drop parts it does not know, so that the priming text never reaches the teacher."""
    if case.priming is None:
        return None
    case.priming.check_columns(list(case.raw[0]), "dataset")
    plain = sum(row["teacher_prompt_ids"] == row["prompt_ids"] for row in case.views)
    if plain:
        return warning(
            f"in {plain} of {len(case.views)} rows the priming text is empty, and the teacher sees the student's "
            "prompt",
            "Check the template's conditions and the columns that it writes.",
        )
    mean = sum(len(row["teacher_prompt_ids"]) - len(row["prompt_ids"]) for row in case.views) / len(case.views)
    return passing(f"reaches the teacher's prompt in every row ({mean:.0f} tokens on average)", tokens=mean)


def lengths(case: Case) -> Finding:
    """Long rows are dropped or lose the end of their answer, and with it the token that says stop."""
    tokens = DataFrame([{name.removesuffix("_ids"): len(ids) for name, ids in row.items()} for row in case.views])
    longest = ", ".join(f"{name} {size}" for name, size in tokens.max().items())
    found = f"longest, in tokens: {longest}"
    total, dropped, cut = len(case.raw), len(case.raw) - len(case.prepared), 0
    if isinstance(case.args, PromptKDConfig) and case.args.max_length is not None:
        room = case.args.max_length - tokens.prompt
        cut = int(((room > 0) & (room < tokens.completion)).sum())
    limit, figures = f"`max_length={case.args.max_length}`", {"dropped": dropped, "cut": cut}
    if dropped:
        left_out = f"{dropped} of {total} rows do not fit into {limit} and are left out; {found}"
        return warning(left_out, "Raise `max_length` to keep them.", **figures)
    if cut and case.answers_needed is not None:
        short = f"{cut} of {total} answers are cut at {limit} and lose their end-of-text token; {found}"
        return warning(short, "Raise `max_length` to train on them whole.", **figures)
    return passing(found, **figures)


def positions(case: Case) -> Finding:
    """A model with learned positions stops a run in the middle when a row and its sample run out of them."""
    new = case.args.max_new_tokens if case.is_sampled else 0
    virtual = 0 if case.soft_prompt is None else len(case.soft_prompt)
    remedy = "Lower `max_new_tokens` or `max_length`, filter the longest rows out, or take a shorter priming text."
    longest = {}
    for role, model, part, more in (
        ("student", case.student, "prompt_ids", 0),
        ("teacher", case.teacher, "teacher_prompt_ids", virtual),
    ):
        longest[role] = more + max(len(row[part]) + max(len(row["completion_ids"]), new) for row in case.views)
        check_positions(role, model, longest[role], remedy)
    most = f"at most {longest['student']} for the student and {longest['teacher']} for the teacher"
    return passing(f"{most}, of which samples {new} and the soft prompt {virtual}", **longest)


def trained_tokens(case: Case) -> Finding | None:
    """If the end-of-text token also pads, masks from ids drop it. Other masks may cut an answer's first token."""
    if case.data_collator is not None:
        batch, rows = case.data_collator(case.raw), case.views
    elif isinstance(case.args, PromptKDConfig):
        batch, rows = DataCollatorForPromptCompletion(case.tokenizer.pad_token_id)(case.prepared), case.prepared
    else:
        batch, rows = DataCollatorForPrimedDistillation(case.tokenizer, case.priming)(case.prepared), case.prepared
    trained = _trained(batch, "")
    share = sum(map(len, trained)) / int(batch["attention_mask"].sum())
    answered = [(got, row["completion_ids"]) for got, row in zip(trained, rows, strict=True) if row["completion_ids"]]
    if not answered:
        return None
    other = [(got, answer) for got, answer in answered if got != answer]
    # More tokens than the answer's may be trained on, such as the prompt's
    short = [(got, answer) for got, answer in other if got[-len(answer) :] != answer]
    no_first = sum(got[:1] != answer[:1] for got, answer in short)
    no_end = sum(got[-1:] != answer[-1:] for got, answer in short)
    if no_first or no_end:
        return failing(
            f"of {len(answered)} answers, {no_first} are not trained on from their first token on, {no_end} not up to "
            "their end-of-text token",
            "Let the collator make labels from lengths, not by comparing ids (`labels[labels == pad_token_id] = -100` "
            "drops the end of text if it also pads), or omit `data_collator`.",
            first_token_missing=no_first,
            end_missing=no_end,
        )
    if "teacher_labels" in batch and _trained(batch, "teacher_") != trained:
        return failing(
            "student and teacher are not compared on the same tokens: the two views' labels differ",
            "Both views must hold the same completion; omit `data_collator`.",
        )
    lasts = [row["completion_ids"][-1] for row in case.views if row["completion_ids"]]
    endless = sum(token not in stop_ids(case.generation_config) for token in lasts)
    if endless:
        never = endless == len(lasts) and case.answers_needed is not None
        return (failing if never else warning)(
            f"{endless} of {len(lasts)} answers do not end with a token that generation stops at",
            "The student would not learn to stop. Set `eos_token` to the token that the chat template ends an answer "
            "with.",
            endless=endless,
        )
    if other:
        return warning(
            f"{len(other)} of {len(answered)} rows are trained on other tokens than those of their answer "
            f"({share:.0%} of all tokens)",
            "Check what `data_collator` makes of a row: is a part of the prompt trained on, or a part of the answer "
            "not?",
        )
    return passing(f"{share:.0%} of all tokens, in every row from the answer's first token to its last", share=share)


def _trained(batch: dict[str, Tensor], view: str) -> list[list[int]]:
    """The tokens that a batch trains on, row by row. A label in column 0 has nothing before it."""
    labels = batch[f"{view}labels"]
    wrong = (labels != -100) & (labels != batch[f"{view}input_ids"])
    if wrong.any():
        row = int(torch.nonzero(wrong)[0, 0])
        raise ValueError(f"The labels of row {row} are not the ids that they stand at: labels are not to be shifted.")
    return masked_rows(labels[:, 1:], labels[:, 1:] != -100)
