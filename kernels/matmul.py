"""What every encoding kernel does first: a tile of `W x` in registers, then bias and activation; and its arguments.

Features lie on the accumulator's rows and tokens on its columns. A vector with one number a feature then costs a
thread two to four registers, and pooling, which runs along tokens, mostly stays inside a thread; with tokens on rows
every such vector is replicated over a warp and the fused epilogue spills.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from corrsteer.kernels.token_norm import token_norm

# The interpreter multiplies bfloat16 operands wrongly without a word; there they are widened first.
INTERPRETING = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def grouped_order(program, n_blocks, n_chunks, GROUP_SIZE: tl.constexpr):
    """Which (feature block, token chunk) a program works on; the grouped ordering of Triton's matmul tutorial.

    Programs that run at the same time should read the same weights and the same tokens from L2: they go through
    GROUP_SIZE chunks for one feature block, then for the next, before the next GROUP_SIZE chunks are begun.
    """
    per_group = GROUP_SIZE * n_blocks
    first = program // per_group * GROUP_SIZE
    size = tl.minimum(n_chunks - first, GROUP_SIZE)
    within = program % per_group
    return within // size, first + within % size


@triton.jit
def matmul_tile(
    x, weight, weight_low, shift, f0, t0, T, d_sae, d_in,
    BF: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """`W[f0 : f0 + BF] @ (x[t0 : t0 + BT] - shift)ᵀ`, `[BF, BT]` float32; without `shift`, None, of x itself.

    DOT says how: `native` (both operands of one 16-bit type), `bf16x2` (each weight a sum of two bfloat16), or
    `tf32x3` and `ieee` (operands widened to float32). Rows beyond the end of W or x give numbers that mean nothing.
    """
    if shift is None:
        acc = product_tile(x, weight, weight_low, None, f0, t0, T, d_sae, d_in, BF, BT, BK, DOT, DESCRIPTORS)
    else:
        t = t0 + tl.arange(0, BT)
        b_shift = tl.load(shift + t, mask=t < T, other=0.0)  # [BT]
        # 16-bit operands go to the tensor cores untouched unless they must not
        if (DOT == "tf32x3" or DOT == "ieee") or tl.max(tl.abs(b_shift), 0) > 0:
            acc = product_tile(x, weight, weight_low, b_shift, f0, t0, T, d_sae, d_in, BF, BT, BK, DOT, DESCRIPTORS)
        else:
            acc = product_tile(x, weight, weight_low, None, f0, t0, T, d_sae, d_in, BF, BT, BK, DOT, DESCRIPTORS)
    return acc


@triton.jit
def product_tile(
    x, weight, weight_low, b_shift, f0, t0, T, d_sae, d_in,
    BF: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """The loop of `matmul_tile`; `b_shift: [BT]`, or None."""
    LOW: tl.constexpr = weight_low is not None
    acc = tl.zeros((BF, BT), tl.float32)  # [BF, BT]
    for k in range(0, d_in, BK):
        if DESCRIPTORS:  # the copy engine fetches, and fills with zeros what lies outside
            b_w = weight.load([f0, k])  # [BF, BK]
            b_x = x.load([t0, k])  # [BT, BK]
            if LOW:
                b_low = weight_low.load([f0, k])
        else:
            o_k = k + tl.arange(0, BK)
            m_k = (o_k < d_in)[None, :]
            p_w = tl.minimum(f0 + tl.arange(0, BF), d_sae - 1).to(tl.int64)[:, None] * d_in + o_k[None, :]
            p_x = tl.minimum(t0 + tl.arange(0, BT), T - 1).to(tl.int64)[:, None] * d_in + o_k[None, :]
            b_w = tl.load(weight + p_w, mask=m_k, other=0.0)
            b_x = tl.load(x + p_x, mask=m_k, other=0.0)
            if LOW:
                b_low = tl.load(weight_low + p_w, mask=m_k, other=0.0)
        if DOT == "native" or DOT == "bf16x2":
            if b_shift is not None:  # beyond d_in as well, where the weights are 0
                b_x = (b_x.to(tl.float32) - b_shift[:, None]).to(b_x.dtype)
            if INTERPRETING:
                b_w, b_x = b_w.to(tl.float32), b_x.to(tl.float32)
                if LOW:
                    b_low = b_low.to(tl.float32)
            acc = tl.dot(b_w, b_x.T, acc)
            if LOW:
                acc = tl.dot(b_low, b_x.T, acc)
        else:
            b_w, b_x = b_w.to(tl.float32), b_x.to(tl.float32)
            if b_shift is not None:
                b_x -= b_shift[:, None]
            if LOW:
                b_w += b_low.to(tl.float32)
            acc = tl.dot(b_w, b_x.T, acc, input_precision=DOT)
    return acc


@triton.jit
def normalise(acc, f, t, T, d_sae, scale, mean, weight_sum):
    """`acc` after the SAE's input normalisation: `scale · (acc - mean · row sums of W)`, of the mean what `matmul_tile`
    has left; None leaves a part out."""
    if scale is not None:
        if mean is not None:
            rows = tl.load(weight_sum + f, mask=f < d_sae, other=0.0)
            acc -= rows[:, None] * tl.load(mean + t, mask=t < T, other=0.0)[None, :]
        acc *= tl.load(scale + t, mask=t < T, other=0.0)[None, :]
    return acc


@triton.jit
def activate(acc, f, d_sae, bias, threshold, magnitude_scale, magnitude_bias, ACTIVATION: tl.constexpr):
    """Bias and activation, as `corrsteer.ops.reference.encode` defines them; `linear` adds the bias alone.

    Written as "0 where p <= threshold", so that a NaN, which compares false, stays one and is not lost.
    """
    m_f = f < d_sae
    p = acc + tl.load(bias + f, mask=m_f, other=0.0)[:, None]
    if ACTIVATION == "linear":
        return p
    if ACTIVATION == "gated":
        scaled = acc * tl.load(magnitude_scale + f, mask=m_f, other=0.0)[:, None]
        magnitude = scaled + tl.load(magnitude_bias + f, mask=m_f, other=0.0)[:, None]
        return tl.where((p <= 0) | (magnitude <= 0), 0.0, magnitude)
    if ACTIVATION == "jumprelu":
        above = tl.maximum(tl.load(threshold + f, mask=m_f, other=0.0), 0.0)
        return tl.where(p <= above[:, None], 0.0, p)
    return tl.where(p <= 0, 0.0, p)


@triton.jit
def split_accumulator(z):
    """`[BF, W]` as its left and its right `[BF, W / 2]`; registers are renamed, nothing moves."""
    left, right = tl.split(tl.permute(tl.reshape(z, (z.shape[0], 2, z.shape[1] // 2)), (0, 2, 1)))
    return left, right


def dot_kind(x: Tensor, encoder) -> str:
    """DOT: operands that differ in type are widened, so that none of them is rounded."""
    if encoder.precision == "fp32_ieee":
        return "ieee"
    if encoder.weight_low is not None:
        return "bf16x2" if x.dtype == torch.bfloat16 else "tf32x3"
    return "native" if x.dtype == encoder.weight.dtype and x.dtype != torch.float32 else "tf32x3"


def packed_rows(x: Tensor) -> Tensor:
    """`x: [T, d_in]` with its rows one after the other in memory, of a single row too."""
    return x if x.stride(-1) == 1 and x.stride(0) == x.shape[1] else x.contiguous()


def matmul_arguments(x: Tensor, encoder, config: dict[str, int]) -> dict:
    """What every kernel with a product takes; x and the weights as tensor descriptors where the copy engine can read
    the rows."""
    x = packed_rows(x)
    operands = {"x": (x, config["BT"]), "weight": (encoder.weight, config["BF"])}
    if encoder.weight_low is not None:
        operands["weight_low"] = (encoder.weight_low, config["BF"])
    described = config["descriptors"] and all(
        t.data_ptr() % 16 == 0 and t.shape[1] * t.element_size() % 16 == 0 for t, _ in operands.values()
    )
    if described:
        given = {
            # strides by hand, as those of a single row may be anything
            n: TensorDescriptor(t, list(t.shape), [t.shape[1], 1], [rows, config["BK"]])
            for n, (t, rows) in operands.items()
        }
    else:
        given = {n: t for n, (t, _) in operands.items()}
    dot = dot_kind(x, encoder)
    norm = (None, None, None)
    if encoder.input_norm != "none":
        norm = token_norm(x, encoder.input_norm, exact=dot in ("native", "bf16x2"))
    blocks = ("BF", "BT", "BK", "SUBTILE", "GROUP_SIZE", "num_warps", "num_stages")
    return {"weight_low": None, **given, **{name: config[name] for name in blocks}} | dict(
        bias=encoder.bias, weight_sum=encoder.weight_sum, T=len(x), d_in=encoder.d_in,
        d_sae=encoder.d_sae, DOT=dot, DESCRIPTORS=bool(described), **dict(zip(("scale", "mean", "shift"), norm)),
    )  # fmt: skip


def activation_arguments(encoder) -> dict:
    """What `activate` takes besides."""
    names = ("threshold", "magnitude_scale", "magnitude_bias")
    return {name: getattr(encoder, name) for name in names} | {"ACTIVATION": encoder.activation}
