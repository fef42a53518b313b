"""How a run came about, in anything JSON can hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from corrsteer.lm.decoding import Decoding
from corrsteer.sae.encoder import SparseEncoder
from corrsteer.tasks import Task
from corrsteer.version import __version__


def provenance(
    model: nn.Module,
    task: Task,
    encoders: Mapping[int, SparseEncoder],
    positions: str,
    decoding: Decoding,
    hook_offset: int,
) -> dict[str, Any]:
    """Model, task, SAEs, decoding and versions."""
    import transformers

    config: Any = model.config
    return {
        "model": config._name_or_path,
        "model_dtype": str(model.dtype),
        "task": {
            "name": task.name,
            "part": task.part,
            "grader": task.grader_name,
            "chat": task.chat,
            "system": task.system,
            "examples": len(task),
        },
        "saes": {
            str(layer): {"encoder": encoder.describe(), "source": encoder.decoder.source, "metadata": encoder.metadata}
            for layer, encoder in encoders.items()
        },
        "positions": positions,
        "decoding": asdict(decoding),
        "hook_offset": hook_offset,
        "versions": {
            "corrsteer": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
