"""Pooling of a tile's columns: a segmented reduction, whose segments are the samples.

Three ways, all right for segments of any lengths. `segment_reduce_loop` goes through the segments one after the other,
in subtiles so that a segment costs little more than its own tokens; it is the way for long segments, and for maxima.
`segment_reduce_matmul` forms the sums of many short segments on tensor cores. `segment_reduce_single` is for tiles in
which every token is a segment, where nothing is left to pool.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from corrsteer.kernels.matmul import INTERPRETING, split_accumulator
from corrsteer.kernels.moments import Moments, chan_mean, merge_columns, welford_update
from corrsteer.kernels.plan import INVERSE_LENGTH, POSITIVE, REWARD

NEVER = tl.constexpr(2147483647)
ALL_NAN = tl.constexpr(tl.PropagateNan.ALL)
SAMPLES = tl.constexpr(16)  # columns of one product


class Batch(NamedTuple):
    """Where the segments are, and what there is of each; see `plan.Plan`."""

    cu: tl.tensor  # pointer to `[N + 1]` int32
    segment_ids: tl.tensor
    sample_stats: tl.tensor
    N: tl.tensor
    chunk_start: tl.tensor  # first token of this program's chunk
    stop: tl.tensor  # behind the last token of the batch


class Rows(NamedTuple):
    """Where the pooled values of finished segments go: pointers `[N, d_sae]`, and features `f: [BF]`."""

    mean: tl.tensor
    max: tl.tensor
    f: tl.tensor
    d_sae: tl.tensor


class Pool(NamedTuple):
    """One pooling of a chunk, mean or max; `[BF]` float32 each."""

    moments: Moments  # of the segments that began and ended in it
    open: tl.tensor  # sum or maximum of the segment not ended yet
    carry_in: tl.tensor  # the same of the segment that an earlier chunk began


class State(NamedTuple):
    """A chunk up to some token. The order of the fields is that of the compiler's registers: another may spill."""

    mean: Pool
    max: Pool
    n: tl.tensor  # segments that began and ended here, and their mean reward
    y_mean: tl.tensor
    j: tl.tensor  # the open segment, its first token and the one behind its last
    start: tl.tensor
    end: tl.tensor


@triton.jit
def ieee_maximum(a, b):
    """IEEE 754's maximum, which propagates NaN."""
    return tl.maximum(a, b, propagate_nan=ALL_NAN)


@triton.jit
def segment_reduce_loop(
    z, t0, state, batch, rows, SUBTILE: tl.constexpr, MEAN: tl.constexpr, MAX: tl.constexpr, MOMENTS: tl.constexpr
):
    """Segment after segment through `z: [BF, W]`."""
    W: tl.constexpr = z.shape[1]
    if W > SUBTILE:
        left, right = split_accumulator(z)
        state = segment_reduce_loop(left, t0, state, batch, rows, SUBTILE, MEAN, MAX, MOMENTS)
        return segment_reduce_loop(right, t0 + W // 2, state, batch, rows, SUBTILE, MEAN, MAX, MOMENTS)
    else:
        of_mean, of_max, n, y_mean, j, start, end = state
        mean_moments, total, total_in = of_mean
        max_moments, top, top_in = of_max
        t = t0 + tl.arange(0, W)
        while end <= t0 + W:
            next_end = tl.load(batch.cu + j + 2, mask=j + 1 < batch.N, other=NEVER)
            inverse_length = tl.load(batch.sample_stats + INVERSE_LENGTH * batch.N + j)
            inside = ((t >= start) & (t < end))[None, :]
            if MEAN:
                total += tl.sum(tl.where(inside, z, 0.0), 1)
                total_in = tl.where(start < batch.chunk_start, total, total_in)
            if MAX:
                top = ieee_maximum(top, tl.reduce(tl.where(inside, z, 0.0), 1, ieee_maximum))
                top_in = tl.where(start < batch.chunk_start, top, top_in)
            if (start >= batch.chunk_start) & (start < end):
                if MOMENTS:
                    y = tl.load(batch.sample_stats + REWARD * batch.N + j)
                    positive = tl.load(batch.sample_stats + POSITIVE * batch.N + j)
                    if MEAN:
                        mean_moments = welford_update(mean_moments, total * inverse_length, n, y, y_mean, positive)
                    if MAX:
                        max_moments = welford_update(max_moments, top, n, y, y_mean, positive)
                    n += 1
                    y_mean += (y - y_mean) * (1.0 / n)
                else:
                    o_row = j.to(tl.int64) * rows.d_sae + rows.f
                    if MEAN:
                        tl.store(rows.mean + o_row, total * inverse_length, mask=rows.f < rows.d_sae)
                    if MAX:
                        tl.store(rows.max + o_row, top, mask=rows.f < rows.d_sae)
            total, top = tl.zeros_like(total), tl.zeros_like(top)
            j += 1
            start = end
            end = next_end
        still_open = (t >= start)[None, :]
        if MEAN:
            total += tl.sum(tl.where(still_open, z, 0.0), 1)
        if MAX:
            top = ieee_maximum(top, tl.reduce(tl.where(still_open, z, 0.0), 1, ieee_maximum))
        of_mean, of_max = Pool(mean_moments, total, total_in), Pool(max_moments, top, top_in)
        return State(of_mean, of_max, n, y_mean, j, start, end)


@triton.jit
def segment_reduce_single(
    z, t0, state, batch, rows, SUBTILE: tl.constexpr, MEAN: tl.constexpr, MAX: tl.constexpr, MOMENTS: tl.constexpr
):
    """Every column of `z: [BF, W]` is a segment: its mean and its maximum at once."""
    W: tl.constexpr = z.shape[1]
    if W > SUBTILE:
        left, right = split_accumulator(z)
        state = segment_reduce_single(left, t0, state, batch, rows, SUBTILE, MEAN, MAX, MOMENTS)
        return segment_reduce_single(right, t0 + W // 2, state, batch, rows, SUBTILE, MEAN, MAX, MOMENTS)
    else:
        of_mean, of_max, n, y_mean, j, start, end = state
        mean_moments, total, total_in = of_mean
        max_moments, top, top_in = of_max
        b_j = tl.load(batch.segment_ids + t0 + tl.arange(0, W))  # [W]
        if MOMENTS:
            y = tl.load(batch.sample_stats + REWARD * batch.N + b_j)
            positive = tl.load(batch.sample_stats + POSITIVE * batch.N + b_j)
            y_mean_here = tl.sum(y, 0) / W
            if MEAN:
                mean_moments = merge_columns(mean_moments, z, n, W, y, y_mean, y_mean_here, positive, None)
            if MAX:
                max_moments = merge_columns(max_moments, z, n, W, y, y_mean, y_mean_here, positive, None)
            y_mean += (y_mean_here - y_mean) * (W / (n + W))  # not `chan_mean`, with which sm_90 spills
        else:
            o_row = b_j.to(tl.int64)[None, :] * rows.d_sae + rows.f[:, None]  # [BF, W]
            if MEAN:
                tl.store(rows.mean + o_row, z, mask=(rows.f < rows.d_sae)[:, None])
            if MAX:
                tl.store(rows.max + o_row, z, mask=(rows.f < rows.d_sae)[:, None])
        of_mean, of_max = Pool(mean_moments, total, total_in), Pool(max_moments, top, top_in)
        return State(of_mean, of_max, n + W, y_mean, j, start, end)


@triton.jit
def segment_reduce_matmul(z, t0, state, batch, SUBTILE: tl.constexpr, BF16_SPLITS: tl.constexpr):
    """Sums over segments as a product with the 0/1 matrix that says which token is whose, SAMPLES segments at a time;
    for the moments of means alone.

    On tensor cores, at a cost that hardly depends on how many segments end. The ones are exact, and z goes in as a sum
    of BF16_SPLITS bfloat16, which keeps 8 bits each. Where z is not finite the product spreads that to its neighbours:
    the feature's mean and second moment are not finite in any case, but its counts of active samples are then wrong.
    """
    W: tl.constexpr = z.shape[1]
    if W > SUBTILE:
        left, right = split_accumulator(z)
        state = segment_reduce_matmul(left, t0, state, batch, SUBTILE, BF16_SPLITS)
        return segment_reduce_matmul(right, t0 + W // 2, state, batch, SUBTILE, BF16_SPLITS)
    else:
        of_mean, of_max, n, y_mean, j, start, end = state
        moments, total, total_in = of_mean
        t = t0 + tl.arange(0, W)
        b_id = tl.load(batch.segment_ids + t, mask=t < batch.stop, other=-1)  # [W]
        first = tl.load(batch.segment_ids + t0, mask=t0 < batch.stop, other=0)
        last = tl.load(batch.segment_ids + tl.minimum(t0 + W, batch.stop) - 1, mask=t0 < batch.stop, other=-1)
        while first <= last:
            b_j = first + tl.arange(0, SAMPLES)
            belongs = b_id[:, None] == b_j[None, :]  # [W, SAMPLES]
            sums = tl.zeros((z.shape[0], SAMPLES), tl.float32)  # [BF, SAMPLES]
            rest = z
            for _ in tl.static_range(BF16_SPLITS):
                part = rest.to(tl.bfloat16)
                rest -= part.to(tl.float32)
                if INTERPRETING:
                    sums = tl.dot(part.to(tl.float32), belongs.to(tl.float32), sums)
                else:
                    sums = tl.dot(part, belongs.to(tl.bfloat16), sums)
            b_start = tl.load(batch.cu + b_j, mask=b_j <= last, other=NEVER)
            b_end = tl.load(batch.cu + b_j + 1, mask=b_j <= last, other=NEVER)
            sums += tl.where((b_start < t0)[None, :], total[:, None], 0.0)
            ended = (b_start < b_end) & (b_end <= t0 + W)
            carried = ended & (b_start < batch.chunk_start)
            if tl.max(carried.to(tl.int32), 0) != 0:
                total_in = tl.sum(tl.where(carried[None, :], sums, 0.0), 1)
            whole = ended & (b_start >= batch.chunk_start)
            p_stats = batch.sample_stats + b_j
            inverse_length = tl.load(p_stats + INVERSE_LENGTH * batch.N, mask=whole, other=0.0)
            value = tl.where(whole[None, :], sums * inverse_length[None, :], 0.0)
            y = tl.load(p_stats + REWARD * batch.N, mask=whole, other=0.0)
            positive = tl.load(p_stats + POSITIVE * batch.N, mask=whole, other=0.0)
            m = tl.sum(whole.to(tl.int32), 0)
            y_mean_here = tl.sum(y, 0) / tl.maximum(m, 1)
            moments = merge_columns(moments, value, n, m, y, y_mean, y_mean_here, positive, whole)
            y_mean = chan_mean(n, y_mean, m, y_mean_here)
            n += m
            still_open = (b_start < b_end) & (b_end > t0 + W) & (b_j <= last)
            total = tl.sum(tl.where(still_open[None, :], sums, 0.0), 1)
            first += SAMPLES
        return State(Pool(moments, total, total_in), of_max, n, y_mean, j, start, end)
