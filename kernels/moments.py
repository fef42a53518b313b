"""Moments of samples: how they take in one sample, the samples of a tile, or another set's moments.

Everything is centred as it comes, as float32 sums about any fixed value cancel. One sample is taken in by Welford's
update (Technometrics 4, 1962), a set by the pairwise merge of Chan, Golub and LeVeque (The American Statistician 37,
1983), which holds in any dtype: the kernels use it for float32 tiles and for the float64 state.
"""

from typing import NamedTuple

import triton
import triton.language as tl

# Beside Moments are the number of samples n and their mean reward; in memory they lie next to each other.
COUNT, MEAN_REWARD = tl.constexpr(0), tl.constexpr(1)


class Moments(NamedTuple):
    """Of the samples so far, `[BF]` float32 each; `positive` and `other` go by the sign of the reward."""

    mean: tl.tensor
    m2: tl.tensor  # centred second moment
    cross: tl.tensor  # centred cross moment with the rewards
    sum_positive: tl.tensor
    sum_other: tl.tensor
    active_positive: tl.tensor  # how many are above 0
    active_other: tl.tensor


@triton.jit
def power_of_two(size):
    """The largest power of two not above float64 numbers, and 1 for 0: a unit in which float32 can hold them."""
    power = (size.to(tl.int64, bitcast=True) & 0x7FF0000000000000).to(tl.float64, bitcast=True)
    return tl.where(power > 0, power, 1.0)


@triton.jit
def chan_mean(n_a, mean_a, n_b, mean_b):
    """The mean of two sets together."""
    return mean_a + (mean_b - mean_a) * (n_b / tl.maximum(n_a + n_b, 1))


@triton.jit
def chan_product(n_a, product_a, n_b, product_b, x_delta, y_delta=None):
    """The centred sum of products of two sets together, whose means are `x_delta` and `y_delta` apart; of squares
    without the latter."""
    weight = n_a * (n_b / tl.maximum(n_a + n_b, 1))
    if y_delta is None:
        return product_a + product_b + x_delta * x_delta * weight
    else:  # the vector comes last, as y is a scalar in most uses
        return product_a + product_b + x_delta * (y_delta * weight)


@triton.jit
def welford_update(moments, value, n, y, y_mean, positive):
    """The moments after one more sample, `value: [BF]`, where there were `n` of mean reward `y_mean`."""
    mean, m2, cross, sum_positive, sum_other, active_positive, active_other = moments
    deviation = value - mean
    mean += deviation * (1.0 / (n + 1))
    active = (value > 0).to(tl.float32)
    other = 1 - positive
    return Moments(
        mean, m2 + deviation * (value - mean), cross + (y - y_mean) * (value - mean),
        sum_positive + positive * value, sum_other + other * value,
        active_positive + positive * active, active_other + other * active,
    )  # fmt: skip


@triton.jit
def merge_columns(moments, value, n, m, y, y_mean, y_mean_here, positive, counted):
    """The moments after `m` columns of `value: [BF, W]`, of mean reward `y_mean_here`, where there were `n`.

    `counted: [W]` says which columns, None all of them; the values, `y` and `positive` of the others are 0.
    """
    mean, m2, cross, sum_positive, sum_other, active_positive, active_other = moments
    mean_here = tl.sum(value, 1) * (1.0 / tl.maximum(m, 1))
    deviation = value - mean_here[:, None]  # [BF, W]
    y_deviation, other = y - y_mean_here, 1 - positive
    if counted is not None:
        deviation = tl.where(counted[None, :], deviation, 0.0)
        other = tl.where(counted, other, 0.0)
    delta = mean_here - mean
    mean = chan_mean(n, mean, m, mean_here)
    active = (value > 0).to(tl.float32)
    return Moments(
        mean,
        chan_product(n, m2, m, tl.sum(deviation * deviation, 1), delta),
        chan_product(n, cross, m, tl.sum(deviation * y_deviation[None, :], 1), delta, y_mean_here - y_mean),
        sum_positive + tl.sum(value * positive[None, :], 1), sum_other + tl.sum(value * other[None, :], 1),
        active_positive + tl.sum(active * positive[None, :], 1), active_other + tl.sum(active * other[None, :], 1),
    )  # fmt: skip


@triton.jit
def accumulate(pointer, amount, mask):
    """Add to the float64 state in memory."""
    tl.store(pointer, tl.load(pointer, mask=mask, other=0.0) + amount.to(tl.float64), mask=mask)
