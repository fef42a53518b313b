"""Where encoders read a model and where their decoders write: the hook points of each, checked."""

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
        width = hook_points.width(model, points[layer])
        if encoder.d_in != width:
            of_stream = points[layer].kind in hook_points.KINDS
            raise CorrSteerError(
                f"encoders[{layer}] has d_in={encoder.d_in}, but the model's "
                f"{'residual stream' if of_stream else points[layer]} is {width} wide; use an SAE of this model"
            )
    return points


def place_directions(
    model: nn.Module, encoders: Mapping[int, SparseEncoder], points: Mapping[int, HookPoint], hook_offset: int = 0
) -> dict[int, HookPoint]:
    """Where the decoder of each encoder writes that writes elsewhere than the encoder reads, as a transcoder's does."""
    steered = {}
    for layer, encoder in encoders.items():
        writes = encoder.metadata.get("hook_name_out")
        if "transcoder" not in encoder.metadata.get("architecture", ""):
            hook_points.check_steers(points[layer])
        elif writes is None:
            raise CorrSteerError(
                f"encoders[{layer}] is a transcoder that does not say where its decoder writes; name the hook point as "
                f"hook_name_out in its metadata, or encode and pool its features without collecting them"
            )
        else:
            steered[layer] = HookPoint.parse(writes, model).offset(hook_offset)
            hook_points.check_point(model, steered[layer])
            hook_points.check_steers(steered[layer])
    return steered
