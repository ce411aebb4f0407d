"""Means with bootstrap intervals. Numbers in, numbers out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prefopt.figures import readable

DRAWS = 10_000
Z = 1.959964  # of a 95% interval of a normal distribution
_CHUNK = 2_000_000  # numbers looked up at a time


@dataclass(frozen=True)
class Interval:
    """A mean and the interval that it would lie in if the units had been drawn again.

    Args: mean, low, high: in the unit of the values; NaN where there were none. count: units that the mean is over.
    """

    mean: float
    low: float
    high: float
    count: int

    def excludes(self, value: float) -> bool:
        """Whether the interval lies on one side of `value`."""
        return self.low > value or self.high < value

    def __str__(self) -> str:
        values = (self.mean, self.low, self.high)
        mean, low, high = (readable(value) if abs(value) >= 1e9 else f"{value:.3f}" for value in values)
        return f"{mean} [{low}, {high}]".replace("-0.000", "0.000")


def bootstrap(values: np.ndarray | Sequence[float], *, level: float = 0.95, seed: int = 0) -> Interval:
    """The mean, and the percentile interval of its 10,000 bootstrap resamples.

    Units are drawn with replacement along every axis by itself: of a table (runs, pairs) both the runs and the pairs.
    A difference of two policies is paired when `values` holds the differences. One unit gives an interval of no width,
    which is not certainty.

    Args: values: one per example, all finite. Shape `(N,)`, or a table with more axes. level: fraction of the resamples
        inside. seed: the same one gives the same interval.
    Returns: the interval; its count is the length of the last axis.
    Raises: ValueError for a value that is not finite.
    Reference: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13: the percentile interval.
    """
    table = np.asarray(values, dtype=np.float64)
    if not np.isfinite(table).all():
        raise ValueError("a bootstrap of values that are not finite; leave them out and count them")
    if table.size == 0:
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    largest = float(np.abs(table).max())
    if largest > 1e300:  # sums of it are finite no more
        found = bootstrap(table / largest, level=level, seed=seed)
        return Interval(found.mean * largest, found.low * largest, found.high * largest, found.count)
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK // table.size)
    means = np.concatenate([_resampled(table, min(chunk, DRAWS - done), rng) for done in range(0, DRAWS, chunk)])
    low, high = np.percentile(means, [50 * (1 - level), 50 * (1 + level)])
    return Interval(float(table.mean()), float(low), float(high), table.shape[-1])


def wilson(fraction: float, count: int) -> Interval:
    """The 95% interval of a fraction that was found in `count` draws, by the score test of a binomial.

    Args: fraction: found, from 0 to 1; draws that count a half are allowed. count: >= 1.
    Reference: Wilson, Probable Inference, the Law of Succession, and Statistical Inference (1927), eq. 1.
    """
    spread = Z * math.sqrt(fraction * (1 - fraction) / count + Z**2 / (4 * count**2))
    middle, scale = fraction + Z**2 / (2 * count), 1 + Z**2 / count
    return Interval(fraction, (middle - spread) / scale, (middle + spread) / scale, count)


def deciding_count(fraction: float) -> int:
    """The fewest draws among which a fraction of `fraction` has a Wilson interval that excludes one half."""
    count = 1
    while not wilson(fraction, count).excludes(0.5):
        count += 1
    return count


def mean_interval(values: Sequence[float], counts: Sequence[float] | None = None) -> Interval:
    """The ratio of sum of values x counts to sum of counts, with its 95% interval by Student's t.

    Args: values: one per unit. counts: what each is an average over, such as tokens; None: 1 each, a plain mean.
    Returns: without a width that means anything (NaN ends) where there are fewer than two units.
    Reference: Cochran, Sampling Techniques (1977), section 6.3: the ratio estimate.
    """
    from scipy.special import stdtrit  # all that t.ppf of scipy.stats calls, and 1.5 s quicker to import

    found = np.asarray(values, np.float64)
    weights = np.ones(len(found)) if counts is None else np.asarray(counts, np.float64)
    mean, units = float((found * weights).sum() / weights.sum()), len(found)
    if units < 2:
        return Interval(mean, math.nan, math.nan, units)
    error = math.sqrt(((weights * (found - mean)) ** 2).sum() * units / (units - 1)) / weights.sum()
    half = float(stdtrit(units - 1, 0.975)) * error
    return Interval(mean, mean - half, mean + half, units)


def _resampled(table: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Means of `draws` resamples, (draws,)."""
    index = []
    for axis, size in enumerate(table.shape):
        shape = [draws] + [size if other == axis else 1 for other in range(table.ndim)]
        index.append(rng.integers(size, size=(draws, size)).reshape(shape))
    return table[tuple(index)].reshape(draws, -1).mean(-1)
