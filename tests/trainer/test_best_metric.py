import logging

import pytest
from tiny import answered_dataset
from trainers import BEST, EVALUATES, SAVES, Maker, logged
from transformers import EarlyStoppingCallback


NAMES = {"promptkd": "eval_forward_kl", "primed": "eval_ce"}


@pytest.fixture
def run(make):
    """Makes a trainer with something to evaluate."""
    return lambda **overrides: make(**{"max_steps": 2, "eval_dataset": answered_dataset(4), **overrides})


class TestDefault:
    @pytest.mark.parametrize(
        "settings",
        [
            BEST,
            {**EVALUATES, **SAVES, "save_strategy": "best"},
            {**EVALUATES, **SAVES, "lr_scheduler_type": "reduce_lr_on_plateau"},
        ],
    )
    def test_promptkd_takes_the_forward_kl(self, promptkd, settings):
        args = promptkd.args(**settings)
        assert (args.metric_for_best_model, args.greater_is_better) == ("eval_forward_kl", False)

    @pytest.mark.parametrize(
        ("source", "metric"), [("dataset", "eval_ce"), ("teacher", "eval_ce"), ("student", "eval_loss")]
    )
    def test_priming_takes_the_cross_entropy_of_answers(self, primed, source, metric):
        args = primed.args(response_source=source, **BEST)
        assert (args.metric_for_best_model, args.greater_is_better) == (metric, False)

    def test_nothing_where_nothing_needs_it(self, make):
        assert make.args(**EVALUATES, **SAVES).metric_for_best_model is None

    @pytest.mark.parametrize(
        ("method", "settings", "name"),
        [
            ("promptkd", {}, "eval_forward_kl"),
            ("primed", {}, "eval_ce"),
            ("primed", {"response_source": "student"}, "eval_loss"),
        ],
    )
    def test_the_best_checkpoint_is_that_of_the_lowest(self, tmp_path, method, settings, name):
        settings = {"max_steps": 3, "learning_rate": 0.05, **settings, **BEST}
        trainer = Maker(method, tmp_path)(eval_dataset=answered_dataset(4), **settings)
        trainer.train()
        values = logged(trainer, name)
        assert trainer.state.best_metric == min(values)
        assert len(set(values)) == 3


class TestUsersChoice:
    @pytest.mark.parametrize("metric", ["loss", "eval_loss", "rougeL", "score"])
    def test_is_kept(self, make, metric):
        args = make.args(metric_for_best_model=metric, **BEST)
        assert args.metric_for_best_model == metric
        assert args.greater_is_better == (not metric.endswith("loss"))

    @pytest.mark.parametrize("prefix", ["", "eval_", "eval_dev_"])
    def test_divergences_fall(self, make, prefix):
        """transformers takes for granted that what is not called a loss rises."""
        name = "reverse_kl" if make.method == "promptkd" else "kl/student_teacher"
        assert make.args(metric_for_best_model=prefix + name, **BEST).greater_is_better is False
        assert make.args(metric_for_best_model=prefix + name, greater_is_better=True, **BEST).greater_is_better is True
        assert make.args(metric_for_best_model=f"{prefix}balance", **BEST).greater_is_better is True

    @pytest.mark.parametrize("metric", ["loss", "eval_loss"])
    def test_promptkds_loss_is_warned_about(self, promptkd, metric, caplog, propagate):
        with caplog.at_level(logging.WARNING):
            promptkd.args(**BEST)
            assert "metric_for_best_model" not in caplog.text
            promptkd.args(metric_for_best_model=metric, **BEST)
        assert "Set it to 'eval_forward_kl'" in caplog.text


class TestSeveralSets:
    SETS = {"a": answered_dataset(4), "b": answered_dataset(3)}

    @pytest.mark.parametrize("chosen", [None, "loss", "eval_loss"])
    def test_a_metric_without_a_sets_name_is_refused(self, make, run, chosen):
        name = NAMES[make.method].removeprefix("eval_")
        with pytest.raises(ValueError, match=rf"'eval_a_{name}', .*'eval_b_{name}', .*'eval_b_loss'"):
            run(eval_dataset=self.SETS, metric_for_best_model=chosen, **BEST)

    def test_one_with_a_sets_name(self, make, run):
        name = "eval_b_reverse_kl" if make.method == "promptkd" else "eval_b_ce"
        trainer = run(eval_dataset=self.SETS, metric_for_best_model=name, **BEST)
        trainer.train()
        assert trainer.state.best_metric == min(logged(trainer, name))


class TestEarlyStopping:
    def test_without_a_metric_is_refused(self, make, run):
        message = f"EarlyStoppingCallback, but `metric_for_best_model` is None.*'{NAMES[make.method]}'"
        with pytest.raises(ValueError, match=message):
            run(callbacks=[EarlyStoppingCallback()], **EVALUATES)
        trainer = run(**EVALUATES)
        trainer.add_callback(EarlyStoppingCallback())
        with pytest.raises(ValueError, match="`metric_for_best_model` is None"):
            trainer.train()

    def test_stops_by_the_default(self, run):
        stop = EarlyStoppingCallback(early_stopping_patience=2)
        trainer = run(callbacks=[stop], **{**BEST, "max_steps": 6, "learning_rate": 0.0})
        trainer.train()
        assert trainer.state.global_step == 3
