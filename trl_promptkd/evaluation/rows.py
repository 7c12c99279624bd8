"""Data sets to evaluate on: prompts and right answers from rows in several formats, and scores of answers to them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from ..data import check_text_only, plain_rows, tokenize_primed_row
from ..data.priming import PrimingTemplate
from ..metrics import RULES, gsm8k_row_scores, instruction_row_scores, reference_number


__all__ = ["TASKS", "TEMPLATES", "EvaluationRows", "evaluation_rows", "instruction_text", "row_scores"]

TASKS = ("instruct", "gsm8k")
TEMPLATES = ("chat", "paper", "plain")


@dataclass(frozen=True)
class EvaluationRows:
    """
    A data set to evaluate on.

    Args:
        prompt_ids: One list of token ids per row.
        references: The right answers of each row, texts for `"instruct"` and numbers for `"gsm8k"`.
        left_out: How many rows were omitted because their prompt was too long.
    """

    prompt_ids: list[list[int]]
    references: list[list[Any]]
    left_out: int = 0


def instruction_text(instruction: str, input_text: str = "") -> str:
    """An instruction in the template of Alpaca, MiniLLM and PromptKD."""
    more = ", paired with an input that provides further context" if input_text else ""
    given = f"### Input:\n{input_text}\n\n" if input_text else ""
    return (
        f"Below is an instruction that describes a task{more}. Write a response that appropriately completes the "
        f"request.\n\n### Instruction:\n{instruction}\n\n{given}### Response:\n"
    )


def evaluation_rows(
    dataset: Dataset | IterableDataset,
    name: str,
    task: str | None,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    num_rows: int | None = None,
    max_prompt_length: int | None = None,
    priming: PrimingTemplate | None = None,
) -> EvaluationRows:
    """Read prompts and right answers of a data set.

    Args:
        dataset: Rows with one of these sets of columns: `instruction`, optionally `input`, and `output` (a text or a
            list of them). Or `question` and `answer`, or TRL's `prompt` and `completion`, or `messages`. Right answers
            may instead be in `references`. `tools` and `chat_template_kwargs` reach the chat template, as in training.
        name: Name of the data set in messages.
        task: `"instruct"` or `"gsm8k"`. `None` for rows that need no right answer.
        template: Template of instructions and questions: `"chat"` (the tokenizer's), `"paper"` ([`instruction_text`])
            or `"plain"`.
        num_rows: Use only the first rows.
        max_prompt_length: Omit rows whose prompt has more tokens.
        priming: Put this text into the prompts. A row's first right answer is its `reference_answer`.

    Raises:
        TypeError, ValueError: if the data set or a row has any other format. The message names it.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(
            f"`{name}` is a {type(dataset).__name__}; it must be a `datasets.Dataset` or `datasets.IterableDataset`. "
            "Use `load_dataset(name, split=...)`, or `Dataset.from_list(rows)` for rows in memory."
        )
    prompts: list[list[int]] = []
    references: list[list[Any]] = []
    left_out = 0
    dataset = plain_rows(dataset)
    for index, row in enumerate(islice(dataset, num_rows)):
        try:
            check_text_only(row)
            prompt_row, answers = _read_row(dict(row), template, task is not None)
            if priming is not None:
                known = {"reference_answer": answers[0]} if answers else {}
                prompt_row = {**known, **row, "messages": None, "prompt_ids": None, **prompt_row}
            ids = tokenize_primed_row(prompt_row, tokenizer, priming, with_answer=False)["teacher_prompt_ids"]
            right = [reference_number(text, "the right answer") for text in answers] if task == "gsm8k" else answers
        except (TypeError, ValueError) as error:
            raise ValueError(f"Row {index} of `{name}`: {error}") from error
        if max_prompt_length is not None and len(ids) > max_prompt_length:
            left_out += 1
            continue
        prompts.append(ids)
        references.append(right)
    if not prompts:
        if left_out:
            why = f"all {left_out} prompts are longer than `max_prompt_length={max_prompt_length}`. Raise it."
            raise ValueError(f"`{name}` has no rows to evaluate on: {why}")
        raise ValueError(f"`{name}` is empty: it has no rows to evaluate on. Check its path, split and filters.")
    return EvaluationRows(prompts, references, left_out)


def _read_row(row: dict[str, Any], template: str, needs_answers: bool) -> tuple[dict[str, Any], list[str]]:
    """A row in the format of [`tokenize_primed_row`], without its answer, and its right answers."""
    of_template = {name: row[name] for name in ("tools", "chat_template_kwargs") if row.get(name) is not None}
    for question, more, answer in (("instruction", "input", "output"), ("question", "", "answer")):
        text, extra = row.get(question), row.get(more) or ""
        if not isinstance(text, str):
            continue
        if not text.strip():
            raise ValueError(f"its `{question}` is {text!r}, which asks nothing. Filter such rows out.")
        plain = f"{text}\n\n{extra}" if extra else text
        prompts = {
            "chat": [{"role": "user", "content": plain}],
            "paper": instruction_text(text, extra),
            "plain": plain,
        }
        return {"prompt": prompts[template], **of_template}, _answers(row, needs_answers, answer)
    messages = row.get("messages")
    if messages:
        last = messages[-1].get("role") if isinstance(messages[-1], Mapping) else None
        if last == "assistant" and len(messages) > 1:
            answers = _answers({**row, "completion": messages[-1:]}, needs_answers, "completion")
            return {"messages": messages, **of_template}, answers
        if last in ("assistant", None) or (needs_answers and not row.get("references")):
            raise ValueError(
                "its `messages` are not a conversation that ends with an assistant message, the answer. Filter such "
                "rows out, or give right answers in `references`."
            )
    prompt = messages or row.get("prompt")
    if prompt is None:
        raise ValueError(
            "it has none of `instruction`, `question`, `prompt` and `messages`; its columns are "
            f"{sorted(row)}. Rename columns with `dataset.rename_column`."
        )
    return {"prompt": prompt, **of_template}, _answers(row, needs_answers, "completion", "output", "answer")


def _answers(row: Mapping[str, Any], needed: bool, *columns: str) -> list[str]:
    """The right answers of a row: its `references`, else the content of the first of `columns` that it has.

    The list is empty if they are not `needed` and the row has no such texts.
    """
    found = (row[column] for column in columns if row.get(column) is not None)
    answers = row.get("references") or next(found, None)
    if isinstance(answers, list) and answers and isinstance(answers[0], Mapping):
        content = answers[-1].get("content")
        is_parts = isinstance(content, list) and all(isinstance(part, Mapping) for part in content)
        answers = "".join(str(part.get("text") or "") for part in content) if is_parts else content
    answers = list(answers) if isinstance(answers, list | tuple) else [answers]
    texts = [isinstance(answer, str | int | float) and not isinstance(answer, bool) for answer in answers]
    if not answers or not all(texts):
        if not needed:
            return []
        raise ValueError(
            f"its right answer is {answers[0] if len(answers) == 1 else answers!r}; it must be a text or a list of "
            "texts, in `output`, `answer`, `completion`, `references` or the last message. Filter such rows out."
        )
    return list(map(str, answers))


def row_scores(task: str, answers: Sequence[str], references: Sequence[Sequence[Any]]) -> dict[str, list[float]]:
    """The task's metrics of each row, in percent: `rougeL` and `exact_match`, or `strict`, `flexible` and `paper`."""
    if task == "instruct":
        found = instruction_row_scores(answers, references)
        return {name: [row[name] for row in found] for name in ("rougeL", "exact_match")}
    # An answer is right if any of its row's right answers is
    owners = [row for row in range(len(answers)) for _ in references[row]]
    correct = {rule: [0.0] * len(answers) for rule in RULES}
    scores = gsm8k_row_scores([answers[row] for row in owners], [right for row in references for right in row])
    for row, score in zip(owners, scores, strict=True):
        for rule in RULES:
            correct[rule][row] = max(correct[rule][row], 100.0 * score[rule])
    return correct
