"""The k largest features of each token, exactly, without a dense matrix: two products and two small selections.

Features are taken in buckets of BUCKET. The k largest of a token lie in the k buckets with the largest maxima, because
a feature elsewhere has k maxima above it. So the first product keeps every bucket's maximum, `[T, d_sae / BUCKET]`; the
k best buckets are chosen; the second product, the same one again, writes those buckets' values, `[T, k, BUCKET]`; and
the k largest of them are the token's. A bounded number of tokens goes through at a time, which bounds the memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from corrsteer.kernels import launch
from corrsteer.kernels.matmul import (
    activate,
    dot_kind,
    grouped_order,
    matmul_arguments,
    matmul_tile,
    normalise,
    split_accumulator,
)
from corrsteer.kernels.segment_reduce import ieee_maximum

MAX_TOKENS = 512  # at a time


@triton.jit
def topk_kernel(
    x, weight, weight_low, bias, weight_sum, scale, mean, shift, slots, out, T, k, d_in, d_sae,
    DOT: tl.constexpr, DESCRIPTORS: tl.constexpr, ABSOLUTE: tl.constexpr, BUCKET: tl.constexpr,
    BF: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, SUBTILE: tl.constexpr, GROUP_SIZE: tl.constexpr,
):  # fmt: skip
    """Without `slots`, each bucket's maximum into `out: [T, n_buckets]`; with `slots: [T, n_buckets]` int16, which says
    where among a token's k best buckets a bucket is, or -1, the values of the best into `out: [T, k, BUCKET]`."""
    block, tile = grouped_order(tl.program_id(0), tl.cdiv(d_sae, BF), tl.cdiv(T, BT), GROUP_SIZE)
    f0, t0 = block * BF, tile * BT
    f, t = f0 + tl.arange(0, BF), t0 + tl.arange(0, BT)
    acc = matmul_tile(x, weight, weight_low, shift, f0, t0, T, d_sae, d_in, BF, BT, BK, DOT, DESCRIPTORS)  # [BF, BT]
    acc = normalise(acc, f, t, T, d_sae, scale, mean, weight_sum)
    p = activate(acc, f, d_sae, bias, None, None, None, "linear")
    n_buckets = d_sae // BUCKET
    if slots is None:
        rank = tl.where((f < d_sae)[:, None], tl.abs(p) if ABSOLUTE else p, float("-inf"))
        top = tl.reduce(tl.reshape(rank, (BF // BUCKET, BUCKET, BT)), 1, ieee_maximum)  # [BF / BUCKET, BT]
        bucket = f0 // BUCKET + tl.arange(0, BF // BUCKET)
        m = (bucket < n_buckets)[:, None] & (t < T)[None, :]
        tl.store(out + t.to(tl.int64)[None, :] * n_buckets + bucket[:, None], top, mask=m)
    else:
        store_best(p, f, t0, slots, out, T, k, n_buckets, d_sae, BUCKET, SUBTILE)


@triton.jit
def store_best(p, f, t0, slots, out, T, k, n_buckets, d_sae, BUCKET: tl.constexpr, SUBTILE: tl.constexpr):
    """Write the best buckets of `p: [BF, W]`, a subtile at a time so that transposing takes little room."""
    W: tl.constexpr = p.shape[1]
    if W > SUBTILE:
        left, right = split_accumulator(p)
        store_best(left, f, t0, slots, out, T, k, n_buckets, d_sae, BUCKET, SUBTILE)
        store_best(right, f, t0 + W // 2, slots, out, T, k, n_buckets, d_sae, BUCKET, SUBTILE)
    else:
        p_t = (t0 + tl.arange(0, W)).to(tl.int64)[None, :]
        m = (f < d_sae)[:, None] & (p_t < T)
        slot = tl.load(slots + p_t * n_buckets + (f // BUCKET)[:, None], mask=m, other=-1)  # [BF, W]
        tl.store(out + (p_t * k + slot) * BUCKET + (f % BUCKET)[:, None], p, mask=slot >= 0)


def bucket_size(d_sae: int, k: int) -> int:
    """BUCKET: of the powers of two that divide d_sae, the largest near which maxima and values of the best buckets take
    the least memory together."""
    bucket = 64
    while bucket > 1 and (d_sae % bucket or bucket * bucket > d_sae / k):
        bucket //= 2
    return bucket


def best_buckets(maxima: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """From each token's `maxima: [T, n_buckets]` its best k buckets `[T, k]`, and the kernel's `slots`."""
    best = maxima.topk(min(k, maxima.shape[1]), dim=1).indices
    slots = torch.full(maxima.shape, -1, dtype=torch.int16, device=maxima.device)
    order = torch.arange(best.shape[1], dtype=torch.int16, device=maxima.device)
    return best, slots.scatter_(1, best, order.expand_as(best))


def top_activations(x: Tensor, encoder) -> tuple[Tensor, Tensor]:
    """The k largest activations of each token and their features, `[T, k]` float32 and int32."""
    k, d_sae, absolute = encoder.k, encoder.d_sae, encoder.activation == "abstopk"
    bucket = bucket_size(d_sae, k)
    n_buckets = d_sae // bucket
    values = torch.empty(len(x), k, dtype=torch.float32, device=x.device)
    features = torch.empty(len(x), k, dtype=torch.int32, device=x.device)
    for first in range(0, len(x), MAX_TOKENS):
        part = x[first : first + MAX_TOKENS]
        T = len(part)
        config = launch.config(x.device, "encode", dot_kind(x, encoder), T)
        grid = (triton.cdiv(T, config["BT"]) * triton.cdiv(d_sae, config["BF"]),)
        arguments = matmul_arguments(part, encoder, config) | dict(
            k=min(k, n_buckets), ABSOLUTE=absolute, BUCKET=bucket
        )
        maxima = torch.empty(T, n_buckets, dtype=torch.float32, device=x.device)
        topk_kernel[grid](**arguments, slots=None, out=maxima)
        best, slots = best_buckets(maxima, k)
        candidates = torch.empty(T, best.shape[1] * bucket, dtype=torch.float32, device=x.device)
        topk_kernel[grid](**arguments, slots=slots, out=candidates)
        at = (candidates.abs() if absolute else candidates).topk(k, dim=1).indices
        top = candidates.gather(1, at)
        values[first : first + T] = top if absolute else top.relu_()
        features[first : first + T] = best.gather(1, at // bucket) * bucket + at % bucket
    return values, features
