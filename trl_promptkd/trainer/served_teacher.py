"""Response priming's teacher on another machine. A vLLM server makes its hidden states, and its head is applied here.

Requests are sent ahead of need. Those of a window's first micro-batches are sent when the window is known. While one
micro-batch trains, the server works on the next ones.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from ..generation.teacher_server import PendingStates, TeacherServer
from ..losses.chunked import chunked_sums
from ..losses.primed_distill import log_prob_sums
from ..models.forward import TokenStates
from ..models.output_head import head_kwargs, load_output_head, move_output_head
from .datasets import View


__all__ = ["ServedTeacher"]

_AHEAD = 2  # micro-batches whose states are requested, or wait in memory, beside those that are trained on


class ServedTeacher:
    """
    A teacher that runs on a vLLM server in pooling mode. Every rank sends its own rows there.

    Args:
        url (`str`): The server's address.
        name: The name or folder of its weights. Their output head is loaded here.
        args ([`PrimedDistillConfig`]): The run's settings.
        has_priming (`bool`): Whether it sees a priming text.

    Raises:
        ConnectionError, TimeoutError: if the server does not answer.
        ValueError: for a teacher without a name, for a server that serves another one, and if the teacher is to write
            answers.
    """

    cache = None
    model = None

    def __init__(self, url: str, name: Any, args: Any, has_priming: bool):
        if not isinstance(name, str):
            given = "is None" if name is None else f"is a {type(name).__name__}"
            raise ValueError(
                f"`teacher_server` is set, but `teacher_model` {given}. Pass the name or the folder of the weights "
                "that are served: their output head is loaded here."
            )
        if args.response_source == "teacher":
            raise ValueError(
                "`response_source` is 'teacher', but a server in pooling mode writes no answers. Set "
                "`response_source` to 'dataset' or 'student'."
            )
        head_kwargs(args.teacher_model_init_kwargs)
        self.name, self.args, self.has_priming = name, args, has_priming
        self.server = TeacherServer(url, name, args.teacher_server_dtype, args.teacher_server_timeout)
        self.server.find_model()  # before weights are loaded
        self._sent: deque[tuple[list[list[int]], PendingStates]] = deque()
        self._unsent: deque[list[list[int]]] = deque()

    def find(self, dataset: Any, name: str) -> Any:
        """Tokenized rows as they are."""
        return dataset

    def load(self, trainer: Any) -> Any:
        """The model, of which only the output head is loaded."""
        self.trainer = trainer
        self.head = load_output_head(self.name, self.args.teacher_model_init_kwargs, self.args.trust_remote_code)
        return self.head

    @property
    def vocabulary(self) -> Any:
        """The model, whose vocabulary is compared with the student's."""
        return self.head

    def views(self) -> list[View]:
        """The rows that the server sees."""
        return [View("teacher", self.head, "teacher_prompt_ids")]

    def place(self) -> None:
        """Put the head on its device, and check that the server's model is the one that the head belongs to."""
        move_output_head(self.head, self.trainer.accelerator.device)
        self.server.check(self.head, self.trainer.processing_class)

    def answered(self, dataset: Any, name: str) -> Any:
        """The data set as it is. Raises an error if a row is longer than the server allows."""
        if isinstance(dataset, Dataset) and "teacher_prompt_ids" in dataset.column_names:
            args = self.args
            least = args.max_new_tokens if args.response_source == "student" else 0
            pairs = zip(dataset["teacher_prompt_ids"], dataset["completion_ids"], strict=True)
            longest = max(len(prompt) + max(len(completion), least) for prompt, completion in pairs)
            self.server.check_length(longest - 1)  # without the last token, which predicts nothing that is trained on
        return dataset

    def expect(self, batches: Sequence[Mapping[str, Tensor]]) -> None:
        """Send the rows of a window's first micro-batches."""
        self._forget()
        self._unsent.extend(_asked(batch, "teacher_")[0] for batch in batches)
        self._send_ahead()

    def at_completions(self, student: nn.Module, inputs: dict[str, Tensor]) -> TokenStates:
        """The teacher's output at the completion tokens of its view."""
        return self._token_states(inputs, "teacher_")

    @torch.no_grad()
    def plain_log_prob(self, inputs: dict[str, Tensor]) -> Tensor | None:
        """Sum of the completions' log-probabilities without the priming text, or `None` if there is no such text."""
        if not self.has_priming:
            return None
        labels = inputs["labels"][:, 1:]
        with self.trainer.accelerator.autocast():
            states = self._token_states(inputs, "")
            (plain,), _ = chunked_sums(log_prob_sums, self.args.loss_chunk_size, states, labels[labels != -100])
        return plain

    def _token_states(self, inputs: Mapping[str, Tensor], view: str) -> TokenStates:
        rows, columns = _asked(inputs, view)
        try:
            states = self._pending(rows).result()
        except BaseException:
            self._forget()
            raise
        weight = self.head.get_output_embeddings().weight
        parts = [row_states[picked] for row_states, picked in zip(states, columns, strict=True)]
        empty = torch.empty(0, self.server.hidden_size or 0)
        return TokenStates(torch.cat(parts or [empty]).to(weight), self.head, self.trainer.shared_vocab_size).detach()

    def _pending(self, rows: list[list[int]]) -> PendingStates:
        """The states of these rows, which may have been requested already. Those of an evaluation never are."""
        if not self._sent or self._sent[0][0] != rows:
            return self.server.submit(rows)
        _, pending = self._sent.popleft()
        self._send_ahead()
        return pending

    def _send_ahead(self) -> None:
        while self._unsent and len(self._sent) < _AHEAD:
            rows = self._unsent.popleft()
            self._sent.append((rows, self.server.submit(rows)))

    def _forget(self) -> None:
        """Drop all requests. Some are left if the window before was broken off."""
        for _, pending in self._sent:
            pending.cancel()
        self._sent.clear()
        self._unsent.clear()


def _asked(inputs: Mapping[str, Tensor], view: str) -> tuple[list[list[int]], list[Tensor]]:
    """The rows of a batch that have trained tokens, without padding and without their last token. Also the columns of
    each row whose states predict a trained token."""
    ids, mask, labels = (inputs[view + name].cpu() for name in ("input_ids", "attention_mask", "labels"))
    real, trained = mask[:, :-1].bool(), labels[:, 1:] != -100
    if bool((trained & ~real).any()):
        raise ValueError(
            "The data collator trains on a token that has no token before it. A row must begin with a prompt."
        )
    ends = mask.sum(dim=1) - 1
    judged = trained.any(dim=1).nonzero().flatten().tolist()
    rows = [ids[row, :-1][real[row]][: int(ends[row])].tolist() for row in judged]
    return rows, [trained[row][real[row]].nonzero().flatten() for row in judged]
