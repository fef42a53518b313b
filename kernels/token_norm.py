"""What SAELens' run-time input normalisation multiplies and subtracts, one number a token."""

import torch
import triton
import triton.language as tl
from torch import Tensor

EPS = tl.constexpr(1e-5)  # SAELens' own, added to the standard deviation


@triton.jit
def token_norm_kernel(x, scale, mean, d_in, CENTRED: tl.constexpr, BK: tl.constexpr):
    t = tl.program_id(0)
    row = x + t.to(tl.int64) * d_in
    shift = 0.0
    if CENTRED:
        total = tl.zeros((BK,), tl.float32)
        for k in range(0, d_in, BK):
            o_k = k + tl.arange(0, BK)
            total += tl.load(row + o_k, mask=o_k < d_in, other=0.0).to(tl.float32)
        shift = tl.sum(total, 0) / d_in
        tl.store(mean + t, shift)
    squares = tl.zeros((BK,), tl.float32)
    for k in range(0, d_in, BK):
        o_k = k + tl.arange(0, BK)
        deviation = tl.load(row + o_k, mask=o_k < d_in, other=0.0).to(tl.float32) - shift
        squares += tl.where(o_k < d_in, deviation * deviation, 0.0)
    if CENTRED:  # the unbiased standard deviation
        tl.store(scale + t, 1.0 / (tl.sqrt(tl.sum(squares, 0) / (d_in - 1)) + EPS))
    else:
        tl.store(scale + t, tl.sqrt(d_in / tl.sum(squares, 0)))


def token_norm(x: Tensor, input_norm: str) -> tuple[Tensor, Tensor | None]:
    """Scale and mean of each token of contiguous `x: [T, d_in]`, `[T]` float32; no mean for constant_norm_rescale."""
    scale = torch.empty(len(x), dtype=torch.float32, device=x.device)
    mean = torch.empty_like(scale) if input_norm == "layer_norm" else None
    token_norm_kernel[(len(x),)](x, scale, mean, x.shape[1], CENTRED=mean is not None, BK=1024)
    return scale, mean
