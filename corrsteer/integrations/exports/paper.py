"""The JSON that the evaluator in the paper's released code reads (seonglae/CorrSteer, `eval.py`)."""

from __future__ import annotations

from typing import Any

from corrsteer.errors import CorrSteerError
from corrsteer.files import to_json, write_utf8
from corrsteer.integrations.exports.form import Export, Form
from corrsteer.lm.hook_points import HookPoint


def write(export: Export) -> str:
    """`layers` -> number -> `selected`, one feature each, which the evaluator adds to what the layer reads."""
    layers: dict[str, Any] = {}
    for feature in export.steering.features:
        if feature.index is None or feature.layer is None or feature.statistics is None:
            what = "is no feature of an SAE" if feature.index is None else "has no correlation"
            raise CorrSteerError(f"{feature.name} {what}, and the evaluator needs both; export the steering as json")
        export.check_row(feature)
        point, reads = HookPoint.parse(feature.hook_point, export.model), HookPoint(feature.layer).offset(-1)
        if point not in (reads, HookPoint(feature.layer, "resid_pre")):
            raise CorrSteerError(
                f"{feature.name} adds at {point}, and the evaluator adds to what layer {feature.layer} reads; collect "
                f"with hook_offset=-1"
            )
        if str(feature.layer) in layers:
            raise CorrSteerError(
                f"{feature.name} is not the first of its layer, where the evaluator takes one; export it as json"
            )
        layers[str(feature.layer)] = {
            "selected": {
                "feature_index": feature.index,
                "coefficient": export.scale * feature.coefficient,
                "correlation": feature.statistics.correlation,
            }
        }
    write_utf8(export.path, to_json({"layers": layers}, indent=1) + "\n")
    return f"{export.path} holds what eval.py of seonglae/CorrSteer reads with method=foreach, and with no other method"


FORM = Form(
    "paper",
    "the JSON that the paper's released evaluator reads",
    ("generated",),
    "not run: it needs the paper's models; its fields are those of the source",
    write,
)
