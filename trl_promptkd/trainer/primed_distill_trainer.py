"""Response priming: distillation from a teacher that sees a priming text which the student does not see."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, DataCollator, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalPrediction
from transformers.utils import logging
from trl import SFTTrainer

from ..data import count_trained_tokens, without_repeats
from ..data.primed import DataCollatorForPrimedDistillation, check_views, prompts_of_views, tokenize_primed_dataset
from ..data.priming import PrimingTemplate
from ..generation.rollouts import rollout_config
from ..generation.vllm import check_vllm
from ..losses.chunked import chunked_sums
from ..losses.primed_distill import PrimedLossSums, primed_loss_sums
from ..models.compare import check_forward
from ..models.forward import forward_logits, inside_forward
from ..models.side_effects import nothing_changed
from ..models.teacher import each_teacher
from ..models.tokenizer import prepare_tokenizer, shared_vocab_size
from ..teacher_cache import TeacherCache
from ..teacher_cache.card import hub_id
from . import shared
from .best_metric import check_best_metric
from .checkpoints import checkpoint_to_resume, push_later, save_checkpoint, saved_on_interrupt
from .checks import check_arguments, check_finite, check_found, names_processing_class
from .completions import Samples, keep_row_kls, log_completions
from .datasets import View, check_streamed_evaluation, checked_rows, map_parts
from .hub import init_hf_repo
from .logged_metrics import Means, is_logged_step
from .model_card import RESPONSE_PRIMING_PAPER, complete_card, hub_dataset, priming_section
from .primed_distill_config import PrimedDistillConfig
from .primed_metrics import add_gain, add_sums, add_token_counts
from .primed_teacher import receipt_of_run, view_states
from .several_teachers import priming_by_name, teacher_and_rows, teachers_of_run
from .window import collected_window, padded_views, sample_views


__all__ = ["PrimedDistillTrainer"]

logger = logging.get_logger(__name__)

_ANSWERS_NEEDED = (
    "`response_source` is 'dataset', so the data's own answers are trained on. Set `response_source='teacher'` (the "
    "primed teacher writes the answers) or `'student'` (the student's own samples)."
)
_GAIN_EVERY = 16  # micro-batches for one value of `priming/gain_nats`, which costs one more teacher pass


class PrimedDistillTrainer(SFTTrainer):
    """
    Trainer for response priming. The teacher sees a priming text with the question. The student sees the question
    alone. Both are compared on the same completion tokens.

    The loss is `alpha * CE + (1 - alpha) * tau**2 * D`. CE is the cross-entropy of the completion, and D the
    divergence of both distributions at temperature tau. Both are sums over completion tokens, end of text included,
    divided by the number of those tokens in the whole accumulation window on all ranks. Source: arXiv 2412.17846. Its
    released code compares the tokens of different texts. Here the tokens are the same.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The student.
        args ([`PrimedDistillConfig`], *optional*):
            Training arguments.
        data_collator ([`~transformers.DataCollator`], *optional*):
            A collator of your own. It gets the rows as they are and must return what
            [`DataCollatorForPrimedDistillation`] returns. `priming` is then only recorded.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows with `messages`, or with `prompt` and `completion`, as texts or conversations. `prompt` alone is
            enough if the teacher or the student writes the answers. The priming template may use other columns.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict` of them, *optional*):
            The same formats.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer of both models. `None` loads the student's.
        compute_loss_func (`Callable`, *optional*):
            Not supported. Kept for the base class's signature.
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
            How to quantize a student that is given by name.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Trains an adapter of the student instead of all its weights.
        formatting_func (`Callable`, *optional*):
            Not supported. Kept for the base class's signature.
        priming (`str`, [`PrimingTemplate`] or `dict` of them, *optional*):
            The text that only the teacher sees. The paper's are `"teacher"`, `"ground_truth"` and `"confidence"`.
            `"reference_answer"` shows it the row's answer. A template of your own works too. `None` is plain
            distillation. A `dict` has one for each of several teachers, by their names.
        teacher_model (`str`, [`~transformers.PreTrainedModel`], [`~peft.PeftModel`] or `dict` of them, *optional*):
            The teacher, which may be quantized. Its weights are frozen and never change. `None` takes
            `args.teacher_model_name_or_path`. If that is `None` too, the teacher is the student's own start, and the
            priming text is trained into the student. A PEFT student needs no second copy for that. A `dict` has
            several teachers by name. The column `teacher` of a row names the one that teaches it.
        teacher_cache (`str`, [`TeacherCache`] or `dict` of them, *optional*):
            A teacher's stored output, in place of a teacher: the folder of a cache that [`build_teacher_cache`] made,
            or its id on the Hub. All rows must be in it, with the same priming text, template and tokenizer. A `dict`
            has caches by teacher name. These names must not be in `teacher_model`.
        teacher_server (`str` or `dict`, *optional*):
            As `args.teacher_server`: the address of the vLLM server that runs the teacher named by `teacher_model`. A
            `dict` has several addresses, by the names of their teachers in `teacher_model`.

    Raises:
        ValueError: for settings, data or models that cannot be trained together, before weights are loaded if
            possible.
    """

    _tag_names = ["trl", "primed-distillation", "knowledge-distillation"]
    _name = "Response priming"
    _paper = RESPONSE_PRIMING_PAPER

    # `compute_loss` divides by the token count of the whole window itself
    loss_is_scaled_for_ga = True

    # Shared with the other trainer
    evaluation_loop = shared.evaluation_loop
    hyperparameter_search = shared.hyperparameter_search
    init_hf_repo = init_hf_repo
    _save_checkpoint = save_checkpoint
    _push_from_checkpoint = push_later
    _load_best_model = shared.load_best_model
    _load_from_checkpoint = shared.load_from_checkpoint

    @names_processing_class
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
        priming: str | PrimingTemplate | dict[str, str | PrimingTemplate | None] | None = None,
        teacher_model: PreTrainedModel | PeftModel | nn.Module | str | dict[str, Any] | None = None,
        teacher_cache: str | TeacherCache | dict[str, str | TeacherCache] | None = None,
        teacher_server: str | Mapping[str, str] | None = None,
    ):
        # 1. What can be checked without weights
        args = PrimedDistillConfig(output_dir="PrimedDistill") if args is None else args
        teacher_model = getattr(args, "teacher_model_name_or_path", None) if teacher_model is None else teacher_model
        teacher_server = args.teacher_server if teacher_server is None else teacher_server
        given = (peft_config, formatting_func, data_collator, callbacks)
        check_arguments(PrimedDistillConfig, args, model, teacher_model, *given)
        if compute_loss_func is not None:
            raise ValueError(
                "`compute_loss_func` is not supported: the loss needs both models' views. Subclass "
                "PrimedDistillTrainer and override `compute_loss` instead."
            )
        self.priming = priming_by_name(priming, teacher_model, teacher_cache, teacher_server)
        self.is_self_distillation = teacher_model is None and teacher_cache is None and not args.teacher_answers_url
        if self.priming is None and self.is_self_distillation:
            logger.warning(
                "`teacher_model` and `priming` are both None: the teacher is the student's own start and sees what "
                "the student sees, so the divergence only holds the student at its start. Pass a teacher or a "
                "priming text."
            )
        check_best_metric(args, eval_dataset, callbacks)
        check_streamed_evaluation(eval_dataset, "eval_dataset", args)
        check_vllm(args, model, samples=args.response_source == "student")
        self._tokenizes = data_collator is None
        processing_class = prepare_tokenizer(processing_class, model, teacher_model, args)
        self.teacher = teachers_of_run(
            teacher_model, teacher_cache, teacher_server, args, self._tokenizes, processing_class, self.priming
        )
        self.teacher_cache = self.teacher.cache
        self._teacher_names = list(self.priming) if isinstance(self.priming, Mapping) else []
        self._dropped_rows = 0
        if self._tokenizes:
            data_collator = DataCollatorForPrimedDistillation(processing_class, self.priming, args.pad_to_multiple_of)
            train_dataset = self._tokenize(train_dataset, "train_dataset", processing_class, args)
            eval_dataset = map_parts(self._tokenize, eval_dataset, "eval_dataset", processing_class, args)
        for argument, one in each_teacher(teacher_model).items():
            check_found(argument, one, args.teacher_model_init_kwargs, args.trust_remote_code)

        # 2. The student
        with shared.prepared_student(self, model, args, quantization_config, adapter_dropout=True) as (
            loaded,
            quantization_config,
        ):
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

        # 3. The teacher, and the checks of rows against both models
        teacher = self.teacher.load(self)
        self.shared_vocab_size = shared_vocab_size(self.model, self.teacher.vocabulary, processing_class)
        self._views = [View("student", self.model, "prompt_ids"), *self.teacher.views()]
        self.generation_config = rollout_config(self.model, teacher, processing_class, args)
        self.rollouts = shared.student_rollouts(self)
        datasets = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        datasets = {name: self._checked(dataset, name) for name, dataset in datasets.items()}
        settings = (processing_class, self.accelerator, None, self.shared_vocab_size, args.padding_free)
        check_forward("student", self.model, *settings)
        self.teacher.place()
        self.teacher_model: Any = self.teacher.model
        self.train_dataset: Any = self.teacher.answered(datasets["train_dataset"], "train_dataset")
        self.eval_dataset: Any = map_parts(self.teacher.answered, datasets["eval_dataset"], "eval_dataset")

        # 4. Logging
        self._train_means, self._eval_means = Means(), Means()
        self._train_batches = self._eval_batches = 0
        self._samples = Samples()

    # ------------------------------------------------------------------------------------------------ the data

    def _tokenize(
        self, dataset: Any, name: str, processing_class: PreTrainedTokenizerBase, args: PrimedDistillConfig
    ) -> Any:
        """Check and tokenize a data set."""
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
            server_answers=args.teacher_answers_url is not None,
        )
        if isinstance(tokenized, Dataset) and name == "train_dataset":
            self._dropped_rows = len(dataset) - len(tokenized)
        tokenized = self.teacher.find(tokenized, name)
        return tokenized.shuffle(seed=args.seed) if args.shuffle_dataset else tokenized

    def _checked(self, dataset: Any, name: str) -> Any:
        new_tokens = 0 if self.args.response_source == "dataset" else self.args.max_new_tokens
        return checked_rows(self, dataset, name, new_tokens)

    def _prepare(self, dataset: Any, name: str) -> Any:
        """What `__init__` does with a data set, for one that is passed later."""
        check_streamed_evaluation(dataset, name, self.args)
        if self._tokenizes:
            dataset = map_parts(self._tokenize, dataset, name, self.processing_class, self.args)
        return map_parts(self.teacher.answered, self._checked(dataset, name), name)

    def _set_signature_columns_if_needed(self) -> None:
        # Columns that `remove_unused_columns=True` keeps
        self._signature_columns: list[str] | None = [
            "prompt_ids",
            "teacher_prompt_ids",
            "completion_ids",
            "length",
            "cache_row",
            "teacher",
        ]

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        # Forget a window that failed (`auto_find_batch_size`) or was broken off
        self._train_means, self._train_batches = Means(), 0
        return super().create_scheduler(num_training_steps, optimizer)

    def quantization_receipt(
        self, full_teacher: nn.Module | str | None = None, num_rows: int = 32, teacher: str | None = None
    ) -> dict[str, Any]:
        """Measures what quantization did to the teacher, on the first training rows as the teacher sees them.

        Args:
            full_teacher (`str` or [`~transformers.PreTrainedModel`], *optional*):
                The teacher without quantization. `None` loads the teacher by its name, without the
                `quantization_config` of `teacher_model_init_kwargs`. Both are in memory while this runs.
            num_rows (`int`, *optional*, defaults to `32`):
                How many rows to use.
            teacher (`str`, *optional*):
                Which of several teachers, by name. Only rows that name it are used.

        Returns:
            `dict` with `kl_full_quantized`, `top1_agreement`, `answer_nll_full`, `answer_nll_quantized` and more. See
            [`~trl_promptkd.evaluation.quantization_receipt.quantization_receipt`].

        Raises:
            ValueError: if the teacher is not quantized, the full one is or has no name, or no row has an answer.
        """
        chosen, rows = teacher_and_rows(self, teacher)
        if chosen.model is None or not isinstance(rows, Dataset) or not self._tokenizes:
            raise ValueError(
                "A quantization receipt needs a teacher of its own, and training rows that the trainer has tokenized."
            )
        return receipt_of_run(chosen, full_teacher, rows.select(range(min(num_rows, len(rows)))))

    # ------------------------------------------------------------------------------------------------ training

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """Collect a window's micro-batches, sample completions if the student writes them, and count the tokens."""
        batches = collected_window(self, epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        if self.args.response_source == "student":
            batches = sample_views(self, batches)
        num_tokens = count_trained_tokens(batches, self.accelerator, self.state.global_step)
        add_token_counts(self._train_means, batches, num_tokens, self._teacher_names, self.accelerator)
        self.teacher.expect(batches)
        return batches, num_tokens

    def train(self, resume_from_checkpoint: str | bool | None = None, trial=None, ignore_keys_for_eval=None):
        """As in the base class. `resume_from_checkpoint=True` takes the newest checkpoint that is whole."""
        check_best_metric(self.args, self.eval_dataset, self.callback_handler.callbacks)
        resume_from_checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
        with saved_on_interrupt(self):
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """One micro-batch.

        Returns:
            Scalar: the loss summed over this micro-batch's completion tokens, divided by `num_items_in_batch` (those
            of the whole window on all ranks). It is multiplied by the number of ranks, because data parallelism
            averages gradients over them.
        """
        with_gain = self._train_batches % _GAIN_EVERY == 0
        with_metrics = with_gain or is_logged_step(self)
        with self.accelerator.autocast():
            loss, count, sums = inside_forward(model, self._distill, inputs, with_metrics)
        add_sums(self._train_means, sums, count, self._teacher_names, with_metrics)
        if with_gain:
            add_gain(self._train_means, self.teacher.plain_log_prob(inputs), sums, count, self._teacher_names)
        self._train_batches += 1
        self._total_train_tokens += int(self.accelerator.gather(inputs["attention_mask"].sum()).sum())
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]

        num_tokens = count if num_items_in_batch is None else num_items_in_batch
        num_tokens = torch.as_tensor(num_tokens, device=count.device).clamp(min=1)
        loss = loss / num_tokens * self.accelerator.num_processes
        return (loss, None) if return_outputs else loss

    def _distill(self, student: nn.Module, inputs, with_metrics: bool = True) -> tuple[Tensor, Tensor, PrimedLossSums]:
        """The loss summed over a batch's completion tokens, with its gradient, their number, and what is logged."""
        args = self.args
        trained = inputs["labels"][:, 1:] != -100
        tokens, teachers = inputs["labels"][:, 1:][trained], inputs["teachers"] if self._teacher_names else None
        student_states = view_states(student, inputs, "", self.shared_vocab_size, args.padding_free)
        teacher_says = self.teacher.at_completions(student, inputs)
        if not self._tokenizes:
            check_views(inputs["teacher_labels"][:, 1:], tokens)
        sums, gradients = chunked_sums(
            primed_loss_sums,
            args.loss_chunk_size,
            student_states,
            teacher_says,
            tokens,
            None if teacher_says is None else teacher_says.entropies(),
            None if teachers is None else teachers.unsqueeze(1).expand_as(trained)[trained],
            alpha=args.alpha,
            temperature=args.kd_temperature,
            beta=args.kd_beta,
            skew=args.skew,
            with_metrics=with_metrics,
            num_teachers=len(self._teacher_names),
        )
        when = f"{'at' if torch.is_grad_enabled() else 'in the evaluation at'} step {self.state.global_step + 1}"
        check_finite(sums.loss, when, student=student_states, teacher=teacher_says)
        if args.response_source == "student":
            keep_row_kls(self, inputs, student_states, {"kl/student_teacher": teacher_says}, args.kd_temperature)
        return gradients[0].attach(sums.loss) if gradients else sums.loss, trained.sum(), sums

    # ------------------------------------------------------------------------------------------------ evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval"):
        """As in the base class. Takes raw or tokenized data."""
        if not isinstance(eval_dataset, str):  # a name means a data set that is prepared already
            eval_dataset = self._prepare(eval_dataset, "eval_dataset")
        with nothing_changed(self):
            if not isinstance(eval_dataset, dict):
                return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            metrics: dict[str, float] = {}  # the base class would call this method again with prepared rows
            for name, part in eval_dataset.items():
                metrics |= super().evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix: str = "test"):
        """As in the base class. Takes raw or tokenized data."""
        if test_dataset is None:
            raise ValueError(
                "`test_dataset` is None; pass a data set. (`evaluate()` takes the trainer's `eval_dataset`.)"
            )
        with nothing_changed(self):
            return super().predict(self._prepare(test_dataset, "test_dataset"), ignore_keys, metric_key_prefix)

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with self.accelerator.autocast():  # before training, the student is not wrapped in it yet
            inputs = self._prepare_inputs(inputs)
            if self.args.response_source == "student":
                prompts, teacher_prompts = prompts_of_views(inputs)
                # The same random numbers at every evaluation, so that values differ only by what was learned
                completions = self.rollouts.sample(self.model_wrapped, prompts, -1 - self._eval_batches)
                teachers = inputs["teachers"] if self._teacher_names else None
                inputs = padded_views(self, prompts, teacher_prompts, completions, teachers=teachers)
            for name in ("labels", "teacher_labels"):
                inputs[name] = without_repeats(inputs[name], self.accelerator)
            _, count, sums = inside_forward(model, self._distill, inputs)
            self._eval_means.add("loss", sums.loss, count)
            add_sums(self._eval_means, sums, count, self._teacher_names)
            if self._eval_batches % _GAIN_EVERY == 0:
                add_gain(self._eval_means, self.teacher.plain_log_prob(inputs), sums, count, self._teacher_names)
            self._eval_batches += 1
            loss = sums.loss / count.clamp(min=1)
            if prediction_loss_only:
                return loss, None, None
            return loss, forward_logits(model, inputs["input_ids"], inputs["attention_mask"]), inputs["labels"]

    # ------------------------------------------------------------------------------------------------ logging, saving

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._train_means.report(self.accelerator))
            logs["dropped_rows"] = self._dropped_rows
            log_completions(self)
        super().log(logs, start_time)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None) -> None:
        """TRL's model card, with the teacher, the priming text, data, scores, and how to load the model."""
        super().create_model_card(model_name, hub_id(dataset_name) or hub_dataset(self.train_dataset), tags)
        if self.is_world_process_zero():
            complete_card(self, priming_section(self))
