"""Data sets to evaluate on: prompts and right answers of rows in many formats."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from ..data import check_text_only, plain_rows, tokenize_row
from ..metrics import reference_number


__all__ = ["TEMPLATES", "EvaluationRows", "evaluation_rows", "instruction_text"]

TEMPLATES = ("chat", "paper", "plain")


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
    dataset = plain_rows(dataset)
    rows = dataset.take(num_rows) if num_rows is not None else dataset
    for index, row in enumerate(rows):
        try:
            check_text_only(row)
            prompt_row, answers = _read_row(dict(row), template)
            ids = tokenize_row(prompt_row, tokenizer, with_answer=False)["prompt_ids"]
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
    """A row as [`tokenize_row`] takes it, for its prompt alone, and its right answers."""
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
            answers = _answers({"completion": row["messages"][-1:], **_references(row)})
            return {"messages": row["messages"], **of_template}, answers
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
        content = answers[-1].get("content")
        is_parts = isinstance(content, list) and all(isinstance(part, Mapping) for part in content)
        answers = "".join(str(part.get("text") or "") for part in content) if is_parts else content
    answers = list(answers) if isinstance(answers, list | tuple) else [answers]
    texts = [isinstance(answer, str | int | float) and not isinstance(answer, bool) for answer in answers]
    if not answers or not all(texts):
        raise ValueError(
            f"its right answer is {answers[0] if len(answers) == 1 else answers!r}; it must be a text or a list of texts, in `output`, `answer`, "
            "`completion`, `references` or the last message. Filter such rows out."
        )
    return [answer if isinstance(answer, str) else str(answer) for answer in answers]
