"""What is left when the groups of `encode_pool` are done: the samples that a cut between groups went through.

A sample's parts are the tails of the groups from the one it begins in, and the head of the one it ends in. `complete`
puts them together into rows of the pooled matrix; `fold` into moments, and merges all groups' moments, in float64 and
in the order of the groups.
"""

import triton
import triton.language as tl

from corrsteer.kernels.encode_pool import larger
from corrsteer.kernels.partials import CUT
from corrsteer.kernels.update_moments import gain


@triton.jit
def ending_here(g, sample, cu, N, T, group_tokens):
    """Of the groups `g`: does a sample that began in an earlier one end here, which, and where did it begin."""
    base = tl.minimum(tl.maximum(tl.load(cu), 0), T)
    stop = tl.minimum(tl.load(cu + N), T)
    group_start = base + g * group_tokens
    m_g = group_start < stop
    j = tl.load(sample + group_start, mask=m_g, other=0)
    start, end = tl.maximum(tl.load(cu + j), base), tl.load(cu + j + 1)
    cut = m_g & (start < group_start) & (end <= tl.minimum(group_start + group_tokens, stop))
    return cut, j, (start - base) // group_tokens


@triton.jit
def put_together(partials, g, cut, first, f, d_sae, stride, MAX: tl.constexpr):
    """The pooled values (sums, for the mean) of samples cut before groups `g: [GB]`, for features `f`: `[GB, BF]`."""
    m = cut[:, None] & (f < d_sae)[None, :]
    p_f = g.to(tl.int64)[:, None] * stride + f[None, :]
    value = tl.load(partials + p_f, mask=m, other=0.0)
    span = tl.max(tl.where(cut, g - first, 0), 0)
    for back in range(1, span + 1):
        m_back = m & (g - back >= first)[:, None]
        p_part = (g - back).to(tl.int64)[:, None] * stride + (d_sae + f)[None, :]
        part = tl.load(partials + p_part, mask=m_back, other=0.0)
        if MAX:
            value = larger(value, part)
        else:
            value += part
    return value


@triton.jit(do_not_specialize=["T", "N", "group_tokens", "n_groups"])
def complete_kernel(
    partials, pooled, sample, labels, cu, T, N, d_sae, group_tokens, n_groups, stride,
    MAX: tl.constexpr, BF: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """Rows of `pooled: [N, d_sae]` that the groups left: those of cut samples, and zeros for samples without tokens."""
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    at = tl.program_id(0) * BG + tl.arange(0, BG)
    cut, j, first = ending_here(at, sample, cu, N, T, group_tokens)
    cut = cut & (at < n_groups)
    value = put_together(partials, at, cut, first, f, d_sae, stride, MAX)
    if not MAX:
        value *= tl.load(labels + j)[:, None]
    m_f = (f < d_sae)[None, :]
    tl.store(pooled + j.to(tl.int64)[:, None] * d_sae + f[None, :], value, mask=cut[:, None] & m_f)

    m_n = at < N
    empty = m_n & (tl.load(cu + at, mask=m_n, other=0) == tl.load(cu + at + 1, mask=m_n, other=1))
    if tl.max(empty.to(tl.int32), 0) != 0:
        p_row = at.to(tl.int64)[:, None] * d_sae + f[None, :]
        tl.store(pooled + p_row, tl.zeros((BG, BF), tl.float32), mask=empty[:, None] & m_f)


@triton.jit(do_not_specialize=["T", "N", "group_tokens", "n_groups"])
def fold_kernel(
    partials, finished, sample, labels, cu, before, batch,
    z_mean, z_m2, cross, n_active, group_sum, group_active_sum, group_active_count,
    T, N, d_sae, group_tokens, n_groups, stride,
    MAX: tl.constexpr, BF: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """Moments of features `f`, all groups of a batch folded and merged into a state of one label."""
    f = tl.program_id(0) * BF + tl.arange(0, BF)
    m_f = f < d_sae
    n, y_mean = tl.zeros((), tl.float64), tl.zeros((), tl.float64)
    mean = tl.zeros((BF,), tl.float64)
    m2, covariance = mean, mean
    sum_positive, sum_other, active_positive, active_other = mean, mean, mean, mean
    for g0 in range(0, n_groups, BG):
        g = g0 + tl.arange(0, BG)
        m_g = g < n_groups
        m = m_g[:, None] & m_f[None, :]
        own = partials + CUT * d_sae + g.to(tl.int64)[:, None] * stride + f[None, :]

        # the samples that each group began and finished, and as one more entry a group the one cut before it
        cut, j, first = ending_here(g, sample, cu, N, T, group_tokens)
        cut = cut & m_g
        value = put_together(partials, g, cut, first, f, d_sae, stride, MAX)
        if not MAX:
            value *= tl.load(labels + j)[:, None]
        value = value.to(tl.float64)
        y = tl.load(labels + N + j, mask=cut, other=0.0).to(tl.float64)[:, None]
        positive = tl.load(labels + 2 * N + j, mask=cut, other=0.0).to(tl.float64)[:, None]
        is_cut = cut.to(tl.float64)[:, None]
        n_g = tl.load(finished + 2 * g, mask=m_g, other=0.0).to(tl.float64)[:, None]
        y_g = tl.load(finished + 2 * g + 1, mask=m_g, other=0.0).to(tl.float64)[:, None]
        mean_g = tl.load(own, mask=m, other=0.0).to(tl.float64)
        m2_g = tl.load(own + d_sae, mask=m, other=0.0).to(tl.float64)
        cross_g = tl.load(own + 2 * d_sae, mask=m, other=0.0).to(tl.float64)

        n_here = tl.sum(n_g + is_cut)
        mean_here = tl.sum(n_g * mean_g + is_cut * value, 0) / tl.maximum(n_here, 1.0)
        y_here = tl.sum(n_g * y_g + is_cut * y) / tl.maximum(n_here, 1.0)
        from_mean_g, from_mean = mean_g - mean_here[None, :], is_cut * (value - mean_here[None, :])
        m2_here = tl.sum(m2_g + n_g * from_mean_g * from_mean_g + from_mean * from_mean, 0)
        cross_here = tl.sum(cross_g + n_g * from_mean_g * (y_g - y_here) + from_mean * (y - y_here), 0)
        delta, y_delta = mean_here - mean, y_here - y_mean
        share = n_here / tl.maximum(n + n_here, 1.0)
        m2 += m2_here + delta * delta * (n * share)
        covariance += cross_here + delta * (y_delta * (n * share))
        mean += delta * share
        y_mean += y_delta * share
        n += n_here

        active = (value > 0).to(tl.float64)
        sum_positive += tl.sum(tl.load(own + 3 * d_sae, mask=m, other=0.0).to(tl.float64) + positive * value, 0)
        sum_other += tl.sum(tl.load(own + 4 * d_sae, mask=m, other=0.0).to(tl.float64) + (is_cut - positive) * value, 0)
        active_positive += tl.sum(tl.load(own + 5 * d_sae, mask=m, other=0.0).to(tl.float64) + positive * active, 0)
        active_other += tl.sum(
            tl.load(own + 6 * d_sae, mask=m, other=0.0).to(tl.float64) + (is_cut - positive) * active, 0
        )

    # samples without a token count as zeros; as all rewards are centred, theirs sum to minus the others' n · y_mean
    covariance += mean * (n * y_mean)
    empty = N - n
    m2 += mean * mean * (n * (empty / N))
    mean *= n / N

    old_n, old_y_mean = tl.load(before), tl.load(before + 1)
    old_mean = tl.load(z_mean + f, mask=m_f, other=0.0)
    share = N / (old_n + N)
    delta = mean - old_mean
    gain(z_m2 + f, m2 + delta * delta * (old_n * share), m_f)
    gain(cross + f, covariance + delta * ((tl.load(batch) - old_y_mean) * (old_n * share)), m_f)
    tl.store(z_mean + f, old_mean + delta * share, mask=m_f)
    gain(n_active + f, active_positive + active_other, m_f)
    # activations are not negative, so that their sum is also the sum over the active samples
    gain(group_sum + f, sum_positive, m_f)
    gain(group_sum + d_sae + f, sum_other, m_f)
    gain(group_active_sum + f, sum_positive, m_f)
    gain(group_active_sum + d_sae + f, sum_other, m_f)
    gain(group_active_count + f, active_positive, m_f)
    gain(group_active_count + d_sae + f, active_other, m_f)
