"""How a build runs its teacher: transformers' forward pass, vLLM in this process, or a vLLM server.

All return the same: hidden states and logits at the completion tokens. The builder chooses one, and the writer does
not depend on which.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data import pad_rows
from ..generation.servers import check_url
from ..generation.teacher_answers import weights_fingerprint
from ..generation.teacher_server import KEY_VARIABLE, TeacherServer
from ..generation.vllm_states import VLLMStates, check_engine
from ..models.compare import check_forward
from ..models.forward import TokenStates, completion_states, inside_forward, is_sharded
from ..models.init_kwargs import hub_kwargs
from ..models.output_head import load_output_head, move_output_head
from ..models.teacher import freeze, load_teacher


__all__ = ["EngineStates", "ForwardStates", "ServerStates", "StatesSource"]


class StatesSource(Protocol):
    """A teacher, and a way to run it on rows. `load` is called first, then `start`, then `states`."""

    teacher: Any
    """The model. At least its output head is in memory."""

    def load(self) -> PreTrainedModel:
        """Load the teacher, for what must be known before it runs."""

    def identity(self) -> dict[str, str | None]:
        """The manifest's entry on the teacher."""

    def start(
        self, accelerator: Accelerator, processing_class: PreTrainedTokenizerBase, vocab_size: int, longest: int
    ) -> None:
        """Make the teacher ready to run, and check its results.

        Args:
            vocab_size: Number of logits that count.
            longest: Length of the longest row, in tokens.
        """

    def states(self, rows: Sequence[Mapping[str, Any]]) -> Iterable[tuple[Tensor, Tensor]]:
        """Hidden states `(num_tokens, hidden)` and logits `(num_tokens, vocab)` at the completion tokens of each row.

        All ranks call it equally often, as a sharded teacher needs all of them. A rank that has run out of rows
        passes none.

        Args:
            rows: Have `teacher_prompt_ids` and `completion_ids`.
        """


def _identity(config: Any, dtype: torch.dtype, quantization: Any, weights: nn.Module) -> dict[str, str | None]:
    return {
        "name": config._name_or_path,
        "revision": getattr(config, "_commit_hash", None),
        "dtype": str(dtype).removeprefix("torch."),
        "quantization": str(quantization or "none"),
        "weights": weights_fingerprint(weights),
    }


class ForwardStates:
    """
    The teacher's own forward pass, with transformers.

    Args:
        teacher (`str` or [`~transformers.PreTrainedModel`]): The teacher or its name.
        init_kwargs, trust_remote_code: How it is loaded.
    """

    def __init__(self, teacher: str | PreTrainedModel, init_kwargs: Mapping[str, Any] | None, trust_remote_code: bool):
        self.given, self.init_kwargs, self.trust_remote_code = teacher, init_kwargs, trust_remote_code

    def load(self) -> PreTrainedModel:
        loads = isinstance(self.given, str)
        teacher: Any = load_teacher(self.given, self.init_kwargs, self.trust_remote_code) if loads else self.given
        self.teacher: Any = freeze(teacher)
        return self.teacher

    def identity(self) -> dict[str, str | None]:
        quantization = getattr(self.teacher, "quantization_method", None)
        return _identity(self.teacher.config, self.teacher.dtype, quantization, self.teacher)

    def start(
        self, accelerator: Accelerator, processing_class: PreTrainedTokenizerBase, vocab_size: int, longest: int
    ) -> None:
        self.accelerator, self.vocab_size = accelerator, vocab_size
        self.model = accelerator.prepare_model(self.teacher, evaluation_mode=True)
        check_forward("teacher", self.teacher, processing_class, accelerator, vocab_size=vocab_size)
        eos = processing_class.eos_token_id or 0  # any will do: masks come from lengths
        self.pad_token_id = eos if processing_class.pad_token_id is None else processing_class.pad_token_id

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


class HeadStates(ABC):
    """
    A decoder that runs elsewhere, with the teacher's output head in this process.

    Args:
        teacher (`str`): The teacher's name.
        init_kwargs, trust_remote_code: How its head is loaded.
    """

    backend: str

    def __init__(self, teacher: str, init_kwargs: Mapping[str, Any] | None, trust_remote_code: bool):
        self.name, self.init_kwargs, self.trust_remote_code = teacher, dict(init_kwargs or {}), trust_remote_code

    def load(self) -> PreTrainedModel:
        self.teacher: Any = load_output_head(self.name, self.init_kwargs, self.trust_remote_code)
        return self.teacher

    def identity(self) -> dict[str, str | None]:
        """The manifest's entry. The fingerprint is that of the head, as the other weights are not known here."""
        known = _identity(
            self.teacher.config, self.teacher.dtype, self._quantization(), self.teacher.get_output_embeddings()
        )
        return {**known, "backend": self.backend}

    @property
    def _trusted(self) -> bool:
        return self.init_kwargs.get("trust_remote_code", self.trust_remote_code)

    def _quantization(self) -> str | None:
        """How the checkpoint is quantized."""
        config = AutoConfig.from_pretrained(self.name, trust_remote_code=self._trusted, **hub_kwargs(self.init_kwargs))
        return (getattr(config, "quantization_config", None) or {}).get("quant_method")

    def start(
        self, accelerator: Accelerator, processing_class: PreTrainedTokenizerBase, vocab_size: int, longest: int
    ) -> None:
        self.vocab_size = vocab_size
        move_output_head(self.teacher, accelerator.device)
        self.decoder = self._decoder(processing_class, longest)

    @abstractmethod
    def _decoder(self, processing_class: PreTrainedTokenizerBase, longest: int) -> VLLMStates | TeacherServer:
        """The source of the hidden states of whole rows."""

    def states(self, rows: Sequence[Mapping[str, Any]]) -> Iterable[tuple[Tensor, Tensor]]:
        if not rows:
            return
        whole = self.decoder.states([[*row["teacher_prompt_ids"], *row["completion_ids"]] for row in rows])
        head = self.teacher.get_output_embeddings().weight
        for row, states in zip(rows, whole, strict=True):
            first = len(row["teacher_prompt_ids"]) - 1  # the state before a token predicts it
            known = TokenStates(states[first:-1].to(head), self.teacher, self.vocab_size)
            yield known.hidden_states, known.logits()


class EngineStates(HeadStates):
    """
    vLLM in this process.

    Args:
        vllm_kwargs (`Mapping`, *optional*): Arguments of `vllm.LLM`.
    """

    backend = "vllm"

    def __init__(self, *args: Any, vllm_kwargs: Mapping[str, Any] | None):
        super().__init__(*args)
        self.vllm_kwargs = vllm_kwargs
        check_engine(vllm_kwargs)
        unknown = sorted(self.init_kwargs.keys() - {"dtype", "torch_dtype", "revision", "trust_remote_code"})
        if unknown:
            raise ValueError(
                f"`teacher_model_init_kwargs` holds {unknown[0]!r}, which vLLM does not take. Remove it; arguments of "
                "vLLM's own are `vllm_kwargs`, and a token of the Hub is the environment's `HF_TOKEN`."
            )

    def _quantization(self) -> str | None:
        return (self.vllm_kwargs or {}).get("quantization") or super()._quantization()

    def _decoder(self, processing_class: PreTrainedTokenizerBase, longest: int) -> VLLMStates:
        revision = self.init_kwargs.get("revision")
        return VLLMStates(self.name, self.teacher.dtype, longest, revision, self._trusted, self.vllm_kwargs)


class ServerStates(HeadStates):
    """
    A vLLM server in pooling mode.

    Args:
        url (`str`): URL of the server.
    """

    backend = "server"

    def __init__(self, *args: Any, url: str):
        super().__init__(*args)
        check_url("teacher_server", url, KEY_VARIABLE, "http://host:8000")
        self.url = url

    def _decoder(self, processing_class: PreTrainedTokenizerBase, longest: int) -> TeacherServer:
        # The wire keeps what the head takes: states in bfloat16 are not rounded by it
        wire = "bfloat16" if self.teacher.dtype == torch.bfloat16 else "float32"
        server = TeacherServer(self.url, self.name, wire)
        server.check(self.teacher, processing_class, longest)
        return server
