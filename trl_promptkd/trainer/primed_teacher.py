"""The teachers of response priming: one that runs beside the student, and one that a cache stands for. Two more have
modules of their own: one that runs on a server, and one that only writes answers, over an API.

All have the same methods, so that the trainer need not know which one it has.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..data.priming import PrimingTemplate
from ..evaluation.quantization_receipt import quantization_receipt
from ..generation.teacher_answers import weights_fingerprint, write_teacher_answers
from ..losses.chunked import chunked_sums
from ..losses.primed_distill import log_prob_sums
from ..models.compare import check_forward
from ..models.forward import TokenStates, completion_states, inside_forward
from ..models.teacher import build_teacher, load_teacher, place_teacher, run_teacher
from ..teacher_cache import TeacherCache
from ..teacher_cache.reader import CachedAnswers
from .api_teacher import ApiTeacher
from .datasets import View
from .served_teacher import ServedTeacher


__all__ = ["CachedTeacher", "LiveTeacher", "primed_teacher", "receipt_of_run", "view_states"]


def primed_teacher(
    teacher_model: Any,
    teacher_cache: str | TeacherCache | None,
    teacher_server: str | None,
    args: Any,
    tokenizes: bool,
    processing_class: PreTrainedTokenizerBase,
    priming: PrimingTemplate | None,
) -> "LiveTeacher | CachedTeacher | ServedTeacher | ApiTeacher":
    """The teacher of a run, before any weights are loaded.

    Args:
        teacher_model, teacher_cache, teacher_server, args, processing_class, priming: The trainer's.
        tokenizes: Whether the trainer prepares its rows. Otherwise a user's own collator does.

    Raises:
        ValueError: for a teacher that cannot serve this run.
    """
    if teacher_cache is not None and teacher_server is not None:
        raise ValueError("`teacher_cache` and `teacher_server` are both set; pass one of them.")
    if teacher_cache is not None and teacher_model is not None:
        raise ValueError("`teacher_model` and `teacher_cache` are both set; pass one of them.")
    for name, needs_rows in (
        ("teacher_cache", teacher_cache is not None),
        ("response_source='teacher'", args.response_source == "teacher"),
    ):
        if needs_rows and not tokenizes:
            raise ValueError(
                f"`{name}` needs rows that the trainer prepares, but `data_collator` is set. Omit `data_collator`."
            )
    if args.teacher_answers_url is not None:
        others = {"teacher_model": teacher_model, "teacher_cache": teacher_cache, "teacher_server": teacher_server}
        for name, given in others.items():
            if given is not None:
                raise ValueError(
                    f"`{name}` and `teacher_answers_url` are both set, but on a server's answers the student is "
                    f"trained with hard labels alone. Omit `{name}`; or omit `teacher_answers_url`, and the teacher "
                    "here writes the answers."
                )
        return ApiTeacher(args, processing_class)
    if teacher_cache is not None:
        return CachedTeacher(teacher_cache, args, processing_class, priming)
    if teacher_server is not None:
        return ServedTeacher(teacher_server, teacher_model, args, has_priming=priming is not None)
    deepspeed = args.deepspeed_plugin
    if args.response_source == "teacher" and deepspeed is not None and deepspeed.zero_stage == 3:
        raise ValueError(
            "`response_source='teacher'` does not work with weights that are sharded by ZeRO-3. Let the teacher "
            "write its answers in a run on one process, and train on its `teacher_answers_dir` as a data set "
            "(`load_dataset`)."
        )
    return LiveTeacher(teacher_model, args, has_priming=priming is not None)


def view_states(
    model: nn.Module, inputs: Mapping[str, Tensor], view: str, vocab_size: int, padding_free: bool
) -> TokenStates:
    """The output of a bare model at the completion tokens, after the student's prompt (`view=""`) or the teacher's
    (`"teacher_"`)."""
    ids, mask, labels = (inputs[view + name] for name in ("input_ids", "attention_mask", "labels"))
    return completion_states(model, ids, mask, labels, vocab_size=vocab_size, padding_free=padding_free)


class LiveTeacher:
    """
    A teacher that runs beside the student: a model, or the student's own start.

    Args:
        given: A model, a name, or `None` for the student's own start.
        args ([`PrimedDistillConfig`]): The run's settings.
        has_priming (`bool`): Whether it sees a priming text.
    """

    cache = None

    def __init__(self, given: Any, args: Any, has_priming: bool):
        self.given, self.args, self.has_priming = given, args, has_priming
        self.writes = args.response_source == "teacher"
        self.model: Any = None
        """The model on its device. `None` for the student below its adapter."""

    def find(self, dataset: Any, name: str) -> Any:
        """Tokenized rows as they are. Rejects a stream if the teacher is to answer its rows before training."""
        if self.writes and isinstance(dataset, IterableDataset):
            raise ValueError(
                f"`{name}` is streamed, but with `response_source='teacher'` the teacher answers every row before "
                "training. Load it without streaming, or set `response_source` to 'dataset' or 'student'."
            )
        return dataset

    def load(self, trainer: Any) -> Any:
        """The model, loaded and frozen, but not on its device yet."""
        self.trainer = trainer
        self.bare = build_teacher(trainer.model, self.given, self.args)
        # The main process's, because the others may have loaded no weights yet
        self.fingerprint = broadcast_object_list([weights_fingerprint(self.bare) if self.writes else ""])[0]
        on_meta = any(parameter.device.type == "meta" for parameter in self.bare.parameters())
        if self.writes and self.bare is trainer.model and on_meta:
            raise ValueError(
                "`response_source` is 'teacher' and the student its own teacher, but FSDP2 has loaded its weights on "
                "one rank only, and shards them when training starts. Set `fsdp_cpu_ram_efficient_loading: false`, "
                "or pass `teacher_model`."
            )
        return self.bare

    @property
    def vocabulary(self) -> Any:
        """The model, whose vocabulary is compared with the student's."""
        return self.bare

    def views(self) -> list[View]:
        """The rows that its model sees."""
        return [View("teacher", self.bare, "teacher_prompt_ids")]

    def place(self) -> None:
        """Put the model on its device. Then compare its passes with its own forward pass."""
        trainer = self.trainer
        self.model = place_teacher(self.bare, trainer.model, trainer.accelerator)
        settings = (trainer.processing_class, trainer.accelerator, None, trainer.shared_vocab_size)
        with self.run() as teacher:
            teacher = trainer.accelerator.unwrap_model(teacher)
            check_forward("teacher", teacher, *settings, self.args.padding_free)

    def run(self):
        """The model, in evaluation mode, as a context."""
        return run_teacher(self.model, self.trainer.accelerator.unwrap_model(self.trainer.model_wrapped))

    def answered(self, dataset: Any, name: str) -> Any:
        """The data set, with the teacher's answers if `response_source="teacher"`. Otherwise as it is."""
        if not self.writes:
            return dataset
        trainer, args = self.trainer, self.args
        folder = args.teacher_answers_dir or os.path.join(args.output_dir, "_teacher_answers")
        with self.run() as teacher:
            return write_teacher_answers(
                dataset,
                folder,
                teacher,
                self.fingerprint,
                trainer.accelerator,
                trainer.processing_class,
                trainer.generation_config,
                args,
                trainer.shared_vocab_size,
                name,
            )

    def expect(self, batches: Sequence[Mapping[str, Tensor]]) -> None:
        """Nothing to do, as it runs when a micro-batch is trained on."""

    @torch.no_grad()
    def at_completions(self, student: nn.Module, inputs: dict[str, Tensor]) -> TokenStates:
        """Its output at the completion tokens of its view, inside the student's forward pass."""
        arguments = (inputs, "teacher_", self.trainer.shared_vocab_size, self.args.padding_free)
        with run_teacher(self.model, student) as teacher:
            if self.model is None:  # it is the student, and this is inside its forward pass already
                return view_states(teacher, *arguments).detach()
            return inside_forward(teacher, view_states, *arguments).detach()

    @torch.no_grad()
    def plain_log_prob(self, inputs: dict[str, Tensor]) -> Tensor | None:
        """Sum of the completions' log-probabilities without the priming text, or `None` if there is no such text."""
        if not self.has_priming:
            return None
        trainer, labels = self.trainer, inputs["labels"][:, 1:]
        with trainer.accelerator.autocast(), self.run() as teacher:
            arguments = (inputs, "", trainer.shared_vocab_size, self.args.padding_free)
            states = inside_forward(teacher, view_states, *arguments)
            (plain,), _ = chunked_sums(log_prob_sums, self.args.loss_chunk_size, states, labels[labels != -100])
        return plain


class CachedTeacher:
    """
    A teacher's stored output, read from a cache.

    Args:
        cache (`str` or [`TeacherCache`]): A cache, its folder, or its id on the Hub.
        args ([`PrimedDistillConfig`]): The run's settings.
        processing_class, priming: The run's. They must equal those of the cache.

    Raises:
        ValueError: for a cache that does not fit the run.
    """

    model = None

    def __init__(
        self,
        cache: str | TeacherCache,
        args: Any,
        processing_class: PreTrainedTokenizerBase,
        priming: PrimingTemplate | None,
    ):
        if args.response_source == "student":
            raise ValueError(
                "`response_source` is 'student', but a teacher cache knows nothing of the student's samples. Pass a "
                "live `teacher_model`, or set `response_source` to 'dataset' or 'teacher'."
            )
        cache = TeacherCache(os.fspath(cache)) if isinstance(cache, str | os.PathLike) else cache
        if not isinstance(cache, TeacherCache):
            raise TypeError(
                f"`teacher_cache` is a {type(cache).__name__}; it must be a folder, the id of a data set on the Hub, "
                "or a `TeacherCache`."
            )
        cache.manifest.check_fits(processing_class, priming)
        cache.check_serves(args.kd_temperature, args.kd_beta, args.skew)
        if args.response_source == "teacher" and cache.manifest.response_source != "teacher":
            raise ValueError(
                f"`response_source` is 'teacher', but the answers in the teacher cache at {cache.path} are the "
                "data's. Set `response_source='dataset'`, or build the cache with `response_source='teacher'`."
            )
        self.cache, self.args, self.processing_class = cache, args, processing_class

    def find(self, dataset: Any, name: str) -> Any:
        """Tokenized rows with their places in the cache. They get its answers if the teacher writes the answers."""
        if isinstance(dataset, IterableDataset):
            raise ValueError(
                f"`{name}` is streamed, but the rows of a teacher cache are looked up before training. Load it "
                "without streaming."
            )
        limits = f"max_length={self.args.max_length}, teacher_max_length={self.args.teacher_max_length}"
        takes_answers = self.args.response_source == "teacher"
        return self.cache.locate(dataset, name, self.processing_class, takes_answers=takes_answers, limits=limits)

    def load(self, trainer: Any) -> Any:
        """Put the cache on the device. Returns the student, because completions end with its own end of text."""
        self.trainer = trainer
        self.cache.to(trainer.accelerator.device)
        return trainer.model

    @property
    def vocabulary(self) -> Any:
        """The number of ids in the cache, which is compared with the student's."""
        return self.cache.manifest.vocab_size

    def views(self) -> list[View]:
        """No rows, as its output is stored already."""
        return []

    def place(self) -> None:
        """Nothing to do."""

    def answered(self, dataset: Any, name: str) -> Any:
        """The data set as it is. [`~CachedTeacher.find`] has added the cache's answers."""
        return dataset

    def expect(self, batches: Sequence[Mapping[str, Tensor]]) -> None:
        """Nothing to do, as rows are read when a micro-batch is trained on."""

    def at_completions(self, student: nn.Module, inputs: dict[str, Tensor]) -> CachedAnswers:
        """The teacher's stored output at the completion tokens."""
        judged = (inputs["labels"] != -100).any(dim=1)  # the repeated rows of an evaluation are masked
        return self.cache.answers(inputs["cache_rows"][judged].tolist(), self.trainer.shared_vocab_size)

    def plain_log_prob(self, inputs: dict[str, Tensor]) -> None:
        """`None`, as the cache only holds the teacher's output with the priming text."""


def receipt_of_run(teacher: Any, full_teacher: Any, rows: Dataset) -> dict[str, Any]:
    """What quantization did to a live teacher. See [`PrimedDistillTrainer.quantization_receipt`]."""
    accelerator, args = teacher.trainer.accelerator, teacher.args
    quantized = accelerator.unwrap_model(teacher.model)
    if getattr(quantized, "quantization_method", None) is None:
        raise ValueError(
            "The teacher is not quantized, so there is nothing to compare. Pass for example "
            "`teacher_model_init_kwargs={'quantization_config': {'load_in_4bit': True}}`."
        )
    receipt: list[Any] = [None]
    if accelerator.is_main_process:
        full: Any = quantized.config._name_or_path if full_teacher is None else full_teacher
        if full == "":
            raise ValueError("The teacher has no name to load it by without quantization. Pass `full_teacher`.")
        if isinstance(full, str):
            kwargs = dict(args.teacher_model_init_kwargs or {})
            kwargs.pop("quantization_config", None)
            full = load_teacher(full, kwargs, args.trust_remote_code)
        if getattr(full, "quantization_method", None) is not None:
            raise ValueError(
                f"The teacher to compare with, {full.config._name_or_path!r}, is quantized itself (its checkpoint may "
                "be). Pass the model it was made from as `full_teacher`."
            )
        views = [{**row, "prompt_ids": row["teacher_prompt_ids"]} for row in rows]
        with accelerator.autocast():  # the teacher's forward pass is wrapped in it too
            receipt = [quantization_receipt(full, quantized, views, teacher.trainer.processing_class.pad_token_id)]
    return broadcast_object_list(receipt)[0]
