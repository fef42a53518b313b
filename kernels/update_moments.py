"""update_moments for any number of labels: products of rewards and pooled activations, of float32 accuracy.

Three launches. `column_moments` reads what the batch and the state had; `products` adds to the arrays with one row a
label; `merge` brings the state's means and counts up to date, when nobody reads the old ones any more.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from corrsteer.kernels.launch import readable
from corrsteer.kernels.moments import accumulate, chan_mean, chan_product, power_of_two

MEAN, M2, N_POSITIVE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # rows of what `column_moments` leaves


@triton.jit
def column_moments(values, stride_n, stride_d, c, m_c, N, BN: tl.constexpr, BC: tl.constexpr):
    """Mean, centred second moment and number of positive entries of columns `c: [BC]`, in float64."""
    total, positive = tl.zeros((BC,), tl.float64), tl.zeros((BC,), tl.float64)
    for n0 in range(0, N, BN):
        o_n = n0 + tl.arange(0, BN)
        m = (o_n < N)[:, None] & m_c[None, :]
        b = tl.load(values + o_n.to(tl.int64)[:, None] * stride_n + c.to(tl.int64)[None, :] * stride_d, mask=m, other=0)
        total += tl.sum(b.to(tl.float64), 0)
        positive += tl.sum((b > 0).to(tl.float64), 0)
    mean = total / N
    m2 = tl.zeros((BC,), tl.float64)
    for n0 in range(0, N, BN):
        o_n = n0 + tl.arange(0, BN)
        m = (o_n < N)[:, None] & m_c[None, :]
        b = tl.load(values + o_n.to(tl.int64)[:, None] * stride_n + c.to(tl.int64)[None, :] * stride_d, mask=m, other=0)
        deviation = tl.where(m, b.to(tl.float64) - mean[None, :], 0.0)
        m2 += tl.sum(deviation * deviation, 0)
    return mean, m2, positive


@triton.jit
def store_column_moments(rows, values, stride_n, stride_d, c, N, C, BN: tl.constexpr, BC: tl.constexpr):
    m_c = c < C
    mean, m2, positive = column_moments(values, stride_n, stride_d, c, m_c, N, BN, BC)
    tl.store(rows + MEAN * C + c, mean, mask=m_c)
    tl.store(rows + M2 * C + c, m2, mask=m_c)
    tl.store(rows + N_POSITIVE * C + c, positive, mask=m_c)


@triton.jit
def column_moments_kernel(
    pooled, pooled_n, pooled_d, y, y_n, y_r, count, old_count, z_rows, y_rows, N, R, D,
    BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The batch's column moments, `z_rows: [3, D]` and `y_rows: [3, R]`, and a copy of the state's count; float64."""
    program = tl.program_id(0)
    blocks = tl.cdiv(D, BC)
    if program == 0:
        tl.store(old_count, tl.load(count))
    if program < blocks:
        store_column_moments(z_rows, pooled, pooled_n, pooled_d, program * BC + tl.arange(0, BC), N, D, BN, BC)
    else:
        store_column_moments(y_rows, y, y_n, y_r, (program - blocks) * BC + tl.arange(0, BC), N, R, BN, BC)


@triton.jit
def column_unit(rows, c, m_c, N, C):
    """A power of two near the standard deviation of columns `c: [BC]`, in units of which float32 holds deviations."""
    return power_of_two(tl.sqrt(tl.load(rows + M2 * C + c, mask=m_c, other=0.0) / N))


@triton.jit
def products_kernel(
    pooled, pooled_n, pooled_d, y, y_n, y_r, old_count, z_rows, y_rows, z_mean, y_mean,
    cross, group_sum, group_active_sum, group_active_count, N, R, D,
    BN: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """`[BR, BD]` of the arrays that have a row for each label."""
    r, f = tl.program_id(1) * BR + tl.arange(0, BR), tl.program_id(0) * BD + tl.arange(0, BD)
    m_r, m_f = r < R, f < D
    z_batch = tl.load(z_rows + MEAN * D + f, mask=m_f, other=0.0)
    y_batch = tl.load(y_rows + MEAN * R + r, mask=m_r, other=0.0)
    z_unit, y_unit = column_unit(z_rows, f, m_f, N, D), column_unit(y_rows, r, m_r, N, R)
    z_inverse, y_inverse = 1.0 / z_unit, 1.0 / y_unit
    covariance = tl.zeros((BR, BD), tl.float32)  # [BR, BD]
    sum_positive, sum_other = covariance, covariance
    active_sum_positive, active_sum_other = covariance, covariance
    active_positive, active_other = covariance, covariance
    for n0 in range(0, N, BN):
        o_n = n0 + tl.arange(0, BN)
        m_z, m_y = (o_n < N)[:, None] & m_f[None, :], m_r[:, None] & (o_n < N)[None, :]
        p_n = o_n.to(tl.int64)
        z = tl.load(pooled + p_n[:, None] * pooled_n + f.to(tl.int64)[None, :] * pooled_d, mask=m_z, other=0)
        b_y = tl.load(y + p_n[None, :] * y_n + r.to(tl.int64)[:, None] * y_r, mask=m_y, other=0).to(tl.float64)
        y_deviation = tl.where(m_y, (b_y - y_batch[:, None]) * y_inverse[:, None], 0.0).to(tl.float32)
        z_deviation = tl.where(m_z, (z.to(tl.float64) - z_batch[None, :]) * z_inverse[None, :], 0.0).to(tl.float32)
        positive, other = (m_y & (b_y > 0)).to(tl.float32), (m_y & (b_y <= 0)).to(tl.float32)
        z = z.to(tl.float32)
        active = (z > 0).to(tl.float32)
        z_active = z * active
        covariance = tl.dot(y_deviation, z_deviation, covariance, input_precision="tf32x3")
        sum_positive = tl.dot(positive, z, sum_positive, input_precision="tf32x3")
        sum_other = tl.dot(other, z, sum_other, input_precision="tf32x3")
        active_sum_positive = tl.dot(positive, z_active, active_sum_positive, input_precision="tf32x3")
        active_sum_other = tl.dot(other, z_active, active_sum_other, input_precision="tf32x3")
        # zeros and ones are exact in any precision
        active_positive = tl.dot(positive, active, active_positive, input_precision="tf32")
        active_other = tl.dot(other, active, active_other, input_precision="tf32")

    z_delta = z_batch - tl.load(z_mean + f, mask=m_f, other=0.0)
    y_delta = y_batch - tl.load(y_mean + r, mask=m_r, other=0.0)
    m = m_r[:, None] & m_f[None, :]
    at = r.to(tl.int64)[:, None] * D + f[None, :]
    other = at + (tl.zeros((1, 1), tl.int64) + R) * D  # second `[R, D]` of `[2, R, D]`
    old_cross = tl.load(cross + at, mask=m, other=0.0)
    covariance = covariance.to(tl.float64) * y_unit[:, None] * z_unit[None, :]
    merged = chan_product(tl.load(old_count), old_cross, N, covariance, z_delta[None, :], y_delta[:, None])
    tl.store(cross + at, merged, mask=m)
    accumulate(group_sum + at, sum_positive, m)
    accumulate(group_sum + other, sum_other, m)
    accumulate(group_active_sum + at, active_sum_positive, m)
    accumulate(group_active_sum + other, active_sum_other, m)
    accumulate(group_active_count + at, active_positive, m)
    accumulate(group_active_count + other, active_other, m)


@triton.jit
def merge_into_state(mean, m2, n_positive, rows, old_n, N, c, C):
    """Columns `c: [BC]` of the batch, in `rows: [3, C]`, merged into a state's arrays `[C]`."""
    m_c = c < C
    old_mean, batch_mean = tl.load(mean + c, mask=m_c, other=0.0), tl.load(rows + MEAN * C + c, mask=m_c, other=0.0)
    old_m2, batch_m2 = tl.load(m2 + c, mask=m_c, other=0.0), tl.load(rows + M2 * C + c, mask=m_c, other=0.0)
    delta = batch_mean - old_mean
    tl.store(m2 + c, chan_product(old_n, old_m2, N, batch_m2, delta), mask=m_c)
    tl.store(mean + c, chan_mean(old_n, old_mean, N, batch_mean), mask=m_c)
    accumulate(n_positive + c, tl.load(rows + N_POSITIVE * C + c, mask=m_c, other=0.0), m_c)


@triton.jit
def merge_kernel(
    old_count, z_rows, y_rows, count, z_mean, z_m2, y_mean, y_m2, n_positive, n_active, N, R, D, BC: tl.constexpr
):
    """Means, second moments and counts of the batch, merged into the state's."""
    program = tl.program_id(0)
    blocks = tl.cdiv(D, BC)
    old_n = tl.load(old_count)
    if program < blocks:
        merge_into_state(z_mean, z_m2, n_active, z_rows, old_n, N, program * BC + tl.arange(0, BC), D)
    else:
        merge_into_state(y_mean, y_m2, n_positive, y_rows, old_n, N, (program - blocks) * BC + tl.arange(0, BC), R)
        if program == blocks:
            tl.store(count, old_n + N)


def update_moments(pooled: Tensor, y: Tensor, moments) -> None:
    """`corrsteer.ops.reference.update_moments`: fold `pooled: [N, d_sae]` and `y: [N, R]` into `moments`, in place."""
    N, D = pooled.shape
    R = y.shape[1]
    if N == 0:
        return
    pooled, y = readable(pooled), readable(y)
    z_rows, y_rows, old_count = (torch.empty(n, dtype=torch.float64, device=y.device) for n in (3 * D, 3 * R, 1))
    batch, batch_rows = (pooled, *pooled.stride(), y, *y.stride()), (old_count, z_rows, y_rows)
    grid = (triton.cdiv(D, 64) + triton.cdiv(R, 64),)
    column_moments_kernel[grid](*batch, moments.count, *batch_rows, N, R, D, BN=32, BC=64)
    products_kernel[(triton.cdiv(D, 64), triton.cdiv(R, 16))](
        *batch, *batch_rows, moments.z_mean, moments.y_mean, moments.cross, moments.group_sum,
        moments.group_active_sum, moments.group_active_count, N, R, D, BN=32, BR=16, BD=64, num_warps=8,
    )  # fmt: skip
    merge_kernel[grid](
        *batch_rows, moments.count, moments.z_mean, moments.z_m2, moments.y_mean, moments.y_m2, moments.n_positive,
        moments.n_active, N, R, D, BC=64,
    )  # fmt: skip
