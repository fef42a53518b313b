"""Each operation in a few lines of eager torch: the definition that every backend is tested against.

Arithmetic is done in float32, or in float64 where the encoder is float64, which is how tests get the truth
that errors are measured from. Arguments are taken as checked; `corrsteer.ops.operations` is the way in.

Notation: T tokens, N samples, D features, R labels, C columns of sums, V steering vectors, B rows of S positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from corrsteer.ops.moments import Moments
from corrsteer.sae.encoder import SparseEncoder, required

LAYER_NORM_EPS = 1e-5  # SAELens' own, added to the standard deviation


def normalised(x: Tensor, encoder: SparseEncoder) -> Tensor:
    """`x: [T, d_in]` after SAELens' run-time input normalisation."""
    if encoder.input_norm == "layer_norm":
        return (x - x.mean(dim=-1, keepdim=True)) / (x.std(dim=-1, keepdim=True) + LAYER_NORM_EPS)
    if encoder.input_norm == "constant_norm_rescale":
        return x * (encoder.d_in**0.5 / x.norm(dim=-1, keepdim=True))
    return x


def preactivation(x: Tensor, encoder: SparseEncoder) -> Tensor:
    """`W x`, x normalised, before any bias: `[T, d_sae]`."""
    with torch.autocast(x.device.type, enabled=False):  # which would round the operands to half precision
        return normalised(x.to(encoder.compute_dtype), encoder) @ encoder.full_weight().T


def encode(x: Tensor, encoder: SparseEncoder) -> Tensor:
    """Dense feature activations `[T, d_sae]` of residual rows `x: [T, d_in]`.

    With p = W x + b: relu max(p, 0); jumprelu p · [p > threshold] · [p > 0], strict (Rajamanoharan et al. 2024);
    gated [p > 0] · relu(scale · W x + bias) (the same, 2024); topk the k largest p of a token, then relu (Gao et al.
    2024); abstopk the k largest |p|, signed; groupmax the largest of each of k groups of features that follow each
    other, then relu.
    """
    if encoder.activation == "identity":
        return x.to(encoder.compute_dtype, copy=True)
    product = preactivation(x, encoder)
    p = product + required(encoder.bias)
    if encoder.activation == "relu":
        return p.relu()
    if encoder.activation == "jumprelu":
        return p.relu() * (p > required(encoder.threshold))
    if encoder.activation == "gated":
        magnitude = product * required(encoder.magnitude_scale) + required(encoder.magnitude_bias)
        return magnitude.relu() * (p > 0)
    if encoder.activation == "groupmax":
        size = encoder.d_sae // encoder.k
        first = torch.arange(0, encoder.d_sae, size, dtype=torch.int64, device=p.device)
        top = p.unflatten(-1, (encoder.k, size)).argmax(dim=-1) + first
    else:
        rank = p.abs() if encoder.activation == "abstopk" else p
        top = rank.topk(encoder.k, dim=-1).indices
    kept = torch.zeros_like(p).scatter_(-1, top, p.gather(-1, top))
    return kept if encoder.activation == "abstopk" else kept.relu()


def pool(z: Tensor, cu_seqlens: Tensor, how: str) -> Tensor:
    """Mean or max of `z: [T, d]` over each sample's tokens: `[N, d]`. A sample without tokens pools to 0."""
    lengths = cu_seqlens.diff().long()
    if how == "mean":  # segment_reduce rather than index_add_, which on a GPU adds in any order
        total = torch.segment_reduce(z, "sum", lengths=lengths, axis=0, initial=0, unsafe=True)
        return total / lengths.clamp(min=1)[:, None]
    out = z.new_zeros(len(lengths), z.shape[1])
    token = torch.arange(len(z), device=z.device, dtype=cu_seqlens.dtype)
    # clamped, so that cu_seqlens which nobody checked cannot write outside of the result
    sample = torch.searchsorted(cu_seqlens[1:], token, right=True).clamp(max=len(lengths) - 1)
    # include_self=False: activations may be negative, so 0 is not where a maximum starts
    return out.scatter_reduce_(0, sample[:, None].expand_as(z), z, "amax", include_self=False)


def encode_pool(x: Tensor, cu_seqlens: Tensor, encoder: SparseEncoder, pools: tuple[str, ...]) -> Tensor:
    """Pooled activations `[len(pools), N, d_sae]`."""
    z = encode(x, encoder)
    return torch.stack([pool(z, cu_seqlens, how) for how in pools])


def update_moments(pooled: Tensor, y: Tensor, moments: Moments) -> None:
    """Fold `pooled: [N, d_sae]` and `y: [N, R]` into `moments`, in place.

    The batch's own moments are computed about its own means, and merged.
    """
    z, y = pooled.double(), y.double()
    if len(z) == 0:
        return
    batch = Moments(z.shape[1], y.shape[1], z.device)
    batch.count.fill_(len(z))
    batch.z_mean, batch.y_mean = z.mean(0), y.mean(0)
    z_dev, y_dev = z - batch.z_mean, y - batch.y_mean
    batch.z_m2, batch.y_m2, batch.cross = z_dev.square().sum(0), y_dev.square().sum(0), y_dev.T @ z_dev
    positive, active = (y > 0).double(), (z > 0).double()
    batch.n_positive, batch.n_active = positive.sum(0), active.sum(0)
    for at, members in enumerate((positive, 1 - positive)):
        batch.group_sum[at] = members.T @ z
        batch.group_active_sum[at] = members.T @ (z * active)
        batch.group_active_count[at] = members.T @ active
    moments.fold(batch)


def update_sums(pooled: Tensor, weights: Tensor, sums: Tensor, powers: tuple[int, ...]) -> None:
    """Add Σ_n `weights[n, c]` · `pooled[n, i]`^p to `sums[i, c]`, in place and in float64.

    `pooled: [N, D]`, `weights: [N, C]`, `sums: [D, C]`; the first `powers[0]` columns take p = 1, the next `powers[1]`
    take p = 2, and so on.
    """
    z, first = pooled.double(), 0
    for power, columns in enumerate(powers, 1):
        last = first + columns
        if columns:
            sums[:, first:last] += z.pow(power).T @ weights[:, first:last]
        first = last


def encode_update(
    x: Tensor,
    cu_seqlens: Tensor,
    y: Tensor,
    encoder: SparseEncoder,
    moments: tuple[Moments, ...],
    pools: tuple[str, ...],
) -> None:
    """`encode_pool`, then `update_moments` of each pooling's own moments."""
    for pooled, state in zip(encode_pool(x, cu_seqlens, encoder, pools), moments):
        update_moments(pooled, y, state)


def steer_add(h: Tensor, vectors: Tensor, row_vector: Tensor, positions: Tensor | None) -> None:
    """Add `vectors[row_vector[b]]` to `h[b, s]` where `positions[b, s]`, in place; a row of -1 is left alone.

    The sum is formed in float32 (float64 for a float64 `h`) and rounded once to `h`'s dtype.
    """
    steered = row_vector >= 0
    where = steered[:, None] if positions is None else positions & steered[:, None]
    wide = torch.promote_types(h.dtype, torch.float32)
    added = h.to(wide) + vectors[row_vector.clamp(min=0)].to(wide)[:, None]
    h.copy_(torch.where(where[..., None], added.to(h.dtype), h))
