"""Where the hidden states of a build come from; the writer never asks which it is."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data import pad_rows
from ..models.forward import completion_states, inside_forward, is_sharded


__all__ = ["ForwardStates", "StatesSource"]


class StatesSource(Protocol):
    """Runs a teacher over rows."""

    teacher: PreTrainedModel
    """The teacher. Its output head at least is in memory."""

    def states(self, rows: Sequence[Mapping[str, Any]]) -> Iterable[tuple[Tensor, Tensor]]:
        """Hidden states `(num_tokens, hidden)` and logits `(num_tokens, vocab)` at the completion tokens of each row.

        All ranks call it equally often, as a sharded teacher needs all of them: a rank that has run out of rows
        passes none.

        Args:
            rows: With `teacher_prompt_ids` and `completion_ids`.
        """


class ForwardStates:
    """
    The teacher's own forward pass, with transformers.

    Args:
        model: The teacher as it is wrapped.
        vocab_size (`int`): How many logits count.
        pad_token_id (`int`): What fills up the rows of a batch.
        accelerator ([`~accelerate.Accelerator`]): The build's.
    """

    def __init__(self, model: nn.Module, vocab_size: int, pad_token_id: int, accelerator: Accelerator):
        self.model, self.vocab_size, self.pad_token_id = model, vocab_size, pad_token_id
        self.accelerator = accelerator
        self.teacher: Any = accelerator.unwrap_model(model)

    def states(self, rows: Sequence[Mapping[str, Any]]) -> list[tuple[Tensor, Tensor]]:
        prompts, completions = ([row[name] for row in rows] for name in ("teacher_prompt_ids", "completion_ids"))
        lengths = list(map(len, completions))
        if not rows:
            if not is_sharded(self.model):
                return []
            prompts, completions = [[self.pad_token_id]], [[self.pad_token_id]]  # the other ranks wait for this pass
        batch = pad_rows(prompts, completions, self.pad_token_id)
        ids, mask, labels = (
            batch[name].to(self.accelerator.device) for name in ("input_ids", "attention_mask", "labels")
        )

        def run(teacher: nn.Module) -> tuple[Tensor, Tensor]:
            known = completion_states(teacher, ids, mask, labels, vocab_size=self.vocab_size)
            return known.hidden_states, known.logits()

        with torch.no_grad(), self.accelerator.autocast():
            states, logits = inside_forward(self.model, run)
        if not rows:
            return []
        return list(zip(states.split(lengths), logits.split(lengths), strict=True))
