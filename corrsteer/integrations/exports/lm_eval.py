"""lm-evaluation-harness: the file that `--model steered` takes as `steer_path`."""

from __future__ import annotations

import shlex

import torch

from corrsteer.errors import CorrSteerError
from corrsteer.files import write_whole
from corrsteer.integrations.exports.form import Export, Form
from corrsteer.lm import hook_points


def write(export: Export) -> str:
    """Module of the base model -> the vector that is added to its output at every token."""
    if export.path.suffix != ".pt" or "," in str(export.path):
        raise CorrSteerError(
            f"path must end with .pt, by which lm-eval tells the file, and have no comma, where it cuts its arguments, "
            f"got {export.path}"
        )
    model = export.model
    assert model is not None
    base = model.base_model
    names = {module: name for name, module in (base if isinstance(base, torch.nn.Module) else model).named_modules()}
    layers = hook_points.decoder_layers(model)[1]
    # The harness rounds the vector to the model's dtype and then multiplies by the coefficient: in this order the
    # product is rounded once.
    entries = {
        names[layers[layer]]: {
            "steering_vector": vector, "steering_coefficient": 1.0, "action": "add", "bias": None, "head_index": None,
        }
        for layer, vector in export.outputs(FORM.name).items()
    }  # fmt: skip
    write_whole(export.path, lambda part: torch.save(entries, part))
    arguments = shlex.quote(f"pretrained={export.model_name},steer_path={export.path}")
    return f"lm_eval --model steered --model_args {arguments} --tasks TASK"


FORM = Form(
    "lm-eval",
    "a `.pt` for `lm_eval --model steered` of lm-evaluation-harness",
    ("all",),
    "logits of lm-eval 0.4.13 equal `apply`'s, and a task of it runs",
    write,
    needs="structure",
)
