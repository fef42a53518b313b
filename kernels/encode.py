"""Dense activations `[T, d_sae]`, for those who want them: the drop-in for SAELens' `encode`."""

import triton
import triton.language as tl

from corrsteer.kernels.product import activated, halves, normalised, product, tile_of


@triton.jit
def store_columns(out, z, f, t0, T, d_sae, SUB: tl.constexpr):
    """Write `z: [BF, W]` as rows of `out: [T, d_sae]`, a slice at a time so that turning it round takes little room."""
    W: tl.constexpr = z.shape[1]
    if W > SUB:
        left, right = halves(z)
        store_columns(out, left, f, t0, T, d_sae, SUB)
        store_columns(out, right, f, t0 + W // 2, T, d_sae, SUB)
    else:
        t = t0 + tl.arange(0, W)
        p_out = out + t.to(tl.int64)[None, :] * d_sae + f[:, None]
        tl.store(p_out, z, mask=(t < T)[None, :] & (f < d_sae)[:, None])


@triton.jit
def encode_kernel(
    x, weight, weight_low, bias, threshold, magnitude_scale, magnitude_bias, weight_sum, scale, mean, out,
    T, d_in, d_sae,
    ACTIVATION: tl.constexpr, DOT: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BF: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, SUB: tl.constexpr, SUPER: tl.constexpr,
):  # fmt: skip
    """One tile of features and tokens."""
    block, tile = tile_of(tl.program_id(0), tl.cdiv(d_sae, BF), tl.cdiv(T, BT), SUPER)
    f0, t0 = block * BF, tile * BT
    f, t = f0 + tl.arange(0, BF), t0 + tl.arange(0, BT)
    acc = product(x, weight, weight_low, f0, t0, T, d_sae, d_in, BF, BT, BK, DOT, DESCRIPTORS)
    acc = normalised(acc, f, t, T, d_sae, scale, mean, weight_sum)
    z = activated(acc, f, d_sae, bias, threshold, magnitude_scale, magnitude_bias, ACTIVATION)
    store_columns(out, z, f, t0, T, d_sae, SUB)
