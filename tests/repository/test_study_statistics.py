"""The study's statistics against values worked out by hand, from published tables, or by another way."""

import math

import numpy as np
import pytest


@pytest.fixture(scope="module")
def statistics(study):
    pytest.importorskip("scipy")
    return study("study_statistics")


class TestMeanInterval:
    # Two-sided 95 % of Student's t from a printed table, by degrees of freedom
    @pytest.mark.parametrize(("num", "t"), [(2, 12.7062), (3, 4.30265), (5, 2.77645), (10, 2.26216), (31, 2.04227)])
    def test_half_width_is_t_times_the_standard_error(self, statistics, num, t):
        found = statistics.mean_interval(list(range(1, num + 1)))
        variance = num * (num + 1) / 12  # of 1 ... n, with n - 1 below
        assert found.mean == (num + 1) / 2
        assert found.half == pytest.approx(t * math.sqrt(variance / num), rel=1e-5)
        assert found.num == num

    def test_one_value_has_no_interval(self, statistics):
        mean, half, num = statistics.mean_interval([3.0])
        assert (mean, num) == (3.0, 1)
        assert math.isnan(half)


class TestPairedDifference:
    def test_sleep_data_of_student_1908(self, statistics):
        """Hours of sleep that ten patients gained with two drugs: t = 4.0621, p = 0.002833 in R's `t.test`."""
        first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
        second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
        found = statistics.paired_difference(second, first)
        assert found.mean == pytest.approx(1.58)
        assert found.mean - found.half == pytest.approx(0.7001142, abs=1e-6)
        assert found.mean + found.half == pytest.approx(2.4598858, abs=1e-6)
        assert found.p == pytest.approx(0.002833, abs=5e-7)
        assert found.num == 10

    def test_three_pairs_by_hand(self, statistics):
        """Differences 1, 2, 3: t is 2 sqrt(3), and for two degrees of freedom p is 1 - t / sqrt(2 + t^2)."""
        found = statistics.paired_difference([3.0, 5.0, 7.0], [2.0, 3.0, 4.0])
        assert found.p == pytest.approx(1 - math.sqrt(12 / 14))

    def test_equal_values_are_no_difference(self, statistics):
        assert statistics.paired_difference([1.0, 2.0], [1.0, 2.0]) == (0.0, 0.0, 1.0, 2)


class TestHeldOutR2:
    def test_by_hand(self, statistics):
        """(0, 0), (1, 1), (2, 4): lines through two points miss the third by 2, -1 and 2. The squares around the mean
        of 5 / 3 sum up to 26 / 3."""
        assert statistics.held_out_r2([0, 1, 2], [0, 1, 4]) == pytest.approx(1 - 9 / (26 / 3))

    def test_a_straight_line_is_predicted(self, statistics):
        assert statistics.held_out_r2([3, 1, 2, 5], [7, 3, 5, 11]) == pytest.approx(1)

    def test_it_is_the_press_statistic(self, statistics):
        """The closed form of least squares: a held-out error is the error over one minus the leverage."""
        x, y = np.array([1.0, 2.0, 4.0, 7.0, 8.0]), np.array([3.0, 1.0, 4.0, 2.0, 6.0])
        design = np.stack([np.ones(5), x], axis=1)
        hat = design @ np.linalg.inv(design.T @ design) @ design.T
        errors = (y - hat @ y) / (1 - np.diag(hat))
        expected = 1 - (errors**2).sum() / ((y - y.mean()) ** 2).sum()
        assert statistics.held_out_r2(x, y) == pytest.approx(expected)


class TestSmallestSeen:
    def test_ten_pairs_see_about_one_standard_deviation(self, statistics):
        """G*Power: ten pairs have power 0.803 for one standard deviation."""
        differences = np.arange(10) / np.std(np.arange(10), ddof=1)
        assert statistics.smallest_seen(differences, power=0.8031) == pytest.approx(1.0, abs=1e-3)

    @pytest.mark.parametrize(("num", "t"), [(2, 12.7062), (5, 2.77645), (10, 2.26216)])
    def test_power_by_integrating_over_the_standard_deviation(self, statistics, num, t):
        """With the standard deviation known, the mean is normal; averaged over the chi distribution of the former."""
        differences = [3.0 * value for value in range(num)]
        size = statistics.smallest_seen(differences) / np.std(differences, ddof=1)
        freedom = num - 1
        chi = np.linspace(1e-6, 12.0, 200_001)
        density = chi ** (freedom - 1) * np.exp(-(chi**2) / 2) / (2 ** (freedom / 2 - 1) * math.gamma(freedom / 2))
        limits = t * chi / math.sqrt(freedom)
        above = np.array([math.erfc((limit - size * math.sqrt(num)) / math.sqrt(2)) / 2 for limit in limits])
        below = np.array([math.erfc((limit + size * math.sqrt(num)) / math.sqrt(2)) / 2 for limit in limits])
        assert np.trapezoid(density * (above + below), chi) == pytest.approx(0.8, abs=1e-4)
