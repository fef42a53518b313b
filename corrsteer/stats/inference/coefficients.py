"""Standard errors of steering coefficients."""

from __future__ import annotations

import torch
from torch import Tensor

from corrsteer.errors import CorrSteerError
from corrsteer.ops.moments import COEFFICIENTS, Moments
from corrsteer.stats.evidence import Evidence
from corrsteer.types import Features


def coefficient_error(
    evidence: Evidence, moments: Moments, kind: str, features: Features = slice(None), label: int = 0
) -> Tensor:
    """Standard errors of `moments.coefficient(kind)`, `[features]` float64; NaN for groups of fewer than two samples.

    A mean's is the group's standard deviation over the root of its size; a difference's the root of the sum of squares
    (Welch, "The generalization of 'Student's' problem when several different population variances are involved", 1947).
    For signed activations that of `mean_positive_active` is NaN, as squares are not kept by sign. All are NaN where a
    prompt had several samples, as these are not independent.
    """
    if kind not in COEFFICIENTS:
        raise CorrSteerError(f"coefficient must be one of {', '.join(COEFFICIENTS)}, got {kind!r}")
    n, n_positive = evidence.n, evidence.n_positive[label]
    if evidence.clustered:
        return torch.full_like(evidence.columns("z1u0", features)[:, 0], torch.nan)
    squares = evidence.columns("positive2", features, label)[:, 0]
    sums = moments.group_sum[:, label, features]

    def square(total: Tensor, squares: Tensor, size: Tensor | int) -> Tensor:
        size = torch.as_tensor(size, dtype=torch.float64, device=total.device)
        variance = (squares - total**2 / size.clamp(min=1)).clamp(min=0) / (size - 1).clamp(min=1)
        return torch.where(size > 1, variance / size.clamp(min=1), torch.nan)

    if kind == "mean_positive_active":
        active = moments.group_active_sum[0, label, features]
        unsigned = (moments.group_active_sum[:, label, features] == sums).all(0)
        error = square(active, squares, moments.group_active_count[0, label, features]).sqrt()
        return torch.where(unsigned, error, torch.nan)
    above = square(sums[0], squares, n_positive)
    if kind == "mean_positive":
        return above.sqrt()
    return (above + square(sums[1], evidence.columns("z2u0", features)[:, 0] - squares, n - n_positive)).sqrt()
