"""encode_pool and the heart of encode_update: product, activation, pooling and moments in one kernel.

A program owns a block of features and a group of neighbouring tokens. It walks the group's tiles in order and carries
the pooled value of the sample that is still open from tile to tile, so that a dense activation lives only in
registers. A finished sample is written to `[N, d_sae]`, or folded into the group's moments at once.

Groups are cut by tokens alone, so that all of them do the same work whatever the samples' lengths, and no length need
be known to launch. A sample that a cut goes through is left to `boundaries.py`: the group in which it goes on to its
end stores its part as `head`, the group at whose end it is open stores it as `tail`.

Within a tile there are two ways through the samples, both right for any lengths. `few` loops over the samples that
end in each slice of SUB tokens. `many` is a segmented scan of each slice, whose cost does not depend on how many
samples end there; where every token is a sample of its own it leaves the scan out.
"""

import triton
import triton.language as tl

from corrsteer.kernels.product import activated, halves, normalised, product, tile_of

# What a group stores for each pooling and feature, `[d_sae]` float32 each; without moments the first two.
PARTIALS = (
    "head", "tail", "mean", "m2", "cross", "sum_positive", "sum_other", "active_positive", "active_other",
)  # fmt: skip
CUT, STORED = tl.constexpr(2), tl.constexpr(len(PARTIALS))
NEVER = tl.constexpr(2147483647)
EVERY_NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=EVERY_NAN)


@triton.jit
def added_since_open(a, a_opens, b, b_opens):
    return tl.where(b_opens != 0, b, a + b), a_opens | b_opens


@triton.jit
def largest_since_open(a, a_opens, b, b_opens):
    return tl.where(b_opens != 0, b, larger(a, b)), a_opens | b_opens


@triton.jit
def with_one(moments, value, n, y, positive, counts):
    """The moments after one more sample: Welford's update, with `n` the count that includes it.

    `counts` is 0 or 1, and 0 leaves everything as it is.
    """
    mean, m2, cross, sum_positive, sum_other, active_positive, active_other = moments
    deviation = value - mean
    mean += deviation * (counts / tl.maximum(n, 1.0))
    m2 += counts * deviation * (value - mean)
    cross += (counts * y) * value
    active = (value > 0).to(tl.float32)
    positive, other = counts * positive, counts * (1 - positive)
    return (
        mean, m2, cross,
        sum_positive + positive * value, sum_other + other * value,
        active_positive + positive * active, active_other + other * active,
    )  # fmt: skip


@triton.jit
def with_columns(moments, value, n, m, y, positive, counts):
    """The moments after the `m` columns of `value: [BF, W]` for which `counts: [W]` is 1; Chan's merge, `n` before."""
    mean, m2, cross, sum_positive, sum_other, active_positive, active_other = moments
    value = tl.where(counts[None, :] > 0, value, 0.0)
    own_mean = tl.sum(value, 1) / tl.maximum(m, 1.0)
    deviation = value - own_mean[:, None]
    delta = own_mean - mean
    share = m / tl.maximum(n + m, 1.0)
    active = (value > 0).to(tl.float32)
    positive, other = positive[None, :], (counts - positive)[None, :]
    return (
        mean + delta * share,
        m2 + tl.sum(deviation * deviation * counts[None, :], 1) + delta * delta * (n * share),
        cross + tl.sum(value * y[None, :], 1),
        sum_positive + tl.sum(value * positive, 1), sum_other + tl.sum(value * other, 1),
        active_positive + tl.sum(active * positive, 1), active_other + tl.sum(active * other, 1),
    )  # fmt: skip


@triton.jit
def walk_few(
    z, t0, group_start, cu, labels, pooled_mean, pooled_max, heads, f, N, d_sae, state,
    SUB: tl.constexpr, MEAN: tl.constexpr, MAX: tl.constexpr, MOMENTS: tl.constexpr,
):  # fmt: skip
    """Sample after sample through the columns of `z`; `state` holds the open sample and the moments so far."""
    W: tl.constexpr = z.shape[1]
    if W > SUB:
        left, right = halves(z)
        state = walk_few(
            left, t0, group_start, cu, labels, pooled_mean, pooled_max, heads, f, N, d_sae, state,
            SUB, MEAN, MAX, MOMENTS,
        )  # fmt: skip
        return walk_few(
            right, t0 + W // 2, group_start, cu, labels, pooled_mean, pooled_max, heads, f, N, d_sae, state,
            SUB, MEAN, MAX, MOMENTS,
        )  # fmt: skip
    else:
        j, start, end, n, total, top, of_mean, of_max = state
        t = t0 + tl.arange(0, W)
        m_f = f < d_sae
        while end <= t0 + W:
            next_end = tl.load(cu + j + 2, mask=j + 1 < N, other=NEVER)
            inverse_length = tl.load(labels + j)
            inside = ((t >= start) & (t < end))[None, :]
            if MEAN:
                total += tl.sum(tl.where(inside, z, 0.0), 1)
            if MAX:
                top = larger(top, tl.reduce(tl.where(inside, z, 0.0), 1, larger))
            if start < group_start:
                if MEAN:
                    tl.store(heads + f, total, mask=m_f)
                if MAX:
                    tl.store(heads + MEAN * (STORED if MOMENTS else CUT) * d_sae + f, top, mask=m_f)
            whole = (start >= group_start) & (start < end)
            if MOMENTS:
                counts = whole.to(tl.float32)
                n += counts
                y, positive = tl.load(labels + N + j), tl.load(labels + 2 * N + j)
                if MEAN:
                    of_mean = with_one(of_mean, total * inverse_length, n, y, positive, counts)
                if MAX:
                    of_max = with_one(of_max, top, n, y, positive, counts)
            elif whole:
                row = j.to(tl.int64) * d_sae + f
                if MEAN:
                    tl.store(pooled_mean + row, total * inverse_length, mask=m_f)
                if MAX:
                    tl.store(pooled_max + row, top, mask=m_f)
            total, top = tl.zeros_like(total), tl.zeros_like(top)
            j += 1
            start = end
            end = next_end
        still_open = (t >= start)[None, :]
        if MEAN:
            total += tl.sum(tl.where(still_open, z, 0.0), 1)
        if MAX:
            top = larger(top, tl.reduce(tl.where(still_open, z, 0.0), 1, larger))
        return j, start, end, n, total, top, of_mean, of_max


@triton.jit
def walk_many(
    z, t0, group_start, stop, sample, cu, labels, pooled_mean, pooled_max, heads, f, N, d_sae, state,
    SUB: tl.constexpr, MEAN: tl.constexpr, MAX: tl.constexpr, MOMENTS: tl.constexpr,
):  # fmt: skip
    """A segmented scan along the columns of `z`: a sample's pooled value appears at its last token."""
    W: tl.constexpr = z.shape[1]
    if W > SUB:
        left, right = halves(z)
        state = walk_many(
            left, t0, group_start, stop, sample, cu, labels, pooled_mean, pooled_max, heads, f, N, d_sae, state,
            SUB, MEAN, MAX, MOMENTS,
        )  # fmt: skip
        return walk_many(
            right, t0 + W // 2, group_start, stop, sample, cu, labels, pooled_mean, pooled_max, heads, f, N, d_sae,
            state, SUB, MEAN, MAX, MOMENTS,
        )  # fmt: skip
    else:
        n, total, top, of_mean, of_max = state
        m_f = f < d_sae
        t = t0 + tl.arange(0, W)
        m_t = t < stop
        j = tl.load(sample + t, mask=m_t, other=0)
        start = tl.load(cu + j)
        ends = m_t & (t + 1 == tl.load(cu + j + 1))
        opens = (t == start) | ~m_t
        whole = ends & (start >= group_start)
        cut = ends & (start < group_start)
        last_is_open = (t == t0 + W - 1) & ~ends
        counts = whole.to(tl.float32)
        m = tl.sum(counts, 0)
        scanned = tl.min(opens.to(tl.int32), 0) == 0
        a_sample_was_cut = tl.max(cut.to(tl.int32), 0) != 0
        if MOMENTS:
            y = tl.load(labels + N + j, mask=whole, other=0.0)
            positive = tl.load(labels + 2 * N + j, mask=whole, other=0.0)
        p_row = j.to(tl.int64)[None, :] * d_sae + f[:, None]
        m_row = m_f[:, None] & whole[None, :]
        if MEAN:
            sums = z
            if scanned:
                flags = tl.broadcast_to(opens.to(tl.int32)[None, :], z.shape)
                sums, _ = tl.associative_scan((z, flags), 1, added_since_open)
                sums = tl.where((start < t0)[None, :], total[:, None] + sums, sums)
            if a_sample_was_cut:
                tl.store(heads + f, tl.sum(tl.where(cut[None, :], sums, 0.0), 1), mask=m_f)
            value = sums * tl.load(labels + j)[None, :]
            if MOMENTS:
                of_mean = with_columns(of_mean, value, n, m, y, positive, counts)
            else:
                tl.store(pooled_mean + p_row, value, mask=m_row)
            total = tl.sum(tl.where(last_is_open[None, :], sums, 0.0), 1)
        if MAX:
            tops = z
            if scanned:
                flags = tl.broadcast_to(opens.to(tl.int32)[None, :], z.shape)
                tops, _ = tl.associative_scan((z, flags), 1, largest_since_open)
                tops = tl.where((start < t0)[None, :], larger(top[:, None], tops), tops)
            if a_sample_was_cut:
                p_head = heads + MEAN * (STORED if MOMENTS else CUT) * d_sae + f
                tl.store(p_head, tl.sum(tl.where(cut[None, :], tops, 0.0), 1), mask=m_f)
            if MOMENTS:
                of_max = with_columns(of_max, tops, n, m, y, positive, counts)
            else:
                tl.store(pooled_max + p_row, tops, mask=m_row)
            top = tl.sum(tl.where(last_is_open[None, :], tops, 0.0), 1)
        return n + m, total, top, of_mean, of_max


@triton.jit
def store_partials(partials, f, d_sae, tail, moments, MOMENTS: tl.constexpr):
    m_f = f < d_sae
    tl.store(partials + d_sae + f, tail, mask=m_f)
    if MOMENTS:
        for at in tl.static_range(len(moments)):
            tl.store(partials + (CUT + at) * d_sae + f, moments[at], mask=m_f)


@triton.jit
def encode_pool_kernel(
    x, weight, weight_low, bias, threshold, magnitude_scale, magnitude_bias, weight_sum, scale, mean,
    cu, sample, labels, pooled_mean, pooled_max, partials, finished,
    T, N, d_in, d_sae, group_tokens, n_groups,
    ACTIVATION: tl.constexpr, DOT: tl.constexpr, DESCRIPTORS: tl.constexpr,
    MEAN: tl.constexpr, MAX: tl.constexpr, MOMENTS: tl.constexpr, FEW: tl.constexpr,
    BF: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, SUB: tl.constexpr, SUPER: tl.constexpr,
):  # fmt: skip
    """One feature block and one group of tokens; see the top of the file.

    pooled_mean, pooled_max : `[N, d_sae]` float32, where not MOMENTS.
    partials : `[n_groups, MEAN + MAX, len(PARTIALS) or 2, d_sae]` float32.
    finished : `[n_groups]` float32, how many samples a group began and finished.
    """
    block, group = tile_of(tl.program_id(0), tl.cdiv(d_sae, BF), n_groups, SUPER)
    f0 = block * BF
    f = f0 + tl.arange(0, BF)
    group_start = tl.load(cu) + group * group_tokens
    stop = tl.minimum(tl.load(cu + N), T)
    group_stop = tl.minimum(group_start + group_tokens, stop)
    stored: tl.constexpr = STORED if MOMENTS else CUT
    partials += group.to(tl.int64) * ((MEAN + MAX) * stored) * d_sae

    zero = tl.zeros((BF,), tl.float32)
    of_mean = (zero, zero, zero, zero, zero, zero, zero)
    of_max = of_mean
    n = 0.0
    total, top = zero, zero
    if FEW:
        j = tl.load(sample + group_start, mask=group_start < stop, other=0)
        start, end = tl.load(cu + j), tl.load(cu + j + 1)

    for t0 in range(group_start, group_stop, BT):
        acc = product(x, weight, weight_low, f0, t0, T, d_sae, d_in, BF, BT, BK, DOT, DESCRIPTORS)
        t = t0 + tl.arange(0, BT)
        acc = normalised(acc, f, t, T, d_sae, scale, mean, weight_sum)
        z = activated(acc, f, d_sae, bias, threshold, magnitude_scale, magnitude_bias, ACTIVATION)
        if FEW:
            state = (j, start, end, n, total, top, of_mean, of_max)
            j, start, end, n, total, top, of_mean, of_max = walk_few(
                z, t0, group_start, cu, labels, pooled_mean, pooled_max, partials, f, N, d_sae, state,
                SUB, MEAN, MAX, MOMENTS,
            )  # fmt: skip
        else:
            state = (n, total, top, of_mean, of_max)
            n, total, top, of_mean, of_max = walk_many(
                z, t0, group_start, stop, sample, cu, labels, pooled_mean, pooled_max, partials, f, N, d_sae, state,
                SUB, MEAN, MAX, MOMENTS,
            )  # fmt: skip

    if MEAN:
        store_partials(partials, f, d_sae, total, of_mean, MOMENTS)
    if MAX:
        store_partials(partials + MEAN * stored * d_sae, f, d_sae, top, of_max, MOMENTS)
    if MOMENTS and block == 0:
        tl.store(finished + group, n)
