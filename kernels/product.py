"""What every encoding kernel does first: a tile of `W x` in registers, then bias and activation.

Features lie on the accumulator's rows and tokens on its columns. A vector with one number a feature then costs a
thread two to four registers, and pooling, which runs along tokens, mostly stays inside a thread; with tokens on rows
every such vector is replicated over a warp and the fused epilogue spills.
"""

import triton
import triton.language as tl

# The interpreter multiplies bfloat16 operands wrongly without a word; there they are widened first.
INTERPRETING = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def tile_of(program, n_features, n_groups, SUPER: tl.constexpr):
    """Which (feature block, token group) a program works on.

    Programs that run at the same time should read the same weights and the same tokens from L2: they go through
    `SUPER` token groups for one feature block, then for the next, before the next `SUPER` groups are begun.
    """
    per_super = SUPER * n_features
    first = program // per_super * SUPER
    width = tl.minimum(n_groups - first, SUPER)
    within = program % per_super
    return within // width, first + within % width


@triton.jit
def product(
    x, weight, weight_low, f0, t0, T, d_sae, d_in,
    BF: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """`W[f0 : f0 + BF] @ x[t0 : t0 + BT]ᵀ`, `[BF, BT]` float32.

    DOT says how: `native` (both operands of one 16-bit type), `bf16x2` (each weight a sum of two bfloat16), or
    `tf32x3` and `ieee` (operands widened to float32). Rows beyond the end of W or x give numbers that mean nothing.
    """
    LOW: tl.constexpr = weight_low is not None
    acc = tl.zeros((BF, BT), tl.float32)
    for k in range(0, d_in, BK):
        if DESCRIPTORS:  # the copy engine fetches, and fills with zeros what lies outside
            b_w = weight.load([f0, k])
            b_x = x.load([t0, k])
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
            if INTERPRETING:
                b_w, b_x = b_w.to(tl.float32), b_x.to(tl.float32)
                if LOW:
                    b_low = b_low.to(tl.float32)
            acc = tl.dot(b_w, b_x.T, acc)
            if LOW:
                acc = tl.dot(b_low, b_x.T, acc)
        else:
            b_w, b_x = b_w.to(tl.float32), b_x.to(tl.float32)
            if LOW:
                b_w += b_low.to(tl.float32)
            acc = tl.dot(b_w, b_x.T, acc, input_precision=DOT)
    return acc


@triton.jit
def normalised(acc, f, t, T, d_sae, scale, mean, weight_sum):
    """`acc` after the SAE's input normalisation: `scale · (W x - mean(x) · row sums of W)`; None leaves a part out."""
    if scale is not None:
        if mean is not None:
            rows = tl.load(weight_sum + f, mask=f < d_sae, other=0.0)
            acc -= rows[:, None] * tl.load(mean + t, mask=t < T, other=0.0)[None, :]
        acc *= tl.load(scale + t, mask=t < T, other=0.0)[None, :]
    return acc


@triton.jit
def activated(acc, f, d_sae, bias, threshold, magnitude_scale, magnitude_bias, ACTIVATION: tl.constexpr):
    """Bias and activation, as `corrsteer.reference.encode` defines them; `linear` adds the bias alone.

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
def halves(z):
    """`[BF, W]` as its left and its right `[BF, W / 2]`; registers are renamed, nothing moves."""
    left, right = tl.split(tl.permute(tl.reshape(z, (z.shape[0], 2, z.shape[1] // 2)), (0, 2, 1)))
    return left, right
