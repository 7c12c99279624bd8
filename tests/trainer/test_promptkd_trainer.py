import copy
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from reference import greedy, log_probs, promptkd_step
from tiny import (
    WORDS,
    answered_dataset,
    chat_dataset,
    difference,
    prompt_dataset,
    tiny_model,
    tiny_tokenizer,
    weights,
)
from transformers import AutoModelForCausalLM

from trl_promptkd import PromptEncoderConfig, PromptKDTrainer, SoftPrompt
from trl_promptkd.losses.chunked import StateGradient
from trl_promptkd.trainer.prompt_optimizer import PromptOptimizer


PROMPT_TEXT = "suppose you are a student ."
GREEDY = {"do_sample": False}


def make_trainer(args, student=None, teacher=None, dataset=None, **kwargs):
    kwargs.setdefault("prompt_encoder_config", PromptEncoderConfig(prompt_init_text=PROMPT_TEXT))
    kwargs.setdefault("processing_class", tiny_tokenizer())
    return PromptKDTrainer(
        model=tiny_model(seed=1) if student is None else student,
        teacher_model=tiny_model(seed=2, num_hidden_layers=3) if teacher is None else teacher,
        args=args,
        train_dataset=prompt_dataset() if dataset is None else dataset,
        **kwargs,
    )


def keep_windows(trainer):
    """Record the micro-batches that the trainer trains on, as (prompt ids, completion ids)."""
    windows, original = [], trainer.get_batch_samples

    def record(*args):
        batches, count = original(*args)
        windows.append(
            [
                [
                    (ids[mask.bool() & (labels == -100)].tolist(), ids[labels != -100].tolist())
                    for ids, mask, labels in zip(b["input_ids"], b["attention_mask"], b["labels"], strict=True)
                ]
                for b in batches
            ]
        )
        return batches, count

    trainer.get_batch_samples = record
    return windows


class TestOneStep:
    """One whole step against the row-by-row implementation in `reference.py`."""

    @pytest.mark.parametrize("direction", ["reverse", "forward"])
    @pytest.mark.parametrize("update", ["sequential", "simultaneous"])
    @pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
    def test_equals_rows_alone(self, make_args, family, update, direction):
        student, teacher = tiny_model(family, seed=1), tiny_model(family, seed=2)
        args = make_args(
            gradient_accumulation_steps=2,
            learning_rate=0.05,
            lr_scheduler_type="constant",
            optim="sgd",  # Adam's first step hides the gradient's scale
            prompt_update=update,
            prompt_divergence=direction,
            generation_kwargs=GREEDY,
        )
        ref_student, ref_teacher = copy.deepcopy(student), copy.deepcopy(teacher)
        prompt_config = PromptEncoderConfig(prompt_init_text=PROMPT_TEXT, prompt_learning_rate=0.01)
        trainer = make_trainer(args, student, teacher, prompt_encoder_config=prompt_config)
        before = weights(teacher)
        soft_prompt = trainer.prompt_embeddings().clone()
        windows = keep_windows(trainer)
        trainer.train()

        (window,) = windows
        assert [len(batch) for batch in window] == [2, 2]
        assert len({len(prompt) for batch in window for prompt, _ in batch}) > 1  # there is padding
        for prompt, completion in window[0] + window[1]:
            assert completion == greedy(ref_student, prompt, args.max_new_tokens, 0)
        loss, prompt_norm, norm = promptkd_step(
            ref_student, ref_teacher, soft_prompt, window, 0.05, 0.01, update, direction
        )
        log = trainer.state.log_history[0]
        assert log["loss"] == pytest.approx(loss, rel=1e-3)
        assert log["prompt/grad_norm"] == pytest.approx(prompt_norm, rel=1e-3)
        assert log["grad_norm"] == pytest.approx(norm, rel=1e-3)
        assert difference(weights(trainer.model), weights(ref_student)) < 1e-4
        assert (trainer.prompt_embeddings() - soft_prompt.detach()).abs().max() < 5e-3
        assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
        assert all(parameter.grad is None for parameter in teacher.parameters())

    def test_logged_values_equal_rows_alone(self, make_args):
        student, teacher = tiny_model(seed=1), tiny_model(seed=2)
        reference = copy.deepcopy(student)
        trainer = make_trainer(make_args(prompt_update="simultaneous"), student, teacher)
        soft_prompt = trainer.prompt_embeddings()
        windows = keep_windows(trainer)
        trainer.train()
        rows = [row for batch in windows[0] for row in batch]
        total = dict.fromkeys(("sP", "sp", "Ps", "Pp", "Hs", "HP"), 0.0)
        with torch.no_grad():
            for prompt, completion in rows:
                ids, first = prompt + completion, len(prompt)
                q, p = log_probs(reference, ids, first), log_probs(teacher, ids, first)
                pp = log_probs(teacher, ids, first, soft_prompt)
                for name, a, b in (("sP", q, pp), ("sp", q, p), ("Ps", pp, q), ("Pp", pp, p)):
                    total[name] += (a.exp() * (a - b)).sum().item()
                total["Hs"] -= (q.exp() * q).sum().item()
                total["HP"] -= (pp.exp() * pp).sum().item()
        count = sum(len(completion) for _, completion in rows)
        log = trainer.state.log_history[0]
        for key, name in (
            ("kl/student_prompted", "sP"),
            ("kl/student_plain", "sp"),
            ("kl/prompted_student", "Ps"),
            ("kl/prompted_plain", "Pp"),
            ("entropy/student", "Hs"),
            ("entropy/teacher", "HP"),
        ):
            assert log[key] == pytest.approx(total[name] / count, rel=1e-3), key
        assert log["kl/prompt_gain"] == pytest.approx((total["sp"] - total["sP"]) / count, rel=1e-3)
        assert log["loss"] == pytest.approx(log["kl/student_prompted"], rel=1e-5)
        assert log["rollout/mean_length"] == pytest.approx(count / len(rows))
        assert log["rollout/terminated_share"] == pytest.approx(sum(c[-1] == 0 for _, c in rows) / len(rows))
        assert log["rollout/tokens_per_second"] > 0
        assert log["regularization_weight"] == 1.0
        assert log["prompt/learning_rate"] == pytest.approx(1e-3)
        assert log["prompt/drift"] > 0

    @pytest.mark.parametrize("chunk", [1, 5, None])
    def test_chunks_change_nothing(self, make_args, chunk):
        results = []
        for size in (1024, chunk):
            args = make_args(loss_chunk_size=size, optim="sgd", learning_rate=0.05, prompt_update="simultaneous")
            trainer = make_trainer(args)
            trainer.train()
            results.append((weights(trainer.model), trainer.prompt_embeddings()))
        assert difference(results[0][0], results[1][0]) < 1e-5
        assert (results[0][1] - results[1][1]).abs().max() < 1e-4


class TestTokenCounts:
    @pytest.mark.parametrize("update", ["simultaneous", "sequential"])
    def test_the_split_of_a_window_changes_nothing(self, make_args, update):
        """Traps 1 and 20: on-policy, sampled; `sequential` depends on the split a little, by its definition."""
        results = []
        for rows, micro_batches in ((4, 1), (2, 2), (1, 4)):
            args = make_args(
                per_device_train_batch_size=rows,
                gradient_accumulation_steps=micro_batches,
                prompt_update=update,
                optim="sgd",
                learning_rate=0.05,
            )
            trainer = make_trainer(args)
            trainer.train()
            results.append((weights(trainer.model), trainer.prompt_embeddings(), trainer.state.log_history[0]["loss"]))
        for student, soft_prompt, loss in results[1:]:
            assert (soft_prompt - results[0][1]).abs().max() < 1e-4
            if update == "simultaneous":
                assert difference(student, results[0][0]) < 1e-4
                assert loss == pytest.approx(results[0][2], rel=1e-4)
            else:
                assert difference(student, results[0][0]) < 1e-2

    def test_the_data_answers_are_not_counted_on_policy(self, make_args):
        """Trap 1: `GKDTrainer` divides by the number of tokens of the answers in the data."""
        losses = []
        for dataset in (answered_dataset(), prompt_dataset()):
            trainer = make_trainer(make_args(generation_kwargs=GREEDY), dataset=dataset)
            trainer.train()
            losses.append(trainer.state.log_history[0]["loss"])
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)

    def test_the_logged_loss_is_a_mean_over_steps_with_larger_logging_steps(self, make_args):
        args = make_args(max_steps=4, logging_steps=4, gradient_accumulation_steps=2)
        trainer = make_trainer(args, dataset=prompt_dataset(16))
        trainer.train()
        log = trainer.state.log_history[0]
        assert log["loss"] == pytest.approx(log["kl/student_prompted"], rel=0.1)


class TestDataSources:
    def run(self, args, dataset, **kwargs):
        trainer = make_trainer(args, dataset=dataset, **kwargs)
        windows = keep_windows(trainer)
        trainer.train()
        return trainer, [row for window in windows for batch in window for row in batch]

    @pytest.mark.parametrize("make", [answered_dataset, chat_dataset])
    def test_off_policy_trains_on_the_data_with_its_end_of_text(self, make_args, make):
        _, rows = self.run(make_args(lmbda=0.0), make())
        completions = [ids for _, ids in rows]
        assert all(ids[-1] == 0 and len(ids) > 1 for ids in completions)
        tokenizer = tiny_tokenizer()
        assert all(tokenizer.decode(ids[:-1]) in " ".join(WORDS) for ids in completions)

    def test_seq_kd_trains_on_the_plain_teachers_answers(self, make_args):
        teacher = tiny_model(seed=2)
        args = make_args(lmbda=0.0, seq_kd=True, generation_kwargs=GREEDY)
        _, rows = self.run(args, prompt_dataset(), teacher=teacher)
        assert [completion for _, completion in rows] == [greedy(teacher, prompt, 6, 0) for prompt, _ in rows]

    def test_mixed_draws_row_by_row_about_as_often_as_asked(self, make_args):
        args = make_args(lmbda=0.5, max_steps=4, per_device_train_batch_size=8, learning_rate=0.0)
        dataset = Dataset.from_list([{"prompt": "the cat", "completion": " red blue green"}] * 32)
        _, rows = self.run(args, dataset)
        from_data = sum(tiny_tokenizer().decode(completion) == "red blue green <eos>" for _, completion in rows)
        assert 6 <= from_data <= 26

    def test_conversations_and_streams(self, make_args):
        args = make_args(lmbda=0.5)
        streamed = chat_dataset().to_iterable_dataset()
        trainer, rows = self.run(args, streamed)
        assert len(rows) == 2
        assert trainer.state.log_history[0]["loss"] > 0

    def test_rollouts_stop_at_the_teachers_end_of_turn_too(self, make_args):
        teacher = tiny_model(seed=2)
        teacher.generation_config.eos_token_id = [0, 11]
        trainer, rows = self.run(make_args(max_steps=4), prompt_dataset(), teacher=teacher)
        assert trainer.generation_config.eos_token_id == [0, 11]
        assert all(11 not in completion[:-1] for _, completion in rows)

    def test_rollout_batch_size_bounds_what_is_generated_at_once(self, make_args, monkeypatch):
        sizes = []
        original = type(tiny_model()).generate

        def spy(self, input_ids, **kwargs):
            sizes.append(len(input_ids))
            return original(self, input_ids=input_ids, **kwargs)

        monkeypatch.setattr(type(tiny_model()), "generate", spy)
        for size in (None, 3):
            make_trainer(make_args(gradient_accumulation_steps=4, rollout_batch_size=size)).train()
        assert sizes == [8, 3, 3, 2]

    def test_a_collator_of_ones_own(self, make_args):
        from trl_promptkd.data import DataCollatorForPromptCompletion, tokenize_row

        tokenizer, own = tiny_tokenizer(), DataCollatorForPromptCompletion(0)
        trainer = make_trainer(
            make_args(), data_collator=lambda rows: own([tokenize_row(row, tokenizer) for row in rows])
        )
        trainer.train()
        assert trainer.state.log_history[0]["loss"] > 0


class TestRows:
    """What the trainer makes of the user's rows; see test_data.py, test_chat_template.py and test_tokenize.py."""

    @staticmethod
    def rewriting():
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template += "{% if add_generation_prompt %}red{% endif %}"  # as one that opens thoughts
        return tokenizer

    @pytest.mark.parametrize("settings", [{"lmbda": 1.0}, {"lmbda": 0.5, "seq_kd": True}])
    def test_answers_that_are_not_trained_on_are_not_looked_at(self, make_args, settings):
        trainer = make_trainer(make_args(**settings), dataset=chat_dataset(4), processing_class=self.rewriting())
        assert trainer.train_dataset["completion_ids"][:] == [[]] * 4
        assert all(ids[-2:] == [3, 23] for ids in trainer.train_dataset["prompt_ids"])
        trainer.train()

    def test_answers_that_are_trained_on_must_follow_their_prompt(self, make_args):
        with pytest.raises(
            ValueError, match="Row 0 of `train_dataset`: The chat template writes a prompt differently"
        ):
            make_trainer(make_args(lmbda=0.5), dataset=chat_dataset(4), processing_class=self.rewriting())

    def test_evaluation_lets_the_teacher_answer_where_the_datas_answer_cannot_be_used(self, make_args):
        rewriting = self.rewriting()
        trainer = make_trainer(make_args(), eval_dataset=chat_dataset(4), processing_class=rewriting)
        prompts = Dataset.from_list([{"prompt": row["messages"][:-1]} for row in chat_dataset(4)])
        alone = make_trainer(make_args(), eval_dataset=prompts, processing_class=rewriting)
        assert trainer.eval_dataset.to_list() == alone.eval_dataset.to_list()
        assert trainer.evaluate()["eval_forward_kl"] == pytest.approx(alone.evaluate()["eval_forward_kl"])

    def test_evaluation_judges_the_datas_answers(self, make_args):
        trainer = make_trainer(make_args(), dataset=chat_dataset(4), eval_dataset=chat_dataset(4))
        assert all(trainer.eval_dataset["completion_ids"])
        assert not any(trainer.train_dataset["completion_ids"])

    def test_a_transform_is_honoured_in_both_data_sets(self, make_args):
        data = chat_dataset(4).with_transform(lambda batch: {"prompt": ["the cat"] * len(batch["messages"])})
        trainer = make_trainer(make_args(), dataset=data, eval_dataset=data)
        for dataset in (trainer.train_dataset, trainer.eval_dataset):
            assert dataset["prompt_ids"][:] == [[12, 13]] * 4
        trainer.train()
        trainer.evaluate(data)


class TestTemperatures:
    def test_loss_temperature_divides_both_logits(self, make_args):
        """Trap 7: sampling and loss have a temperature each."""
        student, teacher = tiny_model(seed=1), tiny_model(seed=2)
        args = make_args(loss_temperature=3.0, temperature=0.7, prompt_update="simultaneous")
        reference = copy.deepcopy(student)
        trainer = make_trainer(args, student, teacher)
        soft_prompt = trainer.prompt_embeddings()
        assert trainer.generation_config.temperature == 0.7
        windows = keep_windows(trainer)
        trainer.train()
        rows = [row for batch in windows[0] for row in batch]
        total = 0.0
        with torch.no_grad():
            for prompt, completion in rows:
                ids, first = prompt + completion, len(prompt)
                q = (log_probs(reference, ids, first) / 3).log_softmax(-1)
                pp = (log_probs(teacher, ids, first, soft_prompt) / 3).log_softmax(-1)
                total += (q.exp() * (q - pp)).sum().item()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(total / sum(len(c) for _, c in rows), rel=1e-3)


class TestSchedules:
    def test_the_regularizer_falls_and_the_prompt_has_its_own_schedule(self, make_args):
        args = make_args(max_steps=4, lr_scheduler_type="constant", regularization_coef=2.0)
        config = PromptEncoderConfig(
            prompt_init_text=PROMPT_TEXT,
            prompt_learning_rate=0.01,
            prompt_lr_scheduler_type="linear",
            prompt_warmup_steps=2,
        )
        trainer = make_trainer(args, prompt_encoder_config=config)
        trainer.train()
        logs = trainer.state.log_history[:4]
        assert [log["regularization_weight"] for log in logs] == [2.0, 1.5, 1.0, 0.5]
        assert [log["prompt/learning_rate"] for log in logs] == pytest.approx([0.0, 0.005, 0.01, 0.005])
        assert [log["learning_rate"] for log in logs] == pytest.approx([1e-3] * 4)

    def test_a_schedule_that_waits_for_metrics_is_refused(self, make_args):
        args = make_args(lr_scheduler_type="greedy", eval_strategy="steps", eval_steps=1)
        with pytest.raises(ValueError, match="cannot follow the schedule 'greedy'"):
            make_trainer(args, eval_dataset=prompt_dataset(2)).train()

    def test_clipping_bounds_the_prompts_gradient(self, make_args, monkeypatch):
        norms = []
        monkeypatch.setattr(
            torch.optim.AdamW,
            "step",
            lambda self, closure=None: norms.append(
                [float(p.grad.norm()) for g in self.param_groups for p in g["params"]]
            ),
        )
        config = PromptEncoderConfig(prompt_init_text=PROMPT_TEXT, prompt_max_grad_norm=0.25)
        make_trainer(make_args(optim="sgd"), prompt_encoder_config=config).train()
        assert norms == [[pytest.approx(0.25, rel=1e-3)]]

    def test_without_regularizer_the_plain_teacher_is_asked_on_logged_steps_only(self, make_args):
        args = make_args(max_steps=4, logging_steps=2, regularization_coef=0.0, prompt_update="simultaneous")
        trainer = make_trainer(args)
        calls = []
        trainer.teacher_model.get_decoder().layers[0].register_forward_hook(
            lambda *_: calls.append(trainer.state.global_step)
        )
        trainer.train()
        assert calls == [0, 1, 1, 2, 3, 3]
        assert "kl/prompt_gain" in trainer.state.log_history[0]

    def test_sequential_asks_the_prompted_teacher_twice_at_the_windows_end_only(self, make_args):
        trainer = make_trainer(make_args(gradient_accumulation_steps=3))
        calls = []
        trainer.teacher_model.get_decoder().layers[0].register_forward_hook(lambda *_: calls.append(1))
        trainer.train()
        assert len(calls) == 3 * 2 + 1


class TestWindows:
    @pytest.mark.parametrize("update", ["sequential", "simultaneous"])
    def test_rows_are_shared_out_by_length_but_those_of_the_last_micro_batch_stay(self, make_args, update):
        """`sequential`: the last micro-batch learns from another prompt, so that who is in it matters."""

        def consecutive(lengths, sizes):
            return [list(range(sum(sizes[:i]), sum(sizes[: i + 1]))) for i in range(len(sizes))]

        windows = []
        for regroup in (False, True):
            args = make_args(gradient_accumulation_steps=4, prompt_update=update, generation_kwargs=GREEDY)
            trainer = make_trainer(args, dataset=prompt_dataset(8))
            if not regroup:
                trainer.rollouts.sample = lambda model, prompts, *_: [[7]] * len(prompts)
                seen = keep_windows(trainer)
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr("trl_promptkd.trainer.window.grouped_by_length", consecutive)
                    trainer.train()
            else:
                trainer.rollouts.sample = lambda model, prompts, *_: [[7]] * len(prompts)
                seen = keep_windows(trainer)
                trainer.train()
            windows.append(seen[0])
        plain, grouped = windows
        rows = [sorted(map(str, itertools.chain(*window))) for window in (plain, grouped)]
        assert rows[0] == rows[1]
        lengths = [[len(prompt) for prompt, _ in batch] for batch in grouped]
        free = list(itertools.chain(*(lengths[:-1] if update == "sequential" else lengths)))
        assert free == sorted(free, reverse=True)
        assert (sorted(map(str, grouped[-1])) == sorted(map(str, plain[-1]))) or update == "simultaneous"
        assert plain != grouped


class TestTeacherCheckpointing:
    @pytest.mark.parametrize("itself", [False, True])
    @pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
    def test_changes_nothing_but_what_is_kept(self, make_args, family, itself):
        """`itself`: the teacher is the student below its adapter."""
        runs = []
        for enabled in (False, True):
            student = tiny_model(family, seed=1)
            if itself:
                student = get_peft_model(student, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
                teacher = None
            else:
                teacher = tiny_model(family, seed=2, **({"dropout": 0.3} if family == "opt" else {}))
            kwargs = {"gradient_checkpointing": False, "teacher_gradient_checkpointing": enabled}
            args = make_args(max_steps=2, gradient_accumulation_steps=2, **kwargs)
            kwargs = {"prompt_encoder_config": PromptEncoderConfig(prompt_init_text=PROMPT_TEXT)}
            trainer = PromptKDTrainer(
                student, teacher, args, train_dataset=prompt_dataset(), processing_class=tiny_tokenizer(), **kwargs
            )
            decoder = (trainer.teacher_model or trainer.model.get_base_model()).get_decoder()
            layer = (decoder.h if family == "gpt2" else decoder.layers)[0]
            inner = next(child for name, child in layer.named_children() if "attn" in name or "attention" in name)
            recomputed = []
            inner.register_forward_hook(lambda *_, recomputed=recomputed: recomputed.append(1))
            trainer.train()
            assert not layer.gradient_checkpointing
            assert itself or not layer.training
            runs.append((weights(trainer.model), trainer.prompt_embeddings(), len(recomputed)))
        assert difference(runs[0][0], runs[1][0]) < 1e-6
        torch.testing.assert_close(runs[0][1], runs[1][1], atol=1e-6, rtol=1e-5)
        assert runs[1][2] == runs[0][2] + 4  # the layer's inside, once more in each of four backward passes

    def test_a_student_that_is_its_own_teacher_and_keeps_its_dropout_is_refused(self, make_args):
        student = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM"))
        args = make_args(teacher_gradient_checkpointing=True, disable_dropout=False)
        with pytest.raises(
            ValueError, match="the teacher is the student below its adapter, and would have its dropout"
        ):
            PromptKDTrainer(student, None, args, train_dataset=prompt_dataset(), processing_class=tiny_tokenizer())

    def test_a_teacher_without_such_layers_is_refused(self, make_args, monkeypatch):
        from trl_promptkd.models import teacher

        monkeypatch.setattr(teacher, "GradientCheckpointingLayer", torch.nn.Bilinear)
        with pytest.raises(
            ValueError, match="`teacher_gradient_checkpointing` is True, but LlamaForCausalLM has no layers"
        ):
            make_trainer(make_args(teacher_gradient_checkpointing=True))


class TestResume:
    @pytest.mark.parametrize("encoder", ["embedding", "mlp"])
    @pytest.mark.parametrize("lora", [False, True])
    def test_six_steps_equal_three_and_three(self, make_args, tmp_path, lora, encoder):
        """Trap 19, and the base class's habit of taking `teacher_prompt/` for an adapter of the student."""

        def run(folder, resume=None):
            args = make_args(
                output_dir=str(tmp_path / folder),
                max_steps=6,
                gradient_accumulation_steps=2,
                save_strategy="steps",
                save_steps=3,
            )
            config = PromptEncoderConfig(
                prompt_init_text=PROMPT_TEXT, encoder=encoder, prompt_learning_rate=0.01, prompt_warmup_steps=2
            )
            peft_config = LoraConfig(task_type="CAUSAL_LM", r=4) if lora else None
            trainer = make_trainer(
                args, dataset=prompt_dataset(24), prompt_encoder_config=config, peft_config=peft_config
            )
            trainer.train(resume_from_checkpoint=resume)
            return weights(trainer.model), trainer.prompt_embeddings(), trainer.state.log_history

        student, soft_prompt, history = run("whole")
        again, prompt_again, history_again = run("resumed", str(tmp_path / "whole" / "checkpoint-3"))
        assert difference(student, again) <= 1e-6
        assert (soft_prompt - prompt_again).abs().max() <= 1e-6
        for key in ("loss", "kl/prompt_gain", "prompt/learning_rate", "rollout/mean_length"):
            assert [log[key] for log in history[:6]] == pytest.approx(
                [log[key] for log in history_again[:6]], rel=1e-6
            )

    def test_a_checkpoint_without_prompt_is_refused(self, make_args, tmp_path):
        args = make_args(save_strategy="steps", save_steps=1)
        make_trainer(args).train()
        (tmp_path / "run" / "checkpoint-1" / "prompt_training_state.safetensors").unlink()
        with pytest.raises(
            ValueError, match=r"not a whole checkpoint.*: prompt_training_state\.safetensors is missing"
        ):
            make_trainer(make_args(max_steps=2)).train(str(tmp_path / "run" / "checkpoint-1"))

    def test_another_prompt_is_refused(self, make_args, tmp_path):
        make_trainer(make_args(save_strategy="steps", save_steps=1)).train()
        config = PromptEncoderConfig(prompt_init_text=PROMPT_TEXT, num_virtual_tokens=3)
        with pytest.raises(ValueError, match="holds another soft prompt than this run's"):
            make_trainer(make_args(max_steps=2), prompt_encoder_config=config).train(
                str(tmp_path / "run" / "checkpoint-1")
            )

    def test_the_best_checkpoint_brings_its_prompt_back(self, make_args, tmp_path):
        args = make_args(
            max_steps=3,
            save_strategy="steps",
            save_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="eval_forward_kl",
            greater_is_better=True,  # whichever is the worst: any checkpoint will do, as long as both parts are from it
        )
        trainer = make_trainer(args, eval_dataset=answered_dataset(4))
        trainer.train()
        best = trainer.state.best_model_checkpoint
        loaded = PeftModel.from_pretrained(tiny_model(seed=2, num_hidden_layers=3), f"{best}/teacher_prompt")
        torch.testing.assert_close(loaded.prompt_encoder["default"].embedding.weight, trainer.prompt_embeddings())
        student = AutoModelForCausalLM.from_pretrained(best)
        assert difference(weights(student), weights(trainer.model)) == 0

    @pytest.mark.parametrize("encoder", ["embedding", "mlp"])
    def test_the_best_checkpoint_may_be_saved_without_optimizers(self, make_args, encoder):
        args = make_args(
            max_steps=2,
            save_strategy="steps",
            save_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            load_best_model_at_end=True,
            save_only_model=True,
        )
        config = PromptEncoderConfig(prompt_init_text=PROMPT_TEXT, encoder=encoder)
        trainer = make_trainer(args, eval_dataset=answered_dataset(4), prompt_encoder_config=config)
        trainer.train()
        folder = f"{trainer.state.best_model_checkpoint}/teacher_prompt"
        loaded = PeftModel.from_pretrained(tiny_model(seed=2, num_hidden_layers=3), folder)
        torch.testing.assert_close(loaded.prompt_encoder["default"].embedding.weight, trainer.prompt_embeddings())

    def test_an_adapter_of_another_name(self, make_args, tmp_path):
        results = []
        for resume in (None, str(tmp_path / "run" / "checkpoint-1")):
            torch.manual_seed(0)
            student = get_peft_model(tiny_model(seed=1), LoraConfig(task_type="CAUSAL_LM", r=4), adapter_name="mine")
            trainer = make_trainer(make_args(max_steps=2, save_strategy="steps", save_steps=1), student)
            trainer.train(resume_from_checkpoint=resume)
            results.append(weights(trainer.model))
        assert difference(*results) <= 1e-6


class TestStudents:
    def test_lora_trains_the_adapter_only(self, make_args):
        student = tiny_model(seed=1)
        before = weights(student)
        trainer = make_trainer(make_args(), student, peft_config=LoraConfig(task_type="CAUSAL_LM", r=4))
        adapter = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora_" in n}
        trainer.train()
        after = {
            n.removeprefix("base_model.model.").replace(".base_layer", ""): v
            for n, v in weights(trainer.model).items()
        }
        assert all(torch.equal(value, after[name]) for name, value in before.items() if name in after)
        assert any((p - adapter[n]).abs().max() > 0 for n, p in trainer.model.named_parameters() if "lora_" in n)

    def test_names_are_loaded_by_the_trainer(self, make_args, tmp_path):
        for name, seed in (("student", 1), ("teacher", 2)):
            tiny_model(seed=seed).save_pretrained(tmp_path / name)
            tiny_tokenizer().save_pretrained(tmp_path / name)
        args = make_args(teacher_model_init_kwargs={"dtype": "bfloat16"})
        trainer = PromptKDTrainer(
            model=str(tmp_path / "student"),
            teacher_model=str(tmp_path / "teacher"),
            args=args,
            train_dataset=prompt_dataset(),
            prompt_encoder_config=PromptEncoderConfig(prompt_init_text=PROMPT_TEXT),
        )
        assert trainer.teacher_model.dtype == torch.bfloat16
        assert args.teacher_model_init_kwargs == {"dtype": "bfloat16"}
        trainer.train()
        assert trainer.prompt_embeddings().dtype == torch.float32

    def test_quantized_student_and_teacher(self, make_args, tmp_path):
        pytest.importorskip("bitsandbytes")
        size = {"hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 4}
        tiny_model(seed=1, **size).save_pretrained(tmp_path / "student")
        tiny_model(seed=2, **size).save_pretrained(tmp_path / "teacher")
        four_bit = {"quantization_config": {"load_in_4bit": True}}
        student = AutoModelForCausalLM.from_pretrained(
            tmp_path / "student", quantization_config=__import__("transformers").BitsAndBytesConfig(load_in_4bit=True)
        )
        trainer = make_trainer(
            make_args(max_steps=3, teacher_model_init_kwargs=four_bit),
            student,
            str(tmp_path / "teacher"),
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"]),
        )
        adapter = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora_B" in n}
        start = trainer.prompt_embeddings().clone()
        trainer.train()
        assert not any(
            getattr(getattr(m, "weight", None), "quant_state", None) is not None
            and getattr(m.weight.quant_state, "packing_format_for_cpu", False)
            for model in (trainer.model, trainer.teacher_model)
            for m in model.modules()
        )
        assert all((p - adapter[n]).abs().max() > 0 for n, p in trainer.model.named_parameters() if "lora_B" in n)
        assert (trainer.prompt_embeddings() - start).abs().max() > 0

    def test_padded_vocabularies_are_compared_on_the_real_ids(self, make_args):
        """Trap 8: the logits of ids that stand for nothing must not matter."""
        losses = []
        tokenizer = tiny_tokenizer()
        for size in (40, 64):
            teacher = tiny_model(seed=2, vocab_size=64)
            teacher.resize_token_embeddings(size)
            student = tiny_model(seed=1, vocab_size=48)
            args = make_args(generation_kwargs=GREEDY, optim="sgd", learning_rate=0.05)
            trainer = make_trainer(args, student, teacher, processing_class=tokenizer)
            assert trainer.shared_vocab_size == len(tokenizer)
            trainer.train()
            losses.append((trainer.state.log_history[0]["loss"], weights(trainer.model)))
        assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6)
        assert difference(losses[0][1], losses[1][1]) < 1e-6

    @pytest.mark.parametrize("family", ["gpt2", "opt"])
    def test_dropout_is_off_in_modules_and_in_functional_calls(self, make_args, family):
        """TRL's own switch leaves out models that call dropout as a function, such as OPT."""
        trainer = make_trainer(make_args(), tiny_model(family), tiny_model(family, seed=2))
        model, ids = trainer.model.train(), torch.tensor([[7, 8, 9]])
        torch.testing.assert_close(model(input_ids=ids).logits, model(input_ids=ids).logits, atol=0, rtol=0)


class TestSelfDistillation:
    @pytest.mark.parametrize(
        "settings",
        [
            {"modules_to_save": ["lm_head"]},
            {"trainable_token_indices": [3, 4]},
            {"target_modules": ["lm_head", "q_proj"]},
        ],
    )
    def test_an_adapter_of_the_head_or_the_embeddings_needs_a_teacher_of_its_own(self, make_args, settings):
        student = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", **settings))
        with pytest.raises(ValueError, match=r"cannot be its own teacher|lm_head"):
            PromptKDTrainer(
                student, None, make_args(), train_dataset=prompt_dataset(), processing_class=tiny_tokenizer()
            )

    def test_full_student_has_a_frozen_copy_of_its_start(self, make_args):
        student = tiny_model(seed=1)
        start = copy.deepcopy(student)
        args = make_args(max_steps=3, learning_rate=0.05, optim="sgd")
        trainer = PromptKDTrainer(
            model=student,
            args=args,
            train_dataset=prompt_dataset(),
            processing_class=tiny_tokenizer(),
            prompt_encoder_config=PromptEncoderConfig(prompt_init_text=PROMPT_TEXT),
        )
        trainer.train()
        assert difference(weights(trainer.model), weights(start)) > 1e-3
        assert difference(weights(trainer.teacher_model), weights(start)) == 0
        ids = torch.tensor([[7, 8, 9]])
        with torch.no_grad():  # the copy's forward is its own, not the student's
            torch.testing.assert_close(trainer.teacher_model(input_ids=ids).logits, start(input_ids=ids).logits)

    @pytest.mark.parametrize("checkpointing", [True, False])
    def test_lora_student_is_its_own_teacher_with_the_adapter_off(self, make_args, checkpointing):
        student = tiny_model(seed=1)
        start = copy.deepcopy(student)
        args = make_args(max_steps=3, learning_rate=0.1, gradient_checkpointing=checkpointing)
        trainer = PromptKDTrainer(
            model=student,
            args=args,
            train_dataset=prompt_dataset(),
            processing_class=tiny_tokenizer(),
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=4),
            prompt_encoder_config=PromptEncoderConfig(prompt_init_text=PROMPT_TEXT),
        )
        assert trainer.teacher_model is None
        trainer.train()
        ids = torch.tensor([[7, 8, 9, 10]])
        mask = torch.ones_like(ids)
        expected = log_probs(start, ids[0].tolist(), 1, trainer.prompt_embeddings())
        got = trainer.prompted_teacher_logits(ids, mask)[0, :-1].log_softmax(-1)
        torch.testing.assert_close(got, expected.detach(), atol=1e-4, rtol=1e-4)
        with torch.no_grad():
            moved = trainer.model(input_ids=ids).logits - start(input_ids=ids).logits
        assert moved.abs().max() > 1e-3
        assert all(p.requires_grad == ("lora_" in n) for n, p in trainer.model.named_parameters())

    def test_the_first_step_equals_that_with_a_separate_teacher(self, make_args):
        results = []
        for teacher in (None, tiny_model(seed=1)):
            torch.manual_seed(0)
            trainer = PromptKDTrainer(
                model=tiny_model(seed=1),
                teacher_model=teacher,
                args=make_args(optim="sgd", learning_rate=0.1),
                train_dataset=prompt_dataset(),
                processing_class=tiny_tokenizer(),
                peft_config=LoraConfig(task_type="CAUSAL_LM", r=4),
                prompt_encoder_config=PromptEncoderConfig(prompt_init_text=PROMPT_TEXT),
            )
            trainer.train()
            results.append((trainer.state.log_history[0]["loss"], weights(trainer.model), trainer.prompt_embeddings()))
        assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
        assert difference(results[0][1], results[1][1]) < 1e-5
        assert (results[0][2] - results[1][2]).abs().max() < 1e-4

    def test_evaluating_first_leaves_the_student_to_be_prepared_for_training(self, make_args):
        """accelerate marks what it has prepared for evaluation, and would then leave it out of data parallelism."""
        trainer = PromptKDTrainer(
            model=tiny_model(seed=1),
            args=make_args(),
            train_dataset=prompt_dataset(),
            eval_dataset=prompt_dataset(4),
            processing_class=tiny_tokenizer(),
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=4),
            prompt_encoder_config=PromptEncoderConfig(prompt_init_text=PROMPT_TEXT),
        )
        trainer.evaluate()
        assert not getattr(trainer.model, "_is_accelerate_prepared", False)
        trainer.train()
        assert trainer.state.log_history[-2]["loss"] > 0


class TestEvaluation:
    def test_both_sides_equal_rows_alone(self, make_args):
        student, teacher = tiny_model(seed=1), tiny_model(seed=2)
        trainer = make_trainer(
            make_args(generation_kwargs=GREEDY, per_device_eval_batch_size=3),
            student,
            teacher,
            eval_dataset=answered_dataset(4),
        )
        metrics = trainer.evaluate()
        tokenizer, soft_prompt = tiny_tokenizer(), trainer.prompt_embeddings()
        sums = {"loss": 0.0, "reverse": 0.0, "forward": 0.0}
        sampled = answered = 0
        with torch.no_grad():
            for row in answered_dataset(4):
                prompt = tokenizer(row["prompt"])["input_ids"]
                answer = [*tokenizer(row["completion"])["input_ids"], 0]
                sample = greedy(student, prompt, 6, 0)
                q, p = (
                    log_probs(student, prompt + sample, len(prompt)),
                    log_probs(teacher, prompt + sample, len(prompt)),
                )
                pp = log_probs(teacher, prompt + sample, len(prompt), soft_prompt)
                sums["reverse"] += (q.exp() * (q - p)).sum().item()
                sums["loss"] += (q.exp() * (q - pp)).sum().item()
                q, p = (
                    log_probs(student, prompt + answer, len(prompt)),
                    log_probs(teacher, prompt + answer, len(prompt)),
                )
                sums["forward"] += (p.exp() * (p - q)).sum().item()
                sampled, answered = sampled + len(sample), answered + len(answer)
        assert metrics["eval_reverse_kl"] == pytest.approx(sums["reverse"] / sampled, rel=1e-3)
        assert metrics["eval_loss"] == pytest.approx(sums["loss"] / sampled, rel=1e-3)
        assert metrics["eval_forward_kl"] == pytest.approx(sums["forward"] / answered, rel=1e-3)

    def test_prompts_alone_are_answered_by_the_plain_teacher_once(self, make_args):
        teacher = tiny_model(seed=2)
        trainer = make_trainer(make_args(), tiny_model(seed=1), teacher, eval_dataset=prompt_dataset(4))
        first = trainer.evaluate()
        answers = copy.deepcopy(trainer._teacher_answers)
        assert len(answers) == 4
        second = trainer.evaluate()
        assert trainer._teacher_answers == answers
        for key in ("eval_loss", "eval_forward_kl", "eval_reverse_kl"):
            assert second[key] == pytest.approx(first[key], rel=1e-6)

    def test_raw_data_and_several_sets(self, make_args):
        trainer = make_trainer(make_args(), eval_dataset={"a": answered_dataset(4), "b": prompt_dataset(4)})
        metrics = trainer.evaluate()
        assert {"eval_a_forward_kl", "eval_b_forward_kl", "eval_a_reverse_kl", "eval_b_loss"} <= metrics.keys()
        assert "eval_forward_kl" in trainer.evaluate(chat_dataset(4))
        assert "test_reverse_kl" in trainer.predict(chat_dataset(4)).metrics

    def test_compute_metrics_gets_the_students_logits(self, make_args):
        shapes = []

        def compute_metrics(prediction):
            shapes.append((prediction.predictions.shape, prediction.label_ids.shape))
            return {"x": 1.0}

        trainer = make_trainer(make_args(), eval_dataset=answered_dataset(4), compute_metrics=compute_metrics)
        assert trainer.evaluate()["eval_x"] == 1.0
        assert shapes[0][0][:2] == shapes[0][1]
        assert shapes[0][0][2] == 40

    def test_evaluation_does_not_change_training(self, make_args):
        results = []
        for strategy in ("no", "steps"):
            args = make_args(max_steps=3, eval_strategy=strategy, eval_steps=1)
            trainer = make_trainer(args, eval_dataset=prompt_dataset(4))
            trainer.train()
            results.append(weights(trainer.model))
        assert difference(*results) == 0


class TestOutputs:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_prompted_teacher_logits_are_aligned(self, make_args, side):
        trainer = make_trainer(make_args())
        row = [7, 8, 9]
        ids, mask = torch.zeros(1, 6, dtype=torch.long), torch.zeros(1, 6, dtype=torch.long)
        at = slice(3, 6) if side == "left" else slice(0, 3)
        ids[0, at], mask[0, at] = torch.tensor(row), 1
        logits = trainer.prompted_teacher_logits(ids, mask)
        assert logits.shape == (1, 6, 40)
        assert logits.dtype == torch.float32
        expected = log_probs(trainer.teacher_model, [*row, 1], 1, trainer.prompt_embeddings())
        torch.testing.assert_close(logits[0, at].log_softmax(-1), expected, atol=1e-4, rtol=1e-4)

    def test_saved_parts_load_again(self, make_args, tmp_path):
        trainer = make_trainer(make_args(max_steps=2))
        trainer.train()
        trainer.save_model(str(tmp_path / "final"))
        student = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
        assert difference(weights(student), weights(trainer.model)) == 0
        teacher = PeftModel.from_pretrained(
            tiny_model(seed=2, num_hidden_layers=3), tmp_path / "final", subfolder="teacher_prompt"
        ).eval()
        ids = torch.tensor([[7, 8, 9, 10]])
        with torch.no_grad():
            theirs = teacher(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, 7:]
        torch.testing.assert_close(
            theirs, trainer.prompted_teacher_logits(ids, torch.ones_like(ids)), atol=1e-4, rtol=1e-4
        )

    def test_a_lora_student_is_saved_beside_the_prompt(self, make_args, tmp_path):
        trainer = make_trainer(make_args(), peft_config=LoraConfig(task_type="CAUSAL_LM", r=4))
        trainer.train()
        trainer.save_model(str(tmp_path / "final"))
        loaded = PeftModel.from_pretrained(tiny_model(seed=1), tmp_path / "final")
        expected = {n: p for n, p in trainer.model.named_parameters() if "lora_" in n}
        assert all(torch.equal(p, expected[n]) for n, p in loaded.named_parameters() if "lora_" in n)

    def test_model_card(self, make_args, tmp_path):
        trainer = make_trainer(make_args())
        trainer.create_model_card(model_name="x")
        card = (tmp_path / "run" / "README.md").read_text()
        assert "2402.12842" in card
        assert "kim2024promptkd" in card
        for part in (
            "| `num_virtual_tokens` | `7` |",
            PROMPT_TEXT,
            "`prompt_update` | `sequential`",
            "teacher_prompt",
        ):
            assert part in card
        assert "promptkd" in card.split("---")[1]

    def test_completions_are_printed_and_kept(self, make_args, tmp_path, capsys):
        trainer = make_trainer(make_args(log_completions=True, num_completions_to_print=1))
        trainer.train()
        (file,) = (tmp_path / "run" / "completions").iterdir()
        table = Dataset.from_parquet(str(file))
        assert set(table.column_names) == {"step", "prompt", "completion"}
        assert len(table) == 2
        assert "Prompt" in capsys.readouterr().out

    def test_nothing_is_pickled_by_us(self, make_args, tmp_path):
        make_trainer(make_args(save_strategy="steps", save_steps=1)).train()
        files = {path.name for path in (tmp_path / "run" / "checkpoint-1").rglob("*") if path.is_file()}
        theirs = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"}  # the Trainer's own
        assert not {name for name in files - theirs if name.endswith((".pt", ".pth", ".bin", ".pkl"))}

    def test_the_callers_arguments_are_left_alone(self, make_args):
        args = make_args()
        before = json.dumps(args.to_dict(), default=str)
        make_trainer(args)
        assert json.dumps(args.to_dict(), default=str) == before


class TestLossScale:
    def test_under_float16_the_prompt_has_its_own_which_falls_on_a_skipped_step(self, make_args):
        soft_prompt = SoftPrompt(PromptEncoderConfig(prompt_init_text=PROMPT_TEXT), tiny_model(), tiny_tokenizer())
        accelerator = SimpleNamespace(scaler=object(), reduce=lambda tensor, reduction: tensor)
        optimizer = PromptOptimizer(soft_prompt, PromptEncoderConfig(), make_args(), 4, accelerator)
        states = soft_prompt()
        optimizer.accumulate(StateGradient([states], [2 * states.detach()]), torch.tensor(4))
        (parameter,) = soft_prompt.parameters()
        torch.testing.assert_close(parameter.grad, parameter.detach() / 2)
        optimizer.step()
        assert optimizer.loss_scale == 1024
        states = soft_prompt()
        optimizer.accumulate(StateGradient([states], [states.detach() * float("nan")]), torch.tensor(4))
        optimizer.step()
        assert optimizer.loss_scale == 512


class TestNonFinite:
    @staticmethod
    def spoil(trainer, hook):
        original = trainer.soft_prompt.encoder.forward

        def forward(indices):
            output = original(indices)
            return hook(output) if output.requires_grad else output

        trainer.soft_prompt.encoder.forward = forward
        return original

    def test_a_bad_gradient_skips_the_prompts_step_and_stops_after_five(self, make_args):
        trainer = make_trainer(make_args(max_steps=8), dataset=prompt_dataset(16))
        start = trainer.prompt_embeddings().clone()

        def spoil_gradient(output):
            output.register_hook(lambda gradient: gradient * float("nan"))
            return output

        original = self.spoil(trainer, spoil_gradient)
        with pytest.raises(FloatingPointError, match="not finite in 5 steps in a row"):
            trainer.train()
        trainer.soft_prompt.encoder.forward = original
        assert torch.equal(trainer.prompt_embeddings(), start)
        assert trainer.state.global_step == 4
        assert [entry["prompt/skipped_steps"] for entry in trainer.state.log_history] == [1, 2, 3, 4]
        assert all(value.isfinite().all() for value in weights(trainer.model).values())

    def test_bad_logits_stop_before_they_reach_the_student(self, make_args):
        student = tiny_model(seed=1)
        trainer = make_trainer(make_args(prompt_update="simultaneous"), student)
        self.spoil(trainer, lambda output: output * float("nan"))
        with pytest.raises(
            FloatingPointError, match=r"The loss is nan at step 1.*hidden states of the prompted teacher"
        ):
            trainer.train()
        assert all(value.isfinite().all() for value in weights(student).values())


class TestRefusals:
    def test_what_the_parted_forward_pass_cannot_do(self, make_args):
        with pytest.raises(ValueError, match="`torch_compile` is True"):
            make_trainer(make_args(torch_compile=True))
        with pytest.raises(ValueError, match="`activation_offloading=True` has no meaning in PromptKD"):
            make_args(activation_offloading=True)
        with pytest.raises(ValueError, match="activated LoRA"):
            make_trainer(make_args(), peft_config=LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[3]))

    """Bad input comes back with what to do; see also test_data.py and the tests of both configs."""

    @pytest.mark.parametrize(
        ("kwargs", "error", "message"),
        [
            ({"dataset": Dataset.from_dict({"prompt": []})}, ValueError, "`train_dataset` is empty"),
            (
                {"dataset": Dataset.from_dict({"text": ["x"]})},
                ValueError,
                "neither a `messages` nor a `prompt` column",
            ),
            ({"eval_dataset": Dataset.from_dict({"text": ["x"]})}, ValueError, "`eval_dataset` has neither"),
            ({"prompt_encoder_config": LoraConfig()}, TypeError, "LoraConfig, which does not describe a soft prompt"),
            ({"formatting_func": str}, ValueError, "`formatting_func` is not supported"),
            (
                {"peft_config": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")},
                ValueError,
                r"prompt learning for the \*student\*",
            ),
            (
                {"dataset": Dataset.from_dict({"prompt": ["the " * 200]})},
                ValueError,
                "1 of 1 prompts in `train_dataset`",
            ),
        ],
    )
    def test_are_named_before_training(self, make_args, kwargs, error, message):
        with pytest.raises(error, match=message):
            make_trainer(make_args(max_length=64), **kwargs)

    def test_prompts_alone_below_lmbda_one(self, make_args):
        with pytest.raises(ValueError, match=r"prompts without answers.*`lmbda` is below 1.*lmbda=1\.0"):
            make_trainer(make_args(lmbda=0.9))

    def test_different_tokenizers_come_before_any_weights(self, make_args, tmp_path):
        other = [*WORDS]
        other[0] = "imagine"
        tiny_tokenizer(other).save_pretrained(tmp_path)  # no weights there: they must not be asked for
        with pytest.raises(ValueError, match="first token that differs has id 6, which is 'suppose' for the student"):
            make_trainer(make_args(), teacher=str(tmp_path))

    def test_a_loaded_teachers_tokenizer_is_checked_too(self, make_args, tmp_path):
        tiny_tokenizer(WORDS[::-1]).save_pretrained(tmp_path)
        tiny_model(seed=2).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="different tokenizers"):
            make_trainer(make_args(), teacher=AutoModelForCausalLM.from_pretrained(tmp_path))

    def test_an_init_text_without_tokens(self, make_args):
        from tokenizers import normalizers

        tokenizer = tiny_tokenizer()
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace("?", "")
        with pytest.raises(ValueError, match="turns into no tokens"):
            make_trainer(
                make_args(),
                processing_class=tokenizer,
                prompt_encoder_config=PromptEncoderConfig(prompt_init_text="??"),
            )

    def test_a_teacher_without_input_embeddings(self, make_args, monkeypatch):
        teacher = tiny_model(seed=2)
        monkeypatch.setattr(teacher, "get_input_embeddings", lambda: None)
        with pytest.raises(ValueError, match="no input embeddings"):
            make_trainer(make_args(), teacher=teacher)

    def test_one_object_for_both(self, make_args):
        student = tiny_model()
        with pytest.raises(ValueError, match="the very object that is trained"):
            make_trainer(make_args(), student, student)

    def test_the_model_below_the_students_adapter_as_teacher(self, make_args):
        base = tiny_model()
        with pytest.raises(ValueError, match="the very object that is trained"):
            make_trainer(make_args(), get_peft_model(base, LoraConfig(task_type="CAUSAL_LM")), base)

    def test_a_teacher_with_a_soft_prompt(self, make_args):
        teacher = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
        with pytest.raises(ValueError, match="already carries a soft prompt"):
            make_trainer(make_args(), teacher=teacher)

    def test_init_kwargs_for_a_loaded_teacher(self, make_args):
        with pytest.raises(ValueError, match="`teacher_model_init_kwargs` is set"):
            make_trainer(make_args(teacher_model_init_kwargs={"dtype": "float32"}))

    def test_a_config_of_another_trainer(self, tmp_path):
        from trl import SFTConfig

        with pytest.raises(TypeError, match="SFTConfig; PromptKDTrainer needs a"):
            make_trainer(SFTConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True))

    def test_more_positions_than_the_models_have(self, make_args):
        with pytest.raises(ValueError, match=r"128 positions, .* needs 1[34]\d"):
            make_trainer(make_args(max_new_tokens=125), tiny_model("gpt2"), tiny_model("gpt2", seed=2))
