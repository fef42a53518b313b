"""Encoders and moments as the flat arguments that operators of `torch.library` take: tensors, numbers, strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from corrsteer.ops.moments import Moments
from corrsteer.sae.encoder import TENSORS, SparseEncoder

ENCODER = "Tensor?[] parts, int d_in, int d_sae, str activation, int k, str input_norm, str precision"  # its schema


def flatten_encoder(encoder: SparseEncoder) -> tuple[Any, ...]:
    """The arguments that `ENCODER` names."""
    parts = [getattr(encoder, name) for name in TENSORS]
    return parts, encoder.d_in, encoder.d_sae, encoder.activation, encoder.k, encoder.input_norm, encoder.precision


def restore_encoder(
    parts: Sequence[Tensor | None], d_in: int, d_sae: int, activation: str, k: int, input_norm: str, precision: str
) -> SparseEncoder:
    """The encoder of what `flatten_encoder` gave; where its decoder lies is not among it."""
    tensors = dict(zip(TENSORS, parts))
    return SparseEncoder(d_in, d_sae, activation, **tensors, k=k, input_norm=input_norm, precision=precision)


def restore_moments(flat: Sequence[Tensor]) -> tuple[Moments, ...]:
    """The moments whose `state` arrays stand one after the other in `flat`."""
    each = len(Moments.STATE)
    return tuple(Moments.from_state(flat[at : at + each]) for at in range(0, len(flat), each))
