"""Infinities, NaN, and nothing to train on: a finite loss or a named error, never a silent NaN."""

import logging
import math

import pytest
import torch
from tiny import answered_dataset, difference, tiny_model, weights
from trainers import Maker, answers_always, equal, logged

from trl_promptkd.data import DataCollatorForPromptCompletion


class Masking(torch.nn.Linear):
    """An output head that rules some tokens out, as models do whose vocabulary has entries for images."""

    lowest = -math.inf

    def forward(self, states):
        return super().forward(states).index_fill(-1, torch.tensor([7, 30]), self.lowest)


@pytest.mark.parametrize("lowest", [-math.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize(
    ("method", "settings"),
    [("promptkd", {"beta": beta}) for beta in (0.0, 0.5, 1.0)]
    + [("primed", {"kd_beta": beta, "alpha": 0.0}) for beta in (0.0, 0.5, 1.0)],
)
class TestRuledOutTokens:
    def test_the_student_learns_the_others(self, method, settings, lowest, tmp_path):
        teacher = tiny_model(seed=2)
        teacher.lm_head.__class__ = Masking
        teacher.lm_head.lowest = lowest
        trainer = Maker(method, tmp_path)(teacher_model=teacher, max_steps=3, **settings)
        before = weights(trainer.model)
        trainer.train()
        for entry in trainer.state.log_history[:3]:
            assert all(math.isfinite(value) for value in entry.values()), entry
            assert 0 < entry["loss"] < 200
        after = weights(trainer.model)
        assert all(value.isfinite().all() for value in after.values())
        assert difference(after, before) > 0


class TestNamedErrors:
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("role", ["teacher", "student"])
    def test_states_that_are_not_finite_name_the_model(self, make, role, value):
        models = {"student": tiny_model(seed=1), "teacher": tiny_model(seed=2)}
        trainer = make(*models.values())
        models[role].model.norm.weight.data[3] = value
        answers_always(trainer.model, [10, 0])
        before = weights(models["student"])
        with pytest.raises(
            FloatingPointError, match=r"The loss is nan at step 1\. Not finite already: the hidden"
        ) as error:
            trainer.train()
        assert role in str(error.value).split("Check")[0]
        assert ("student" in str(error.value)) == (role == "student")
        assert role == "student" or equal(weights(models["student"]), before)

    def test_evaluation_too(self, make):
        teacher = tiny_model(seed=2)
        trainer = make(teacher_model=teacher)
        teacher.lm_head.weight.data.fill_(math.nan)
        with pytest.raises(FloatingPointError, match="The loss is nan in the evaluation"):
            trainer.evaluate(answered_dataset(2))


class TestEmptyCompletions:
    def test_a_student_that_ends_at_once_is_trained_on_its_end(self, promptkd):
        trainer = promptkd(max_steps=2)
        answers_always(trainer.model, [0])
        trainer.train()
        first = trainer.state.log_history[0]
        assert first["rollout/mean_length"] == 1
        assert first["rollout/terminated_share"] == 1
        assert math.isfinite(first["loss"])
        assert first["loss"] > 0

    def test_no_token_at_all_is_a_warning_and_a_zero_loss(self, make, caplog, propagate):
        source = {} if make.method == "promptkd" else {"response_source": "student"}
        trainer = make(optim="sgd", weight_decay=0.0, **source)
        answers_always(trainer.model, [])
        before = weights(trainer.model)
        with caplog.at_level(logging.WARNING):
            trainer.train()
        assert "Step 1 has nothing to train on" in caplog.text
        assert logged(trainer, "loss")[0] == 0
        assert difference(weights(trainer.model), before) == 0

    def test_some_rows_without_a_token_do_not_count(self, promptkd):
        pad, losses = DataCollatorForPromptCompletion(0), []
        for answers in ([[10, 11, 0], []], [[10, 11, 0]]):
            rows = [{"prompt_ids": [12, 13], "completion_ids": ids} for ids in answers]
            trainer = promptkd(lmbda=0.0, data_collator=lambda _, rows=rows: pad(rows))
            trainer.train()
            losses.append(logged(trainer, "loss")[0])
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
