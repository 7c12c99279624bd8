"""PromptKD: on-policy distillation from a frozen teacher whose soft prompt is tuned with the student's guidance."""

import os
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import broadcast
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import DataCollator, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalPrediction
from trl import SFTTrainer

from .._trl import GKDTrainer
from ..data import DataCollatorForPromptCompletion
from ..generation.rollouts import Rollouts, rollout_config
from ..generation.vllm import check_vllm
from ..models.compare import check_forward
from ..models.forward import (
    TokenStates,
    completion_states,
    forward_logits,
    input_embeddings,
    inside_forward,
    whole_weights,
)
from ..models.side_effects import nothing_changed
from ..models.soft_prompt import ADAPTER_FOLDER, PromptEncoderConfig, SoftPrompt
from ..models.teacher import build_teacher, disable_dropout, place_teacher, recomputed_activations, run_teacher
from ..models.tokenizer import prepare_tokenizer, shared_vocab_size
from ..teacher_cache.card import hub_id
from . import checks, shared
from .best_metric import check_best_metric
from .checkpoints import checkpoint_to_resume, push_later, save_checkpoint, saved_on_interrupt
from .completions import Samples, log_completions
from .datasets import View, check_streamed_evaluation, checked_rows, map_parts, tokenize_part
from .hub import init_hf_repo
from .logged_metrics import CollusionCallback, Means
from .model_card import PROMPTKD_PAPER, complete_card, hub_dataset, prompt_section
from .prompt_optimizer import PromptOptimizer
from .promptkd_config import PromptKDConfig
from .promptkd_evaluation import evaluate_batch
from .promptkd_step import distill
from .window import collected_window, sample_mixture, with_teaching_rows


__all__ = ["PromptKDTrainer"]

_ANSWERS_NEEDED = (
    "`lmbda` is below 1, so part of the training uses the data's own answers. Set `lmbda=1.0` (train on the student's "
    "samples only) or `seq_kd=True` (the teacher writes the answers)."
)


class PromptKDTrainer(GKDTrainer):
    """
    Trainer for PromptKD. A few embeddings before a frozen teacher's input are tuned with the student's guidance. The
    student learns from that teacher on its own samples.

    `q` is the student, `p` the plain teacher, and `pP` the teacher with the soft prompt `P`. In one optimizer step,

    1. the student samples a completion for every prompt of the accumulation window
    2. `P` takes a step on KL(pP || q) + w KL(pP || p)
    3. the student takes a step on KL(q || pP).

    Losses are in nats per token. Each is a sum over completion tokens, end of text included, divided by the number of
    those tokens in the whole window on all ranks. Source: Kim et al., PromptKD (arXiv 2402.12842).

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The student.
        teacher_model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*):
            The teacher, which may be quantized. Its weights are frozen and never change. `None` takes
            `args.teacher_model_name_or_path`. If that is `None` too, the teacher is the student's own start. This is a
            frozen copy, or for a PEFT model the student with its adapter switched off, without a second copy.
        args ([`PromptKDConfig`], *optional*):
            Training arguments.
        data_collator ([`~transformers.DataCollator`], *optional*):
            A collator of your own. It gets the rows as they are and must return `input_ids`, `attention_mask`,
            `labels`, `prompts` and `prompt_attention_mask`, as `GKDTrainer`'s does.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows with `messages`, or with `prompt` and `completion`, as texts or conversations. `prompt` alone is
            enough if the student or the teacher writes all completions.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict` of them, *optional*):
            The same formats. If a row has no answer, the plain teacher writes one.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer of both models. `None` loads the student's.
        compute_metrics (`Callable`, *optional*):
            Gets the student's logits on the evaluation rows, as in the base class.
        callbacks (`list` of [`~transformers.TrainerCallback`], *optional*):
            More callbacks.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            The student's optimizer and scheduler.
        preprocess_logits_for_metrics (`Callable`, *optional*):
            As in the base class.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Trains an adapter of the student instead of all its weights.
        formatting_func (`Callable`, *optional*):
            Not supported. Kept for the base class's signature.
        prompt_encoder_config ([`PromptEncoderConfig`] or one of PEFT's, *optional*):
            The teacher's soft prompt. `None`: the paper's. PEFT's are `PromptTuningConfig` and `PromptEncoderConfig`.

    Raises:
        ValueError: for settings, data or models that cannot be trained together, before weights are loaded if
            possible.
    """

    _tag_names = ["trl", "promptkd", "knowledge-distillation"]
    _name = "PromptKD"
    _paper = PROMPTKD_PAPER

    prompt_optimizer: PromptOptimizer  # made when the number of steps is known
    _distill = distill  # one micro-batch
    # `compute_loss` divides by the token count of the whole window itself
    loss_is_scaled_for_ga = True

    # Shared with the other trainer
    evaluation_loop = shared.evaluation_loop
    hyperparameter_search = shared.hyperparameter_search
    init_hf_repo = init_hf_repo
    _save_checkpoint = save_checkpoint
    _push_from_checkpoint = push_later
    _load_from_checkpoint = shared.load_from_checkpoint

    @checks.names_processing_class
    def __init__(
        self,
        model: PreTrainedModel | PeftModel | nn.Module | str | None = None,
        teacher_model: PreTrainedModel | PeftModel | nn.Module | str | None = None,
        args: PromptKDConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        peft_config: PeftConfig | None = None,
        formatting_func: Callable | None = None,
        prompt_encoder_config: Any = None,
    ):
        # 1. What can be checked without weights
        args = PromptKDConfig(output_dir="PromptKD") if args is None else args
        teacher_model = args.teacher_model_name_or_path if teacher_model is None else teacher_model
        prompt_encoder_config = PromptEncoderConfig() if prompt_encoder_config is None else prompt_encoder_config
        given = (peft_config, formatting_func, data_collator, callbacks)
        checks.check_arguments(PromptKDConfig, args, model, teacher_model, *given)
        check_best_metric(args, eval_dataset, callbacks)
        check_streamed_evaluation(eval_dataset, "eval_dataset", args)
        check_vllm(args, model, samples=args.lmbda > 0)
        processing_class = prepare_tokenizer(processing_class, model, teacher_model, args)
        checks.check_soft_prompt(prompt_encoder_config, processing_class)
        self._tokenizes = data_collator is None
        if self._tokenizes:
            data_collator = DataCollatorForPromptCompletion(processing_class.pad_token_id)
            needed = _ANSWERS_NEEDED if args.lmbda < 1 and not args.seq_kd else None
            settings = (processing_class, args)
            train_dataset = tokenize_part(train_dataset, "train_dataset", *settings, needed, needed is not None)
            eval_dataset = map_parts(tokenize_part, eval_dataset, "eval_dataset", *settings)
        checks.check_found("teacher_model", teacher_model, args.teacher_model_init_kwargs, args.trust_remote_code)

        # 2. The student. GKDTrainer's own __init__ is not called: it rejects padded vocabularies, needs a `dtype` in
        # `teacher_model_init_kwargs`, changes the caller's `args`, and samples without a KV cache under checkpointing.
        with shared.prepared_student(self, model, args) as (loaded, _):
            SFTTrainer.__init__(
                self,
                model=loaded,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
                peft_config=peft_config,
            )
        self.lmbda, self.beta, self.seq_kd, self.temperature = args.lmbda, args.beta, args.seq_kd, args.temperature

        # 3. The teacher and its soft prompt
        self.is_self_distillation = teacher_model is None
        teacher = build_teacher(self.model, teacher_model, args)
        if teacher is self.model:
            checks.check_own_teacher(args, self.accelerator)
        if args.teacher_gradient_checkpointing:
            disable_dropout(teacher)  # some layers would apply theirs in the mode that checkpointing needs
            with recomputed_activations(teacher, True):
                pass  # raises an error now if the teacher cannot
        self.shared_vocab_size = shared_vocab_size(self.model, teacher, processing_class)
        self.prompt_encoder_config = prompt_encoder_config
        with whole_weights(input_embeddings(teacher)):
            self.soft_prompt = SoftPrompt(prompt_encoder_config, teacher, processing_class)
        self.soft_prompt.to(self.accelerator.device)
        for tensor in self.soft_prompt.state_dict().values():
            tensor.copy_(broadcast(tensor))  # equal on every rank from the start
        virtual = self.soft_prompt.peft_config.num_virtual_tokens
        self._views = [View("student", self.model, "prompt_ids"), View("teacher", teacher, "prompt_ids", virtual)]
        self.train_dataset: Any = checked_rows(self, train_dataset, "train_dataset", args.max_new_tokens)
        self.eval_dataset: Any = checked_rows(self, eval_dataset, "eval_dataset", args.max_new_tokens)
        self.teacher_model: Any = place_teacher(teacher, self.model, self.accelerator)
        self._check_forward()

        # 4. Sampling and logging
        self.generation_config = rollout_config(self.model, teacher, processing_class, args)
        self.rollouts = shared.student_rollouts(self)
        self.generation_kwargs = self.generation_config.to_dict()  # GKDTrainer's attribute
        sampling = (self.accelerator, processing_class, self.generation_config, args, self.shared_vocab_size)
        self._teacher_rollouts = Rollouts(teacher, *sampling, writer="teacher")
        self._train_means, self._eval_means = Means(), Means()
        self._eval_batches = 0
        self._teacher_answers: dict[tuple[int, ...], list[int]] = {}  # the plain teacher's answers, for evaluation
        self._samples = Samples()
        self.add_callback(CollusionCallback())

    # ------------------------------------------------------------------------------------------------ setting up

    def _prepare(self, dataset: Any, name: str) -> Any:
        """What `__init__` does with a data set, for one that is passed later."""
        check_streamed_evaluation(dataset, name, self.args)
        if self._tokenizes:
            dataset = map_parts(tokenize_part, dataset, name, self.processing_class, self.args)
        return checked_rows(self, dataset, name, self.args.max_new_tokens)

    def _check_forward(self) -> None:
        """Compare the passes of both models with their own forward, the teacher's with and without its soft prompt."""
        settings = (self.processing_class, self.accelerator)
        check_forward("student", self.model, *settings, vocab_size=self.shared_vocab_size)
        with self._run_teacher() as teacher:
            teacher = self.accelerator.unwrap_model(teacher)
            for role, prompt in (("teacher", None), ("prompted teacher", self.prompt_embeddings())):
                check_forward(role, teacher, *settings, prompt, self.shared_vocab_size)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        self.prompt_optimizer = PromptOptimizer(
            self.soft_prompt, self.prompt_encoder_config, self.args, num_training_steps, self.accelerator
        )
        self._train_means = Means()  # forget a window that failed (`auto_find_batch_size`) or was broken off
        return scheduler

    # ------------------------------------------------------------------------------------------------ the teacher

    def _run_teacher(self):
        """The plain teacher, in evaluation mode, as a context."""
        return run_teacher(self.teacher_model, self.accelerator.unwrap_model(self.model_wrapped))

    def prompt_embeddings(self) -> Tensor:
        """The soft prompt: `(num_virtual_tokens, hidden)` in float32, without gradient."""
        return self.soft_prompt().detach()

    @torch.no_grad()
    def prompted_teacher_logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The logits of the teacher with its soft prompt.

        Args:
            input_ids (`Tensor` of shape `(batch, seq)`): Rows padded on either side, or not at all.
            attention_mask (`Tensor` of shape `(batch, seq)`): 1 for tokens, 0 for padding.

        Returns:
            `Tensor` of shape `(batch, seq, vocab)` in float32. Position `i` is for the token after `input_ids[:, i]`.
            Entries at padding mean nothing.
        """
        device = self.accelerator.device
        inputs = (input_ids.to(device), attention_mask.to(device), self.soft_prompt())
        with self._run_teacher() as teacher:
            return inside_forward(teacher, lambda bare: forward_logits(bare, *inputs).float())

    def _states(self, model: nn.Module, inputs: dict[str, Tensor], soft_prompt: Tensor | None = None) -> TokenStates:
        """The output of a bare model at the completion tokens."""
        rows = (inputs["input_ids"], inputs["attention_mask"], inputs["labels"])
        return completion_states(model, *rows, soft_prompt, self.shared_vocab_size)

    def _teacher_states(self, teacher: nn.Module, inputs: dict[str, Tensor], soft_prompt=None) -> TokenStates:
        if self.teacher_model is None:  # it is the student, and this is inside its forward pass already
            return self._states(teacher, inputs, soft_prompt)
        return inside_forward(teacher, self._states, inputs, soft_prompt)

    # ------------------------------------------------------------------------------------------------ sampling

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """Collect a window's micro-batches, sample their completions, and count the tokens that will be trained on."""
        batches = collected_window(self, epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        return with_teaching_rows(self, sample_mixture(self, batches), is_whole=len(batches) == num_batches)

    # ------------------------------------------------------------------------------------------------ training

    def train(self, resume_from_checkpoint: str | bool | None = None, trial=None, ignore_keys_for_eval=None):
        """As in the base class. `resume_from_checkpoint=True` takes the newest checkpoint that is whole."""
        check_best_metric(self.args, self.eval_dataset, self.callback_handler.callbacks)
        resume_from_checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
        with saved_on_interrupt(self):
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def training_step(self, model, inputs, num_items_in_batch=None):
        # Skips GKDTrainer's, which would sample here, one micro-batch at a time
        return SFTTrainer.training_step(self, model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """One micro-batch: the prompt's gradient, its step once in a window, and the student's loss.

        Returns:
            Scalar: the divergence summed over this micro-batch's completion tokens, divided by `num_items_in_batch`
            (those of the whole window on all ranks). It is multiplied by the number of ranks, because data parallelism
            averages gradients over them.
        """
        num_tokens = num_items_in_batch.clamp(min=1)
        with self.accelerator.autocast():
            loss = inside_forward(model, self._distill, inputs, num_tokens) * self.accelerator.num_processes
        return (loss, None) if return_outputs else loss

    # ------------------------------------------------------------------------------------------------ evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval"):
        """As in the base class. Adds `eval_forward_kl` and `eval_reverse_kl`, and takes raw or tokenized data."""
        if not isinstance(eval_dataset, str):  # a name means a data set that is tokenized already
            eval_dataset = self._prepare(eval_dataset, "eval_dataset")
        with nothing_changed(self):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

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
            loss = evaluate_batch(self, model, inputs)
            if prediction_loss_only:
                return loss, None, None
            return loss, forward_logits(model, inputs["input_ids"], inputs["attention_mask"]), inputs["labels"]

    # ------------------------------------------------------------------------------------------------ logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._train_means.report(self.accelerator))
            logs["prompt/drift"] = self.soft_prompt.drift()
            logs["prompt/skipped_steps"] = self.prompt_optimizer.skipped
            log_completions(self)
        super().log(logs, start_time)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None) -> None:
        """TRL's model card, with the teacher, its soft prompt, data, scores, and how to load the models."""
        super().create_model_card(model_name, hub_id(dataset_name) or hub_dataset(self.train_dataset), tags)
        if self.is_world_process_zero():
            complete_card(self, prompt_section(self))

    # ------------------------------------------------------------------------------------------------ saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the student as usual, and the teacher's soft prompt to `teacher_prompt/` in the same folder."""
        output_dir = self.args.output_dir if output_dir is None else output_dir
        if self.args.should_save:
            self.soft_prompt.save_adapter(os.path.join(output_dir, ADAPTER_FOLDER))
        super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self.prompt_optimizer.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.prompt_optimizer.load(checkpoint)
            self.soft_prompt.load_parameters(os.path.join(checkpoint, ADAPTER_FOLDER))

    def _load_best_model(self) -> None:
        shared.load_best_model(self)
        self.soft_prompt.load_parameters(os.path.join(self.state.best_model_checkpoint, ADAPTER_FOLDER))
