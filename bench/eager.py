"""What one writes without corrsteer: SAELens' encode, pooling in torch, raw float64 sums.

The sums (z, z², yᵀz) are the least that a correlation needs, and fewer than `Moments` keeps.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

SAE_LENS = importlib.util.find_spec("sae_lens") is not None


def encoded_by(activation: str) -> str:
    """Whose arithmetic the eager contestants run, for the result file."""
    if SAE_LENS and activation == "jumprelu":
        return f"sae-lens {importlib.metadata.version('sae-lens')}"
    return "SAELens' arithmetic, written out"


def encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor | None, k: int) -> Tensor:
    """SAELens' jumprelu, or topk where there is no threshold, in the weight's dtype: `[T, d_sae]`."""
    p = x.to(W_enc.dtype) @ W_enc + b_enc
    if threshold is not None:
        return p.relu() * (p > threshold).to(p.dtype)
    top = p.topk(k, dim=-1)
    return torch.zeros_like(p).scatter_(-1, top.indices, top.values.relu())


def encoder(W_enc: Tensor, b_enc: Tensor, threshold: Tensor | None, k: int) -> Callable[[Tensor], Tensor]:
    """`encode` of these parameters, SAELens' own where it is installed."""
    dtype = W_enc.dtype
    b_enc, threshold = b_enc.to(dtype), None if threshold is None else threshold.to(dtype)
    if not SAE_LENS or threshold is None:
        return lambda x: encode(x, W_enc, b_enc, threshold, k)
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

    config = JumpReLUSAEConfig(*W_enc.shape, dtype=str(dtype).removeprefix("torch."), device=str(W_enc.device))
    sae = JumpReLUSAE(config).requires_grad_(False)
    for name, value in (("W_enc", W_enc), ("b_enc", b_enc), ("threshold", threshold)):
        getattr(sae, name).data = value
    return sae.encode


def pool_segments(z: Tensor, lengths: Tensor, sample: Tensor, how: str) -> Tensor:
    """Mean or maximum per sample with `segment_reduce`, in float32."""
    z = z.float()
    if how == "max":
        return torch.segment_reduce(z, "max", lengths=lengths, axis=0, unsafe=True)
    return torch.segment_reduce(z, "sum", lengths=lengths, axis=0, unsafe=True) / lengths[:, None]


def pool_scatter(z: Tensor, lengths: Tensor, sample: Tensor, how: str) -> Tensor:
    """The same with scatters, which torch.compile can fuse with what comes before."""
    z = z.float()
    out = z.new_zeros(len(lengths), z.shape[1])
    if how == "max":
        return out.scatter_reduce_(0, sample[:, None].expand_as(z), z, "amax", include_self=False)
    return out.index_add_(0, sample, z) / lengths[:, None]


def add_sums(z: Tensor, y: Tensor, sums: Tensor) -> None:
    """Add pooled `z: [N, d_sae]` and `y: [N, R]` to `sums: [2 + R, d_sae]` float64: z, z², yᵀz."""
    z = z.double()
    sums[0] += z.sum(0)
    sums[1] += z.square().sum(0)
    sums[2:] += y.double().T @ z


@torch.no_grad()
def collect(encode_x, x, lengths, sample, y, sums, pools, pooling) -> None:
    """The whole of it: encode `x: [T, d_in]`, pool each way, add to that way's sums."""
    z = encode_x(x)
    for how, into in zip(pools, sums):
        add_sums(pooling(z, lengths, sample, how), y, into)
