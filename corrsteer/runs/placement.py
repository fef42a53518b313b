"""Where encoders read a model: the hook point of each, checked."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from corrsteer.arguments import check_type
from corrsteer.errors import CorrSteerError
from corrsteer.lm import hook_points
from corrsteer.lm.hook_points import HookPoint
from corrsteer.sae.encoder import SparseEncoder


def place(model: nn.Module, encoders: Mapping[int, SparseEncoder], hook_offset: int = 0) -> dict[int, HookPoint]:
    """The hook point of every encoder, after checking that each fits the model there."""
    for layer, encoder in encoders.items():
        check_type(f"encoders[{layer!r}]", encoder, SparseEncoder, "a SparseEncoder")
    if not encoders:
        raise CorrSteerError("encoders must map at least one layer to a SparseEncoder, got none")
    points = {}
    for layer, encoder in encoders.items():
        point = HookPoint(layer) if encoder.hook_name is None else HookPoint.parse(encoder.hook_name, model)
        if point.layer != layer:
            raise CorrSteerError(
                f"encoders[{layer}] was trained at {encoder.hook_name}, which is layer {point.layer}; "
                f"give it under that layer"
            )
        points[layer] = point.offset(hook_offset)
        hook_points.check_point(model, points[layer])
        width = hook_points.width(model)
        if encoder.d_in != width:
            raise CorrSteerError(
                f"encoders[{layer}] has d_in={encoder.d_in}, but the model's residual stream is {width} wide; "
                f"use an SAE of this model"
            )
        if "transcoder" in encoder.metadata.get("architecture", ""):
            raise CorrSteerError(
                f"encoders[{layer}] is a transcoder, whose decoder writes elsewhere than its encoder reads; "
                f"its features can be encoded and pooled, but not collected for steering"
            )
    return points
