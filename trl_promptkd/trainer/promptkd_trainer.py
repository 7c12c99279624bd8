"""PromptKD: on-policy distillation from a frozen teacher whose soft prompt is tuned with the student's guidance."""

import os
import random
import textwrap
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate.utils import broadcast, is_peft_model
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import (
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers.trainer_utils import EvalPrediction
from transformers.utils import logging

from .._trl import GKDTrainer, keep_four_bit_weights_differentiable
from ..data import (
    DataCollatorForPromptCompletion,
    check_columns,
    count_trained_tokens,
    grouped_by_length,
    masked_rows,
    pad_rows,
    tokenize_dataset,
    without_repeats,
)
from ..generation.rollouts import rollout_config, rollout_seed, sample_completions
from ..generation.vllm import VLLMRollouts, check_vllm
from ..losses.chunked import chunked_sums
from ..losses.promptkd import prompt_loss_sums, promptkd_loss_sums, regularization_weight, student_loss_sums
from ..models.compare import check_forward
from ..models.forward import (
    TokenStates,
    completion_states,
    forward_logits,
    input_embeddings,
    inside_forward,
    whole_weights,
)
from ..models.limits import check_positions, check_rows_embedded, embedded_by
from ..models.side_effects import flags_restored, nothing_changed
from ..models.soft_prompt import ADAPTER_FOLDER, PromptEncoderConfig, SoftPrompt
from ..models.student import check_trains, student_by_name
from ..models.teacher import asked_teacher, build_teacher, disable_dropout, place_teacher, recomputed_activations
from ..models.tokenizer import prepare_tokenizer, shared_vocab_size
from ..teacher_cache.card import hub_id
from .best_metric import check_best_metric
from .checkpoints import checkpoint_to_resume, save_whole_checkpoint, saved_on_interrupt
from .checks import (
    SEARCH,
    check_arguments,
    check_finite,
    check_found,
    check_sharding,
    check_soft_prompt,
    check_streamed_evaluation,
    loaded_settings,
    restore_settings,
)
from .hub import make_branch
from .logged_metrics import CollusionCallback, Means, add_rollouts, is_logged_step, keep_completions, with_means
from .model_card import complete_card, hub_dataset, prompt_section
from .prompt_optimizer import PromptOptimizer
from .promptkd_config import PromptKDConfig


__all__ = ["PromptKDTrainer"]

logger = logging.get_logger(__name__)

_ANSWERS_NEEDED = (
    "`lmbda` is below 1, so that part of the training uses the data's own answers. Set `lmbda=1.0` (train on the student's "
    "samples only) or `seq_kd=True` (the teacher writes the answers)."
)


class PromptKDTrainer(GKDTrainer):
    """
    Trainer for PromptKD: a few embeddings before a frozen teacher's input are tuned with the student's guidance, so that
    the teacher becomes student-friendly; the student learns from that teacher on its own samples.

    One optimizer step, with `q` the student, `p` the plain teacher and `pP` the teacher behind the soft prompt `P`:

    1. the student samples a completion for every prompt of the accumulation window;
    2. `P` is stepped on KL(pP || q) + w KL(pP || p);
    3. the student is stepped on KL(q || pP).

    Losses are sums over completion tokens, end of text included, divided by the number of those tokens in the whole window
    on all ranks: nats per token. Source: Kim et al., PromptKD (arXiv 2402.12842).

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The student.
        teacher_model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*):
            The teacher, which may be quantized. Its weights are frozen and never change. `None` takes
            `args.teacher_model_name_or_path`; where that is `None` too, the student's own starting weights: the student
            with its adapter switched off if it is a PEFT model (no second copy is held), else a frozen copy.
        args ([`PromptKDConfig`], *optional*):
            Training arguments.
        data_collator ([`~transformers.DataCollator`], *optional*):
            A collator of your own gets the rows as they are and must return `input_ids`, `attention_mask`, `labels`,
            `prompts` and `prompt_attention_mask`, as `GKDTrainer`'s does.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows with `messages`, with `prompt` and `completion`, or (fully on-policy only) with `prompt` alone; texts or
            conversations.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict` of them, *optional*):
            The same formats. Where rows have no answer, the plain teacher writes one.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer of both models; by default loaded with the student.
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
            Not supported; kept for the base class's signature.
        prompt_encoder_config ([`PromptEncoderConfig`], `peft.PromptTuningConfig` or `peft.PromptEncoderConfig`, *optional*):
            The teacher's soft prompt; by default the paper's.

    Raises:
        ValueError: for settings, data or models that cannot be trained together. Whatever can be checked without weights is
            checked before they are loaded.
    """

    _tag_names = ["trl", "promptkd", "knowledge-distillation"]
    _name = "PromptKD"
    _paper = {
        "title": "PromptKD: Distilling Student-Friendly Knowledge for Generative Language Models via Prompt Tuning",
        "id": "2402.12842",
        "citation": textwrap.dedent("""\
            @inproceedings{kim2024promptkd,
                title     = {{PromptKD: Distilling Student-Friendly Knowledge for Generative Language Models via Prompt Tuning}},
                author    = {Gyeongman Kim and Doohyuk Jang and Eunho Yang},
                year      = 2024,
                booktitle = {Findings of the Association for Computational Linguistics: EMNLP 2024},
            }"""),
    }

    prompt_optimizer: PromptOptimizer  # made when the number of steps is known

    # `compute_loss` divides by the token count of the whole window itself
    loss_is_scaled_for_ga = True

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
        check_arguments(
            "PromptKDTrainer",
            PromptKDConfig,
            model,
            teacher_model,
            args,
            train_dataset,
            peft_config,
            formatting_func,
            data_collator,
            callbacks,
        )
        check_best_metric(args, eval_dataset, callbacks)
        check_streamed_evaluation(eval_dataset, "eval_dataset", args)
        check_vllm(args, model, samples=args.lmbda > 0)
        self._tokenizes = data_collator is None
        processing_class = prepare_tokenizer(processing_class, model, teacher_model, args)
        check_soft_prompt(prompt_encoder_config, processing_class)
        answers_needed = _ANSWERS_NEEDED if args.lmbda < 1 and not args.seq_kd else None
        train_dataset = self._tokenize(
            train_dataset, "train_dataset", processing_class, args, answers_needed, answers_needed is not None
        )
        eval_dataset = self._tokenize(eval_dataset, "eval_dataset", processing_class, args)
        if self._tokenizes:
            data_collator = DataCollatorForPromptCompletion(processing_class.pad_token_id)
        check_found("teacher_model", teacher_model, args.teacher_model_init_kwargs, args.trust_remote_code)

        # 2. The student. GKDTrainer's own __init__ is left out: it refuses padded vocabularies, needs a `dtype` in
        # `teacher_model_init_kwargs`, changes the caller's `args`, and generates without a KV cache under checkpointing.
        with student_by_name(model, args) as (loaded, _):
            settings_as_loaded = loaded_settings(loaded, args)
            super(GKDTrainer, self).__init__(
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
        restore_settings(self.model, settings_as_loaded)
        self.aux_loss_enabled = False
        check_trains(self.model)
        check_sharding(self.accelerator)
        if args.disable_dropout:
            disable_dropout(self.model)
        keep_four_bit_weights_differentiable(self.model)
        self.lmbda, self.beta, self.seq_kd = args.lmbda, args.beta, args.seq_kd
        self.temperature = args.temperature

        # 3. The teacher and its soft prompt
        self.distils_itself = teacher_model is None
        teacher = build_teacher(self.model, teacher_model, args)
        if self.accelerator.is_fsdp2 and teacher is self.model and args.prompt_update == "sequential":
            raise ValueError(
                "`prompt_update` is 'sequential' and the student is its own teacher below its adapter: under FSDP2, its weights cannot be asked again "
                "between a backward pass and another within one step. Set `prompt_update='simultaneous'`, or pass `teacher_model`."
            )
        if args.teacher_gradient_checkpointing:
            if teacher is self.model and not args.disable_dropout:
                raise ValueError(
                    "`teacher_gradient_checkpointing` is True and `disable_dropout` False, but the teacher is the student below its adapter, and "
                    "would have its dropout. Change one of them, or pass `teacher_model`."
                )
            disable_dropout(teacher)  # some layers would take theirs for training
            with recomputed_activations(teacher, True):
                pass  # refused now where the teacher cannot
        self.shared_vocab_size = shared_vocab_size(self.model, teacher, processing_class)
        columns = ("prompt_ids", "completion_ids")
        self._embedded = embedded_by(
            {"student": (self.model, columns), "teacher": (teacher, columns)}, processing_class
        )
        self.train_dataset: Any = self._check_embedded(train_dataset, "train_dataset")
        self.eval_dataset: Any = self._check_embedded(eval_dataset, "eval_dataset")
        self.prompt_encoder_config = prompt_encoder_config
        with whole_weights(input_embeddings(teacher)):
            self.soft_prompt = SoftPrompt(prompt_encoder_config, teacher, processing_class)
        self.soft_prompt.to(self.accelerator.device)
        for tensor in self.soft_prompt.state_dict().values():
            tensor.copy_(broadcast(tensor))  # equal on every rank from the start
        self._check_positions(teacher, train_dataset)
        self._check_positions(teacher, eval_dataset)
        self.teacher_model: Any = place_teacher(teacher, self.model, self.accelerator)
        self._check_forward()

        # 4. Sampling and logging
        self.generation_config = rollout_config(self.model, teacher, processing_class, args)
        self.generation_kwargs = self.generation_config.to_dict()
        self.vllm: VLLMRollouts | None = None
        if args.use_vllm:
            self.vllm = VLLMRollouts(
                self.model, self.accelerator, processing_class, self.generation_config, args, self.shared_vocab_size
            )
        self._train_means, self._eval_means = Means(), Means()
        self._eval_batches = 0
        self._teacher_answers: dict[tuple[int, ...], list[int]] = {}  # the plain teacher's, for evaluation
        self._last_rollouts: tuple[list[list[int]], ...] = ()
        self.add_callback(CollusionCallback())

    # ------------------------------------------------------------------------------------------------ setting up

    def _tokenize(
        self, dataset, name: str, processing_class, args: PromptKDConfig, answers_needed=None, with_answers=True
    ):
        """Check and tokenize a data set or a `dict` of them; a collator of the user's own gets the rows as they are.

        Training rows whose answers are not trained on are tokenized without them. Evaluation judges all answers.
        """
        if dataset is None or not self._tokenizes:
            return dataset
        if isinstance(dataset, dict):
            return {
                key: self._tokenize(part, f"{name}[{key!r}]", processing_class, args) for key, part in dataset.items()
            }
        check_columns(dataset, name, answers_needed)
        tokenized = tokenize_dataset(
            dataset,
            name,
            processing_class,
            args.max_length,
            answers_needed,
            args.overlong,
            args.dataset_num_proc,
            with_answers,
        )
        return tokenized.shuffle(seed=args.seed) if args.shuffle_dataset else tokenized

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
        virtual = self.soft_prompt.peft_config.num_virtual_tokens
        longest = max(
            len(prompt) + max(len(completion), self.args.max_new_tokens)
            for prompt, completion in zip(dataset["prompt_ids"], dataset["completion_ids"], strict=True)
        )
        remedy = (
            f"That is {longest} tokens, of which `max_new_tokens` is {self.args.max_new_tokens}, and for the teacher {virtual} "
            "virtual tokens more. Lower `max_new_tokens` or `max_length`, or filter the longest rows out."
        )
        check_positions("student", self.model, longest, remedy)
        check_positions("teacher", teacher, longest + virtual, remedy)

    def _check_forward(self) -> None:
        """Compare the passes of both models with their own forward, the teacher's with and without its soft prompt."""
        check = partial(
            check_forward,
            processing_class=self.processing_class,
            accelerator=self.accelerator,
            vocab_size=self.shared_vocab_size,
        )
        check("student", self.model)
        with self._teacher() as teacher:
            teacher = self.accelerator.unwrap_model(teacher)
            check("teacher", teacher)
            check("prompted teacher", teacher, soft_prompt=self.prompt_embeddings())

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        config = self.prompt_encoder_config
        config = config if isinstance(config, PromptEncoderConfig) else PromptEncoderConfig()
        self.prompt_optimizer = PromptOptimizer(
            self.soft_prompt, config, self.args, num_training_steps, self.accelerator
        )
        self._train_means = Means()  # without those of a window that failed (`auto_find_batch_size`) or was broken off
        return scheduler

    def hyperparameter_search(self, *args: Any, **kwargs: Any):
        """Not supported: a trainer's settings are used up when it is made, so each trial needs a trainer of its own."""
        raise NotImplementedError(SEARCH)

    # ------------------------------------------------------------------------------------------------ the teacher

    def _teacher(self):
        """The plain teacher, in evaluation mode, as a context."""
        return asked_teacher(self.teacher_model, self.accelerator.unwrap_model(self.model_wrapped))

    def prompt_embeddings(self) -> Tensor:
        """The soft prompt: `(num_virtual_tokens, hidden)` in float32, without gradient."""
        return self.soft_prompt().detach()

    @torch.no_grad()
    def prompted_teacher_logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The teacher's logits behind the soft prompt.

        Args:
            input_ids (`Tensor` of shape `(batch, seq)`): Rows padded on either side, or not at all.
            attention_mask (`Tensor` of shape `(batch, seq)`): 1 for tokens, 0 for padding.

        Returns:
            `Tensor` of shape `(batch, seq, vocab)` in float32; position `i` follows `input_ids[:, i]`. What stands at padding
            means nothing.
        """
        device = self.accelerator.device
        inputs = (input_ids.to(device), attention_mask.to(device), self.soft_prompt())
        with self._teacher() as teacher:
            return inside_forward(teacher, lambda bare: forward_logits(bare, *inputs).float())

    def _states(self, model: nn.Module, inputs: dict[str, Tensor], soft_prompt: Tensor | None = None) -> TokenStates:
        return completion_states(
            model, inputs["input_ids"], inputs["attention_mask"], inputs["labels"], soft_prompt, self.shared_vocab_size
        )

    def _teacher_states(self, teacher: nn.Module, inputs: dict[str, Tensor], soft_prompt=None) -> TokenStates:
        ask = partial(self._states, inputs=inputs, soft_prompt=soft_prompt)
        return ask(teacher) if self.teacher_model is None else inside_forward(teacher, ask)

    def _sums(self, student: TokenStates, prompted: TokenStates, plain: TokenStates | None, of_prompt, of_student):
        sums = partial(
            promptkd_loss_sums,
            prompt_loss=of_prompt,
            student_loss=of_student,
            temperature=self.args.loss_temperature,
        )
        return chunked_sums(sums, self.args.loss_chunk_size, student, prompted, plain)

    # ------------------------------------------------------------------------------------------------ sampling

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """Collect a window's micro-batches, sample their completions, and count the tokens that will be trained on."""
        if self.state.global_step >= self.state.max_steps:
            return [], None  # resumed after its last step, of which the base class would take one more
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        batches = self._sample_window([self._prepare_inputs(batch) for batch in batches])
        return batches, count_trained_tokens(batches, self.accelerator, self.state.global_step)

    def _sample_window(self, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        step, rank = self.state.global_step, self.accelerator.process_index
        draw = random.Random(rollout_seed(self.args.seed, "mixture", step, rank))
        prompts = [masked_rows(batch["prompts"], batch["prompt_attention_mask"]) for batch in batches]
        answers = [masked_rows(batch["input_ids"], batch["labels"] != -100) for batch in batches]
        rows = [(i, j) for i, batch in enumerate(prompts) for j in range(len(batch))]
        from_student = {row for row in rows if draw.random() < self.lmbda}
        if self.vllm is not None:
            self.vllm.sync()
        sources = {"student": from_student, "teacher": set(rows) - from_student if self.seq_kd else set()}
        for source, chosen in sources.items():
            chosen_rows = [row for row in rows if row in chosen]
            start = time.perf_counter()
            sampled = self._sample([prompts[i][j] for i, j in chosen_rows], source, step, rank)
            if source == "student":
                seconds = time.perf_counter() - start
                add_rollouts(self._train_means, sampled, self.generation_config, seconds, self.processing_class)
                if sampled:
                    self._last_rollouts = ([prompts[i][j] for i, j in chosen_rows], sampled)
            for (i, j), completion in zip(chosen_rows, sampled, strict=True):
                answers[i][j] = completion
        replaced = {i for chosen in sources.values() for i, _ in chosen}
        if len(replaced) == len(batches):
            # In the last micro-batch, the student may learn from another prompt than in the others: its rows stay in it
            stay = 1 if self.args.prompt_update == "sequential" else 0
            prompts, answers = _regrouped(prompts, answers, len(batches) - stay)
        pad, device = self.processing_class.pad_token_id, self.accelerator.device
        return [
            {key: value.to(device) for key, value in pad_rows(prompts[i], answers[i], pad).items()}
            if i in replaced
            else batch
            for i, batch in enumerate(batches)
        ]

    def _sample(self, prompts: list[list[int]], source: str, step: int, rank: int) -> list[list[int]]:
        """Completions by the student or by the plain teacher, from a random state of their own."""
        if source == "student" and self.vllm is not None:
            return self.vllm.sample(prompts, step)
        sample = partial(
            sample_completions,
            accelerator=self.accelerator,
            prompt_ids=prompts,
            generation_config=self.generation_config,
            seed=rollout_seed(self.args.seed, source, step, rank),
            args=self.args,
            vocab_size=self.shared_vocab_size,
            tokenizer=self.processing_class,
        )
        if source == "student":
            return sample(self.model_wrapped)
        with self._teacher() as teacher:
            return sample(teacher)

    # ------------------------------------------------------------------------------------------------ training

    def train(self, resume_from_checkpoint: str | bool | None = None, trial=None, ignore_keys_for_eval=None):
        """As in the base class; `resume_from_checkpoint=True` takes the newest checkpoint that is whole."""
        check_best_metric(self.args, self.eval_dataset, self.callback_handler.callbacks)
        resume_from_checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
        with saved_on_interrupt(self):
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def training_step(self, model, inputs, num_items_in_batch=None):
        # Past GKDTrainer, which would sample here, one micro-batch at a time
        return super(GKDTrainer, self).training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """One micro-batch: the prompt's gradient, its step at the window's end, and the student's loss.

        Returns:
            Scalar: the divergence summed over this micro-batch's completion tokens, divided by `num_items_in_batch` (those of the
            whole window on all ranks), times the number of ranks, over which data parallelism averages gradients.
        """
        num_local = (inputs["labels"][:, 1:] != -100).sum()
        num_tokens = num_local if num_items_in_batch is None else num_items_in_batch
        num_tokens = torch.as_tensor(num_tokens, device=num_local.device).clamp(min=1)
        with self.accelerator.autocast():
            losses = partial(self._losses, inputs=inputs, num_local=num_local, num_tokens=num_tokens)
            loss = inside_forward(model, losses) * self.accelerator.num_processes
        return (loss, None) if return_outputs else loss

    def _losses(self, student: nn.Module, inputs: dict[str, Tensor], num_local: Tensor, num_tokens: Tensor) -> Tensor:
        """Both losses of a micro-batch: the prompt's gradient is taken on the way, the student's loss is returned."""
        args, means = self.args, self._train_means
        weight = regularization_weight(
            args.regularization_coef, args.regularization_schedule, self.state.global_step, self.state.max_steps
        )
        window_ends = self.accelerator.sync_gradients
        prompt_leads = window_ends and args.prompt_update == "sequential"  # the student learns from the stepped prompt
        of_prompt = partial(prompt_loss_sums, direction=args.prompt_divergence, weight=weight)
        of_student = partial(student_loss_sums, beta=self.beta)

        student_states = self._states(student, inputs)
        with asked_teacher(self.teacher_model, student) as teacher:
            plain = None
            if weight > 0 or is_logged_step(self):
                with torch.no_grad():
                    plain = self._teacher_states(teacher, inputs).detach()
            with recomputed_activations(teacher, args.teacher_gradient_checkpointing):
                prompted = self._teacher_states(teacher, inputs, self.soft_prompt())
                if prompt_leads:
                    sums, (prompt_gradient,) = self._sums(student_states.detach(), prompted, plain, of_prompt, None)
                else:
                    sums, (student_gradient, prompt_gradient) = self._sums(
                        student_states, prompted, plain, of_prompt, of_student
                    )
                self.prompt_optimizer.accumulate(prompt_gradient, num_tokens)
            if window_ends:
                means.add("prompt/learning_rate", self.prompt_optimizer.learning_rate)
                means.add("prompt/grad_norm", self.prompt_optimizer.step())
            if prompt_leads:
                with torch.no_grad():
                    prompted = self._teacher_states(teacher, inputs, self.soft_prompt()).detach()
                of_new_prompt, (student_gradient,) = self._sums(student_states, prompted, None, None, of_student)
                sums = (*sums, *of_new_prompt[1:])

        _, _, prompted_student, *about_plain, loss, student_prompted, student_entropy, teacher_entropy = sums
        when = f"at step {self.state.global_step + 1}"
        check_finite(loss, when, student=student_states, prompted_teacher=prompted, plain_teacher=plain)
        means.add("kl/student_prompted", student_prompted, num_local)
        means.add("kl/prompted_student", prompted_student, num_local)
        means.add("entropy/student", student_entropy, num_local)
        means.add("entropy/teacher", teacher_entropy, num_local)
        if plain is not None:
            prompted_plain, student_plain = about_plain
            means.add("kl/student_plain", student_plain, num_local)
            means.add("kl/prompt_gain", student_plain - student_prompted, num_local)
            means.add("kl/prompted_plain", prompted_plain, num_local)
        means.add("regularization_weight", weight)
        return student_gradient.attach(loss) / num_tokens

    # ------------------------------------------------------------------------------------------------ evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval"):
        """As in the base class; adds `eval_forward_kl` and `eval_reverse_kl`, and takes raw or tokenized data."""
        if not isinstance(eval_dataset, str):  # a name stands for a data set that is tokenized already
            check_streamed_evaluation(eval_dataset, "eval_dataset", self.args)
            eval_dataset = self._tokenize(eval_dataset, "eval_dataset", self.processing_class, self.args)
            eval_dataset = self._check_embedded(eval_dataset, "eval_dataset")
        with nothing_changed(self):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix: str = "test"):
        """As in the base class; takes raw or tokenized data."""
        if test_dataset is None:
            raise ValueError(
                "`test_dataset` is None; pass a data set. (`evaluate()` takes the trainer's `eval_dataset`.)"
            )
        check_streamed_evaluation(test_dataset, "test_dataset", self.args)
        test_dataset = self._tokenize(test_dataset, "test_dataset", self.processing_class, self.args)
        test_dataset = self._check_embedded(test_dataset, "test_dataset")
        with nothing_changed(self):
            return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        self._eval_means, self._eval_batches = Means(), 0
        if self.vllm is not None:
            self.vllm.sync()
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        return with_means(self, output, self._eval_means, metric_key_prefix)

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with self.accelerator.autocast():  # before training, nobody has wrapped the student in it
            return self._evaluate_batch(model, self._prepare_inputs(inputs), prediction_loss_only)

    def _evaluate_batch(self, model, inputs, prediction_loss_only: bool):
        prompts = masked_rows(inputs["prompts"], inputs["prompt_attention_mask"])
        answers = masked_rows(inputs["input_ids"], inputs["labels"] != -100)
        pad, rank = self.processing_class.pad_token_id, self.accelerator.process_index
        # The same random numbers at every evaluation, so that values differ by what was learned
        samples = self._sample(prompts, "student", -1 - self._eval_batches, rank)
        new = [
            prompt
            for prompt, answer in zip(prompts, answers, strict=True)
            if not answer and tuple(prompt) not in self._teacher_answers
        ]
        for prompt, answer in zip(new, self._sample(new, "teacher", -1 - self._eval_batches, rank), strict=True):
            self._teacher_answers[tuple(prompt)] = answer
        answers = [
            answer or self._teacher_answers[tuple(prompt)] for prompt, answer in zip(prompts, answers, strict=True)
        ]
        self._eval_batches += 1

        device, losses = self.accelerator.device, {}
        for source, completions in (("student", samples), ("answers", answers)):
            batch = {key: value.to(device) for key, value in pad_rows(prompts, completions, pad).items()}
            batch["labels"] = without_repeats(batch["labels"], self.accelerator)
            losses[source] = inside_forward(model, partial(self._evaluate_completions, batch=batch, source=source))
        batch_loss = losses["student" if self.lmbda > 0 else "answers"]
        if prediction_loss_only:
            return batch_loss, None, None
        return batch_loss, forward_logits(model, inputs["input_ids"], inputs["attention_mask"]), inputs["labels"]

    def _evaluate_completions(self, student: nn.Module, batch: dict[str, Tensor], source: str) -> Tensor:
        """Adds what is reported about the student's samples or the data's answers; returns the mean loss, where it is taken of these."""
        means, count = self._eval_means, (batch["labels"][:, 1:] != -100).sum()
        batch_loss = torch.zeros((), device=count.device)
        student_states = self._states(student, batch)
        with asked_teacher(self.teacher_model, student) as teacher:
            plain = self._teacher_states(teacher, batch)
            if source == ("student" if self.lmbda > 0 else "answers"):
                prompted = self._teacher_states(teacher, batch, self.soft_prompt())
                of_student = partial(student_loss_sums, beta=self.beta)
                (loss, *_), _ = self._sums(student_states, prompted, None, None, of_student)
                means.add("loss", loss, count)
                batch_loss = loss / count.clamp(min=1)
        of_student = partial(student_loss_sums, beta=1.0 if source == "student" else 0.0)
        (divergence, *_), _ = self._sums(student_states, plain, None, None, of_student)
        when = f"in the evaluation after step {self.state.global_step}"
        check_finite(divergence + batch_loss, when, student=student_states, teacher=plain)
        means.add("reverse_kl" if source == "student" else "forward_kl", divergence, count)
        return batch_loss

    # ------------------------------------------------------------------------------------------------ logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._train_means.report(self.accelerator))
            logs["prompt/drift"] = self.soft_prompt.drift()
            logs["prompt/skipped_steps"] = self.prompt_optimizer.skipped
            keep_completions(self, self._last_rollouts)
        super().log(logs, start_time)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None) -> None:
        """TRL's model card, and a section on the teacher, its prompt, and how to load both."""
        super().create_model_card(model_name, hub_id(dataset_name) or hub_dataset(self.train_dataset), tags)
        if self.is_world_process_zero():
            complete_card(self, prompt_section(self))

    # ------------------------------------------------------------------------------------------------ saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the student as usual, and the teacher's soft prompt to `teacher_prompt/` beside it."""
        output_dir = self.args.output_dir if output_dir is None else output_dir
        if self.args.should_save:
            self.soft_prompt.save_adapter(os.path.join(output_dir, ADAPTER_FOLDER))
        super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        save = partial(super()._save_checkpoint, model, trial)
        save_whole_checkpoint(self, save, super()._push_from_checkpoint, self._get_output_dir(trial=trial))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Does nothing: the base class would push a checkpoint before it is whole; `save_whole_checkpoint` does it then."""

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As in the base class; makes the branch `hub_revision`, too."""
        super().init_hf_repo(token, private)
        make_branch(self, token)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self.prompt_optimizer.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.prompt_optimizer.load(checkpoint)
            self.soft_prompt.load_parameters(os.path.join(checkpoint, ADAPTER_FOLDER))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if is_peft_model(self.model) and not self.is_fsdp_enabled:
            # The base class would take `teacher_prompt/` for a second adapter of the student
            name = self.model.active_adapters[0]
            folder = resume_from_checkpoint if name == "default" else os.path.join(resume_from_checkpoint, name)
            with flags_restored(self.model):  # PEFT makes all weights of the adapter trainable
                self.model.load_adapter(folder, name, is_trainable=True)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        with flags_restored(self.model):
            super()._load_best_model()
        self.soft_prompt.load_parameters(os.path.join(self.state.best_model_checkpoint, ADAPTER_FOLDER))


def _regrouped(
    prompts: list[list[list[int]]], answers: list[list[list[int]]], num_batches: int
) -> tuple[list[list[list[int]]], list[list[list[int]]]]:
    """The first `num_batches` micro-batches with their rows shared out anew, by length; the others as they are."""
    rows = [(p, a) for i in range(num_batches) for p, a in zip(prompts[i], answers[i], strict=True)]
    groups = grouped_by_length([len(p) + len(a) for p, a in rows], [len(batch) for batch in prompts[:num_batches]])
    shared_out = [[[rows[row][side] for row in group] for group in groups] for side in (0, 1)]
    return shared_out[0] + prompts[num_batches:], shared_out[1] + answers[num_batches:]
