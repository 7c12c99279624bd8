"""What a diagnosis looks at: two models, their tokenizer, a few rows and the settings of a run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..data import RewrittenPromptError, pad_rows, tokenize_dataset, tokenize_row
from ..data.primed import tokenize_primed_dataset, tokenize_primed_row
from ..data.priming import PrimingTemplate
from ..generation.rollouts import generate_completions, own_random_state, rollout_config
from ..models.forward import TokenStates, completion_states
from ..models.soft_prompt import SoftPrompt
from ..models.tokenizer import shared_vocab_size


__all__ = ["Case", "Finding"]

_PROBES = 4  # rows that the models are asked about
_PROMPT, _PRIMED_PROMPT, _ANSWER = 128, 256, 48  # tokens of a probe at most
_SAMPLE = 16  # tokens of a sample


@dataclass(frozen=True)
class Finding:
    """
    What one check says.

    Args:
        name: Of the check.
        status: `"pass"`, `"warn"` (probably not what you want), `"fail"` (a run would be wrong or stop), or `"skip"` (left out, as a
            check failed that it needs).
        found: What was found.
        advice: What to do about it; empty where there is nothing to do.
        values: The figures in it, for machines.
    """

    name: str
    status: str
    found: str
    advice: str = ""
    values: dict[str, Any] = field(default_factory=dict)


@dataclass
class Case:
    """
    Everything the checks ask about. What is worked out from it is worked out once, when the first check asks.

    Args:
        student, teacher: Both in evaluation mode, the teacher frozen; one object where the student is its own teacher.
        tokenizer: Of both.
        teacher_tokenizer: What was found beside the teacher, if anything.
        raw: Rows as the user has them.
        answers_needed: Why answers in the data are needed; `None` where they are not.
        The others: as for [`diagnose`].
    """

    student: Any
    teacher: Any
    tokenizer: PreTrainedTokenizerBase
    teacher_tokenizer: PreTrainedTokenizerBase | None
    raw: list[dict[str, Any]]
    prompt_encoder_config: Any
    priming: PrimingTemplate | None
    answers_needed: str | None
    data_collator: Callable[[list[dict[str, Any]]], dict[str, Tensor]] | None
    max_length: int | None
    max_new_tokens: int
    overlong: str
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool
    teacher_gradient_checkpointing: bool
    loss_chunk_size: int | None
    lora: bool

    @property
    def distils_itself(self) -> bool:
        return self.teacher is self.student

    @property
    def is_conversational(self) -> bool:
        return any("messages" in row or isinstance(row.get("prompt"), list) for row in self.raw)

    @cached_property
    def vocab_size(self) -> int | None:
        return shared_vocab_size(self.student, self.teacher, self.tokenizer)

    # ------------------------------------------------------------------------------------------------ rows

    @cached_property
    def tokenized(self) -> list[dict[str, list[int]]]:
        """`prompt_ids` and `completion_ids` of every row, nothing cut."""
        return self._each_row(partial(tokenize_row, processing_class=self.tokenizer))

    @cached_property
    def views(self) -> list[dict[str, list[int]]]:
        """The same with `teacher_prompt_ids`."""
        return self._each_row(partial(tokenize_primed_row, processing_class=self.tokenizer, priming=self.priming))

    def _each_row(self, tokenize: Callable[..., dict[str, list[int]]]) -> list[dict[str, list[int]]]:
        """Answers that no training needs are taken if the chat template allows it."""
        found = []
        for index, row in enumerate(self.raw):
            try:
                try:
                    found.append(tokenize(row))
                except RewrittenPromptError:
                    if self.answers_needed is not None:
                        raise
                    found.append(tokenize(row, with_answer=False))
            except ValueError as error:
                raise ValueError(f"Row {index}: {error}") from error
        return found

    @cached_property
    def prepared(self) -> list[dict[str, list[int]]]:
        """The rows as the trainers prepare them: cut (PromptKD) or dropped where they are too long."""
        rows = Dataset.from_list(self.raw, on_mixed_types="use_json")
        limits = {"answers_needed": self.answers_needed, "overlong": self.overlong}
        if self.priming is None:
            return list(tokenize_dataset(rows, "dataset", self.tokenizer, self.max_length, **limits))  # type: ignore[arg-type]
        return list(
            tokenize_primed_dataset(rows, "dataset", self.tokenizer, self.priming, self.max_length, **limits)  # type: ignore[arg-type]
        )

    # ------------------------------------------------------------------------------------------------ probes

    @cached_property
    def soft_prompt(self) -> Tensor | None:
        """Where a run's soft prompt would start, `(num_virtual_tokens, hidden)` in float32; `None` with a priming text."""
        if self.priming is not None:
            return None
        with own_random_state(0, self.student.device):
            return SoftPrompt(self.prompt_encoder_config, self.teacher, self.tokenizer)().detach()

    def generation_config(self, max_new_tokens: int = _SAMPLE) -> GenerationConfig:
        settings = {"max_new_tokens": max_new_tokens, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        args = SimpleNamespace(**settings, generation_kwargs=None)
        return rollout_config(self.student, self.teacher, self.tokenizer, args)

    @cached_property
    def chosen(self) -> list[dict[str, list[int]]]:
        """Up to four rows, from the shortest to the longest."""
        rows = sorted(self.views, key=lambda row: len(row["prompt_ids"]) + len(row["completion_ids"]))
        number = min(_PROBES, len(rows))
        return [rows[index * (len(rows) - 1) // max(number - 1, 1)] for index in range(number)]

    @cached_property
    def samples(self) -> list[list[int]]:
        """A few tokens that the student writes after each of the chosen prompts."""
        prompts = [row["prompt_ids"][-_PRIMED_PROMPT:] for row in self.chosen]
        with own_random_state(0, self.student.device):
            return generate_completions(self.student, prompts, self.generation_config(), vocab_size=self.vocab_size)

    @cached_property
    def probes(self) -> list[dict[str, list[int]]]:
        """The chosen rows, cut to what is quick; the student's samples stand for answers that there are not."""
        answers = [row["completion_ids"][:_ANSWER] for row in self.chosen]
        if not all(answers):
            answers = [answer or sample for answer, sample in zip(answers, self.samples, strict=True)]
        return [
            {
                "prompt_ids": row["prompt_ids"][-_PROMPT:],
                "teacher_prompt_ids": row["teacher_prompt_ids"][-_PRIMED_PROMPT:],
                "completion_ids": answer,
            }
            for row, answer in zip(self.chosen, answers, strict=True)
        ]

    def batch(
        self, view: str, rows: Sequence[dict[str, list[int]]] | None = None, padding: tuple[int, int] = (0, 0)
    ) -> dict[str, Tensor]:
        """Rows (the probes, unless others are given) as a padded batch.

        Args:
            view: `"student"` or `"teacher"`: whose prompts.
            padding: Columns of nothing but padding on the left and on the right.
        """
        rows = self.probes if rows is None else rows
        prompts = [row["prompt_ids" if view == "student" else "teacher_prompt_ids"] for row in rows]
        pad = self.tokenizer.pad_token_id
        batch = pad_rows(prompts, [row["completion_ids"] for row in rows], pad)
        fill = {"input_ids": pad, "attention_mask": 0, "labels": -100}
        return {
            name: torch.nn.functional.pad(batch[name], padding, value=value).to(self.student.device)
            for name, value in fill.items()
        }

    def states(self, model: Any, batch: dict[str, Tensor], soft_prompt: Tensor | None = None) -> TokenStates:
        """What `model` knows at a batch's answer tokens, by the pass that losses are taken from."""
        return completion_states(
            model, batch["input_ids"], batch["attention_mask"], batch["labels"], soft_prompt, self.vocab_size
        )
