"""Rewards of the same samples before and after a change: means, their difference, tests, and several tests at once.

Wilson, "Probable inference, the law of succession, and statistical inference", J. Am. Stat. Assoc. 22 (1927).
McNemar, "Note on the sampling error of the difference between correlated proportions", Psychometrika 12 (1947).
Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Stat. 6 (1979).
Efron, "Better bootstrap confidence intervals", J. Am. Stat. Assoc. 82 (1987).
Newcombe, "Improved confidence intervals for the difference between binomial proportions based on paired data",
Statistics in Medicine 17 (1998).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from corrsteer.arguments import number, numbers, share, whole
from corrsteer.errors import CorrSteerError

_SEED = 0  # of the bootstrap: the same rewards give the same interval
_FLIPS = 9999
_BOOTSTRAP_ELEMENTS = 2**22  # of resampled rewards that are held at once: 32 MiB


class Estimate(NamedTuple):
    """A mean and the ends of its confidence interval, which are NaN where the rewards give none."""

    value: float
    low: float
    high: float


def mean(rewards: Sequence[float], level: float = 0.95) -> Estimate:
    """The mean reward with a confidence interval.

    Rewards that are all 0 or 1 have Wilson's score interval (1927), others the BCa bootstrap's (Efron 1987). Where
    those others are all equal, or there is only one, nothing says how far the next may lie, and the ends are NaN.
    """
    values, level = numbers("rewards", rewards), share("level", level)
    if _binary(values):
        return Estimate(math.fsum(values) / len(values), *_wilson(round(sum(values)), len(values), level))
    return _bootstrap(values, level)


def difference(before: Sequence[float], after: Sequence[float], level: float = 0.95) -> Estimate:
    """The mean of `after - before`, sample by sample, with a confidence interval.

    Where all rewards are 0 or 1 the interval is Newcombe's for paired proportions (1998, method 10), otherwise the
    BCa bootstrap's of the differences. Where those others are all equal, or there is only one, nothing says how far
    the next may lie, and the ends are NaN.

    Raises
    ------
    CorrSteerError : where the two are not of equal length, among others.
    """
    (first, second), level = _paired(before, after), share("level", level)
    if _binary(first) and _binary(second):
        pairs = list(zip(first, second))
        both, gained, lost, neither = (pairs.count(pair) for pair in ((1, 1), (0, 1), (1, 0), (0, 0)))
        return _newcombe(both, gained, lost, neither, level)
    return _bootstrap([b - a for a, b in zip(first, second)], level)


def mcnemar(improved: int, worsened: int) -> float:
    """Exact two-sided p-value of McNemar's test: a fair coin's chance of a split at least as uneven.

    Of rewards that are not 0 or 1 the same computation is the sign test, which says nothing of their mean.
    """
    from scipy.stats import binomtest

    improved, worsened = whole("improved", improved, 0), whole("worsened", worsened, 0)
    return float(binomtest(improved, improved + worsened).pvalue) if improved + worsened else 1.0


def paired_p_value(before: Sequence[float], after: Sequence[float]) -> float:
    """Two-sided p-value of no difference between the rewards of the same samples.

    McNemar's exact test where all rewards are 0 or 1. Otherwise the permutation test of the mean difference (Fisher,
    "The design of experiments", 1935, section 21): where nothing has changed, each difference could as well have the
    other sign. All signs are tried of up to 13 differences, 9999 random ones of more: no p-value is below 1/5000 then.

    Raises
    ------
    CorrSteerError : where the two are not of equal length, among others.
    """
    from scipy.stats import permutation_test

    first, second = _paired(before, after)
    differences = np.asarray(second) - np.asarray(first)
    if _binary(first) and _binary(second):
        return mcnemar(int((differences > 0).sum()), int((differences < 0).sum()))
    differences = differences[differences != 0]
    if len(differences) == 0:
        return 1.0
    test = permutation_test(
        (differences / np.abs(differences).max(),), np.mean, permutation_type="samples", n_resamples=_FLIPS,
        vectorized=True, batch=max(1, _BOOTSTRAP_ELEMENTS // len(differences)), rng=np.random.default_rng(_SEED),
    )  # fmt: skip
    return float(min(1.0, test.pvalue))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values of several tests (1979), in the order given.

    The i-th smallest of m is multiplied by m - i + 1; none is more than 1, nor less than one before it. Below alpha,
    they bound the chance of any false rejection by alpha, however the tests depend on each other.
    """
    given = [number("each of p_values", p, 0, 1) for p in p_values]
    adjusted, largest = [0.0] * len(given), 0.0
    for rank, at in enumerate(sorted(range(len(given)), key=given.__getitem__)):
        largest = max(largest, min(1.0, (len(given) - rank) * given[at]))
        adjusted[at] = largest
    return adjusted


def _paired(before: Sequence[float], after: Sequence[float]) -> tuple[list[float], list[float]]:
    """Both as numbers; raises unless they are of the same samples."""
    first, second = numbers("before", before), numbers("after", after)
    if len(first) != len(second):
        raise CorrSteerError(
            f"after must have a reward for each of before's {len(first)} samples, got {len(second)}; "
            f"give both in the same order"
        )
    return first, second


def _binary(values: Sequence[float]) -> bool:
    return all(value in (0, 1) for value in values)


def _wilson(successes: int, n: int, level: float) -> tuple[float, float]:
    from scipy.stats import binomtest

    interval = binomtest(successes, n).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def _newcombe(both: int, gained: int, lost: int, neither: int, level: float) -> Estimate:
    """The share of successes after less that before: Newcombe's (1998) method 10, with e, f, g, h as the four counts.

    Wilson's intervals of the two shares are joined as if they were errors with the correlation phi of the two
    outcomes, which is corrected for continuity where it is positive.
    """
    n = both + gained + lost + neither
    after, before = both + gained, both + lost
    low_after, high_after = _wilson(after, n, level)
    low_before, high_before = _wilson(before, n, level)
    p_after, p_before = after / n, before / n
    margins = after * (n - after) * before * (n - before)
    covariance = both * neither - gained * lost
    corrected = max(covariance - n / 2, 0) if covariance > 0 else covariance
    phi = corrected / math.sqrt(margins) if margins else 0.0
    below = _joined(p_after - low_after, high_before - p_before, phi)
    above = _joined(high_after - p_after, p_before - low_before, phi)
    value = (gained - lost) / n
    return Estimate(value, value - below, value + above)


def _joined(a: float, b: float, phi: float) -> float:
    """The length of the error of a difference, of two errors that correlate by phi."""
    return math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))


def _bootstrap(values: Sequence[float], level: float) -> Estimate:
    from scipy.stats import bootstrap

    value = math.fsum(each / len(values) for each in values)
    if min(values) == max(values):
        return Estimate(value, math.nan, math.nan)
    unit = max(abs(each - value) for each in values)  # BCa takes third powers, which may not be floats
    deviations = [(each - value) / unit for each in values]
    interval = bootstrap(
        (deviations,), np.mean, confidence_level=level, method="BCa", rng=np.random.default_rng(_SEED),
        batch=max(1, _BOOTSTRAP_ELEMENTS // len(values)),
    ).confidence_interval  # fmt: skip
    return Estimate(value, value + unit * float(interval.low), value + unit * float(interval.high))
