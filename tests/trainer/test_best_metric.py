import logging

import pytest
from tiny import answered_dataset, prompt_dataset, tiny_model, tiny_tokenizer
from transformers import EarlyStoppingCallback

from trl_promptkd import PrimedDistillTrainer, PrimingTemplate, PromptEncoderConfig, PromptKDTrainer


EACH_STEP = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
BEST = {**EACH_STEP, "load_best_model_at_end": True}


@pytest.fixture(params=["promptkd", "primed"])
def make(request, make_args, make_primed_args):
    """The settings and the trainer of either kind."""

    class Make:
        kind = request.param
        args = staticmethod(make_args if request.param == "promptkd" else make_primed_args)

        def trainer(self, callbacks=None, eval_dataset=None, rows=answered_dataset, **settings):
            given = {
                "model": tiny_model(seed=1),
                "teacher_model": tiny_model(seed=2),
                "args": self.args(**settings),
                "train_dataset": rows(),
                "eval_dataset": rows(4) if eval_dataset is None else eval_dataset,
                "processing_class": tiny_tokenizer(),
                "callbacks": callbacks,
            }
            if self.kind == "promptkd":
                prompt = PromptEncoderConfig(prompt_init_text="suppose you are a student .")
                return PromptKDTrainer(prompt_encoder_config=prompt, **given)
            return PrimedDistillTrainer(priming=PrimingTemplate("red "), **given)

    return Make()


class TestDefault:
    @pytest.mark.parametrize(
        "settings",
        [BEST, {**EACH_STEP, "save_strategy": "best"}, {"lr_scheduler_type": "reduce_lr_on_plateau", **EACH_STEP}],
    )
    def test_promptkd_takes_the_forward_kl(self, make_args, settings):
        args = make_args(**settings)
        assert (args.metric_for_best_model, args.greater_is_better) == ("eval_forward_kl", False)

    @pytest.mark.parametrize(
        ("source", "metric"), [("dataset", "eval_ce"), ("teacher", "eval_ce"), ("student", "eval_loss")]
    )
    def test_priming_takes_the_cross_entropy_of_answers(self, make_primed_args, source, metric):
        args = make_primed_args(response_source=source, **BEST)
        assert (args.metric_for_best_model, args.greater_is_better) == (metric, False)

    def test_nothing_where_nothing_needs_it(self, make):
        args = make.args(**EACH_STEP)
        assert args.metric_for_best_model is None

    def test_the_best_checkpoint_is_that_of_the_lowest(self, make):
        trainer = make.trainer(learning_rate=0.05, **{**BEST, "max_steps": 3})
        trainer.train()
        name = "eval_forward_kl" if make.kind == "promptkd" else "eval_ce"
        values = [entry[name] for entry in trainer.state.log_history if name in entry]
        assert trainer.state.best_metric == min(values)
        assert len(set(values)) == 3

    def test_on_the_students_samples(self, make_primed_args):
        trainer = PrimedDistillTrainer(
            tiny_model(seed=1),
            make_primed_args(response_source="student", **BEST),
            train_dataset=prompt_dataset(),
            eval_dataset=prompt_dataset(4),
            processing_class=tiny_tokenizer(),
            priming=PrimingTemplate("red "),
            teacher_model=tiny_model(seed=2),
        )
        trainer.train()
        values = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        assert trainer.state.best_metric == min(values)


class TestUsersChoice:
    @pytest.mark.parametrize("metric", ["loss", "eval_loss", "rougeL", "score"])
    def test_is_kept(self, make, metric):
        args = make.args(metric_for_best_model=metric, **BEST)
        assert args.metric_for_best_model == metric
        assert args.greater_is_better == (not metric.endswith("loss"))

    @pytest.mark.parametrize("prefix", ["", "eval_", "eval_dev_"])
    def test_divergences_fall(self, make, prefix):
        """transformers takes for granted that what is not called a loss rises."""
        name = "reverse_kl" if make.kind == "promptkd" else "kl/student_teacher"
        assert make.args(metric_for_best_model=prefix + name, **BEST).greater_is_better is False
        assert make.args(metric_for_best_model=prefix + name, greater_is_better=True, **BEST).greater_is_better is True
        assert make.args(metric_for_best_model=f"{prefix}balance", **BEST).greater_is_better is True

    @pytest.mark.parametrize("metric", ["loss", "eval_loss"])
    def test_promptkds_loss_is_warned_about(self, make_args, metric, caplog, propagate):
        with caplog.at_level(logging.WARNING):
            make_args(**BEST)
            assert "metric_for_best_model" not in caplog.text
            make_args(metric_for_best_model=metric, **BEST)
        assert "Set it to 'eval_forward_kl'" in caplog.text


class TestSeveralSets:
    def sets(self):
        return {"a": answered_dataset(4), "b": answered_dataset(3)}

    @pytest.mark.parametrize("chosen", [None, "loss", "eval_loss"])
    def test_a_metric_without_a_sets_name_is_refused(self, make, chosen):
        name = "forward_kl" if make.kind == "promptkd" else "ce"
        with pytest.raises(ValueError, match=rf"'eval_a_{name}', .*'eval_b_{name}', .*'eval_b_loss'"):
            make.trainer(eval_dataset=self.sets(), metric_for_best_model=chosen, **BEST)

    def test_one_with_a_sets_name(self, make):
        name = "eval_b_reverse_kl" if make.kind == "promptkd" else "eval_b_ce"
        trainer = make.trainer(eval_dataset=self.sets(), metric_for_best_model=name, **BEST)
        trainer.train()
        assert trainer.state.best_metric == min(e[name] for e in trainer.state.log_history if name in e)


class TestEarlyStopping:
    def test_without_a_metric_is_refused(self, make):
        name = "eval_forward_kl" if make.kind == "promptkd" else "eval_ce"
        with pytest.raises(ValueError, match=f"EarlyStoppingCallback, but `metric_for_best_model` is None.*'{name}'"):
            make.trainer(callbacks=[EarlyStoppingCallback()], **EACH_STEP)
        trainer = make.trainer(**EACH_STEP)
        trainer.add_callback(EarlyStoppingCallback())
        with pytest.raises(ValueError, match="`metric_for_best_model` is None"):
            trainer.train()

    def test_stops_by_the_default(self, make):
        settings = {**BEST, "max_steps": 6, "learning_rate": 0.0}
        trainer = make.trainer(callbacks=[EarlyStoppingCallback(early_stopping_patience=2)], **settings)
        trainer.train()
        assert trainer.state.global_step == 3
