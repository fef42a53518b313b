"""The moments of a group of samples while a kernel works on it, and how it leaves them behind.

In registers they are a tuple of `[BF]` vectors: a shift (the first value seen, which keeps deviations from it small),
the deviations' sum and sum of squares, the cross moment with the centred rewards, and by sign of the reward the sum of
the values and the number of active ones. The number of samples is a scalar beside it.
"""

import triton
import triton.language as tl

# What a group stores for each pooling and feature, `[d_sae]` float32 each; without moments the first two.
PARTIALS = (
    "head", "tail", "mean", "m2", "cross", "sum_positive", "sum_other", "active_positive", "active_other",
)  # fmt: skip
CUT, STORED = tl.constexpr(2), tl.constexpr(len(PARTIALS))


@triton.jit
def with_one(moments, value, n, y, positive):
    """The moments after one more sample, `value: [BF]`, where there were `n`."""
    shift, s1, s2, cross, sum_positive, sum_other, active_positive, active_other = moments
    shift = tl.where(n == 0, value, shift)
    deviation = value - shift
    active = (value > 0).to(tl.float32)
    other = 1 - positive
    return (
        shift, s1 + deviation, s2 + deviation * deviation, cross + y * value,
        sum_positive + positive * value, sum_other + other * value,
        active_positive + positive * active, active_other + other * active,
    )  # fmt: skip


@triton.jit
def with_columns(moments, value, n, y, positive, counted):
    """The moments after the columns of `value: [BF, W]`, where there were `n`; of those that `counted: [W]` says, or
    of all of them where it is None. `y` and `positive` are 0 in the others."""
    shift, s1, s2, cross, sum_positive, sum_other, active_positive, active_other = moments
    W: tl.constexpr = value.shape[1]
    at = tl.arange(0, W)
    if n == 0:
        first = 0
        if counted is not None:
            first = tl.min(tl.where(counted, at, W), 0)
        shift = tl.sum(tl.where((at == first)[None, :], value, 0.0), 1)
    deviation = value - shift[:, None]
    other = 1 - positive
    if counted is not None:
        deviation = tl.where(counted[None, :], deviation, 0.0)
        other = tl.where(counted, other, 0.0)
    active = (value > 0).to(tl.float32)
    return (
        shift, s1 + tl.sum(deviation, 1), s2 + tl.sum(deviation * deviation, 1), cross + tl.sum(value * y[None, :], 1),
        sum_positive + tl.sum(value * positive[None, :], 1), sum_other + tl.sum(value * other[None, :], 1),
        active_positive + tl.sum(active * positive[None, :], 1), active_other + tl.sum(active * other[None, :], 1),
    )  # fmt: skip


@triton.jit
def store_partials(partials, f, d_sae, head, tail, n, moments, MOMENTS: tl.constexpr):
    m_f = f < d_sae
    tl.store(partials + f, head, mask=m_f)
    tl.store(partials + d_sae + f, tail, mask=m_f)
    if MOMENTS:
        shift, s1, s2, cross, sum_positive, sum_other, active_positive, active_other = moments
        shifted_mean = s1 / tl.maximum(n, 1).to(tl.float32)
        kept = (
            shift + shifted_mean, s2 - s1 * shifted_mean, cross,
            sum_positive, sum_other, active_positive, active_other,
        )  # fmt: skip
        for at in tl.static_range(len(kept)):
            tl.store(partials + (CUT + at) * d_sae + f, kept[at], mask=m_f)
