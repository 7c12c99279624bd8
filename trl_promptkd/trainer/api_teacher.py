"""A teacher that only writes answers, over an API. Response priming then has hard labels alone."""

import os
from typing import Any

from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..data.answered_rows import add_answers, requests_of
from ..generation.openai_server import OpenAIServer
from ..generation.server_answers import write_server_answers
from .datasets import View


__all__ = ["ApiTeacher"]

_AT_ONCE = 32  # requests of one rank at the same time. Servers batch them


class ApiTeacher:
    """
    A teacher behind an OpenAI-compatible API. Its weights are not needed.

    Args:
        args ([`PrimedDistillConfig`]): The run's settings.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): The student's tokenizer. The teacher may have
            another one.

    Raises:
        ConnectionError, ValueError: if the model's name is not given and the server does not list it.
    """

    model = None
    cache = None

    def __init__(self, args: Any, processing_class: PreTrainedTokenizerBase):
        self.args, self.processing_class = args, processing_class
        self.num_at_once = args.rollout_batch_size or _AT_ONCE
        self.server = OpenAIServer(args.teacher_answers_url, args.teacher_answers_model, self.num_at_once)
        samples = (args.generation_kwargs or {}).get("do_sample", True)
        self.sampling = {
            "max_tokens": args.max_new_tokens,
            "temperature": args.temperature if samples else 0.0,
            "top_p": args.top_p if samples else 1.0,
        }

    @property
    def name(self) -> str:
        """The teacher's name on the server."""
        return self.server.model

    def find(self, dataset: Any, name: str) -> Dataset:
        """Tokenized rows with the teacher's answers. Answers that are not on disk yet are requested now, before any
        weights are loaded."""
        if isinstance(dataset, IterableDataset):
            raise ValueError(
                f"`{name}` is streamed, but with `response_source='teacher'` the teacher answers every row before "
                "training. Load it without streaming, or set `response_source` to 'dataset' or 'student'."
            )
        answers = write_server_answers(
            requests_of(dataset),
            self.args.teacher_answers_dir or os.path.join(self.args.output_dir, "_teacher_answers"),
            self.server,
            self.sampling,
            self.args.seed,
            self.num_at_once,
            f"Teacher answers for {name}",
            self.args.disable_tqdm,
        )
        return add_answers(dataset, name, answers, self.processing_class, self.args.dataset_num_proc)

    def load(self, trainer: Any) -> Any:
        """Loads nothing. Returns the student, because completions end with the student's own end of text."""
        self.trainer = trainer
        return trainer.model

    @property
    def vocabulary(self) -> Any:
        """The student, because completions are made of the student's tokens."""
        return self.trainer.model

    def views(self) -> list[View]:
        """No rows, as it has answered already."""
        return []

    def place(self) -> None:
        """Nothing to do."""

    def answered(self, dataset: Any, name: str) -> Any:
        """The data set as it is. [`~ApiTeacher.find`] has added the answers."""
        return dataset

    def expect(self, batches: list[dict[str, Tensor]]) -> None:
        """Nothing to prepare."""

    def at_completions(self, student: nn.Module, inputs: dict[str, Tensor]) -> None:
        """`None`, as there are hard labels alone."""

    def plain_log_prob(self, inputs: dict[str, Tensor]) -> None:
        """`None`, as it is not known."""
