import pytest
from pandas import DataFrame
from paths import ROOT

from trl_promptkd.metrics import run_signs as run_signs_module
from trl_promptkd.metrics.run_signs import collusion, run_signs


NAMES = ("kl/prompt_gain", "kl/prompted_plain", "kl/student_plain", "rollout/terminated_share")
GOOD = [(0.02, 0.05, 1.2, 0.6), (0.06, 0.08, 0.9, 0.8), (0.08, 0.1, 0.7, 0.9)]
COLLUDING = [(0.02, 0.05, 1.2, 0.6), (0.4, 0.4, 1.1, 0.8), (0.67, 0.83, 0.85, 0.9)]


def log(steps, forward=(), reverse=()):
    history = [{"step": 10 * i, **dict(zip(NAMES, step, strict=True))} for i, step in enumerate(steps, 1)]
    sides = zip(forward, reverse, strict=True)
    return history + [{"eval_forward_kl": p, "eval_reverse_kl": q} for p, q in sides]


def primed_log(shares=(0.9,)):
    return [{"step": i, "kd": 0.1, "rollout/terminated_share": share} for i, share in enumerate(shares, 1)]


def samples(lengths, same=False):
    """A table for each list of lengths."""
    return [
        DataFrame(
            {
                "prompt": [f"question {row}" for row in range(len(part))],
                "completion": ["no" if same else f"answer {row}" for row in range(len(part))],
                "length": part,
            }
        )
        for part in lengths
    ]


def verdicts(history, tables=()):
    return {sign.name.split(":")[0]: sign.verdict for sign in run_signs(history, tables)}


LENGTHS = [2, 2, 3, 10, 12, 14, 15, 16, 20, 30] * 4


def test_the_page_states_the_rules():
    page = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    assert f"at least {run_signs_module.COLLUSION_SHARE} of `kl/student_plain`" in page
    assert f"more than {run_signs_module.FORWARD_RISE} times" in page
    assert f"(of at least {run_signs_module.LEAST_PROMPTS})" in page
    assert f"at least {run_signs_module.LEAST_ROWS} rows" in page
    halves_and_fifths = (run_signs_module.ALIKE_SHARE, run_signs_module.CUT_SHARE, run_signs_module.SHORT_QUANTILE)
    assert (*halves_and_fifths, run_signs_module.SHORT_LEFT) == (0.5, 0.5, 0.2, 0.2)  # in words there


class TestRunSigns:
    def test_a_good_run_shows_none(self):
        history = log(GOOD, forward=(2.0, 1.6), reverse=(1.2, 0.7))
        found = verdicts(history, samples([LENGTHS] * 3))
        assert found == dict.fromkeys(("Collusion", "Collapse", "Cut answers", "Short answers given up"), "fine")

    def test_a_colluding_run_shows_where(self):
        history = log(COLLUDING)
        assert verdicts(history)["Collusion"] == "wrong"
        (text,) = [sign.text for sign in run_signs(history) if sign.name.startswith("Collusion")]
        assert "At step 20" in text
        assert "`prompt_learning_rate`" in text

    def test_collusion_is_the_rule_of_the_warning(self):
        """With the numbers at the end of `history`."""
        assert collusion(log(GOOD)) is None
        assert collusion(log(COLLUDING)) == (0.67, 0.83, 0.85, [])
        assert collusion(log(COLLUDING), share=0.9) is None
        assert collusion(log(COLLUDING, forward=(2.0, 1.9), reverse=(1.0, 0.5))) is None

    @pytest.mark.parametrize(
        ("forward", "reverse", "verdict"),
        [
            ((11.8, 15.4), (1.2, 0.8), "wrong"),  # docs/logged_metrics.md, the run that had collapsed
            ((11.8, 12.5), (1.2, 0.8), "fine"),  # within a tenth
            ((11.8, 7.7), (1.2, 1.0), "fine"),
            ((11.8, 15.4), (1.2, 1.5), "fine"),  # worse on both sides: not narrower
        ],
    )
    def test_a_collapse_shows_in_both_kls(self, forward, reverse, verdict):
        assert verdicts(log(GOOD, forward, reverse))["Collapse"] == verdict

    @pytest.mark.parametrize("history", [log(GOOD, (2.0, 1.5), (1.0, 0.5)), primed_log()])
    def test_a_collapse_shows_in_equal_answers_to_different_prompts(self, history):
        assert verdicts(history, samples([[3] * 6], same=True))["Collapse"] == "wrong"
        assert verdicts(history, samples([[3] * 6]))["Collapse"] == "fine"
        assert verdicts(history, samples([[3] * 3], same=True))["Collapse"] == "fine"  # too few to tell
        one_prompt = samples([[3] * 6], same=True)
        one_prompt[0]["prompt"] = "question"
        assert verdicts(history, one_prompt)["Collapse"] == "fine"

    @pytest.mark.parametrize(
        ("shares", "verdict"),
        [((0.9, 0.1, 0.2, 0.3), "wrong"), ((0.1, 0.4, 0.6, 0.7), "fine"), ((0.0,), "wrong"), ((), "unknown")],
    )
    def test_cut_answers_are_those_of_the_last_three_entries(self, shares, verdict):
        assert verdicts(primed_log(shares))["Cut answers"] == verdict

    @pytest.mark.parametrize(
        ("last", "verdict"),
        [
            ([length + 5 for length in LENGTHS], "wrong"),
            ([2] * 4 + [12] * 36, "fine"),  # a tenth is left
            ([2] + [12] * 39, "wrong"),
            ([2] * 40, "fine"),
            ([12] * 29, "unknown"),
        ],
    )
    def test_short_answers_are_looked_for_in_the_last_third(self, last, verdict):
        tables = samples([LENGTHS, LENGTHS, last])
        assert verdicts(primed_log(), tables)["Short answers given up"] == verdict

    def test_named_evaluation_sets_are_judged_each(self):
        named = [
            {"eval_a_forward_kl": a, "eval_a_reverse_kl": r, "eval_b_forward_kl": b, "eval_b_reverse_kl": r}
            for a, b, r in ((1.0, 1.0, 2.0), (0.9, 3.0, 1.0))
        ]
        (sign,) = [sign for sign in run_signs(log(GOOD) + named) if sign.name.startswith("Collapse")]
        assert sign.verdict == "wrong"
        assert "On 'b': KL(teacher || student) on answers went from 1.00 to 3.00" in sign.text
        assert collusion(log(COLLUDING) + named).forward == [1.0, 3.0]
        assert collusion([*log(COLLUDING), {"eval_a_forward_kl": 2.0}, {"eval_a_forward_kl": 1.0}]) is None

    def test_what_cannot_be_told_is_unknown(self):
        assert verdicts(log(GOOD[:1])) == {
            "Collusion": "unknown",
            "Collapse": "unknown",
            "Cut answers": "fine",
            "Short answers given up": "unknown",
        }
        old = samples([LENGTHS] * 3)
        del old[0]["length"]  # a file of an earlier version
        assert verdicts(primed_log(), old)["Short answers given up"] == "unknown"

    def test_priming_has_no_soft_prompt(self):
        assert "Collusion" not in verdicts(primed_log())
