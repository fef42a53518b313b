"""update_sums: one launch for each power, in which every program owns a tile of the sums.

Two kernels. `sums_kernel` multiplies and adds in float64: no power of a float32 number overflows, and moments that will
be subtracted from each other keep their small differences. `sum_products_kernel` is for more columns than that is quick
for, such as permuted labels: on tensor cores, of float32's accuracy, and of its range for the sums of `ROWS` rows.
"""

import triton
import triton.language as tl
from torch import Tensor

from corrsteer.kernels.launch import readable
from corrsteer.kernels.moments import accumulate

MANY = 256  # columns of p = 1 above which they are products of matrices
ROWS = tl.constexpr(128)  # whose products are added up in float32


@triton.jit
def sums_kernel(
    pooled, pooled_n, pooled_d, weights, weights_n, weights_c, sums, sums_d, sums_c, N, D, C,
    POWER: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """`[BC, BD]` of the sums: features in the lanes, where each is widened and raised once for all columns."""
    f, c = tl.program_id(0) * BD + tl.arange(0, BD), tl.program_id(1) * BC + tl.arange(0, BC)
    m_f, m_c = f < D, c < C
    f, c = f.to(tl.int64), c.to(tl.int64)
    p_z, p_w = pooled + f * pooled_d, weights + c * weights_c
    total = tl.zeros((BC, BD), tl.float64)  # [BC, BD]
    for _ in range(0, N):
        z = tl.load(p_z, mask=m_f, other=0).to(tl.float64)
        w = tl.load(p_w, mask=m_c, other=0.0)
        raised = z
        for _ in tl.static_range(1, POWER):
            raised *= z
        total += w[:, None] * raised[None, :]
        p_z += pooled_n
        p_w += weights_n
    accumulate(sums + c[:, None] * sums_c + f[None, :] * sums_d, total, m_c[:, None] & m_f[None, :])


@triton.jit
def sum_products_kernel(
    pooled, pooled_n, pooled_d, weights, weights_n, weights_c, sums, sums_d, sums_c, N, D, C,
    BN: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """`[BD, BC]` of the sums, for p = 1."""
    f, c = tl.program_id(0) * BD + tl.arange(0, BD), tl.program_id(1) * BC + tl.arange(0, BC)
    m_f, m_c = f < D, c < C
    f, c = f.to(tl.int64), c.to(tl.int64)
    total = tl.zeros((BD, BC), tl.float64)  # [BD, BC]
    for first in range(0, N, ROWS):
        part = tl.zeros((BD, BC), tl.float32)
        for n0 in range(first, tl.minimum(first + ROWS, N), BN):
            n = n0 + tl.arange(0, BN)
            m_n = n < N
            n = n.to(tl.int64)
            m_z, m_w = m_f[:, None] & m_n[None, :], m_n[:, None] & m_c[None, :]
            z = tl.load(pooled + n[None, :] * pooled_n + f[:, None] * pooled_d, mask=m_z, other=0)  # [BD, BN]
            w = tl.load(weights + n[:, None] * weights_n + c[None, :] * weights_c, mask=m_w, other=0.0)  # [BN, BC]
            part = tl.dot(z.to(tl.float32), w.to(tl.float32), part, input_precision="tf32x3")
        total += part.to(tl.float64)
    accumulate(sums + f[:, None] * sums_d + c[None, :] * sums_c, total, m_f[:, None] & m_c[None, :])


def update_sums(pooled: Tensor, weights: Tensor, sums: Tensor, powers: tuple[int, ...]) -> None:
    """`corrsteer.ops.reference.update_sums`: power sums of `pooled: [N, D]` added to `sums: [D, C]`."""
    N, D = pooled.shape
    if N == 0 or D == 0:
        return
    pooled = readable(pooled)
    first = 0
    for power, columns in enumerate(powers, 1):
        w, into = weights[:, first : first + columns], sums[:, first : first + columns]
        arguments = (pooled, *pooled.stride(), w, *w.stride(), into, *into.stride(), N, D, columns)
        if power == 1 and columns > MANY:
            grid = (triton.cdiv(D, 64), triton.cdiv(columns, 64))
            sum_products_kernel[grid](*arguments, BN=16, BD=64, BC=64, num_warps=4, num_stages=3)
        elif columns:
            grid = (triton.cdiv(D, 128), triton.cdiv(columns, 16))
            sums_kernel[grid](*arguments, POWER=power, BC=16, BD=128, num_warps=4)
        first += columns
