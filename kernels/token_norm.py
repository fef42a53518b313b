"""What SAELens' run-time input normalisation multiplies and subtracts, one number a token.

Of a token whose mean is many times its deviation, the product with the mean alone would round by more than the result
is allowed to. So what layer_norm subtracts comes in two parts: a `shift`, which is subtracted from the token before it
is multiplied, and the little that is left of the mean, which is subtracted afterwards.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

EPS = tl.constexpr(1e-5)  # SAELens' own, added to the standard deviation
FAR = tl.constexpr(16.0)  # standard deviations from 0 of a mean from which on it is worth a slower product


@triton.jit
def token_norm_kernel(x, scale, mean, shift, d_in, EXACT: tl.constexpr, BK: tl.constexpr):
    """One token. EXACT: the token less its shift must be exact in the token's own dtype.

    It is where no number is further from the shift than half of the shift (Sterbenz, "Floating-point computation",
    1974). Where one is, the mean is not many deviations from 0 either, and the shift may be 0.
    """
    t = tl.program_id(0)
    row = x + t.to(tl.int64) * d_in
    centre = 0.0
    if shift is not None:
        total = tl.zeros((BK,), tl.float32)
        for k in range(0, d_in, BK):
            o_k = k + tl.arange(0, BK)
            total += tl.load(row + o_k, mask=o_k < d_in, other=0.0).to(tl.float32)
        centre = tl.sum(total, 0) / d_in
    deviations = tl.zeros((BK,), tl.float32)
    squares = tl.zeros((BK,), tl.float32)
    largest = tl.zeros((BK,), tl.float32)
    for k in range(0, d_in, BK):
        o_k = k + tl.arange(0, BK)
        deviation = tl.load(row + o_k, mask=o_k < d_in, other=0.0).to(tl.float32) - centre
        deviation = tl.where(o_k < d_in, deviation, 0.0)
        deviations += deviation
        squares += deviation * deviation
        largest = tl.maximum(largest, tl.abs(deviation))
    if shift is not None:
        left = tl.sum(deviations, 0) / d_in  # of the mean, which a float32 holds to its last bit only
        variance = tl.maximum(tl.sum(squares, 0) - d_in * left * left, 0.0) / (d_in - 1)  # unbiased
        deviation = tl.sqrt(variance)
        tl.store(scale + t, 1.0 / (deviation + EPS))
        shifted = centre
        if EXACT:
            rounded = centre.to(x.dtype.element_ty).to(tl.float32)
            near = (tl.max(largest, 0) <= tl.abs(centre) / 3) & (tl.abs(centre) > FAR * deviation)
            shifted = tl.where(near, rounded, 0.0)
        tl.store(shift + t, shifted)
        tl.store(mean + t, (centre - shifted) + left)
    else:
        tl.store(scale + t, tl.sqrt(d_in / tl.sum(squares, 0)))


def token_norm(x: Tensor, input_norm: str, exact: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Scale, mean and shift of each token of contiguous `x: [T, d_in]`, `[T]` float32; for constant_norm_rescale the
    scale alone."""
    scale = torch.empty(len(x), dtype=torch.float32, device=x.device)
    mean, shift = (torch.empty_like(scale), torch.empty_like(scale)) if input_norm == "layer_norm" else (None, None)
    token_norm_kernel[(len(x),)](x, scale, mean, shift, x.shape[1], EXACT=exact, BK=1024)
    return scale, mean, shift
