"""Pooled rows from each token's k activations, where top k has left nothing but those."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from corrsteer.kernels.segment_reduce import ieee_maximum


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
            after = ieee_maximum(before, value) if MAX else before + value * inverse_length
            tl.store(row + feature, after, mask=m_k)
            if SIGNED:
                same = of_first[:, None] == feature[None, :]
                in_all &= tl.max(same.to(tl.int32), 1)
                best = ieee_maximum(best, tl.sum(tl.where(same, value[None, :], 0.0), 1))
            at += k
            tl.debug_barrier()
        if SIGNED:
            tl.store(row + of_first, best, mask=in_all != 0)


def pool_sparse(values: Tensor, features: Tensor, cu: Tensor, first: int, last: int, encoder, pools) -> Tensor:
    """Pooled rows `[len(pools), last - first, d_sae]` of samples `first` to `last`, from `top_activations`."""
    pooled = torch.empty(len(pools), last - first, encoder.d_sae, dtype=torch.float32, device=values.device)
    for of_pool, pool in zip(pooled, pools):
        pool_sparse_kernel[(last - first,)](
            values, features, cu, of_pool, first, len(values), encoder.k, encoder.d_sae,
            MAX=pool == "max", SIGNED=pool == "max" and encoder.activation == "abstopk",
            K=triton.next_power_of_2(encoder.k), BF=1024,
        )  # fmt: skip
    return pooled
