"""update_moments for any number of labels: products of rewards and pooled activations, of float32 accuracy.

Three launches. `means` reads what the batch and the state had; `products` adds to the arrays with one row a label;
`advance` moves the state's means and counts on, when nobody reads the old ones any more.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from corrsteer.kernels.plan import readable


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
def means_kernel(pooled, pooled_n, pooled_d, y, y_n, y_r, count, scratch, N, R, D, BN: tl.constexpr, BC: tl.constexpr):
    """The batch's column moments into `scratch`, float64: the old count, then mean, m2 and positives of D features,
    then of R labels."""
    program = tl.program_id(0)
    blocks = tl.cdiv(D, BC)
    if program == 0:
        tl.store(scratch, tl.load(count))
    if program < blocks:
        c = program * BC + tl.arange(0, BC)
        m_c = c < D
        mean, m2, positive = column_moments(pooled, pooled_n, pooled_d, c, m_c, N, BN, BC)
        base, size = scratch + 1, D
    else:
        c = (program - blocks) * BC + tl.arange(0, BC)
        m_c = c < R
        mean, m2, positive = column_moments(y, y_n, y_r, c, m_c, N, BN, BC)
        base, size = scratch + 1 + 3 * D, R
    tl.store(base + c, mean, mask=m_c)
    tl.store(base + size + c, m2, mask=m_c)
    tl.store(base + 2 * size + c, positive, mask=m_c)


@triton.jit
def gain(pointer, amount, mask):
    tl.store(pointer, tl.load(pointer, mask=mask, other=0.0) + amount.to(tl.float64), mask=mask)


@triton.jit
def products_kernel(
    pooled, pooled_n, pooled_d, y, y_n, y_r, scratch, z_mean, y_mean,
    cross, group_sum, group_active_sum, group_active_count, N, R, D,
    BN: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """`[BR, BD]` of the arrays that have a row for each label."""
    r, f = tl.program_id(1) * BR + tl.arange(0, BR), tl.program_id(0) * BD + tl.arange(0, BD)
    m_r, m_f = r < R, f < D
    z_batch = tl.load(scratch + 1 + f, mask=m_f, other=0.0)
    y_batch = tl.load(scratch + 1 + 3 * D + r, mask=m_r, other=0.0)
    covariance = tl.zeros((BR, BD), tl.float32)
    sum_positive, sum_other = covariance, covariance
    active_sum_positive, active_sum_other = covariance, covariance
    active_positive, active_other = covariance, covariance
    for n0 in range(0, N, BN):
        o_n = n0 + tl.arange(0, BN)
        m_z, m_y = (o_n < N)[:, None] & m_f[None, :], m_r[:, None] & (o_n < N)[None, :]
        p_n = o_n.to(tl.int64)
        z = tl.load(pooled + p_n[:, None] * pooled_n + f.to(tl.int64)[None, :] * pooled_d, mask=m_z, other=0)
        b_y = tl.load(y + p_n[None, :] * y_n + r.to(tl.int64)[:, None] * y_r, mask=m_y, other=0).to(tl.float64)
        y_deviation = tl.where(m_y, b_y - y_batch[:, None], 0.0).to(tl.float32)
        z_deviation = tl.where(m_z, z.to(tl.float64) - z_batch[None, :], 0.0).to(tl.float32)
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

    old_n = tl.load(scratch)
    z_delta = z_batch - tl.load(z_mean + f, mask=m_f, other=0.0)
    y_delta = y_batch - tl.load(y_mean + r, mask=m_r, other=0.0)
    m = m_r[:, None] & m_f[None, :]
    at = r.to(tl.int64)[:, None] * D + f[None, :]
    second = (tl.zeros((1, 1), tl.int64) + R) * D
    gain(cross + at, covariance.to(tl.float64) + y_delta[:, None] * z_delta[None, :] * (old_n * (N / (old_n + N))), m)
    gain(group_sum + at, sum_positive, m)
    gain(group_sum + second + at, sum_other, m)
    gain(group_active_sum + at, active_sum_positive, m)
    gain(group_active_sum + second + at, active_sum_other, m)
    gain(group_active_count + at, active_positive, m)
    gain(group_active_count + second + at, active_other, m)


@triton.jit
def merge_mean(mean, m2, batch_mean, batch_m2, old_n, N, c, m_c):
    old = tl.load(mean + c, mask=m_c, other=0.0)
    delta = batch_mean - old
    share = N / (old_n + N)
    gain(m2 + c, batch_m2 + delta * delta * (old_n * share), m_c)
    tl.store(mean + c, old + delta * share, mask=m_c)


@triton.jit
def advance_kernel(scratch, count, z_mean, z_m2, y_mean, y_m2, n_positive, n_active, N, R, D, BC: tl.constexpr):
    """Means, second moments and counts of the state, moved on by the batch in `scratch`."""
    program = tl.program_id(0)
    blocks = tl.cdiv(D, BC)
    old_n = tl.load(scratch)
    if program < blocks:
        c = program * BC + tl.arange(0, BC)
        m_c = c < D
        own = scratch + 1 + c
        batch_mean, batch_m2 = tl.load(own, mask=m_c, other=0.0), tl.load(own + D, mask=m_c, other=0.0)
        merge_mean(z_mean, z_m2, batch_mean, batch_m2, old_n, N, c, m_c)
        gain(n_active + c, tl.load(own + 2 * D, mask=m_c, other=0.0), m_c)
    else:
        c = (program - blocks) * BC + tl.arange(0, BC)
        m_c = c < R
        own = scratch + 1 + 3 * D + c
        batch_mean, batch_m2 = tl.load(own, mask=m_c, other=0.0), tl.load(own + R, mask=m_c, other=0.0)
        merge_mean(y_mean, y_m2, batch_mean, batch_m2, old_n, N, c, m_c)
        gain(n_positive + c, tl.load(own + 2 * R, mask=m_c, other=0.0), m_c)
        if program == blocks:
            tl.store(count, old_n + N)


def update_moments(pooled: Tensor, y: Tensor, moments) -> None:
    """`corrsteer.reference.update_moments`: fold `pooled: [N, d_sae]` and `y: [N, R]` into `moments`, in place."""
    N, D = pooled.shape
    R = y.shape[1]
    if N == 0:
        return
    pooled, y = readable(pooled), readable(y)
    scratch = torch.empty(1 + 3 * (D + R), dtype=torch.float64, device=pooled.device)
    rows, columns = (pooled, *pooled.stride()), (y, *y.stride())
    each = triton.cdiv(D, 64) + triton.cdiv(R, 64)
    means_kernel[(each,)](*rows, *columns, moments.count, scratch, N, R, D, BN=32, BC=64)
    products_kernel[(triton.cdiv(D, 64), triton.cdiv(R, 32))](
        *rows, *columns, scratch, moments.z_mean, moments.y_mean, moments.cross, moments.group_sum,
        moments.group_active_sum, moments.group_active_count, N, R, D, BN=32, BR=32, BD=64, num_warps=8,
    )  # fmt: skip
    advance_kernel[(each,)](
        scratch, moments.count, moments.z_mean, moments.z_m2, moments.y_mean, moments.y_m2, moments.n_positive,
        moments.n_active, N, R, D, BC=64,
    )  # fmt: skip
