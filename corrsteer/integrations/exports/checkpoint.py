"""A checkpoint with the steering folded into the model's biases, for whatever loads checkpoints."""

from __future__ import annotations

import copy
import shlex
from typing import Any

from corrsteer.errors import CorrSteerError
from corrsteer.integrations.exports.form import Export, Form


def write(export: Export) -> str:
    """A folder as the model's `save_pretrained` makes it, without a tokenizer; the model is left as it was."""
    model: Any = export.model
    if export.path.exists() and (not export.path.is_dir() or any(export.path.iterdir())):
        raise CorrSteerError(f"path {export.path} must be a folder that is new or empty; give another")
    folded = export.steering.fold_into(copy.deepcopy(model), export.scale)
    folded.save_pretrained(export.path)
    return f"vllm serve {shlex.quote(str(export.path))} --tokenizer {export.model_name}"


FORM = Form(
    "model",
    "a checkpoint with the steering folded into the model's biases",
    ("all",),
    "logits of the checkpoint equal `apply`'s, as far as rounding goes; vLLM goes on with the same tokens, see below",
    write,
    needs="weights",
)
