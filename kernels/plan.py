"""What a batch's kernels need to know of its samples, computed on the GPU so that no call waits for a value.

`plan` writes each token's segment, and what each sample contributes by: one over its length, and for the moments its
centred reward and whether that is positive. It also brings the rewards' own moments up to date.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from corrsteer.kernels.launch import readable
from corrsteer.kernels.moments import COUNT, MEAN_REWARD, chan_mean, chan_product, power_of_two

TOKENS = 256  # looked up by one program
SAMPLES = 1024  # read at a time
INVERSE_LENGTH, REWARD, POSITIVE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # rows of the sample statistics


class Plan(NamedTuple):
    """What `plan` computed; `[T]`, `[3, N]`, `[states, 2]` and `[2]`, the last two where there are rewards."""

    segment_ids: Tensor  # int32, which sample a token belongs to
    sample_stats: Tensor  # float32: one over the length, the centred reward in its unit, and 1 where it was positive
    before: Tensor | None  # float64, the count and mean reward that each state had
    batch_y: Tensor | None  # float64, the batch's mean reward, and the unit of the centred ones, a power of two


@triton.jit
def merge_rewards(count, y_mean, y_m2, n_positive, before, N, mean, m2, positive):
    """The batch's rewards merged into a state's, with what was there kept in `before`."""
    old_n, old_mean = tl.load(count), tl.load(y_mean)
    tl.store(before + COUNT, old_n)
    tl.store(before + MEAN_REWARD, old_mean)
    delta = mean - old_mean
    tl.store(y_m2, chan_product(old_n, tl.load(y_m2), N, m2, delta))
    tl.store(y_mean, chan_mean(old_n, old_mean, N, mean))
    tl.store(n_positive, tl.load(n_positive) + positive)
    tl.store(count, old_n + N)


# Sizes that change from batch to batch; each special value of one would be compiled for again.
@triton.jit(do_not_specialize=["T", "N", "steps", "y_stride"])
def plan_kernel(
    cu, segment_ids, sample_stats, y, y_stride, before, batch_y,
    count, y_mean, y_m2, n_positive, other_count, other_y_mean, other_y_m2, other_n_positive, T, N, steps,
    TOKENS: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """Each token's segment by binary search; and in the first program what is one number a sample, or a state."""
    program = tl.program_id(0)
    t = program * TOKENS + tl.arange(0, TOKENS)
    low = tl.zeros((TOKENS,), tl.int32)
    high = low + N
    for _ in range(steps):  # the first sample that ends behind the token
        middle = (low + high) // 2
        passed = tl.load(cu + 1 + middle, mask=middle < N, other=2147483647) <= t
        low = tl.where(passed & (low < high), middle + 1, low)
        high = tl.where(passed, high, middle)
    tl.store(segment_ids + t, tl.minimum(low, N - 1), mask=t < T)

    if program == 0:
        if y is not None:
            total = tl.zeros((SAMPLES,), tl.float64)
            largest = tl.zeros((SAMPLES,), tl.float64)
            positive = tl.zeros((SAMPLES,), tl.float64)
            for j in range(0, N, SAMPLES):
                o_n = j + tl.arange(0, SAMPLES)
                b_y = tl.load(y + o_n.to(tl.int64) * y_stride, mask=o_n < N, other=0).to(tl.float64)  # [SAMPLES]
                total += b_y
                largest = tl.maximum(largest, tl.abs(b_y))
                positive += (b_y > 0).to(tl.float64)
            mean = tl.sum(total, 0) / N
            unit = power_of_two(tl.max(largest, 0))
            m2 = tl.zeros((SAMPLES,), tl.float64)
        for j in range(0, N, SAMPLES):
            o_n = j + tl.arange(0, SAMPLES)
            m_n = o_n < N
            length = tl.load(cu + o_n + 1, mask=m_n, other=0) - tl.load(cu + o_n, mask=m_n, other=0)
            tl.store(sample_stats + INVERSE_LENGTH * N + o_n, 1.0 / tl.maximum(length, 1).to(tl.float32), mask=m_n)
            if y is not None:
                b_y = tl.load(y + o_n.to(tl.int64) * y_stride, mask=m_n, other=0).to(tl.float64)
                centred = tl.where(m_n, b_y - mean, 0.0)
                m2 += centred * centred
                tl.store(sample_stats + REWARD * N + o_n, (centred / unit).to(tl.float32), mask=m_n)
                tl.store(sample_stats + POSITIVE * N + o_n, (b_y > 0).to(tl.float32), mask=m_n)
        if y is not None:
            tl.store(batch_y, mean)
            tl.store(batch_y + 1, unit)
            m2, positive = tl.sum(m2, 0), tl.sum(positive, 0)
            merge_rewards(count, y_mean, y_m2, n_positive, before, N, mean, m2, positive)
            if other_count is not None:
                before += 2
                merge_rewards(other_count, other_y_mean, other_y_m2, other_n_positive, before, N, mean, m2, positive)


def plan(x: Tensor, cu: Tensor, y: Tensor | None = None, states=()) -> Plan:
    """The plan of a batch of `x: [T, d_in]`; with rewards `y: [N, 1]`, one or two Moments take them in."""
    T, N = len(x), len(cu) - 1
    segment_ids = torch.empty(max(T, 1), dtype=torch.int32, device=x.device)
    sample_stats = torch.empty(3, N, dtype=torch.float32, device=x.device)
    before = batch_y = None
    rewards = [None] * 8
    if y is not None:
        scalars = torch.empty(2 * len(states) + 2, dtype=torch.float64, device=x.device)
        before, batch_y = scalars[:-2], scalars[-2:]
        y = readable(y)
        for at, s in enumerate(states):
            rewards[4 * at : 4 * at + 4] = s.count, s.y_mean, s.y_m2, s.n_positive
    plan_kernel[(triton.cdiv(max(T, 1), TOKENS),)](
        cu, segment_ids, sample_stats, y, 0 if y is None else y.stride(0), before, batch_y, *rewards,
        T, N, N.bit_length(), TOKENS=TOKENS, SAMPLES=SAMPLES,
    )  # fmt: skip
    return Plan(segment_ids, sample_stats, before, batch_y)
