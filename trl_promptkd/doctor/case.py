"""What a diagnosis looks at: two models, their tokenizer, a few rows and the settings of a run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..data import RewrittenPromptError, pad_rows, tokenize_dataset, tokenize_primed_row
from ..data.primed import tokenize_primed_dataset
from ..data.priming import PrimingTemplate
from ..generation.rollouts import generate_completions, own_random_state, rollout_config
from ..models.forward import completion_states
from ..models.soft_prompt import SoftPrompt
from ..models.tokenizer import shared_vocab_size
from ..trainer.primed_distill_config import PrimedDistillConfig
from ..trainer.promptkd_config import PromptKDConfig


__all__ = ["Case", "Finding", "cut", "failing", "passing", "warning"]

_PROBES = 4  # rows that go through the models
_PROMPT, _PRIMED_PROMPT, _ANSWER = 128, 256, 48  # tokens of a probe at most
_SAMPLE = 16  # tokens of a sample
_ANSWERS_NEEDED = (
    "Set `lmbda=1.0` (PromptKD: the student's samples only) or `response_source` to 'student' or 'teacher' (response "
    "priming: a model writes the answers)."
)


@dataclass(frozen=True)
class Finding:
    """
    The result of one check.

    Args:
        name: Name of the check.
        status: `"pass"`, `"warn"` (probably not what you want), `"fail"` (a run would be wrong or stop), or `"skip"`
            (a check that it needs failed).
        found: What was found.
        advice: What to do about it. Empty if there is nothing to do.
        values: The figures in it, for programs.
    """

    name: str
    status: str
    found: str
    advice: str = ""
    values: dict[str, Any] = field(default_factory=dict)


def _finding(status: str, found: str, advice: str = "", /, **values: Any) -> Finding:
    return Finding("", status, found, advice, values)  # the check's name is its function's


# What checks return
passing, warning, failing = (partial(_finding, status) for status in ("pass", "warn", "fail"))


def cut(row: dict[str, list[int]]) -> dict[str, list[int]]:
    """A row cut to a length that runs fast."""
    return {
        "prompt_ids": row["prompt_ids"][-_PROMPT:],
        "teacher_prompt_ids": row["teacher_prompt_ids"][-_PRIMED_PROMPT:],
        "completion_ids": row["completion_ids"][:_ANSWER],
    }


@dataclass
class Case:
    """
    Everything the checks look at. Derived values are computed once, when the first check needs them.

    Args:
        student, teacher: Both in evaluation mode, the teacher frozen. One object if the student is its own teacher.
        raw: The user's unchanged rows.
        The others: as for [`diagnose`].
    """

    student: Any
    teacher: Any
    tokenizer: PreTrainedTokenizerBase
    teacher_tokenizer: PreTrainedTokenizerBase | None
    raw: list[dict[str, Any]]
    args: PromptKDConfig | PrimedDistillConfig
    prompt_encoder_config: Any
    priming: PrimingTemplate | None
    data_collator: Callable[[list[dict[str, Any]]], dict[str, Tensor]] | None
    lora: bool

    @property
    def answers_needed(self) -> str | None:
        """How to train without the data's answers. `None` if they are not needed."""
        args = self.args
        needed = args.response_source == "dataset" if isinstance(args, PrimedDistillConfig) else args.lmbda < 1
        return _ANSWERS_NEEDED if needed else None

    @property
    def is_sampled(self) -> bool:  # in a run, a model writes completions
        return isinstance(self.args, PromptKDConfig) or self.answers_needed is None

    @property
    def is_self_distillation(self) -> bool:
        return self.teacher is self.student

    @property
    def is_conversational(self) -> bool:
        return any("messages" in row or isinstance(row.get("prompt"), list) for row in self.raw)

    @cached_property
    def vocab_size(self) -> int:
        return shared_vocab_size(self.student, self.teacher, self.tokenizer)

    @cached_property
    def tokenized(self) -> list[dict[str, list[int]]]:
        """`prompt_ids` and `completion_ids` of every row, nothing cut, without the priming text."""
        return self._each_row(None)

    @cached_property
    def views(self) -> list[dict[str, list[int]]]:
        """`tokenized` with the priming text in `teacher_prompt_ids`, as the teacher sees the prompts."""
        return self.tokenized if self.priming is None else self._each_row(self.priming)

    def _each_row(self, priming: PrimingTemplate | None) -> list[dict[str, list[int]]]:
        """Tokenize every row. Answers that training does not need are included if the chat template allows it."""
        found = []
        for index, row in enumerate(self.raw):
            try:
                found.append(tokenize_primed_row(row, self.tokenizer, priming))
            except ValueError as error:
                if not isinstance(error, RewrittenPromptError) or self.answers_needed is not None:
                    raise ValueError(f"Row {index}: {error}") from error
                found.append(tokenize_primed_row(row, self.tokenizer, priming, with_answer=False))
        return found

    @cached_property
    def prepared(self) -> list[dict[str, list[int]]]:
        """The rows as the trainers prepare them. Those that are too long are cut (PromptKD) or dropped."""
        rows = Dataset.from_list(self.raw, on_mixed_types="use_json")
        args, how = self.args, ("dataset", self.tokenizer)
        if isinstance(args, PromptKDConfig):
            return list(tokenize_dataset(rows, *how, args.max_length, self.answers_needed, args.overlong))
        limits: Any = (args.max_length, args.teacher_max_length, self.answers_needed, args.overlong)
        return list(tokenize_primed_dataset(rows, *how, self.priming, *limits))

    @cached_property
    def soft_prompt(self) -> Tensor | None:
        """PromptKD's initial soft prompt, `(num_virtual_tokens, hidden)` in float32. `None` for response priming."""
        if isinstance(self.args, PrimedDistillConfig):
            return None
        with own_random_state(0, self.student.device):
            return SoftPrompt(self.prompt_encoder_config, self.teacher, self.tokenizer)().detach()

    @property
    def generation_config(self) -> GenerationConfig:
        config: GenerationConfig = rollout_config(self.student, self.teacher, self.tokenizer, self.args)
        config.max_new_tokens = _SAMPLE
        return config

    @cached_property
    def chosen(self) -> list[dict[str, list[int]]]:
        """Up to four rows, from the shortest to the longest."""
        rows = sorted(self.views, key=lambda row: len(row["prompt_ids"]) + len(row["completion_ids"]))
        number = min(_PROBES, len(rows))
        return [rows[index * (len(rows) - 1) // max(number - 1, 1)] for index in range(number)]

    @cached_property
    def samples(self) -> list[list[int]]:
        """A few tokens that the student samples after each of the chosen prompts."""
        prompts = [row["prompt_ids"][-_PRIMED_PROMPT:] for row in self.chosen]
        with own_random_state(0, self.student.device):
            return generate_completions(
                self.student, prompts, self.generation_config, vocab_size=self.vocab_size, tokenizer=self.tokenizer
            )

    @cached_property
    def probes(self) -> list[dict[str, list[int]]]:
        """The chosen rows, cut. The student's samples replace missing answers."""
        rows = [cut(row) for row in self.chosen]
        return [{**row, "completion_ids": row["completion_ids"] or self.samples[i]} for i, row in enumerate(rows)]

    def batch(self, view: str, rows: Sequence[dict[str, list[int]]] | None = None) -> dict[str, Tensor]:
        """A padded batch of `rows` (by default the probes), with the prompts of the `"student"` or the `"teacher"`."""
        rows = self.probes if rows is None else rows
        prompts = [row["prompt_ids" if view == "student" else "teacher_prompt_ids"] for row in rows]
        batch = pad_rows(prompts, [row["completion_ids"] for row in rows], self.tokenizer.pad_token_id)
        return {name: batch[name].to(self.student.device) for name in ("input_ids", "attention_mask", "labels")}

    def logits(
        self,
        model: Any,
        view: str,
        rows: Sequence[dict[str, list[int]]] | None = None,
        soft_prompt: Tensor | None = None,
    ) -> Tensor:
        """Logits `(num_tokens, vocab)` at the answers of [`~Case.batch`], from the same pass as the losses."""
        ids, mask, labels = self.batch(view, rows).values()
        padding_free = self.args.padding_free
        return completion_states(model, ids, mask, labels, soft_prompt, self.vocab_size, padding_free).logits()
