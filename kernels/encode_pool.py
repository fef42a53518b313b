"""encode_pool and the heart of encode_update: product, activation, pooling and moments in one kernel.

A program owns a block of features and a group of neighbouring tokens. It walks the group's tiles in order and carries
the pooled value of the sample that is still open from tile to tile, so that a dense activation lives only in
registers. A finished sample is written to `[N, d_sae]`, or folded into the group's moments at once.

Groups are cut by tokens alone, so that all of them do the same work whatever the samples' lengths, and no length need
be known to launch. A sample that a cut goes through is left to `boundaries.py`: the group in which it goes on to its
end stores its part as `head`, the group at whose end it is open stores it as `tail`.

Within a tile there are three ways to pool, all right for any lengths. `walk_samples` loops over the samples, in slices
of SUB tokens so that a sample costs little more than its own tokens; it is the way for long samples, and for maxima.
`multiply_out` forms the sums of many short samples on tensor cores. `take_columns` is for tiles whose every token is a
sample (one kept step), where nothing is left to pool.
"""

import triton
import triton.language as tl

from corrsteer.kernels.partials import CUT, STORED, store_partials, with_columns, with_one
from corrsteer.kernels.product import INTERPRETING, activated, halves, normalised, product, tile_of

NEVER = tl.constexpr(2147483647)
EVERY_NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=EVERY_NAN)


@triton.jit
def walk_samples(
    z, t0, group_start, cu, labels, pooled_mean, pooled_max, f, N, d_sae, state,
    SUB: tl.constexpr, MEAN: tl.constexpr, MAX: tl.constexpr, MOMENTS: tl.constexpr,
):  # fmt: skip
    """Sample after sample through the columns of `z`; `state` holds the open sample and the moments so far."""
    W: tl.constexpr = z.shape[1]
    if W > SUB:
        left, right = halves(z)
        state = walk_samples(
            left, t0, group_start, cu, labels, pooled_mean, pooled_max, f, N, d_sae, state, SUB, MEAN, MAX, MOMENTS
        )
        return walk_samples(
            right, t0 + W // 2, group_start, cu, labels, pooled_mean, pooled_max, f, N, d_sae, state,
            SUB, MEAN, MAX, MOMENTS,
        )  # fmt: skip
    else:
        j, start, end, n, y_mean, total, top, head_total, head_top, of_mean, of_max = state
        t = t0 + tl.arange(0, W)
        while end <= t0 + W:
            next_end = tl.load(cu + j + 2, mask=j + 1 < N, other=NEVER)
            inverse_length = tl.load(labels + j)
            inside = ((t >= start) & (t < end))[None, :]
            if MEAN:
                total += tl.sum(tl.where(inside, z, 0.0), 1)
                head_total = tl.where(start < group_start, total, head_total)
            if MAX:
                top = larger(top, tl.reduce(tl.where(inside, z, 0.0), 1, larger))
                head_top = tl.where(start < group_start, top, head_top)
            if (start >= group_start) & (start < end):
                if MOMENTS:
                    y, positive = tl.load(labels + N + j), tl.load(labels + 2 * N + j)
                    if MEAN:
                        of_mean = with_one(of_mean, total * inverse_length, n, y, y_mean, positive)
                    if MAX:
                        of_max = with_one(of_max, top, n, y, y_mean, positive)
                    n += 1
                    y_mean += (y - y_mean) * (1.0 / n)
                else:
                    row = j.to(tl.int64) * d_sae + f
                    if MEAN:
                        tl.store(pooled_mean + row, total * inverse_length, mask=f < d_sae)
                    if MAX:
                        tl.store(pooled_max + row, top, mask=f < d_sae)
            total, top = tl.zeros_like(total), tl.zeros_like(top)
            j += 1
            start = end
            end = next_end
        still_open = (t >= start)[None, :]
        if MEAN:
            total += tl.sum(tl.where(still_open, z, 0.0), 1)
        if MAX:
            top = larger(top, tl.reduce(tl.where(still_open, z, 0.0), 1, larger))
        return j, start, end, n, y_mean, total, top, head_total, head_top, of_mean, of_max


@triton.jit
def take_columns(
    z, t0, sample, labels, pooled_mean, pooled_max, f, N, d_sae, n, y_mean, of_mean, of_max,
    SUB: tl.constexpr, MEAN: tl.constexpr, MAX: tl.constexpr, MOMENTS: tl.constexpr,
):  # fmt: skip
    """Every column of `z` is a sample: its mean and its maximum at once."""
    W: tl.constexpr = z.shape[1]
    if W > SUB:
        left, right = halves(z)
        n, y_mean, of_mean, of_max = take_columns(
            left, t0, sample, labels, pooled_mean, pooled_max, f, N, d_sae, n, y_mean, of_mean, of_max,
            SUB, MEAN, MAX, MOMENTS,
        )  # fmt: skip
        return take_columns(
            right, t0 + W // 2, sample, labels, pooled_mean, pooled_max, f, N, d_sae, n, y_mean, of_mean, of_max,
            SUB, MEAN, MAX, MOMENTS,
        )  # fmt: skip
    else:
        j = tl.load(sample + t0 + tl.arange(0, W))
        if MOMENTS:
            y, positive = tl.load(labels + N + j), tl.load(labels + 2 * N + j)
            y_mean_here = tl.sum(y, 0) / W
            if MEAN:
                of_mean = with_columns(of_mean, z, n, W, y, y_mean, y_mean_here, positive, None)
            if MAX:
                of_max = with_columns(of_max, z, n, W, y, y_mean, y_mean_here, positive, None)
            y_mean += (y_mean_here - y_mean) * (W / (n + W))
        else:
            p_row = j.to(tl.int64)[None, :] * d_sae + f[:, None]
            if MEAN:
                tl.store(pooled_mean + p_row, z, mask=(f < d_sae)[:, None])
            if MAX:
                tl.store(pooled_max + p_row, z, mask=(f < d_sae)[:, None])
        return n + W, y_mean, of_mean, of_max


@triton.jit
def multiply_out(
    z, t0, group_start, stop, sample, cu, labels, N, n, y_mean, total, head, moments,
    WIDTH: tl.constexpr, SAMPLES: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Sums over samples as a product with the 0/1 matrix that says which token is whose, SAMPLES samples at a time.

    On tensor cores, at a cost that hardly depends on how many samples end. The ones are exact, and z goes in as a sum
    of PIECES bfloat16, which keeps 8 bits each. Where z is not finite the product spreads that to its neighbours: the
    feature's mean and second moment are not finite in any case, but its counts of active samples are then wrong.
    """
    W: tl.constexpr = z.shape[1]
    if W > WIDTH:
        left, right = halves(z)
        n, y_mean, total, head, moments = multiply_out(
            left, t0, group_start, stop, sample, cu, labels, N, n, y_mean, total, head, moments, WIDTH, SAMPLES, PIECES
        )
        return multiply_out(
            right, t0 + W // 2, group_start, stop, sample, cu, labels, N, n, y_mean, total, head, moments,
            WIDTH, SAMPLES, PIECES,
        )  # fmt: skip
    else:
        t = t0 + tl.arange(0, W)
        whose = tl.load(sample + t, mask=t < stop, other=-1)
        at = tl.load(sample + t0, mask=t0 < stop, other=0)
        last = tl.load(sample + tl.minimum(t0 + W, stop) - 1, mask=t0 < stop, other=-1)
        while at <= last:
            j = at + tl.arange(0, SAMPLES)
            belongs = whose[:, None] == j[None, :]
            sums = tl.zeros((z.shape[0], SAMPLES), tl.float32)
            rest = z
            for _ in tl.static_range(PIECES):
                piece = rest.to(tl.bfloat16)
                rest -= piece.to(tl.float32)
                if INTERPRETING:
                    sums = tl.dot(piece.to(tl.float32), belongs.to(tl.float32), sums)
                else:
                    sums = tl.dot(piece, belongs.to(tl.bfloat16), sums)
            start = tl.load(cu + j, mask=j <= last, other=NEVER)
            end = tl.load(cu + j + 1, mask=j <= last, other=NEVER)
            sums += tl.where((start < t0)[None, :], total[:, None], 0.0)
            ended = (start < end) & (end <= t0 + W)
            cut = ended & (start < group_start)
            if tl.max(cut.to(tl.int32), 0) != 0:
                head = tl.sum(tl.where(cut[None, :], sums, 0.0), 1)
            whole = ended & (start >= group_start)
            value = tl.where(whole[None, :], sums * tl.load(labels + j, mask=whole, other=0.0)[None, :], 0.0)
            y = tl.load(labels + N + j, mask=whole, other=0.0)
            positive = tl.load(labels + 2 * N + j, mask=whole, other=0.0)
            m = tl.sum(whole.to(tl.int32), 0)
            y_mean_here = tl.sum(y, 0) / tl.maximum(m, 1)
            moments = with_columns(moments, value, n, m, y, y_mean, y_mean_here, positive, whole)
            n += m
            y_mean += (y_mean_here - y_mean) * (m / tl.maximum(n, 1))
            total = tl.sum(tl.where(((start < end) & (end > t0 + W) & (j <= last))[None, :], sums, 0.0), 1)
            at += SAMPLES
        return n, y_mean, total, head, moments


# Sizes that change from batch to batch; each special value of one would be compiled for again.
@triton.jit(do_not_specialize=["T", "N", "group_tokens", "n_groups"])
def encode_pool_kernel(
    x, weight, weight_low, bias, threshold, magnitude_scale, magnitude_bias, weight_sum, scale, mean,
    cu, sample, labels, pooled_mean, pooled_max, partials, finished,
    T, N, d_in, d_sae, group_tokens, n_groups,
    ACTIVATION: tl.constexpr, DOT: tl.constexpr, DESCRIPTORS: tl.constexpr,
    MEAN: tl.constexpr, MAX: tl.constexpr, MOMENTS: tl.constexpr, SINGLES: tl.constexpr, PIECES: tl.constexpr,
    BF: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, SUB: tl.constexpr, COLUMNS: tl.constexpr,
    SUPER: tl.constexpr,
):  # fmt: skip
    """One feature block and one group of tokens; see the top of the file.

    pooled_mean, pooled_max : `[N, d_sae]` float32, where not MOMENTS.
    SINGLES : look out for tiles in which every token is a sample; without it they are right too, but slower.
    PIECES : where not 0, the mean's moments by `multiply_out` with so many pieces; for MEAN and MOMENTS alone.
    partials : `[n_groups, MEAN + MAX, len(PARTIALS) or 2, d_sae]` float32.
    finished : `[n_groups, 2]` float32, how many samples a group began and finished, and their mean reward.
    """
    block, group = tile_of(tl.program_id(0), tl.cdiv(d_sae, BF), n_groups, SUPER)
    f0 = block * BF
    f = f0 + tl.arange(0, BF)
    group_start = tl.minimum(tl.maximum(tl.load(cu), 0), T) + group * group_tokens
    stop = tl.minimum(tl.load(cu + N), T)
    group_stop = tl.minimum(group_start + group_tokens, stop)
    stored: tl.constexpr = STORED if MOMENTS else CUT
    partials += group.to(tl.int64) * ((MEAN + MAX) * stored) * d_sae

    zero = tl.zeros((BF,), tl.float32)
    of_mean = (zero, zero, zero, zero, zero, zero, zero)
    of_max = of_mean
    n, y_mean = tl.zeros((), tl.int32), tl.zeros((), tl.float32)
    total, top, head_total, head_top = zero, zero, zero, zero
    j = tl.load(sample + group_start, mask=group_start < stop, other=0)
    start, end = tl.load(cu + j), tl.load(cu + j + 1)

    for t0 in range(group_start, group_stop, BT):
        acc = product(x, weight, weight_low, f0, t0, T, d_sae, d_in, BF, BT, BK, DOT, DESCRIPTORS)
        t = t0 + tl.arange(0, BT)
        acc = normalised(acc, f, t, T, d_sae, scale, mean, weight_sum)
        z = activated(acc, f, d_sae, bias, threshold, magnitude_scale, magnitude_bias, ACTIVATION)
        singles = False
        if SINGLES:
            b_j = tl.load(sample + t, mask=t < stop, other=0)
            single = (t < stop) & (tl.load(cu + b_j) == t) & (tl.load(cu + b_j + 1) == t + 1)
            singles = tl.min(single.to(tl.int32), 0) == 1
        if singles:
            n, y_mean, of_mean, of_max = take_columns(
                z, t0, sample, labels, pooled_mean, pooled_max, f, N, d_sae, n, y_mean, of_mean, of_max,
                COLUMNS, MEAN, MAX, MOMENTS,
            )  # fmt: skip
            j = tl.load(sample + t0 + BT - 1) + 1
            start = t0 + BT
            end = tl.load(cu + j + 1, mask=j < N, other=NEVER)
        elif PIECES > 0:
            n, y_mean, total, head_total, of_mean = multiply_out(
                z, t0, group_start, stop, sample, cu, labels, N, n, y_mean, total, head_total, of_mean,
                COLUMNS, 16, PIECES,
            )  # fmt: skip
        else:
            state = (j, start, end, n, y_mean, total, top, head_total, head_top, of_mean, of_max)
            j, start, end, n, y_mean, total, top, head_total, head_top, of_mean, of_max = walk_samples(
                z, t0, group_start, cu, labels, pooled_mean, pooled_max, f, N, d_sae, state, SUB, MEAN, MAX, MOMENTS
            )

    if MEAN:
        store_partials(partials, f, d_sae, head_total, total, of_mean, MOMENTS)
    if MAX:
        store_partials(partials + MEAN * stored * d_sae, f, d_sae, head_top, top, of_max, MOMENTS)
    if MOMENTS and block == 0:
        tl.store(finished + 2 * group, n.to(tl.float32))
        tl.store(finished + 2 * group + 1, y_mean)
