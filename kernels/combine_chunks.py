"""What is left when the chunks of `encode_pool` are done: the samples that a cut between chunks split.

A split sample is what was carried out of the chunks from the one it begins in, and its part in the one it ends in.
`combine_pooled` adds these up into rows of the pooled matrix; `combine_moments` into moments, and merges those of all
chunks, in float64 and in the order of the chunks.
"""

import triton
import triton.language as tl
from torch import Tensor

from corrsteer.kernels.moments import COUNT, MEAN_REWARD, accumulate, chan_mean, chan_product
from corrsteer.kernels.partials import (
    ACTIVE_OTHER,
    ACTIVE_POSITIVE,
    CARRY_IN,
    CARRY_OUT,
    CROSS,
    M2,
    MEAN,
    SUM_OTHER,
    SUM_POSITIVE,
    Partials,
    load_partial,
)
from corrsteer.kernels.plan import INVERSE_LENGTH, POSITIVE, REWARD, Plan
from corrsteer.kernels.segment_reduce import ieee_maximum


@triton.jit
def split_samples(chunk, segment_ids, cu, N, T, chunk_tokens):
    """Of the chunks `chunk: [BC]`: does a sample that began in an earlier one end here, which, and where it began."""
    base = tl.minimum(tl.maximum(tl.load(cu), 0), T)
    stop = tl.minimum(tl.load(cu + N), T)
    chunk_start = base + chunk * chunk_tokens
    m_c = chunk_start < stop
    j = tl.load(segment_ids + chunk_start, mask=m_c, other=0)
    start, end = tl.maximum(tl.load(cu + j), base), tl.load(cu + j + 1)
    split = m_c & (start < chunk_start) & (end <= tl.minimum(chunk_start + chunk_tokens, stop))
    return split, j, (start - base) // chunk_tokens


@triton.jit
def combine_carries(partials, chunk, split, first, f, d_sae, stride, MAX: tl.constexpr):
    """Pooled values (sums, for the mean) of the samples that end in chunks `chunk: [BC]`, and for features `f: [BF]`:
    `[BC, BF]`."""
    m = split[:, None] & (f < d_sae)[None, :]
    p_in = partials + CARRY_IN * d_sae + chunk.to(tl.int64)[:, None] * stride + f[None, :]
    value = tl.load(p_in, mask=m, other=0.0)  # [BC, BF]
    span = tl.max(tl.where(split, chunk - first, 0), 0)
    for back in range(1, span + 1):
        m_back = m & (chunk - back >= first)[:, None]
        p_out = partials + CARRY_OUT * d_sae + (chunk - back).to(tl.int64)[:, None] * stride + f[None, :]
        part = tl.load(p_out, mask=m_back, other=0.0)
        if MAX:
            value = ieee_maximum(value, part)
        else:
            value += part
    return value


@triton.jit(do_not_specialize=["T", "N", "chunk_tokens", "n_chunks"])
def combine_pooled_kernel(
    partials, pooled, segment_ids, sample_stats, cu, T, N, d_sae, chunk_tokens, n_chunks, stride,
    MAX: tl.constexpr, BF: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Rows of `pooled: [N, d_sae]` that the chunks left: of split samples, and zeros for samples without tokens."""
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    at = tl.program_id(0) * BC + tl.arange(0, BC)
    split, j, first = split_samples(at, segment_ids, cu, N, T, chunk_tokens)
    split = split & (at < n_chunks)
    value = combine_carries(partials, at, split, first, f, d_sae, stride, MAX)  # [BC, BF]
    if not MAX:
        value *= tl.load(sample_stats + INVERSE_LENGTH * N + j)[:, None]
    m_f = (f < d_sae)[None, :]
    tl.store(pooled + j.to(tl.int64)[:, None] * d_sae + f[None, :], value, mask=split[:, None] & m_f)

    m_n = at < N
    empty = m_n & (tl.load(cu + at, mask=m_n, other=0) == tl.load(cu + at + 1, mask=m_n, other=1))
    if tl.max(empty.to(tl.int32), 0) != 0:
        p_row = at.to(tl.int64)[:, None] * d_sae + f[None, :]
        tl.store(pooled + p_row, tl.zeros((BC, BF), tl.float32), mask=empty[:, None] & m_f)


def combine_pooled(partials: Partials, cu: Tensor, T: int, pools: tuple[str, ...], planned: Plan, pooled) -> None:
    """Complete `pooled: [len(pools), N, d_sae]`."""
    n_chunks, (N, d_sae) = len(partials.rows), pooled.shape[1:]
    grid = (triton.cdiv(max(N, n_chunks), 16), triton.cdiv(d_sae, 128))
    for at, pool in enumerate(pools):
        combine_pooled_kernel[grid](
            partials.rows[:, at], pooled[at], planned.segment_ids, planned.sample_stats, cu, T, N, d_sae,
            partials.chunk_tokens, n_chunks, partials.rows.stride(0), MAX=pool == "max", BF=128, BC=16,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "N", "chunk_tokens", "n_chunks"])
def combine_moments_kernel(
    partials, finished, segment_ids, sample_stats, cu, before, batch_y,
    z_mean, z_m2, cross, n_active, group_sum, group_active_sum, group_active_count,
    T, N, d_sae, chunk_tokens, n_chunks, stride,
    MAX: tl.constexpr, BF: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Moments of features `f: [BF]` over all chunks of a batch, merged into a state of one label."""
    f = tl.program_id(0) * BF + tl.arange(0, BF)
    m_f = f < d_sae
    n, y_mean = tl.zeros((), tl.float64), tl.zeros((), tl.float64)
    mean = tl.zeros((BF,), tl.float64)  # [BF]
    m2, covariance = mean, mean
    sum_positive, sum_other, active_positive, active_other = mean, mean, mean, mean
    for chunk0 in range(0, n_chunks, BC):
        chunk = chunk0 + tl.arange(0, BC)
        m_c = chunk < n_chunks
        m = m_c[:, None] & m_f[None, :]
        p_own = partials + chunk.to(tl.int64)[:, None] * stride + f[None, :]  # [BC, BF]

        # the samples that each chunk began and finished, and as one more entry a chunk the split one that ends in it
        split, j, first = split_samples(chunk, segment_ids, cu, N, T, chunk_tokens)
        split = split & m_c
        value = combine_carries(partials, chunk, split, first, f, d_sae, stride, MAX)  # [BC, BF]
        if not MAX:
            value *= tl.load(sample_stats + INVERSE_LENGTH * N + j)[:, None]
        value = value.to(tl.float64)
        y = tl.load(sample_stats + REWARD * N + j, mask=split, other=0.0).to(tl.float64)[:, None]
        positive = tl.load(sample_stats + POSITIVE * N + j, mask=split, other=0.0).to(tl.float64)[:, None]
        is_split = split.to(tl.float64)[:, None]
        n_c = tl.load(finished + 2 * chunk + COUNT, mask=m_c, other=0.0).to(tl.float64)[:, None]
        y_c = tl.load(finished + 2 * chunk + MEAN_REWARD, mask=m_c, other=0.0).to(tl.float64)[:, None]
        mean_c = load_partial(p_own, MEAN, d_sae, m)
        m2_c = load_partial(p_own, M2, d_sae, m)
        cross_c = load_partial(p_own, CROSS, d_sae, m)

        n_here = tl.sum(n_c + is_split)
        mean_here = tl.sum(n_c * mean_c + is_split * value, 0) / tl.maximum(n_here, 1.0)  # [BF]
        y_here = tl.sum(n_c * y_c + is_split * y) / tl.maximum(n_here, 1.0)
        from_mean_c, from_mean = mean_c - mean_here[None, :], is_split * (value - mean_here[None, :])
        m2_here = tl.sum(m2_c + n_c * from_mean_c * from_mean_c + from_mean * from_mean, 0)
        cross_here = tl.sum(cross_c + n_c * from_mean_c * (y_c - y_here) + from_mean * (y - y_here), 0)
        delta = mean_here - mean
        m2 = chan_product(n, m2, n_here, m2_here, delta)
        covariance = chan_product(n, covariance, n_here, cross_here, delta, y_here - y_mean)
        mean = chan_mean(n, mean, n_here, mean_here)
        y_mean = chan_mean(n, y_mean, n_here, y_here)
        n += n_here

        active = (value > 0).to(tl.float64)
        sum_positive += tl.sum(load_partial(p_own, SUM_POSITIVE, d_sae, m) + positive * value, 0)
        sum_other += tl.sum(load_partial(p_own, SUM_OTHER, d_sae, m) + (is_split - positive) * value, 0)
        active_positive += tl.sum(load_partial(p_own, ACTIVE_POSITIVE, d_sae, m) + positive * active, 0)
        active_other += tl.sum(load_partial(p_own, ACTIVE_OTHER, d_sae, m) + (is_split - positive) * active, 0)

    # samples without a token count as zeros; as all rewards are centred, theirs sum to minus the others' n · y_mean
    covariance += mean * (n * y_mean)
    covariance *= tl.load(batch_y + 1)  # the unit that rewards were in
    m2 = chan_product(n, m2, N - n, 0.0, mean)
    mean *= n / N

    old_n, old_y_mean = tl.load(before + COUNT), tl.load(before + MEAN_REWARD)
    old_mean = tl.load(z_mean + f, mask=m_f, other=0.0)
    delta = mean - old_mean
    old_m2, old_cross = tl.load(z_m2 + f, mask=m_f, other=0.0), tl.load(cross + f, mask=m_f, other=0.0)
    y_delta = tl.load(batch_y) - old_y_mean
    tl.store(z_m2 + f, chan_product(old_n, old_m2, N, m2, delta), mask=m_f)
    tl.store(cross + f, chan_product(old_n, old_cross, N, covariance, delta, y_delta), mask=m_f)
    tl.store(z_mean + f, chan_mean(old_n, old_mean, N, mean), mask=m_f)
    accumulate(n_active + f, active_positive + active_other, m_f)
    # activations are not negative, so that their sum is also the sum over the active samples
    other = f + d_sae  # second row of `[2, d_sae]`
    accumulate(group_sum + f, sum_positive, m_f)
    accumulate(group_sum + other, sum_other, m_f)
    accumulate(group_active_sum + f, sum_positive, m_f)
    accumulate(group_active_sum + other, sum_other, m_f)
    accumulate(group_active_count + f, active_positive, m_f)
    accumulate(group_active_count + other, active_other, m_f)


def combine_moments(partials: Partials, cu: Tensor, T: int, pools: tuple[str, ...], planned: Plan, moments) -> None:
    """Merge a batch into `moments`, a state of one label for each pooling."""
    for at, (pool, state) in enumerate(zip(pools, moments)):
        d_sae = len(state.z_mean)
        combine_moments_kernel[(triton.cdiv(d_sae, 64),)](
            partials.rows[:, at], partials.finished, planned.segment_ids, planned.sample_stats, cu,
            planned.before[2 * at :], planned.batch_y, state.z_mean, state.z_m2, state.cross, state.n_active,
            state.group_sum, state.group_active_sum, state.group_active_count, T, len(cu) - 1, d_sae,
            partials.chunk_tokens, len(partials.rows), partials.rows.stride(0), MAX=pool == "max", BF=64, BC=16,
        )  # fmt: skip
