"""The moments of a group of samples while a kernel works on it, and how it leaves them behind.

In registers they are a tuple of `[BF]` vectors: mean, centred second moment, centred cross moment with the rewards, and
by sign of the reward the sum of the values and the number of active ones. Beside it are two scalars, the number of
samples n and their mean reward. Everything is centred as it comes, as float32 sums about any fixed value cancel.
"""

import triton
import triton.language as tl

# What a group stores for each pooling and feature, `[d_sae]` float32 each; without moments the first two.
PARTIALS = (
    "head", "tail", "mean", "m2", "cross", "sum_positive", "sum_other", "active_positive", "active_other",
)  # fmt: skip
CUT, STORED = tl.constexpr(2), tl.constexpr(len(PARTIALS))


@triton.jit
def with_one(moments, value, n, y, y_mean, positive):
    """The moments after one more sample, `value: [BF]`, where there were `n` of mean reward `y_mean` (Welford 1962)."""
    mean, m2, cross, sum_positive, sum_other, active_positive, active_other = moments
    deviation = value - mean
    mean += deviation * (1.0 / (n + 1))
    active = (value > 0).to(tl.float32)
    other = 1 - positive
    return (
        mean, m2 + deviation * (value - mean), cross + (y - y_mean) * (value - mean),
        sum_positive + positive * value, sum_other + other * value,
        active_positive + positive * active, active_other + other * active,
    )  # fmt: skip


@triton.jit
def with_columns(moments, value, n, m, y, y_mean, y_mean_here, positive, counted):
    """The moments after `m` columns of `value: [BF, W]`, of mean reward `y_mean_here`, where there were `n`.

    Chan's merge of the columns' own moments. `counted: [W]` says which columns, None all of them; the values, `y` and
    `positive` of the others are 0.
    """
    mean, m2, cross, sum_positive, sum_other, active_positive, active_other = moments
    mean_here = tl.sum(value, 1) * (1.0 / tl.maximum(m, 1))
    deviation = value - mean_here[:, None]
    y_deviation, other = y - y_mean_here, 1 - positive
    if counted is not None:
        deviation = tl.where(counted[None, :], deviation, 0.0)
        other = tl.where(counted, other, 0.0)
    delta = mean_here - mean
    share = m / tl.maximum(n + m, 1)
    active = (value > 0).to(tl.float32)
    return (
        mean + delta * share,
        m2 + tl.sum(deviation * deviation, 1) + delta * delta * (n * share),
        cross + tl.sum(deviation * y_deviation[None, :], 1) + delta * ((y_mean_here - y_mean) * (n * share)),
        sum_positive + tl.sum(value * positive[None, :], 1), sum_other + tl.sum(value * other[None, :], 1),
        active_positive + tl.sum(active * positive[None, :], 1), active_other + tl.sum(active * other[None, :], 1),
    )  # fmt: skip


@triton.jit
def store_partials(partials, f, d_sae, head, tail, moments, MOMENTS: tl.constexpr):
    m_f = f < d_sae
    tl.store(partials + f, head, mask=m_f)
    tl.store(partials + d_sae + f, tail, mask=m_f)
    if MOMENTS:
        for at in tl.static_range(len(moments)):
            tl.store(partials + (CUT + at) * d_sae + f, moments[at], mask=m_f)
