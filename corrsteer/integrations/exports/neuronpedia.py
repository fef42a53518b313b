"""Neuronpedia: links to features' pages, and the JSON of a request to steer by them there."""

from __future__ import annotations

import shlex

from corrsteer.errors import CorrSteerError
from corrsteer.files import to_json, write_utf8
from corrsteer.integrations.exports.form import Export, Form
from corrsteer.lm.hook_points import HookPoint
from corrsteer.steering.features import Feature

HOST = "https://www.neuronpedia.org"
STEER = f"{HOST}/api/steer"


def write(export: Export) -> str:
    """`{"links": [...], "request": {...}}`; a strength is scale · c, which there multiplies the decoder row."""
    pages = [_page(feature, export) for feature in export.steering.features]
    models = sorted({page.partition("/")[0] for page in pages})
    if len(models) > 1:
        raise CorrSteerError(f"features must be of one model to be steered together, got {', '.join(models)}")
    features = [
        {
            "modelId": models[0], "layer": page.partition("/")[2], "index": feature.index,
            "strength": export.scale * feature.coefficient,
        }
        for feature, page in zip(export.steering.features, pages)
    ]  # fmt: skip
    request = {
        "prompt": "PROMPT", "modelId": models[0], "features": features, "temperature": 0, "n_tokens": 32,
        "freq_penalty": 0, "seed": 0, "strength_multiplier": 1, "steer_method": "SIMPLE_ADDITIVE",
    }  # fmt: skip
    links = [f"{HOST}/{page}/{feature.index}" for feature, page in zip(export.steering.features, pages)]
    write_utf8(export.path, to_json({"links": links, "request": request}, indent=1) + "\n")
    return f"jq .request {shlex.quote(str(export.path))} | curl --json @- {STEER}"


def _page(feature: Feature, export: Export) -> str:
    """What Neuronpedia calls the feature's SAE, such as `gemma-2-2b/20-gemmascope-res-16k`."""
    if feature.index is None or feature.layer is None:
        raise CorrSteerError(
            f"{feature.name} is no feature of an SAE, and Neuronpedia has no others; export the steering as json"
        )
    metadata = export.check_row(feature).get("metadata") or {}
    page = metadata.get("neuronpedia_id")
    if not isinstance(page, str) or "/" not in page:
        raise CorrSteerError(
            f"{feature.name}: its SAE names no page on Neuronpedia (neuronpedia_id); export the steering as json"
        )
    trained_at, point = metadata.get("hook_name"), HookPoint.parse(feature.hook_point, export.model)
    if trained_at is not None and HookPoint.parse(trained_at, export.model) != point:
        raise CorrSteerError(
            f"{feature.name} adds at {point}, and Neuronpedia adds where its SAE was trained, {trained_at}; collect "
            f"without a hook_offset"
        )
    return page


FORM = Form(
    "neuronpedia",
    "links to the features' pages, and the JSON of a request to `POST /api/steer`",
    ("all",),
    "not run: it needs the site",
    write,
)
