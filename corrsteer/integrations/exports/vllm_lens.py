"""vllm-lens: the JSON of `apply_steering_vectors`, for a request to vLLM."""

from __future__ import annotations

import base64

import torch

from corrsteer.files import to_json, write_utf8
from corrsteer.integrations.exports.form import Export, Form

USAGE = """\
from vllm import LLM, SamplingParams

steering = open({path!r}).read()
parameters = SamplingParams(temperature=0, extra_args={{"apply_steering_vectors": steering}})
LLM({model!r}).generate(prompts, parameters)"""


def write(export: Export) -> str:
    """One steering vector over all layers, uncompressed, as its norm is and not matched to the residual stream's."""
    vectors = export.outputs(FORM.name)
    values = torch.stack(list(vectors.values())).numpy()
    described = {
        "activations": {
            "data": base64.b64encode(values.astype("<f4").tobytes()).decode(), "dtype": "float32",
            "shape": list(values.shape),
        },
        "layer_indices": list(vectors), "scale": 1.0, "norm_match": False, "position_indices": None,
    }  # fmt: skip
    write_utf8(export.path, to_json([described]) + "\n")
    return USAGE.format(path=str(export.path), model=export.model_name)


FORM = Form(
    "vllm-lens",
    "the JSON of a request to vLLM with the plugin vllm-lens",
    ("all",),
    "not run: it needs another release of vLLM than the one tested",
    write,
)
