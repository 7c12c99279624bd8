"""Infinities, NaN, and nothing to train on: a finite loss or a named error, never a silent NaN."""

import logging
import math
from functools import partial

import pytest
import torch
from tiny import answered_dataset, difference, prompt_dataset, tiny_model, tiny_tokenizer, weights

from trl_promptkd import PrimedDistillTrainer, PrimingTemplate, PromptEncoderConfig, PromptKDTrainer
from trl_promptkd.losses.primed_distill import primed_loss_sums
from trl_promptkd.losses.promptkd import promptkd_loss_sums


class Masking(torch.nn.Linear):
    """An output head that rules some tokens out, as models do whose vocabulary has entries for images."""

    lowest = -math.inf

    def forward(self, states):
        return super().forward(states).index_fill(-1, torch.tensor([7, 30]), self.lowest)


def masking(model, lowest=-math.inf):
    model.lm_head.__class__ = Masking
    model.lm_head.lowest = lowest
    return model


def make_trainer(method, make_args, make_primed_args, student=None, teacher=None, **settings):
    models = {
        "model": student or tiny_model(seed=1),
        "teacher_model": teacher or tiny_model(seed=2),
        "processing_class": tiny_tokenizer(),
    }
    if method == "promptkd":
        config = PromptEncoderConfig(prompt_init_text="suppose you are a student .")
        return PromptKDTrainer(
            **models, args=make_args(**settings), train_dataset=prompt_dataset(), prompt_encoder_config=config
        )
    return PrimedDistillTrainer(
        **models,
        args=make_primed_args(**settings),
        train_dataset=answered_dataset(),
        priming=PrimingTemplate("red blue "),
    )


@pytest.mark.parametrize("lowest", [-math.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("method", ["promptkd", "primed"])
class TestRuledOutTokens:
    def test_the_student_learns_the_others(self, method, beta, lowest, make_args, make_primed_args):
        settings = {"beta": beta} if method == "promptkd" else {"kd_beta": beta, "alpha": 0.0}
        teacher = masking(tiny_model(seed=2), lowest)
        trainer = make_trainer(method, make_args, make_primed_args, teacher=teacher, max_steps=3, **settings)
        before = weights(trainer.model)
        trainer.train()
        for entry in trainer.state.log_history[:3]:
            assert all(math.isfinite(value) for value in entry.values()), entry
            assert 0 < entry["loss"] < 200
        after = weights(trainer.model)
        assert all(value.isfinite().all() for value in after.values())
        assert difference(after, before) > 0


class TestLossOnWhatIsLeft:
    """Six tokens, two of which the teacher rules out: the loss is that of the other four."""

    def test_promptkd(self):
        torch.manual_seed(0)
        student, prompted, plain = torch.randn(3, 5, 6)
        left = [0, 1, 3, 5]
        masked = [part.index_fill(-1, torch.tensor([2, 4]), -math.inf) for part in (prompted, plain)]
        sums = partial(promptkd_loss_sums, temperature=1.7)
        expected = sums(*(part[:, left] for part in (student, prompted, plain)))
        for found, value in zip(sums(student, *masked), expected, strict=True):
            torch.testing.assert_close(found, value)

    @pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
    def test_primed(self, beta):
        torch.manual_seed(0)
        student, teacher = torch.randn(2, 5, 6)
        left, tokens = [0, 1, 3, 5], torch.tensor([0, 1, 1, 0, 1])
        masked = teacher.index_fill(-1, torch.tensor([2, 4]), -math.inf)
        found = primed_loss_sums(student, masked, tokens, alpha=0.4, temperature=2.0, beta=beta)
        expected = primed_loss_sums(student[:, left], teacher[:, left], tokens, alpha=0.4, temperature=2.0, beta=beta)
        torch.testing.assert_close(found.divergence, expected.divergence)
        torch.testing.assert_close(found.student_teacher, expected.student_teacher)
        torch.testing.assert_close(found.teacher_log_prob, expected.teacher_log_prob)
        # The hard labels are scored by all of the student's distribution
        all_tokens = -student.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).sum()
        torch.testing.assert_close(found.cross_entropy, all_tokens)


class TestNamedErrors:
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("role", ["teacher", "student"])
    @pytest.mark.parametrize("method", ["promptkd", "primed"])
    def test_states_that_are_not_finite_name_the_model(self, method, role, value, make_args, make_primed_args):
        models = {"student": tiny_model(seed=1), "teacher": tiny_model(seed=2)}
        trainer = make_trainer(method, make_args, make_primed_args, **models)
        models[role].model.norm.weight.data[3] = value
        trainer.rollouts.sample = lambda model, prompts, *args: [[10, 0] for _ in prompts]
        with pytest.raises(
            FloatingPointError, match=r"The loss is nan at step 1\. Not finite already: the hidden"
        ) as error:
            trainer.train()
        assert role in str(error.value).split("Check")[0]
        assert ("student" in str(error.value)) == (role == "student")

    @pytest.mark.parametrize("method", ["promptkd", "primed"])
    def test_evaluation_too(self, method, make_args, make_primed_args):
        teacher = tiny_model(seed=2)
        trainer = make_trainer(method, make_args, make_primed_args, teacher=teacher)
        teacher.lm_head.weight.data.fill_(math.nan)
        with pytest.raises(FloatingPointError, match="The loss is nan in the evaluation"):
            trainer.evaluate(answered_dataset(2))


class TestEmptyCompletions:
    def test_a_student_that_ends_at_once_is_trained_on_its_end(self, make_args):
        student = tiny_model(seed=1)
        trainer = make_trainer("promptkd", make_args, None, student=student, max_steps=2)
        trainer.rollouts.sample = lambda model, prompts, *args: [[0] for _ in prompts]
        trainer.train()
        first = trainer.state.log_history[0]
        assert first["rollout/mean_length"] == 1
        assert first["rollout/terminated_share"] == 1
        assert math.isfinite(first["loss"])
        assert first["loss"] > 0

    @pytest.mark.parametrize("method", ["promptkd", "primed"])
    def test_no_token_at_all_is_a_warning_and_a_zero_loss(
        self, method, make_args, make_primed_args, caplog, propagate
    ):
        source = {} if method == "promptkd" else {"response_source": "student"}
        settings = {"optim": "sgd", "weight_decay": 0.0, **source}
        trainer = make_trainer(method, make_args, make_primed_args, **settings)
        trainer.rollouts.sample = lambda model, prompts, *args: [[] for _ in prompts]
        before = weights(trainer.model)
        with caplog.at_level(logging.WARNING):
            trainer.train()
        assert "Step 1 has nothing to train on" in caplog.text
        assert trainer.state.log_history[0]["loss"] == 0
        assert difference(weights(trainer.model), before) == 0

    def test_some_rows_without_a_token_do_not_count(self, make_args):
        losses = []
        for answers in ([[10, 11, 0], []], [[10, 11, 0]]):
            trainer = make_trainer("promptkd", make_args, None, per_device_train_batch_size=len(answers), seed=1)
            trainer.train_dataset = trainer.train_dataset.select([0] * len(answers))
            trainer.rollouts.sample = lambda model, prompts, *args, answers=answers: answers[: len(prompts)]
            trainer.train()
            losses.append(trainer.state.log_history[0]["loss"])
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
