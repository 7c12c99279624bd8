import logging
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from trl_promptkd.telemetry import CollusionCallback, Means


class TestMeans:
    def test_are_weighted_by_tokens_and_start_anew(self):
        means = Means()
        means.add("kl", torch.tensor(6.0), torch.tensor(2))
        means.add("kl", torch.tensor(3.0), torch.tensor(4))
        means.add("weight", 0.5)
        means.add("empty", torch.tensor(0.0), torch.tensor(0))
        assert means.report(Accelerator(cpu=True)) == {"kl": 1.5, "weight": 0.5}
        assert means.report(Accelerator(cpu=True)) == {}

    def test_ranks_may_add_in_any_order(self):
        """With `lmbda < 1` a rank may have sampled nothing yet when it adds its first divergence."""
        sent = []

        class Rank:
            device = torch.device("cpu")

            def reduce(self, totals, reduction):
                sent.append(totals)
                return totals

        for names in (("a", "b"), ("b", "a")):
            means = Means()
            for name in names:
                means.add(name, {"a": 1.0, "b": 2.0}[name], 4.0)
            assert means.report(Rank()) == {"a": 0.25, "b": 0.5}
        assert torch.equal(*sent)


def entry(gain, plain, entropy):
    return {"kl/prompt_gain": gain, "kl/student_plain": plain, "entropy/student": entropy}


class TestCollusionCallback:
    def warnings(self, caplog, history):
        callback, state = CollusionCallback(), SimpleNamespace(log_history=[], global_step=0)
        with caplog.at_level(logging.WARNING):
            for item in history:
                state.log_history.append(item)
                state.global_step += 1
                callback.on_log(None, state, None)
        return [record.getMessage() for record in caplog.records if "following the student" in record.getMessage()]

    def test_warns_once_when_gain_grows_and_the_entropy_falls(self, caplog, propagate):
        # The end of the run in which a prompt learned 100 times as fast as its student
        history = [entry(0.02, 1.2, 2.0), entry(0.4, 0.9, 1.7), entry(0.67, 0.85, 1.2), entry(0.67, 0.85, 1.1)]
        (message,) = self.warnings(caplog, history)
        assert "Step 3" in message
        assert "fell from 2.00 to 1.20" in message
        assert "prompt_learning_rate" in message

    def test_warns_when_gain_grows_and_the_forward_kl_rises(self, caplog, propagate):
        history = [
            entry(0.0, 1.0, 2.0),
            {"eval_forward_kl": 11.8},
            entry(0.6, 0.9, 2.0),
            {"eval_forward_kl": 15.4},
            entry(0.6, 0.9, 2.0),
        ]
        (message,) = self.warnings(caplog, history)
        assert "rose from 11.80 to 15.40" in message

    @pytest.mark.parametrize(
        "history",
        [
            [entry(0.02, 1.2, 2.0), entry(0.1, 0.9, 1.2)],  # a small gain; the student grows surer, as it should
            [entry(0.02, 1.2, 2.0), entry(0.4, 0.9, 1.9)],  # a large gain without a loss of entropy
            [entry(0.6, 0.9, 2.0), entry(0.62, 0.9, 1.2)],  # a gain that was there from the start
            [entry(0.67, 0.85, 1.2)],
        ],
    )
    def test_is_silent_otherwise(self, caplog, propagate, history):
        assert self.warnings(caplog, history) == []
