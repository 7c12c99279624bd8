"""What a few rows say about all rows: 95 % intervals, paired differences, their p values, and the smallest difference
that so few rows could have shown.

Intervals are from the bootstrap, so scores may have any distribution.
"""

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np


__all__ = ["ByRow", "difference", "holm", "mean", "mean_interval", "sign_flip_p", "smallest_seen"]

RESAMPLES = 10_000

# Of each row: a sum, and what it is divided by once rows are added up, (rows, 2)
ByRow = np.ndarray


def mean(values: ByRow) -> float:
    return float(values[:, 0].sum() / max(values[:, 1].sum(), 1))


def mean_interval(values: ByRow) -> tuple[float, float, float]:
    """The mean and its 95 % bootstrap interval over rows."""
    return mean(values), *_limits(_means_of_draws(values))


def difference(values: ByRow, control: ByRow) -> tuple[float, float, float]:
    """The mean minus the control's, and its 95 % bootstrap interval over the paired rows."""
    return mean(values) - mean(control), *_limits(_means_of_draws(values) - _means_of_draws(control))


def _means_of_draws(values: ByRow) -> np.ndarray:
    """`(resamples,)`. The same rows are drawn whenever their number is the same."""
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    sums = values[drawn].sum(axis=1)  # (resamples, 2)
    return sums[:, 0] / np.maximum(sums[:, 1], 1)


def _limits(means: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def sign_flip_p(differences: Sequence[float]) -> float:
    """The two-sided p value of "no difference" between paired rows.

    Without one, each row's difference could as well have had the other sign. p is the share of random signs with which
    the sum is at least as large. It also holds for few rows, and for scores that are 0 or 1.
    """
    given = np.asarray([value for value in differences if value], dtype=float)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(RESAMPLES, len(given)))
    limit = abs(given.sum()) * (1 - 1e-9)  # sums of the same numbers in another order are equal
    return float((1 + (abs(signs @ given) >= limit).sum()) / (1 + RESAMPLES))


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for their number (Holm, 1979). If no difference is real, the chance that any of them falls
    below 0.05 is at most 5 %."""
    adjusted = [float("nan")] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(np.argsort(p_values)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def smallest_seen(differences: Sequence[float], comparisons: int = 1, power: float = 0.8) -> float:
    """The true mean difference that a test on as many rows finds with probability `power`.

    Their differences are assumed to scatter as these do. The test is two-sided at 5 %, divided by the number of
    `comparisons`.
    """
    normal = NormalDist()
    quantiles = normal.inv_cdf(1 - 0.025 / comparisons) + normal.inv_cdf(power)
    return float(quantiles * np.std(differences, ddof=1) / np.sqrt(len(differences)))
