import logging
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from trl_promptkd.trainer.logged_metrics import CollusionCallback, Means


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


def entry(gain, moved, plain, entropy=2.0):
    names = ("kl/prompt_gain", "kl/prompted_plain", "kl/student_plain", "entropy/student")
    return dict(zip(names, (gain, moved, plain, entropy), strict=True))


class TestCollusionCallback:
    def warnings(self, caplog, history):
        callback, state = CollusionCallback(), SimpleNamespace(log_history=[], global_step=0)
        with caplog.at_level(logging.WARNING):
            for item in history:
                state.log_history.append(item)
                state.global_step += 1
                callback.on_log(None, state, None)
        return [record.getMessage() for record in caplog.records if "following the student" in record.getMessage()]

    def test_warns_once_when_both_are_a_large_share(self, caplog, propagate):
        # The end of a run in which a prompt learned 100 times as fast as its student
        history = [entry(0.02, 0.1, 1.2), entry(0.35, 0.35, 1.2), entry(0.4, 0.4, 1.2, 1.2), entry(0.67, 0.83, 0.85)]
        (message,) = self.warnings(caplog, history)
        assert "Step 3" in message
        assert "entropy went from 2.00 to 1.20" in message
        assert "prompt_learning_rate" in message
        assert "eval_strategy" in message

    def test_warns_where_the_entropy_rises(self, caplog, propagate):
        """As it did in the study's real model: steps 1, 7 and 17."""
        numbers = [(0.018, 0.081, 1.759, 4.81), (0.236, 0.095, 1.215, 4.29), (0.628, 0.395, 1.158, 5.41)]
        (message,) = self.warnings(caplog, [entry(*step) for step in numbers])
        assert "Step 3" in message

    def test_says_that_the_forward_kl_rose(self, caplog, propagate):
        evaluations = [{"eval_forward_kl": 11.8}, {"eval_forward_kl": 15.4}]
        (message,) = self.warnings(caplog, [entry(0.0, 0.1, 1.0), *evaluations, entry(0.6, 0.5, 0.9)])
        assert "from 11.80 to 15.40" in message

    @pytest.mark.parametrize(
        "history",
        [
            [entry(0.22, 0.02, 0.67), entry(0.31, 0.04, 0.72)],  # a large gain from a teacher that has hardly moved
            [entry(0.02, 0.1, 1.2), entry(-0.1, 0.5, 1.2)],  # a teacher that has moved, but not to the student
            # cleared
            [entry(0.0, 0.1, 1.0), {"eval_forward_kl": 9.8}, {"eval_forward_kl": 9.7}, entry(0.6, 0.6, 0.9)],
            [entry(0.67, 0.8, 0.85)],
        ],
    )
    def test_is_silent_otherwise(self, caplog, propagate, history):
        assert self.warnings(caplog, history) == []
