"""Whether a contestant may be timed at all: its moments against float64 truth over a part of the features."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from corrsteer import Moments, SparseEncoder
from corrsteer.ops import reference

FEATURES = 256  # checked: half of them the first ones, half the last, which a wrong address reaches first
TOLERANCE = {"fp32": 1e-5, "fp32_ieee": 1e-5, "bf16x2": 1e-4, "fp16": 1e-3, "bf16": 1e-3}  # of the largest value
DOUBT = 1e-4  # preactivations this close to the threshold may be kept or dropped; they are of the order of 1


def some_features(d_sae: int) -> Tensor:
    """Indices of the features that are checked."""
    features = torch.arange(d_sae, dtype=torch.int64, device="cpu")
    half = FEATURES // 2
    return features if d_sae <= FEATURES else torch.cat([features[:half], features[-half:]])


def check(
    x: Tensor, cu_seqlens: Tensor, y: Tensor, encoder: SparseEncoder, moments: Moments, how: str, tolerance: float
) -> dict:
    """`moments` of one batch against the same in float64.

    Parameters
    ----------
    encoder : with the weight as the precision rounds it, in any dtype.
    how : `mean` or `max`.
    tolerance : largest error of a statistic, relative to the largest value of that statistic.

    Returns
    -------
    `ok`, an error for each statistic (None where not finite) and the tolerance.
    """
    features = some_features(encoder.d_sae).to(x.device)
    z, doubt = _truth(x, encoder, features)
    z, doubt = reference.pool(z, cu_seqlens, how), reference.pool(doubt, cu_seqlens, how)
    return _compare(z, doubt, y, moments, features, tolerance)


def check_pooled(pooled: Tensor, y: Tensor, moments: Moments, tolerance: float = 1e-5) -> dict:
    """The same for `update_moments` of `pooled: [N, d_sae]`."""
    features = some_features(moments.d_sae).to(pooled.device)
    z = pooled[:, features].double()
    return _compare(z, torch.zeros_like(z), y, moments, features, tolerance)


def check_close(got: Tensor, expected: Tensor, tolerance: float) -> dict:
    """Largest error relative to the largest expected value."""
    error = ((got.double() - expected.double()).abs().max() / expected.abs().max()).item()
    return {"ok": error <= tolerance, "error": _finite(error), "tolerance": tolerance}


def _truth(x: Tensor, encoder: SparseEncoder, features: Tensor) -> tuple[Tensor, Tensor]:
    """Activations in float64, and the size of those that rounding may keep or drop, both `[T, len(features)]`."""
    rows = slice(None) if encoder.activation == "topk" else features  # a token's top k takes all of its features
    parts = {name: getattr(encoder, name) for name in ("weight", "bias", "threshold")}
    parts = {name: part[rows].double() for name, part in parts.items() if part is not None}
    wide = SparseEncoder(encoder.d_in, len(parts["bias"]), encoder.activation, k=encoder.k, **parts)
    p = reference.preactivation(x, wide) + wide.bias
    if encoder.activation != "topk":
        return reference.encode(x, wide), p.abs() * ((p - wide.threshold).abs() < DOUBT)
    last, next_ = p.topk(encoder.k + 1, dim=-1).values[:, -2:].unbind(-1)
    unclear = ((p - last[:, None]).abs() < DOUBT) & (last - next_ < DOUBT)[:, None]
    return reference.encode(x, wide)[:, features], (p.abs() * unclear)[:, features]


def _compare(z: Tensor, doubt: Tensor, y: Tensor, moments: Moments, features: Tensor, tolerance: float) -> dict:
    y = y.double()
    slack = doubt.sum(0)  # what a feature's sum over samples may be off by, whatever the tolerance
    z_mean, y_dev = z.mean(0), y - y.mean(0)
    z_dev = z - z_mean
    z_m2, y_m2 = z_dev.square().sum(0), y_dev.square().sum(0)

    off = {  # each by how much, and of what scale
        "mean": ((moments.z_mean[features] - z_mean).abs() - slack / len(z), z_mean),
        "m2": ((moments.z_m2[features] - z_m2).abs() - 2 * slack * z.max(), z_m2),
        "cross": (
            (moments.cross[:, features] - y_dev.T @ z_dev).abs() - slack * y_dev.abs().max(),
            (y_m2.max() * z_m2).sqrt(),
        ),
        "group": ((moments.group_sum[0][:, features] - (y > 0).double().T @ z).abs() - slack, len(z) * z_mean),
    }
    # of a single sample nothing varies, and what is 0 has to be 0
    errors = {name: (error.max() / scale.max().clamp(min=1e-300)).item() for name, (error, scale) in off.items()}
    ok = moments.n == len(z) and all(error <= tolerance for error in errors.values())  # NaN is not <= anything
    return {"ok": ok, **{f"{name}_error": _finite(error) for name, error in errors.items()}, "tolerance": tolerance}


def _finite(error: float) -> float | None:
    return max(error, 0.0) if math.isfinite(error) else None
