"""hotwire-vllm: a folder of vectors for the server, and what a request says."""

from __future__ import annotations

import torch

from corrsteer.files import to_json, write_utf8, write_whole
from corrsteer.integrations.exports.form import Export, Form

DEFAULT_SLOTS = 16  # that hotwire has where HOTWIRE_SLOTS is not set

USAGE = """\
import os
from vllm import LLM, SamplingParams

os.environ["HOTWIRE_VECTORS"] = {folder!r}
os.environ["HOTWIRE_SLOTS"] = "{slots}"  # one a layer that is steered; what finds none is not added
request = open({request!r}).read()
LLM({model!r}).generate(prompts, SamplingParams(temperature=0, extra_args={{"hotwire": request}}))"""


def write(export: Export) -> str:
    """`corrsteer.pt`, `[layers, d]` float32 with a row for each layer up to the last that is steered, and
    `request.json`."""
    vectors = export.outputs(FORM.name)
    rows = torch.zeros(max(vectors) + 1, export.steering.directions.shape[1], dtype=torch.float32, device="cpu")
    for layer, vector in vectors.items():
        rows[layer] = vector
    file, request = export.path / "corrsteer.pt", export.path / "request.json"
    entries = [{"id": file.stem, "layer": layer, "scale": 1.0} for layer in vectors]
    export.make_folder()
    write_whole(file, lambda part: torch.save(rows, part))
    write_utf8(request, to_json(entries) + "\n")
    slots = max(DEFAULT_SLOTS, len(vectors))
    return USAGE.format(slots=slots, folder=str(export.path), request=str(request), model=export.model_name)


FORM = Form(
    "hotwire",
    "a folder of vectors and the JSON of a request to vLLM with the plugin hotwire-vllm",
    ("all",),  # its decode_only leaves out the last prompt token, so "generated" cannot be said
    "not run: it needs a GPU",
    write,
)
