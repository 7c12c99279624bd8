"""Response priming: distillation from a teacher that sees a priming text which the student does not see."""

import os
import random
import textwrap
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, DataCollator, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalPrediction
from transformers.utils import logging
from trl import SFTTrainer

from .._trl import keep_four_bit_weights_differentiable
from ..data import count_trained_tokens, grouped_by_length, without_repeats
from ..data.primed import (
    DataCollatorForPrimedDistillation,
    pad_views,
    prompts_of_views,
    tokenize_primed_dataset,
)
from ..data.priming import PrimingTemplate, resolve_priming
from ..evaluation.quantization_receipt import quantization_receipt
from ..generation.rollouts import rollout_config, rollout_seed, sample_completions
from ..generation.teacher_answers import weights_fingerprint, write_teacher_answers
from ..generation.vllm import VLLMRollouts, check_vllm
from ..losses.chunked import chunked_sums
from ..losses.primed_distill import PrimedLossSums, log_prob_sums, primed_loss_sums
from ..models.compare import check_forward
from ..models.forward import TokenStates, completion_states, forward_logits, inside_forward
from ..models.limits import check_positions, check_rows_embedded, embedded_by
from ..models.side_effects import flags_restored, nothing_changed
from ..models.student import check_trains, student_by_name
from ..models.teacher import asked_teacher, build_teacher, disable_dropout, load_teacher, place_teacher
from ..models.tokenizer import prepare_tokenizer, shared_vocab_size
from ..teacher_cache import TeacherCache
from ..teacher_cache.card import hub_id
from .best_metric import check_best_metric
from .checkpoints import checkpoint_to_resume, save_whole_checkpoint, saved_on_interrupt
from .checks import (
    SEARCH,
    check_arguments,
    check_finite,
    check_found,
    check_sharding,
    check_streamed_evaluation,
    loaded_settings,
    restore_settings,
)
from .hub import make_branch
from .logged_metrics import Means, add_rollouts, is_logged_step, keep_completions, with_means
from .model_card import complete_card, hub_dataset, priming_section
from .primed_distill_config import PrimedDistillConfig


__all__ = ["PrimedDistillTrainer"]

logger = logging.get_logger(__name__)

_ANSWERS_NEEDED = (
    "`response_source` is 'dataset', so that the data's own answers are trained on. Set `response_source='teacher'` (the primed "
    "teacher writes the answers) or `'student'` (the student's own samples)."
)
_GAIN_EVERY = 16  # `priming/gain_nats` costs one more teacher pass, for one micro-batch in so many


class PrimedDistillTrainer(SFTTrainer):
    """
    Trainer for response priming: the teacher sees a priming text beside the question, the student sees the bare question,
    and both are compared on the same completion tokens.

    The loss is `alpha * CE + (1 - alpha) * tau**2 * D`, with CE the cross-entropy of the completion and D the divergence of
    both distributions at temperature tau: sums over completion tokens, end of text included, divided by the number of those
    tokens in the whole accumulation window on all ranks. Source: arXiv 2412.17846, whose released code compares the tokens of
    different texts; here they are the same ones.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The student.
        args ([`PrimedDistillConfig`], *optional*):
            Training arguments.
        data_collator ([`~transformers.DataCollator`], *optional*):
            A collator of your own gets the rows as they are and must return what [`DataCollatorForPrimedDistillation`] returns;
            `priming` is then only recorded.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows with `messages`, with `prompt` and `completion`, or (where the teacher or the student writes the answers) with
            `prompt` alone; texts or conversations. Other columns are variables of the priming template.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict` of them, *optional*):
            The same formats.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer of both models; by default loaded with the student.
        compute_loss_func (`Callable`, *optional*):
            Not supported; kept for the base class's signature.
        compute_metrics (`Callable`, *optional*):
            Gets the student's logits on the evaluation rows, as in the base class.
        callbacks (`list` of [`~transformers.TrainerCallback`], *optional*):
            More callbacks.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and scheduler.
        optimizer_cls_and_kwargs (`tuple`, *optional*):
            As in the base class.
        preprocess_logits_for_metrics (`Callable`, *optional*):
            As in the base class.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Of the student, where it is given by name.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Trains an adapter of the student instead of all its weights.
        formatting_func (`Callable`, *optional*):
            Not supported; kept for the base class's signature.
        priming (`str` or [`PrimingTemplate`], *optional*):
            What the teacher sees: one of the paper's texts by its name, `"teacher"`, `"ground_truth"` or `"confidence"`;
            `"reference_answer"`, which shows it the row's answer; a template of your own; or `None`, plain distillation.
        teacher_model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*):
            The teacher, which may be quantized. Its weights are frozen and never change. `None` takes
            `args.teacher_model_name_or_path`; where that is `None` too, the student's own starting weights: what the priming
            text does is then trained into the student. A PEFT student is its own teacher with the adapter switched off (no
            second copy is held), otherwise a frozen copy is kept.
        teacher_cache (`str` or [`TeacherCache`], *optional*):
            What a teacher said before, instead of a teacher: the folder of a cache that [`build_teacher_cache`] made, or its id on the
            Hub. All rows must be in it, under the same priming text, template and tokenizer.

    Raises:
        ValueError: for settings, data or models that cannot be trained together. Whatever can be checked without weights is
            checked before they are loaded.
    """

    _tag_names = ["trl", "primed-distillation", "knowledge-distillation"]
    _name = "Response priming"
    _paper = {
        "title": "Enhancing Knowledge Distillation for LLMs with Response-Priming Prompting",
        "id": "2412.17846",
        "citation": textwrap.dedent("""\
            @article{goyal2024enhancing,
                title   = {{Enhancing Knowledge Distillation for LLMs with Response-Priming Prompting}},
                author  = {Vijay Goyal and Mustafa Khan and Aprameya Tirupati and Harveer Saini and Michael Lam and Kevin Zhu},
                year    = 2024,
                journal = {arXiv preprint arXiv:2412.17846},
            }"""),
    }

    # `compute_loss` divides by the token count of the whole window itself
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | PeftModel | str | None = None,
        args: PrimedDistillConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        formatting_func: Callable | None = None,
        priming: str | PrimingTemplate | None = None,
        teacher_model: PreTrainedModel | PeftModel | nn.Module | str | None = None,
        teacher_cache: str | TeacherCache | None = None,
    ):
        # 1. What can be checked without weights
        args = PrimedDistillConfig(output_dir="PrimedDistill") if args is None else args
        teacher_model = getattr(args, "teacher_model_name_or_path", None) if teacher_model is None else teacher_model
        check_arguments(
            "PrimedDistillTrainer",
            PrimedDistillConfig,
            model,
            teacher_model,
            args,
            train_dataset,
            peft_config,
            formatting_func,
            data_collator,
            callbacks,
        )
        if compute_loss_func is not None:
            raise ValueError(
                "`compute_loss_func` is not supported: the loss needs both models' views. Subclass PrimedDistillTrainer and override "
                "`compute_loss` instead."
            )
        self.priming = resolve_priming(priming)
        if self.priming is None and teacher_model is None and teacher_cache is None:
            logger.warning(
                "`teacher_model` and `priming` are both None: the teacher is the student's own start and sees what the student sees, "
                "so that the divergence only holds the student where it started. Pass a teacher or a priming text."
            )
        check_best_metric(args, eval_dataset, callbacks)
        check_streamed_evaluation(eval_dataset, "eval_dataset", args)
        check_vllm(args, model, samples=args.response_source == "student")
        self._tokenizes = data_collator is None
        if args.response_source == "teacher" and teacher_cache is None:
            self._check_teacher_can_write(args)
        processing_class = prepare_tokenizer(processing_class, model, teacher_model, args)
        self.teacher_cache = self._open_cache(teacher_cache, teacher_model, processing_class, args)
        self._dropped_rows = 0
        train_dataset = self._tokenize(train_dataset, "train_dataset", processing_class, args)
        eval_dataset = self._tokenize(eval_dataset, "eval_dataset", processing_class, args)
        if self._tokenizes:
            data_collator = DataCollatorForPrimedDistillation(processing_class, self.priming, args.pad_to_multiple_of)
        check_found("teacher_model", teacher_model, args.teacher_model_init_kwargs, args.trust_remote_code)

        # 2. The student
        with student_by_name(model, args, quantization_config) as (loaded, quantization_config):
            settings_as_loaded = loaded_settings(loaded, args)
            super().__init__(
                model=loaded,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
                quantization_config=quantization_config,
                peft_config=peft_config,
            )
        restore_settings(self.model, settings_as_loaded)
        self.aux_loss_enabled = False
        check_trains(self.model)
        check_sharding(self.accelerator)
        if args.disable_dropout:
            disable_dropout(self.model, adapters=False)
        keep_four_bit_weights_differentiable(self.model)

        # 3. The teacher
        self.distils_itself = teacher_model is None and self.teacher_cache is None
        if self.teacher_cache is not None:
            teacher = self.model  # is not asked
            self.teacher_cache.to(self.accelerator.device)
        else:
            teacher = build_teacher(self.model, teacher_model, args)
        writes = args.response_source == "teacher" and self.teacher_cache is None
        # Of the main process: the others may have loaded no weights yet
        self._teacher_fingerprint = broadcast_object_list([weights_fingerprint(teacher) if writes else ""])[0]
        if writes and teacher is self.model and any(p.device.type == "meta" for p in teacher.parameters()):
            raise ValueError(
                "`response_source` is 'teacher' and the student its own teacher, but FSDP2 has loaded its weights on one rank only, and shards them when "
                "training starts. Set `fsdp_cpu_ram_efficient_loading: false`, or pass `teacher_model`."
            )
        self.shared_vocab_size = shared_vocab_size(
            self.model,
            teacher if self.teacher_cache is None else self.teacher_cache.manifest.vocab_size,
            processing_class,
        )
        models = {"student": (self.model, ("prompt_ids", "completion_ids"))}
        if self.teacher_cache is None:
            models["teacher"] = (teacher, ("teacher_prompt_ids", "completion_ids"))
        self._embedded = embedded_by(models, processing_class)
        train_dataset = self._check_embedded(train_dataset, "train_dataset")
        eval_dataset = self._check_embedded(eval_dataset, "eval_dataset")
        self.generation_config = rollout_config(self.model, teacher, processing_class, args)
        self.vllm: VLLMRollouts | None = None
        if args.use_vllm:
            self.vllm = VLLMRollouts(
                self.model, self.accelerator, processing_class, self.generation_config, args, self.shared_vocab_size
            )
        self._check_positions(teacher, train_dataset)
        self._check_positions(teacher, eval_dataset)
        self.teacher_model: Any = place_teacher(teacher, self.model, self.accelerator)
        self._check_forward()
        self.train_dataset: Any = self._with_teacher_answers(train_dataset, "train_dataset")
        self.eval_dataset: Any = self._with_teacher_answers(eval_dataset, "eval_dataset")

        # 4. Logging
        self._train_means, self._eval_means = Means(), Means()
        self._train_batches = self._eval_batches = 0
        self._last_rollouts: tuple[list[list[int]], ...] = ()

    # ------------------------------------------------------------------------------------------------ the data

    def _open_cache(self, cache, teacher_model, processing_class, args: PrimedDistillConfig) -> TeacherCache | None:
        if cache is None:
            return None
        if teacher_model is not None:
            raise ValueError("`teacher_model` and `teacher_cache` are both set; pass one of them.")
        if not self._tokenizes:
            raise ValueError(
                "`teacher_cache` needs rows that the trainer prepares, but `data_collator` is set. Leave it away."
            )
        if args.response_source == "student":
            raise ValueError(
                "`response_source` is 'student', but a teacher cache knows nothing of the student's samples. Pass a live `teacher_model`, or "
                "set `response_source` to 'dataset' or 'teacher'."
            )
        cache = TeacherCache(os.fspath(cache)) if isinstance(cache, str | os.PathLike) else cache
        if not isinstance(cache, TeacherCache):
            raise TypeError(
                f"`teacher_cache` is a {type(cache).__name__}; it must be a folder, the id of a data set on the Hub, or a `TeacherCache`."
            )
        cache.manifest.check_fits(processing_class, self.priming)
        cache.check_serves(args.kd_temperature, args.kd_beta, args.skew)
        if args.response_source == "teacher" and cache.manifest.response_source != "teacher":
            raise ValueError(
                f"`response_source` is 'teacher', but the answers in the teacher cache at {cache.path} are the data's. Set "
                "`response_source='dataset'`, or build the cache with `response_source='teacher'`."
            )
        return cache

    def _check_teacher_can_write(self, args: PrimedDistillConfig) -> None:
        if not self._tokenizes:
            raise ValueError(
                "`response_source='teacher'` needs rows that the trainer prepares, but `data_collator` is set. Leave the collator away, or "
                "set `response_source` to 'dataset' and write the answers beforehand."
            )
        if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
            raise ValueError(
                "`response_source='teacher'` has not been made to work with weights that are sharded by ZeRO-3. Let the teacher write its "
                "answers in a run on one process, and train with the same `teacher_answers_dir` as a data set (`load_dataset`)."
            )

    def _tokenize(self, dataset, name: str, processing_class, args: PrimedDistillConfig):
        """Check and tokenize a data set or a `dict` of them; a collator of the user's own gets the rows as they are."""
        if dataset is None or not self._tokenizes:
            return dataset
        if isinstance(dataset, dict):
            return {
                key: self._tokenize(part, f"{name}[{key!r}]", processing_class, args) for key, part in dataset.items()
            }
        if self.teacher_cache is not None and isinstance(dataset, IterableDataset):
            raise ValueError(
                f"`{name}` is streamed, but the rows of a teacher cache are looked up before training. Load it without streaming."
            )
        if args.response_source == "teacher" and isinstance(dataset, IterableDataset):
            raise ValueError(
                f"`{name}` is streamed, but with `response_source='teacher'` the teacher answers every row before training. Load "
                "it without streaming, or set `response_source` to 'dataset' or 'student'."
            )
        tokenized = tokenize_primed_dataset(
            dataset,
            name,
            processing_class,
            self.priming,
            args.max_length,
            args.teacher_max_length,
            _ANSWERS_NEEDED if args.response_source == "dataset" else None,
            args.overlong,
            args.dataset_num_proc,
        )
        if isinstance(tokenized, Dataset) and name == "train_dataset":
            self._dropped_rows = len(dataset) - len(tokenized)
        if self.teacher_cache is not None:
            tokenized = self.teacher_cache.locate(
                tokenized,
                name,
                processing_class,
                takes_answers=args.response_source == "teacher",
                limits=f"max_length={args.max_length}, teacher_max_length={args.teacher_max_length}",
            )
        return tokenized.shuffle(seed=args.seed) if args.shuffle_dataset else tokenized

    def _with_teacher_answers(self, dataset, name: str):
        """With `response_source="teacher"`: the data set, answered."""
        if dataset is None or self.args.response_source != "teacher" or self.teacher_cache is not None:
            return dataset
        if isinstance(dataset, dict):
            return {key: self._with_teacher_answers(part, f"{name}[{key!r}]") for key, part in dataset.items()}
        folder = self.args.teacher_answers_dir or os.path.join(self.args.output_dir, "_teacher_answers")
        with self._teacher() as teacher:
            return write_teacher_answers(
                dataset,
                folder,
                teacher,
                self._teacher_fingerprint,
                self.accelerator,
                self.processing_class,
                self.generation_config,
                self.args,
                self.shared_vocab_size,
                name,
            )

    def _check_embedded(self, dataset, name: str):
        """Refuse tokens that a model has no embedding for; rows for a collator of one's own are not looked into."""
        if not self._tokenizes:
            return dataset
        return check_rows_embedded(dataset, name, self.processing_class, self._embedded)

    def _check_positions(self, teacher: nn.Module, dataset) -> None:
        """Refuse rows that run out of learned positions; streams, and rows for a collator of one's own, are not looked into."""
        if isinstance(dataset, dict):
            for part in dataset.values():
                self._check_positions(teacher, part)
        if not self._tokenizes or not isinstance(dataset, Dataset):
            return
        new_tokens = 0 if self.args.response_source == "dataset" else self.args.max_new_tokens
        answers = list(map(len, dataset["completion_ids"]))
        for role, model, column, limit in (
            ("student", self.model, "prompt_ids", "max_length"),
            ("teacher", teacher, "teacher_prompt_ids", "teacher_max_length"),
        ):
            if role == "teacher" and self.teacher_cache is not None:
                continue  # has said it all already
            longest = max(
                len(prompt) + max(answer, new_tokens) for prompt, answer in zip(dataset[column], answers, strict=True)
            )
            check_positions(role, model, longest, f"Lower `{limit}` to leave such rows out, or `max_new_tokens`.")

    def _check_forward(self) -> None:
        """Compare the passes of both models with their own forward."""
        settings = (self.processing_class, self.accelerator)
        check_forward("student", self.model, *settings, vocab_size=self.shared_vocab_size)
        if self.teacher_cache is None:
            with self._teacher() as teacher:
                teacher = self.accelerator.unwrap_model(teacher)
                check_forward("teacher", teacher, *settings, vocab_size=self.shared_vocab_size)

    def _set_signature_columns_if_needed(self) -> None:
        # What `remove_unused_columns=True` keeps
        self._signature_columns: list[str] | None = [
            "prompt_ids",
            "teacher_prompt_ids",
            "completion_ids",
            "length",
            "cache_row",
        ]

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        # Without what a window added that failed (`auto_find_batch_size`) or was broken off
        self._train_means, self._train_batches = Means(), 0
        return super().create_scheduler(num_training_steps, optimizer)

    def hyperparameter_search(self, *args: Any, **kwargs: Any):
        """Not supported: a trainer's settings are used up when it is made, so each trial needs a trainer of its own."""
        raise NotImplementedError(SEARCH)

    # ------------------------------------------------------------------------------------------------ both models

    def _teacher(self):
        """The teacher, in evaluation mode, as a context."""
        return asked_teacher(self.teacher_model, self.accelerator.unwrap_model(self.model_wrapped))

    def _states(self, model: nn.Module, inputs: dict[str, Tensor], view: str = "") -> TokenStates:
        """States of the completion tokens, behind the student's prompt or (`view="teacher_"`) the teacher's."""
        ids, mask, labels = (inputs[view + name] for name in ("input_ids", "attention_mask", "labels"))
        return completion_states(model, ids, mask, labels, vocab_size=self.shared_vocab_size)

    def quantization_receipt(self, full_teacher: nn.Module | str | None = None, num_rows: int = 32) -> dict[str, Any]:
        """What quantization did to the teacher, on the first rows of the training data as the teacher sees them.

        Args:
            full_teacher (`str` or [`~transformers.PreTrainedModel`], *optional*):
                The teacher without quantization; `None` loads the teacher's own name without the `quantization_config` of
                `teacher_model_init_kwargs`. It is in memory beside the quantized one while this runs.
            num_rows (`int`, *optional*, defaults to `32`):
                How many rows.

        Returns:
            `dict`: `kl_full_quantized`, `top1_agreement`, `answer_nll_full`, `answer_nll_quantized` and more, see
            [`~trl_promptkd.evaluation.quantization_receipt.quantization_receipt`].

        Raises:
            ValueError: where the teacher is not quantized, the full one is or has no name, or the rows have no answers.
        """
        if self.teacher_model is None or not isinstance(self.train_dataset, Dataset) or not self._tokenizes:
            raise ValueError(
                "A quantization receipt needs a teacher of its own, and training rows that the trainer has tokenized."
            )
        quantized = self.accelerator.unwrap_model(self.teacher_model)
        if getattr(quantized, "quantization_method", None) is None:
            raise ValueError(
                "The teacher is not quantized, so that there is nothing to compare. Pass for example "
                "`teacher_model_init_kwargs={'quantization_config': {'load_in_4bit': True}}`."
            )
        receipt: list[Any] = [None]
        if self.accelerator.is_main_process:
            full: Any = quantized.config._name_or_path if full_teacher is None else full_teacher
            if full == "":
                raise ValueError("The teacher has no name to load it by without quantization. Pass `full_teacher`.")
            if isinstance(full, str):
                kwargs = dict(self.args.teacher_model_init_kwargs or {})
                kwargs.pop("quantization_config", None)
                full = load_teacher(full, kwargs, self.args.trust_remote_code)
            if getattr(full, "quantization_method", None) is not None:
                raise ValueError(
                    f"The teacher to compare with, {full.config._name_or_path!r}, is quantized itself (its checkpoint may be). Pass the model "
                    "it was made from as `full_teacher`."
                )
            rows = self.train_dataset.select(range(min(num_rows, len(self.train_dataset))))
            rows = [{**row, "prompt_ids": row["teacher_prompt_ids"]} for row in rows]
            with self.accelerator.autocast():  # the teacher's forward is wrapped in it
                receipt = [quantization_receipt(full, quantized, rows, self.processing_class.pad_token_id)]
        return broadcast_object_list(receipt)[0]

    @torch.no_grad()
    def _teacher_states(self, student: nn.Module, inputs: dict[str, Tensor]) -> Any:
        """What the teacher says at the completion tokens, from the cache where there is one."""
        if self.teacher_cache is not None:
            return self.teacher_cache.answers(self._cache_rows(inputs), self.shared_vocab_size)
        ask = partial(self._states, inputs=inputs, view="teacher_")
        with asked_teacher(self.teacher_model, student) as teacher:
            states = ask(teacher) if self.teacher_model is None else inside_forward(teacher, ask)
            return states.detach()

    def _cache_rows(self, inputs: dict[str, Tensor]) -> list[int]:
        judged = (inputs["labels"] != -100).any(dim=1)  # repeated rows of an evaluation are masked
        return inputs["cache_rows"][judged].tolist()

    # ------------------------------------------------------------------------------------------------ sampling

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """Collect a window's micro-batches, sample their completions if asked to, and count the tokens trained on."""
        if self.state.global_step >= self.state.max_steps:
            return [], None  # resumed after its last step, of which the base class would take one more
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        if self.args.response_source == "student":
            batches = self._sample_window([self._prepare_inputs(batch) for batch in batches])
        num_tokens = count_trained_tokens(batches, self.accelerator, self.state.global_step)
        self._train_means.add("completion_tokens", num_tokens)
        return batches, num_tokens

    def _sample_window(self, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        prompts = [prompts_of_views(batch) for batch in batches]
        students = [ids for student, _ in prompts for ids in student]
        if self.vllm is not None:
            self.vllm.sync()
        start = time.perf_counter()
        answers = self._sample(students, self.state.global_step)
        seconds = time.perf_counter() - start
        add_rollouts(self._train_means, answers, self.generation_config, seconds, self.processing_class)
        self._last_rollouts = (students, answers)
        rows = [row for student, teacher in prompts for row in zip(student, teacher, strict=True)]
        lengths = [len(teacher) + len(answer) for (_, teacher), answer in zip(rows, answers, strict=True)]
        groups = grouped_by_length(lengths, [len(student) for student, _ in prompts])
        # What is measured on one micro-batch in so many is not always to be measured on the longest rows
        random.Random(rollout_seed(self.args.seed, "order", self.state.global_step, 0)).shuffle(groups)
        return [
            self._two_views(
                [rows[row][0] for row in group], [rows[row][1] for row in group], [answers[row] for row in group]
            )
            for group in groups
        ]

    def _sample(self, prompts: list[list[int]], step: int) -> list[list[int]]:
        """The student's completions, from a random state of their own."""
        if self.vllm is not None:
            return self.vllm.sample(prompts, step)
        seed = rollout_seed(self.args.seed, "student", step, self.accelerator.process_index)
        return sample_completions(
            self.model_wrapped,
            self.accelerator,
            prompts,
            self.generation_config,
            seed,
            self.args,
            vocab_size=self.shared_vocab_size,
            tokenizer=self.processing_class,
        )

    def _two_views(self, prompts, teacher_prompts, answers) -> dict[str, Tensor]:
        batch = pad_views(
            prompts, teacher_prompts, answers, self.processing_class.pad_token_id, self.args.pad_to_multiple_of
        )
        return {name: value.to(self.accelerator.device) for name, value in batch.items()}

    # ------------------------------------------------------------------------------------------------ training

    def train(self, resume_from_checkpoint: str | bool | None = None, trial=None, ignore_keys_for_eval=None):
        """As in the base class; `resume_from_checkpoint=True` takes the newest checkpoint that is whole."""
        check_best_metric(self.args, self.eval_dataset, self.callback_handler.callbacks)
        resume_from_checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
        with saved_on_interrupt(self):
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        save = partial(super()._save_checkpoint, model, trial)
        save_whole_checkpoint(self, save, super()._push_from_checkpoint, self._get_output_dir(trial=trial))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with flags_restored(self.model):  # PEFT makes all weights of the adapter trainable
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        with flags_restored(self.model):
            super()._load_best_model()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Does nothing: the base class would push a checkpoint before it is whole; `save_whole_checkpoint` does it then."""

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As in the base class; makes the branch `hub_revision`, too."""
        super().init_hf_repo(token, private)
        make_branch(self, token)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """One micro-batch.

        Returns:
            Scalar: the loss summed over this micro-batch's completion tokens, divided by `num_items_in_batch` (those of the whole
            window on all ranks), times the number of ranks, over which data parallelism averages gradients.
        """
        telemetry = is_logged_step(self) or self._train_batches % _GAIN_EVERY == 0
        with self.accelerator.autocast():
            sums, num_local, loss = inside_forward(model, partial(self._loss_sums, inputs=inputs, telemetry=telemetry))
        self._log_sums(self._train_means, sums, num_local, telemetry)
        if self._train_batches % _GAIN_EVERY == 0:
            self._log_gain(self._train_means, inputs, sums, num_local)
        self._train_batches += 1
        self._total_train_tokens += int(self.accelerator.gather(inputs["attention_mask"].sum()).sum())
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]

        num_tokens = num_local if num_items_in_batch is None else num_items_in_batch
        num_tokens = torch.as_tensor(num_tokens, device=num_local.device).clamp(min=1)
        loss = loss / num_tokens * self.accelerator.num_processes
        return (loss, None) if return_outputs else loss

    def _loss_sums(self, student: nn.Module, inputs, telemetry: bool = True) -> tuple[PrimedLossSums, Tensor, Tensor]:
        """The loss summed over a batch's completion tokens and what is logged about it, their number, and the loss with its gradient."""
        args = self.args
        trained = inputs["labels"][:, 1:] != -100
        student_states = self._states(student, inputs)
        teacher_states = self._teacher_states(student, inputs)
        tokens = inputs["labels"][:, 1:][trained]
        if not self._tokenizes:
            teacher_labels = inputs["teacher_labels"][:, 1:]
            if not torch.equal(teacher_labels[teacher_labels != -100], tokens):
                raise ValueError(
                    f"The data collator's two views hold different completions ({len(student_states)} tokens in the student's, "
                    f"{len(teacher_states)} in the teacher's). `labels` and `teacher_labels` must select the same ids in the same order; see "
                    "DataCollatorForPrimedDistillation."
                )
        sums = partial(
            primed_loss_sums,
            alpha=args.alpha,
            temperature=args.kd_temperature,
            beta=args.kd_beta,
            skew=args.skew,
            telemetry=telemetry,
        )
        drawn_from = None if self.teacher_cache is None else teacher_states.entropies()
        totals, gradients = chunked_sums(
            sums, args.loss_chunk_size, student_states, teacher_states, tokens, drawn_from
        )
        totals = PrimedLossSums(*totals)
        when = f"{'at' if torch.is_grad_enabled() else 'in the evaluation at'} step {self.state.global_step + 1}"
        check_finite(totals.loss, when, student=student_states, teacher=teacher_states)
        return totals, trained.sum(), gradients[0].attach(totals.loss) if gradients else totals.loss

    def _log_sums(self, means: Means, sums: PrimedLossSums, count: Tensor, telemetry: bool = True) -> None:
        means.add("ce", sums.cross_entropy, count)
        means.add("kd", sums.divergence, count)
        if not telemetry:
            return
        means.add("kl/student_teacher", sums.student_teacher, count)
        means.add("entropy/student", sums.student_entropy, count)
        means.add("entropy/teacher", sums.teacher_entropy, count)
        means.add("teacher/top1_agreement", sums.agreement, count)
        means.add("mean_token_accuracy", sums.accuracy, count)

    @torch.no_grad()
    def _log_gain(self, means: Means, inputs, sums: PrimedLossSums, count: Tensor) -> None:
        """How much likelier the completion is to the teacher with the priming text than without it."""
        if self.priming is None or self.teacher_cache is not None:
            return
        labels = inputs["labels"][:, 1:]
        with self.accelerator.autocast(), self._teacher() as teacher:
            states = inside_forward(teacher, partial(self._states, inputs=inputs))
            (plain,), _ = chunked_sums(log_prob_sums, self.args.loss_chunk_size, states, labels[labels != -100])
        means.add("priming/gain_nats", sums.teacher_log_prob - plain, count)

    # ------------------------------------------------------------------------------------------------ evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval"):
        """As in the base class; takes raw or tokenized data."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):  # a name: prepared already
            eval_dataset = self._prepare(eval_dataset, "eval_dataset")
        with nothing_changed(self):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix: str = "test"):
        """As in the base class; takes raw or tokenized data."""
        if test_dataset is None:
            raise ValueError(
                "`test_dataset` is None; pass a data set. (`evaluate()` takes the trainer's `eval_dataset`.)"
            )
        with nothing_changed(self):
            return super().predict(self._prepare(test_dataset, "test_dataset"), ignore_keys, metric_key_prefix)

    def _prepare(self, dataset, name: str):
        check_streamed_evaluation(dataset, name, self.args)
        dataset = self._tokenize(dataset, name, self.processing_class, self.args)
        dataset = self._check_embedded(dataset, name)
        if self.teacher_cache is not None:
            self._check_positions(self.model, dataset)
            return dataset
        with self._teacher() as teacher:
            self._check_positions(teacher, dataset)
        return self._with_teacher_answers(dataset, name)

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        self._eval_means, self._eval_batches = Means(), 0
        if self.vllm is not None:
            self.vllm.sync()
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        return with_means(self, output, self._eval_means, metric_key_prefix)

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with self.accelerator.autocast():  # before training, nobody has wrapped the student in it
            inputs = self._prepare_inputs(inputs)
            if self.args.response_source == "student":
                prompts, teacher_prompts = prompts_of_views(inputs)
                # The same random numbers at every evaluation, so that values differ by what was learned
                answers = self._sample(prompts, -1 - self._eval_batches)
                inputs = self._two_views(prompts, teacher_prompts, answers)
            for name in ("labels", "teacher_labels"):
                inputs[name] = without_repeats(inputs[name], self.accelerator)
            sums, count, _ = inside_forward(model, partial(self._loss_sums, inputs=inputs))
            self._eval_means.add("loss", sums.loss, count)
            self._log_sums(self._eval_means, sums, count)
            if self._eval_batches % _GAIN_EVERY == 0:
                self._log_gain(self._eval_means, inputs, sums, count)
            self._eval_batches += 1
            loss = sums.loss / count.clamp(min=1)
            if prediction_loss_only:
                return loss, None, None
            return loss, forward_logits(model, inputs["input_ids"], inputs["attention_mask"]), inputs["labels"]

    # ------------------------------------------------------------------------------------------------ logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._train_means.report(self.accelerator))
            logs["dropped_rows"] = self._dropped_rows
            keep_completions(self, self._last_rollouts)
        super().log(logs, start_time)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None) -> None:
        """TRL's model card, and a section on the teacher, the priming text and the loss."""
        super().create_model_card(model_name, hub_id(dataset_name) or hub_dataset(self.train_dataset), tags)
        if self.is_world_process_zero():
            complete_card(self, priming_section(self))
