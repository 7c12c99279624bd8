"""What a few rows say of all rows, against values worked out by hand, from all resamples there are, or by scipy."""

import itertools

import numpy as np
import pytest

from trl_promptkd.intervals import difference, holm, mean, mean_interval, sign_flip_p, smallest_seen


def scores(values):
    return np.stack([np.asarray(values, dtype=float), np.ones(len(values))], axis=1)


def normal_scores(size, seed=1):
    return np.random.default_rng(seed).normal(size=size)


class TestBootstrap:
    def test_means_are_over_what_is_divided_by(self):
        assert mean(np.array([(1.0, 1), (0.0, 3)])) == 0.25

    def test_the_interval_is_the_normal_one_for_many_rows(self):
        values, other = normal_scores(400), normal_scores(400, seed=2)
        for found, drawn in (
            (mean_interval(scores(values)), values),
            (difference(scores(values), scores(other)), values - other),
        ):
            half = 1.96 * drawn.std() / 20
            assert found == pytest.approx((drawn.mean(), drawn.mean() - half, drawn.mean() + half), abs=0.02)

    def test_four_rows_against_all_256_resamples(self):
        values, control = [3.0, 5.0, 1.0, 0.0], [2.0, 1.0, 1.0, 4.0]
        each = np.subtract(values, control)
        means = [each[list(rows)].mean() for rows in itertools.product(range(4), repeat=4)]
        expected = (each.mean(), *np.quantile(means, [0.025, 0.975]))
        assert difference(scores(values), scores(control)) == pytest.approx(expected)

    def test_rows_that_move_together_differ_less_than_rows_that_do_not(self):
        values = normal_scores(100)
        found, low, high = difference(scores(values + 0.1), scores(values))
        assert (found, low, high) == pytest.approx((0.1, 0.1, 0.1))


class TestSignFlips:
    def test_by_hand(self):
        """Of the eight signs of 1, 2 and 3, two reach a sum of 6 or -6; of 1, 1 and -1, six reach 1 or -1 or more."""
        assert sign_flip_p([1.0, 2.0, 3.0]) == pytest.approx(2 / 8, abs=0.02)
        assert sign_flip_p([1.0, 1.0, -1.0]) == 1.0

    def test_rows_without_a_difference_do_not_count(self):
        assert sign_flip_p([0.0] * 50 + [1.0, 2.0, 3.0]) == sign_flip_p([1.0, 2.0, 3.0])
        assert sign_flip_p([0.0, 0.0]) == 1.0

    def test_right_and_wrong_answers_have_the_p_value_of_a_sign_test(self):
        stats = pytest.importorskip("scipy.stats")
        for better, worse in ((6, 0), (9, 2), (30, 15)):
            expected = stats.binomtest(better, better + worse).pvalue
            assert sign_flip_p([100.0] * better + [-100.0] * worse + [0.0] * 40) == pytest.approx(expected, abs=0.01)

    def test_scores_on_a_scale_have_nearly_the_p_value_of_a_t_test(self):
        stats = pytest.importorskip("scipy.stats")
        each = normal_scores(100) + 0.2
        assert sign_flip_p(each) == pytest.approx(stats.ttest_1samp(each, 0).pvalue, abs=0.01)


class TestHolm:
    def test_by_hand(self):
        # 4 x 0.01; 3 x 0.02; 2 x 0.04; 0.03 stands before 0.04, so 2 x 0.03 = 0.06 and 0.04 keeps at least that
        assert holm([0.01, 0.04, 0.03, 0.02]) == pytest.approx([0.04, 0.06, 0.06, 0.06])
        assert holm([0.001, 0.6, 0.5]) == pytest.approx([0.003, 1.0, 1.0])

    def test_one_test_needs_no_correction(self):
        assert holm([0.03]) == [0.03]


class TestSmallestSeen:
    @pytest.mark.parametrize("comparisons", [1, 4])
    def test_is_found_four_times_in_five(self, comparisons):
        """Samples of 200 rows whose true mean it is, each tested by its own t value."""
        stats = pytest.importorskip("scipy.stats")
        size = smallest_seen(normal_scores(200), comparisons) / normal_scores(200).std(ddof=1)
        samples = np.random.default_rng(3).normal(loc=size, size=(4000, 200))
        assert (stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05 / comparisons).mean() == pytest.approx(
            0.8, abs=0.02
        )
