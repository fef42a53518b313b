"""The k largest features of each token, exactly, without a dense matrix: two products and two small selections.

Features are taken in blocks of GROUP. The k largest of a token lie in the k blocks with the largest maxima, because a
feature elsewhere has k maxima above it. So the first product keeps every block's maximum, `[T, d_sae / GROUP]`; the k
best blocks are chosen; the second product, the same one again, writes those blocks' values, `[T, k, GROUP]`; and the k
largest of them are the token's. Tokens go through in chunks, which bounds the memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from corrsteer.kernels.encode_pool import larger
from corrsteer.kernels.product import activated, halves, normalised, product, tile_of

CHUNK = 512  # tokens at a time


@triton.jit
def topk_kernel(
    x, weight, weight_low, bias, weight_sum, scale, mean, slots, out, T, k, d_in, d_sae,
    DOT: tl.constexpr, DESCRIPTORS: tl.constexpr, ABSOLUTE: tl.constexpr, GROUP: tl.constexpr,
    BF: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, SUB: tl.constexpr, SUPER: tl.constexpr,
):  # fmt: skip
    """Without `slots`, each block's maximum into `out: [T, groups]`; with `slots: [T, groups]` int16, which says where
    among a token's k chosen blocks a block is, or -1, the values of chosen blocks into `out: [T, k, GROUP]`."""
    block, tile = tile_of(tl.program_id(0), tl.cdiv(d_sae, BF), tl.cdiv(T, BT), SUPER)
    f0, t0 = block * BF, tile * BT
    f, t = f0 + tl.arange(0, BF), t0 + tl.arange(0, BT)
    acc = product(x, weight, weight_low, f0, t0, T, d_sae, d_in, BF, BT, BK, DOT, DESCRIPTORS)
    acc = normalised(acc, f, t, T, d_sae, scale, mean, weight_sum)
    p = activated(acc, f, d_sae, bias, None, None, None, "linear")
    n_groups = d_sae // GROUP
    if slots is None:
        rank = tl.where((f < d_sae)[:, None], tl.abs(p) if ABSOLUTE else p, float("-inf"))
        top = tl.reduce(tl.reshape(rank, (BF // GROUP, GROUP, BT)), 1, larger)
        g = f0 // GROUP + tl.arange(0, BF // GROUP)
        m = (g < n_groups)[:, None] & (t < T)[None, :]
        tl.store(out + t.to(tl.int64)[None, :] * n_groups + g[:, None], top, mask=m)
    else:
        store_chosen(p, f, t0, slots, out, T, k, n_groups, d_sae, GROUP, SUB)


@triton.jit
def store_chosen(p, f, t0, slots, out, T, k, n_groups, d_sae, GROUP: tl.constexpr, SUB: tl.constexpr):
    """Write the chosen blocks of `p: [BF, W]`, a slice at a time so that turning it round takes little room."""
    W: tl.constexpr = p.shape[1]
    if W > SUB:
        left, right = halves(p)
        store_chosen(left, f, t0, slots, out, T, k, n_groups, d_sae, GROUP, SUB)
        store_chosen(right, f, t0 + W // 2, slots, out, T, k, n_groups, d_sae, GROUP, SUB)
    else:
        p_t = (t0 + tl.arange(0, W)).to(tl.int64)[None, :]
        m = (f < d_sae)[:, None] & (p_t < T)
        slot = tl.load(slots + p_t * n_groups + (f // GROUP)[:, None], mask=m, other=-1)
        tl.store(out + (p_t * k + slot) * GROUP + (f % GROUP)[:, None], p, mask=slot >= 0)


@triton.jit
def pool_sparse_kernel(
    values, features, cu, pooled, first_sample, T, k, d_sae,
    MAX: tl.constexpr, SIGNED: tl.constexpr, K: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """The pooled row of one sample from its tokens' k values and features, both `[T, k]`; token after token, so that
    sums are formed in one order."""
    row = pooled + tl.program_id(0).to(tl.int64) * d_sae
    sample = first_sample + tl.program_id(0)
    start, end = tl.maximum(tl.load(cu + sample), 0), tl.minimum(tl.load(cu + sample + 1), T)
    for f0 in range(0, d_sae, BF):
        f = f0 + tl.arange(0, BF)
        tl.store(row + f, tl.zeros((BF,), tl.float32), mask=f < d_sae)
    tl.debug_barrier()
    o_k = tl.arange(0, K)
    m_k = o_k < k
    if start < end:
        inverse_length = 1.0 / (end - start).to(tl.float32)
        if SIGNED:  # where every token has the feature the maximum may be negative, and no 0 is in it
            of_first = tl.load(features + start.to(tl.int64) * k + o_k, mask=m_k, other=-1)
            best = tl.full((K,), float("-inf"), tl.float32)
            in_all = m_k.to(tl.int32)
        at = start.to(tl.int64) * k + o_k
        for _ in range(start, end):
            value = tl.load(values + at, mask=m_k, other=0.0)
            feature = tl.load(features + at, mask=m_k, other=-2)
            before = tl.load(row + feature, mask=m_k, other=0.0)
            after = larger(before, value) if MAX else before + value * inverse_length
            tl.store(row + feature, after, mask=m_k)
            if SIGNED:
                same = of_first[:, None] == feature[None, :]
                in_all &= tl.max(same.to(tl.int32), 1)
                best = larger(best, tl.sum(tl.where(same, value[None, :], 0.0), 1))
            at += k
            tl.debug_barrier()
        if SIGNED:
            tl.store(row + of_first, best, mask=in_all != 0)


def block_size(d_sae: int, k: int) -> int:
    """GROUP: of the powers of two that divide d_sae, the largest near which maxima and chosen values take the least
    memory together."""
    group = 64
    while group > 1 and (d_sae % group or group * group > d_sae / k):
        group //= 2
    return group


def chosen(maxima: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of each token's block maxima, the best k blocks `[T, k]` and where each block is among them, `[T, groups]`."""
    best = maxima.topk(min(k, maxima.shape[1]), dim=1).indices
    slots = torch.full(maxima.shape, -1, dtype=torch.int16, device=maxima.device)
    order = torch.arange(best.shape[1], dtype=torch.int16, device=maxima.device)
    return best, slots.scatter_(1, best, order.expand_as(best))
