"""What only PromptKD does. What both trainers promise is in test_trl_conventions.py and its neighbours."""

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
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
from trainers import (
    GREEDY,
    PROMPT_TEXT,
    SGD,
    answers_always,
    equal,
    keep_windows,
    logged,
    lora,
    trained_rows,
)

from trl_promptkd import PromptEncoderConfig, SoftPrompt
from trl_promptkd.losses.chunked import StateGradient
from trl_promptkd.trainer.prompt_optimizer import PromptOptimizer


def counted_passes(teacher, what=lambda: 1):
    """Grows by `what()` at each forward pass of the teacher."""
    calls = []
    teacher.get_decoder().layers[0].register_forward_hook(lambda *_: calls.append(what()))
    return calls


class TestOneStep:
    """One whole step against the row-by-row implementation in `reference.py`."""

    @pytest.mark.parametrize("direction", ["reverse", "forward"])
    @pytest.mark.parametrize("update", ["sequential", "simultaneous"])
    @pytest.mark.parametrize(("family", "weight"), [("llama", 1.0), ("gpt2", 0.5), ("opt", 1.0)])
    def test_equals_rows_alone(self, promptkd, family, weight, update, direction):
        student, teacher = tiny_model(family, seed=1), tiny_model(family, seed=2)
        ref_student, ref_teacher = copy.deepcopy(student), copy.deepcopy(teacher)
        trainer = promptkd(
            student,
            teacher,
            prompt={"prompt_learning_rate": 0.01},
            gradient_accumulation_steps=2,
            prompt_update=update,
            prompt_divergence=direction,
            regularization_coef=weight,
            generation_kwargs=GREEDY,
            **SGD,
        )
        before = weights(teacher)
        soft_prompt = trainer.prompt_embeddings().clone()
        windows = keep_windows(trainer)
        trainer.train()

        (window,) = windows
        assert [len(batch) for batch in window] == [2, 2]
        assert len({len(prompt) for batch in window for prompt, _ in batch}) > 1  # there is padding
        for prompt, completion in window[0] + window[1]:
            assert completion == greedy(ref_student, prompt, trainer.args.max_new_tokens, 0)
        loss, prompt_norm, norm = promptkd_step(
            ref_student, ref_teacher, soft_prompt, window, 0.05, 0.01, update, direction, weight
        )
        log = trainer.state.log_history[0]
        assert log["loss"] == pytest.approx(loss, rel=1e-3)
        assert log["prompt/grad_norm"] == pytest.approx(prompt_norm, rel=1e-3)
        assert log["grad_norm"] == pytest.approx(norm, rel=1e-3)
        assert difference(weights(trainer.model), weights(ref_student)) < 1e-4
        assert (trainer.prompt_embeddings() - soft_prompt.detach()).abs().max() < 5e-3
        assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
        assert all(parameter.grad is None for parameter in teacher.parameters())

    @pytest.mark.parametrize("update", ["sequential", "simultaneous"])
    def test_a_prompt_that_does_not_learn_is_a_fixed_one(self, promptkd, update):
        """The student learns from the teacher behind it as from any, and the teacher runs once a micro-batch: neither
        plain nor with a gradient."""
        student, teacher = tiny_model(seed=1), tiny_model(seed=2)
        ref_student, ref_teacher = copy.deepcopy(student), copy.deepcopy(teacher)
        fixed = {"prompt_learning_rate": 0.0}
        settings = SGD | {"logging_steps": 100, "logging_first_step": False}
        trainer = promptkd(
            student, teacher, prompt=fixed, gradient_accumulation_steps=2, prompt_update=update, **settings
        )
        soft_prompt = trainer.prompt_embeddings().clone()
        windows, gradients = keep_windows(trainer), counted_passes(teacher, torch.is_grad_enabled)
        trainer.train()
        promptkd_step(ref_student, ref_teacher, soft_prompt.clone(), windows[0], 0.05, 0.0, update)
        assert gradients == [False, False]
        assert difference(weights(trainer.model), weights(ref_student)) < 1e-4
        assert torch.equal(trainer.prompt_embeddings(), soft_prompt)

    def test_logged_values_equal_rows_alone(self, promptkd):
        student, teacher = tiny_model(seed=1), tiny_model(seed=2)
        reference = copy.deepcopy(student)
        trainer = promptkd(student, teacher, prompt_update="simultaneous")
        soft_prompt = trainer.prompt_embeddings()
        rows = trained_rows(trainer)
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

    def test_loss_temperature_divides_both_logits(self, promptkd):
        """Trap 7: sampling and loss have a temperature each."""
        student, teacher = tiny_model(seed=1), tiny_model(seed=2)
        reference = copy.deepcopy(student)
        trainer = promptkd(student, teacher, loss_temperature=3.0, temperature=0.7, prompt_update="simultaneous")
        soft_prompt = trainer.prompt_embeddings()
        assert trainer.generation_config.temperature == 0.7
        rows = trained_rows(trainer)
        total = 0.0
        with torch.no_grad():
            for prompt, completion in rows:
                ids, first = prompt + completion, len(prompt)
                q = (log_probs(reference, ids, first) / 3).log_softmax(-1)
                pp = (log_probs(teacher, ids, first, soft_prompt) / 3).log_softmax(-1)
                total += (q.exp() * (q - pp)).sum().item()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(total / sum(len(c) for _, c in rows), rel=1e-3)


class TestTokenCounts:
    def test_the_data_answers_are_not_counted_on_policy(self, promptkd):
        """Trap 1: `GKDTrainer` divides by the number of tokens of the answers in the data."""
        losses = []
        for dataset in (answered_dataset(), prompt_dataset()):
            trainer = promptkd(generation_kwargs=GREEDY, train_dataset=dataset)
            trainer.train()
            losses.append(trainer.state.log_history[0]["loss"])
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)

    def test_the_logged_loss_is_a_mean_over_steps_with_larger_logging_steps(self, promptkd):
        trainer = promptkd(
            max_steps=4, logging_steps=4, gradient_accumulation_steps=2, train_dataset=prompt_dataset(16)
        )
        trainer.train()
        log = trainer.state.log_history[0]
        assert log["loss"] == pytest.approx(log["kl/student_prompted"], rel=0.1)


class TestDataSources:
    @pytest.mark.parametrize("rows", [answered_dataset, chat_dataset])
    def test_off_policy_trains_on_the_data_with_its_end_of_text(self, promptkd, rows):
        completions = [ids for _, ids in trained_rows(promptkd(lmbda=0.0, train_dataset=rows()))]
        assert all(ids[-1] == 0 and len(ids) > 1 for ids in completions)
        tokenizer = tiny_tokenizer()
        assert all(tokenizer.decode(ids[:-1]) in " ".join(WORDS) for ids in completions)

    def test_seq_kd_trains_on_the_plain_teachers_answers(self, promptkd):
        teacher = tiny_model(seed=2)
        settings = {"lmbda": 0.0, "seq_kd": True, "generation_kwargs": GREEDY}
        rows = trained_rows(promptkd(teacher_model=teacher, train_dataset=prompt_dataset(), **settings))
        assert [completion for _, completion in rows] == [greedy(teacher, prompt, 6, 0) for prompt, _ in rows]

    def test_mixed_draws_row_by_row_about_as_often_as_asked(self, promptkd):
        dataset = Dataset.from_list([{"prompt": "the cat", "completion": " red blue green"}] * 32)
        settings = {"lmbda": 0.5, "max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 0.0}
        rows = trained_rows(promptkd(train_dataset=dataset, **settings))
        from_data = sum(tiny_tokenizer().decode(completion) == "red blue green <eos>" for _, completion in rows)
        assert 6 <= from_data <= 26

    def test_rollouts_stop_at_the_teachers_end_of_turn_too(self, promptkd):
        teacher = tiny_model(seed=2)
        teacher.generation_config.eos_token_id = [0, 11]
        trainer = promptkd(teacher_model=teacher, max_steps=4)
        assert trainer.generation_config.eos_token_id == [0, 11]
        assert all(11 not in completion[:-1] for _, completion in trained_rows(trainer))

    def test_rollout_batch_size_bounds_what_is_generated_at_once(self, promptkd, monkeypatch):
        sizes = []
        original = type(tiny_model()).generate

        def spy(self, input_ids, **kwargs):
            sizes.append(len(input_ids))
            return original(self, input_ids=input_ids, **kwargs)

        monkeypatch.setattr(type(tiny_model()), "generate", spy)
        for size in (None, 3):
            promptkd(gradient_accumulation_steps=4, rollout_batch_size=size).train()
        assert sizes == [8, 3, 3, 2]

    @pytest.mark.parametrize("update", ["sequential", "simultaneous"])
    def test_rows_are_shared_out_by_length_but_those_of_the_last_micro_batch_stay(self, promptkd, update):
        """`sequential`: the last micro-batch learns from another prompt, so that who is in it matters."""
        settings = {"gradient_accumulation_steps": 4, "prompt_update": update}
        found = []
        for lmbda in (0.0, 1.0):  # the data's answers are not shared out
            trainer = promptkd(lmbda=lmbda, **settings)
            answers_always(trainer.model, [7])
            windows = keep_windows(trainer)
            trainer.train()
            found.append([[prompt for prompt, _ in batch] for batch in windows[0]])
        plain, grouped = found
        assert sorted(itertools.chain(*plain)) == sorted(itertools.chain(*grouped))
        free = grouped[:-1] if update == "sequential" else grouped
        lengths = [len(prompt) for prompt in itertools.chain(*free)]
        assert lengths == sorted(lengths, reverse=True)
        assert sorted(grouped[-1]) == sorted(plain[-1]) or update == "simultaneous"
        assert plain != grouped


class TestSchedules:
    def test_the_regularizer_falls_and_the_prompt_has_its_own_schedule(self, promptkd):
        prompt = {"prompt_learning_rate": 0.01, "prompt_lr_scheduler_type": "linear", "prompt_warmup_steps": 2}
        trainer = promptkd(prompt=prompt, max_steps=4, lr_scheduler_type="constant", regularization_coef=2.0)
        trainer.train()
        assert logged(trainer, "regularization_weight") == [2.0, 1.5, 1.0, 0.5]
        assert logged(trainer, "prompt/learning_rate") == pytest.approx([0.0, 0.005, 0.01, 0.005])
        assert logged(trainer, "learning_rate") == pytest.approx([1e-3] * 4)

    def test_a_schedule_that_waits_for_metrics_is_refused(self, promptkd):
        trainer = promptkd(
            lr_scheduler_type="greedy", eval_strategy="steps", eval_steps=1, eval_dataset=prompt_dataset(2)
        )
        with pytest.raises(ValueError, match="cannot follow the schedule 'greedy'"):
            trainer.train()

    def test_clipping_bounds_the_prompts_gradient(self, promptkd, monkeypatch):
        norms = []

        def step(self, closure=None):
            norms.append([float(p.grad.norm()) for group in self.param_groups for p in group["params"]])

        monkeypatch.setattr(torch.optim.AdamW, "step", step)
        promptkd(prompt={"prompt_max_grad_norm": 0.25}, optim="sgd").train()
        assert norms == [[pytest.approx(0.25, rel=1e-3)]]

    def test_without_regularizer_the_plain_teacher_is_asked_on_logged_steps_only(self, promptkd):
        trainer = promptkd(max_steps=4, logging_steps=2, regularization_coef=0.0, prompt_update="simultaneous")
        calls = counted_passes(trainer.teacher_model, lambda: trainer.state.global_step)
        trainer.train()
        assert calls == [0, 1, 1, 2, 3, 3]
        assert "kl/prompt_gain" in trainer.state.log_history[0]

    def test_sequential_asks_the_prompted_teacher_twice_at_the_windows_end_only(self, promptkd):
        trainer = promptkd(gradient_accumulation_steps=3)
        calls = counted_passes(trainer.teacher_model)
        trainer.train()
        assert len(calls) == 3 * 2 + 1


class TestTeacherCheckpointing:
    @pytest.mark.parametrize("itself", [False, True])
    @pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
    def test_changes_nothing_but_what_is_kept(self, promptkd, family, itself):
        """`itself`: the teacher is the student below its adapter."""
        runs = []
        for enabled in (False, True):
            student, teacher = tiny_model(family, seed=1), None
            if itself:
                torch.manual_seed(0)
                student = get_peft_model(student, lora(init_lora_weights=False))
            else:
                teacher = tiny_model(family, seed=2, **({"dropout": 0.3} if family == "opt" else {}))
            settings = {"gradient_checkpointing": False, "teacher_gradient_checkpointing": enabled}
            trainer = promptkd(student, teacher, max_steps=2, gradient_accumulation_steps=2, **settings)
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

    def test_a_student_that_is_its_own_teacher_and_keeps_its_dropout_is_refused(self, promptkd):
        settings = {"teacher_gradient_checkpointing": True, "disable_dropout": False}
        with pytest.raises(ValueError, match="the teacher is the student below its adapter, and would have its drop"):
            promptkd(teacher_model=None, peft_config=lora(), **settings)

    def test_a_teacher_without_such_layers_is_refused(self, promptkd, monkeypatch):
        from trl_promptkd.models import teacher

        monkeypatch.setattr(teacher, "GradientCheckpointingLayer", torch.nn.Bilinear)
        with pytest.raises(ValueError, match="`teacher_gradient_checkpointing` is True, but LlamaForCausalLM has no"):
            promptkd(teacher_gradient_checkpointing=True)


class TestEvaluation:
    def test_both_sides_equal_rows_alone(self, promptkd):
        student, teacher = tiny_model(seed=1), tiny_model(seed=2)
        settings = {"generation_kwargs": GREEDY, "per_device_eval_batch_size": 3}  # batches of 3 rows and of 1
        trainer = promptkd(student, teacher, eval_dataset=answered_dataset(4), **settings)
        metrics = trainer.evaluate()
        tokenizer, soft_prompt = tiny_tokenizer(), trainer.prompt_embeddings()
        sums, sampled, answered = {"reverse": 0.0, "forward": 0.0, "loss": 0.0}, 0, 0
        with torch.no_grad():
            for row in answered_dataset(4):
                prompt = tokenizer(row["prompt"])["input_ids"]
                answer = [*tokenizer(row["completion"])["input_ids"], 0]
                sample = greedy(student, prompt, 6, 0)
                q, p = (log_probs(model, prompt + sample, len(prompt)) for model in (student, teacher))
                pp = log_probs(teacher, prompt + sample, len(prompt), soft_prompt)
                sums["reverse"] += (q.exp() * (q - p)).sum().item()
                sums["loss"] += (q.exp() * (q - pp)).sum().item()
                q, p = (log_probs(model, prompt + answer, len(prompt)) for model in (student, teacher))
                sums["forward"] += (p.exp() * (p - q)).sum().item()
                sampled, answered = sampled + len(sample), answered + len(answer)
        assert metrics["eval_reverse_kl"] == pytest.approx(sums["reverse"] / sampled, rel=1e-3)
        assert metrics["eval_loss"] == pytest.approx(sums["loss"] / sampled, rel=1e-3)
        assert metrics["eval_forward_kl"] == pytest.approx(sums["forward"] / answered, rel=1e-3)

    def test_prompts_alone_are_answered_by_the_plain_teacher_once(self, promptkd):
        teacher = tiny_model(seed=2)
        trainer = promptkd(teacher_model=teacher, eval_dataset=prompt_dataset(4))
        answered, original = [], teacher.generate
        teacher.generate = lambda input_ids, **kwargs: (
            answered.append(len(input_ids)) or original(input_ids=input_ids, **kwargs)
        )
        first, second = trainer.evaluate(), trainer.evaluate()
        assert answered == [4]
        for key in ("eval_loss", "eval_forward_kl", "eval_reverse_kl"):
            assert second[key] == pytest.approx(first[key], rel=1e-6)

    def test_lets_the_teacher_answer_where_the_datas_answer_cannot_be_used(self, promptkd):
        rewriting = tiny_tokenizer()
        rewriting.chat_template += "{% if add_generation_prompt %}red{% endif %}"  # as one that opens thoughts
        trainer = promptkd(eval_dataset=chat_dataset(4), processing_class=rewriting)
        prompts = Dataset.from_list([{"prompt": row["messages"][:-1]} for row in chat_dataset(4)])
        alone = promptkd(eval_dataset=prompts, processing_class=rewriting)
        assert trainer.eval_dataset.to_list() == alone.eval_dataset.to_list()
        assert trainer.evaluate()["eval_forward_kl"] == pytest.approx(alone.evaluate()["eval_forward_kl"])

    def test_judges_the_datas_answers(self, promptkd):
        trainer = promptkd(train_dataset=chat_dataset(4), eval_dataset=chat_dataset(4))
        assert all(trainer.eval_dataset["completion_ids"])
        assert not any(trainer.train_dataset["completion_ids"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompted_teacher_logits_are_aligned(promptkd, side):
    trainer = promptkd()
    row = [7, 8, 9]
    ids, mask = torch.zeros(1, 6, dtype=torch.long), torch.zeros(1, 6, dtype=torch.long)
    at = slice(3, 6) if side == "left" else slice(0, 3)
    ids[0, at], mask[0, at] = torch.tensor(row), 1
    logits = trainer.prompted_teacher_logits(ids, mask)
    assert logits.shape == (1, 6, 40)
    assert logits.dtype == torch.float32
    expected = log_probs(trainer.teacher_model, [*row, 1], 1, trainer.prompt_embeddings())
    torch.testing.assert_close(logits[0, at].log_softmax(-1), expected, atol=1e-4, rtol=1e-4)


def test_more_positions_than_the_models_have(promptkd):
    with pytest.raises(ValueError, match=r"128 positions, .* needs 1[34]\d"):
        promptkd(tiny_model("gpt2"), tiny_model("gpt2", seed=2), max_new_tokens=125)


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
    def spoil(trainer, change):
        """Changes the soft prompt where it is trained."""
        return trainer.soft_prompt.register_forward_hook(
            lambda module, args, output: change(output) if output.requires_grad else output
        )

    def test_a_bad_gradient_skips_the_prompts_step_and_stops_after_five(self, promptkd):
        trainer = promptkd(max_steps=8, train_dataset=prompt_dataset(16))
        start = trainer.prompt_embeddings().clone()

        def spoil_gradient(output):
            output.register_hook(lambda gradient: gradient * float("nan"))
            return output

        handle = self.spoil(trainer, spoil_gradient)
        with pytest.raises(FloatingPointError, match="not finite in 5 steps in a row"):
            trainer.train()
        handle.remove()
        assert torch.equal(trainer.prompt_embeddings(), start)
        assert trainer.state.global_step == 4
        assert [entry["prompt/skipped_steps"] for entry in trainer.state.log_history] == [1, 2, 3, 4]
        assert all(value.isfinite().all() for value in weights(trainer.model).values())

    def test_bad_logits_stop_before_they_reach_the_student(self, promptkd):
        trainer = promptkd(prompt_update="simultaneous")
        before = weights(trainer.model)
        self.spoil(trainer, lambda output: output * float("nan"))
        with pytest.raises(FloatingPointError, match=r"The loss is nan at step 1.*states of the prompted teacher"):
            trainer.train()
        assert equal(weights(trainer.model), before)
