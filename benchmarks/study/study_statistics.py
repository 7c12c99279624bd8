"""What the study's tables say of a few seeds: intervals, paired differences, the smallest difference that so few
seeds could have shown, and how well one number predicts another.

It cannot be named statistics.py: scripts have this folder first on their path, and PyTorch imports the standard
library's module of that name.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats


class Interval(NamedTuple):
    """A mean, and half the width of its 95 % confidence interval (nan for one value)."""

    mean: float
    half: float
    num: int


class Difference(NamedTuple):
    """A mean difference, half the width of its 95 % confidence interval, and the two-sided p value of "no
    difference"."""

    mean: float
    half: float
    p: float
    num: int


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean of independent values with Student's t interval."""
    num = len(values)
    mean = float(np.mean(values))
    if num < 2:
        return Interval(mean, math.nan, num)
    half = stats.t.ppf(0.975, num - 1) * np.std(values, ddof=1) / math.sqrt(num)
    return Interval(mean, float(half), num)


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Of `a` minus `b`, whose values belong together in their order; by the paired t test."""
    differences = np.subtract(a, b)
    mean, half, num = mean_interval(differences)
    if num < 2:
        return Difference(mean, math.nan, math.nan, num)
    if not differences.any():  # 0 / 0 in the test
        return Difference(0.0, 0.0, 1.0, num)
    return Difference(mean, half, float(stats.ttest_rel(a, b).pvalue), num)


def held_out_r2(x: Sequence[float], y: Sequence[float]) -> float:
    """R² of predictions: each `y` by the straight line through all other points. 1 is perfect, 0 no better than the
    mean of all, and worse predictions are below 0."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    errors = []
    for place in range(len(x)):
        others = np.arange(len(x)) != place
        errors.append(y[place] - np.polyval(np.polyfit(x[others], y[others], 1), x[place]))
    return float(1 - np.sum(np.square(errors)) / np.sum(np.square(y - y.mean())))


def smallest_seen(differences: Sequence[float], power: float = 0.8) -> float:
    """The true mean difference that a two-sided paired t test at 5 % would have found with probability `power`, from
    as many pairs whose differences scatter as these do."""
    num = len(differences)
    limit = stats.t.ppf(0.975, num - 1)

    def found(size: float) -> float:
        """Probability, by the difference in standard deviations; without that of the wrong sign, which is next to
        nothing."""
        return stats.nct.sf(limit, num - 1, size * math.sqrt(num))

    high = 1.0
    while found(high) < power:
        high *= 2
    return float(np.std(differences, ddof=1) * optimize.brentq(lambda size: found(size) - power, 0.0, high))
