"""What a batch's kernels need to know of its samples, computed on the GPU so that no call waits for a value.

`plan` writes each token's sample and, for the moments, what each sample contributes by: its centred reward, whether
that is positive, and one over its length. It also brings the reward's own moments up to date.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS = 256  # looked up by one program
SAMPLES = 1024  # read at a time


class Plan(NamedTuple):
    """`sample` `[T]` int32, which sample a token belongs to; `labels` `[3, N]` float32: one over the length, and where
    there are rewards the centred reward and 1 where it is positive; `before` `[states, 2]` float64: the count and mean
    reward that each state had; `batch` `[1]` float64, the batch's mean reward."""

    sample: Tensor
    labels: Tensor
    before: Tensor | None
    batch: Tensor | None


@triton.jit
def advance(count, y_mean, y_m2, n_positive, before, N, mean, m2, positive):
    """Chan's merge of the batch's rewards into a state's, with what was there kept in `before`."""
    old_n, old_mean = tl.load(count), tl.load(y_mean)
    tl.store(before, old_n)
    tl.store(before + 1, old_mean)
    share = N / (old_n + N)
    delta = mean - old_mean
    tl.store(y_m2, tl.load(y_m2) + m2 + delta * delta * (old_n * share))
    tl.store(y_mean, old_mean + delta * share)
    tl.store(n_positive, tl.load(n_positive) + positive)
    tl.store(count, old_n + N)


# Sizes that change from batch to batch; each special value of one would be compiled for again.
@triton.jit(do_not_specialize=["T", "N", "steps", "y_stride"])
def plan_kernel(
    cu, sample, labels, y, y_stride, before, batch,
    count, y_mean, y_m2, n_positive, other_count, other_y_mean, other_y_m2, other_n_positive, T, N, steps,
    TOKENS: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    t = program * TOKENS + tl.arange(0, TOKENS)
    low = tl.zeros((TOKENS,), tl.int32)
    high = low + N
    for _ in range(steps):  # the first sample that ends behind the token
        middle = (low + high) // 2
        passed = tl.load(cu + 1 + middle, mask=middle < N, other=2147483647) <= t
        low = tl.where(passed & (low < high), middle + 1, low)
        high = tl.where(passed, high, middle)
    tl.store(sample + t, tl.minimum(low, N - 1), mask=t < T)

    if program == 0:
        if y is not None:
            total = tl.zeros((SAMPLES,), tl.float64)
            positive = tl.zeros((SAMPLES,), tl.float64)
            for j in range(0, N, SAMPLES):
                o_n = j + tl.arange(0, SAMPLES)
                b_y = tl.load(y + o_n.to(tl.int64) * y_stride, mask=o_n < N, other=0).to(tl.float64)
                total += b_y
                positive += (b_y > 0).to(tl.float64)
            mean = tl.sum(total, 0) / N
            m2 = tl.zeros((SAMPLES,), tl.float64)
        for j in range(0, N, SAMPLES):
            o_n = j + tl.arange(0, SAMPLES)
            m_n = o_n < N
            length = tl.load(cu + o_n + 1, mask=m_n, other=0) - tl.load(cu + o_n, mask=m_n, other=0)
            tl.store(labels + o_n, 1.0 / tl.maximum(length, 1).to(tl.float32), mask=m_n)
            if y is not None:
                b_y = tl.load(y + o_n.to(tl.int64) * y_stride, mask=m_n, other=0).to(tl.float64)
                centred = tl.where(m_n, b_y - mean, 0.0)
                m2 += centred * centred
                tl.store(labels + N + o_n, centred.to(tl.float32), mask=m_n)
                tl.store(labels + 2 * N + o_n, (b_y > 0).to(tl.float32), mask=m_n)
        if y is not None:
            tl.store(batch, mean)
            m2, positive = tl.sum(m2, 0), tl.sum(positive, 0)
            advance(count, y_mean, y_m2, n_positive, before, N, mean, m2, positive)
            if other_count is not None:
                advance(other_count, other_y_mean, other_y_m2, other_n_positive, before + 2, N, mean, m2, positive)


def readable(values: Tensor) -> Tensor:
    """The same numbers in a dtype that Triton and its interpreter both read rightly."""
    return values.to({torch.bool: torch.uint8, torch.bfloat16: torch.float32}.get(values.dtype, values.dtype))


def plan(x: Tensor, cu: Tensor, y: Tensor | None = None, states=()) -> Plan:
    """The plan of a batch of `x: [T, d_in]`; with rewards `y: [N, 1]`, one or two Moments take them in."""
    T, N = len(x), len(cu) - 1
    sample = torch.empty(max(T, 1), dtype=torch.int32, device=x.device)
    labels = torch.empty(3, N, dtype=torch.float32, device=x.device)
    before = batch = None
    rewards = [None] * 8
    if y is not None:
        scalars = torch.empty(2 * len(states) + 1, dtype=torch.float64, device=x.device)
        before, batch = scalars[:-1], scalars[-1:]
        y = readable(y)
        for at, s in enumerate(states):
            rewards[4 * at : 4 * at + 4] = s.count, s.y_mean, s.y_m2, s.n_positive
    plan_kernel[(triton.cdiv(max(T, 1), TOKENS),)](
        cu, sample, labels, y, 0 if y is None else y.stride(0), before, batch, *rewards, T, N, N.bit_length(),
        TOKENS=TOKENS, SAMPLES=SAMPLES,
    )  # fmt: skip
    return Plan(sample, labels, before, batch)
