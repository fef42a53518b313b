"""Dense activations `[T, d_sae]`, for those who want them: the drop-in for SAELens' `encode`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from corrsteer.kernels import launch
from corrsteer.kernels.matmul import (
    activate,
    activation_arguments,
    dot_kind,
    grouped_order,
    matmul_arguments,
    matmul_tile,
    normalise,
    split_accumulator,
)
from corrsteer.kernels.topk import top_activations


@triton.jit
def store_columns(out, z, f, t0, T, d_sae, SUBTILE: tl.constexpr):
    """Write `z: [BF, W]` as rows of `out: [T, d_sae]`, a subtile at a time so that transposing takes little room."""
    W: tl.constexpr = z.shape[1]
    if W > SUBTILE:
        left, right = split_accumulator(z)
        store_columns(out, left, f, t0, T, d_sae, SUBTILE)
        store_columns(out, right, f, t0 + W // 2, T, d_sae, SUBTILE)
    else:
        t = t0 + tl.arange(0, W)
        p_out = out + t.to(tl.int64)[None, :] * d_sae + f[:, None]
        tl.store(p_out, z, mask=(t < T)[None, :] & (f < d_sae)[:, None])


@triton.jit
def encode_kernel(
    x, weight, weight_low, bias, threshold, magnitude_scale, magnitude_bias, weight_sum, scale, mean, shift, out,
    T, d_in, d_sae,
    ACTIVATION: tl.constexpr, DOT: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BF: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, SUBTILE: tl.constexpr, GROUP_SIZE: tl.constexpr,
):  # fmt: skip
    """One tile of features and tokens."""
    block, tile = grouped_order(tl.program_id(0), tl.cdiv(d_sae, BF), tl.cdiv(T, BT), GROUP_SIZE)
    f0, t0 = block * BF, tile * BT
    f, t = f0 + tl.arange(0, BF), t0 + tl.arange(0, BT)
    acc = matmul_tile(x, weight, weight_low, shift, f0, t0, T, d_sae, d_in, BF, BT, BK, DOT, DESCRIPTORS)  # [BF, BT]
    acc = normalise(acc, f, t, T, d_sae, scale, mean, weight_sum)
    z = activate(acc, f, d_sae, bias, threshold, magnitude_scale, magnitude_bias, ACTIVATION)
    store_columns(out, z, f, t0, T, d_sae, SUBTILE)


def encode(x: Tensor, encoder) -> Tensor:
    """`corrsteer.ops.reference.encode`: `[T, d_sae]` float32."""
    T, d_sae = len(x), encoder.d_sae
    if "topk" in encoder.activation:
        values, features = top_activations(x, encoder)
        return torch.zeros(T, d_sae, dtype=torch.float32, device=x.device).scatter_(1, features.long(), values)
    out = torch.empty(T, d_sae, dtype=torch.float32, device=x.device)
    if T:
        config = launch.config(x.device, "encode", dot_kind(x, encoder), T)
        encode_kernel[(triton.cdiv(T, config["BT"]) * triton.cdiv(d_sae, config["BF"]),)](
            **matmul_arguments(x, encoder, config), **activation_arguments(encoder), out=out
        )
    return out
