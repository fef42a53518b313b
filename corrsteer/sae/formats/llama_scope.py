"""Llama Scope: jumprelu SAEs with one threshold (He et al. 2024).

They were trained on tokens scaled to a norm of √d_in on average. That scale is folded in, as by SAELens: weights times
it, decoder rows divided by it, and the threshold times it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corrsteer.arguments import number
from corrsteer.sae.formats.format import Format, Stored, entry, read_json, read_parameters, read_rows
from corrsteer.sae.formats.stores import Safetensors

CONFIG, WEIGHTS = "hyperparams.json", "final.safetensors"
LAYOUT = {
    "W_enc": Stored("encoder.weight", transposed=True),
    "W_dec": Stored("decoder.weight", transposed=True),
    "b_enc": Stored("encoder.bias"),
    "b_dec": Stored("decoder.bias"),
    "threshold": Stored("encoder.bias"),  # whose place the one threshold takes
}


def _weights(path: Path) -> Path:
    return path / "checkpoints" / WEIGHTS



def config(path: Path) -> dict[str, Any]:
    hook_name = entry(read_json(path / CONFIG), "hook_point_in", path / CONFIG)
    return {
        "architecture": "jumprelu",
        "dtype": "float32",  # what is scaled is no bfloat16 any more
        "metadata": {"hook_name": hook_name, "model_name": "meta-llama/Llama-3.1-8B"},
    }


def _scale(path: Path) -> float:
    origin = path / CONFIG
    found = read_json(origin)
    norms = entry(found, "dataset_average_activation_norm", origin)
    norm = number(f"dataset_average_activation_norm of {origin}", norms.get("in") if isinstance(norms, dict) else norms)
    return number(f"d_model of {origin}", entry(found, "d_model", origin), 1) ** 0.5 / norm


def parameters(path: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    origin, scale = path / CONFIG, _scale(path)
    threshold = number(f"jump_relu_threshold of {origin}", entry(read_json(origin), "jump_relu_threshold", origin))
    found = read_parameters(Safetensors(_weights(path)), LAYOUT, config)
    found["W_enc"] = found["W_enc"].float() * scale
    found["threshold"] = torch.tensor(threshold * scale, dtype=torch.float32, device="cpu")
    return found


def decoder_rows(path: Path, features: Sequence[int]) -> Tensor:
    return read_rows(Safetensors(_weights(path)), LAYOUT["W_dec"], features).float() / _scale(path)


FORMAT = Format(
    name="llama_scope",
    title="Llama Scope",
    files=f"`{CONFIG}`, `checkpoints/{WEIGHTS}`",
    activations="`jumprelu`",
    weights=f"checkpoints/{WEIGHTS}",
    origin=lambda path: path / CONFIG,
    config=config,
    parameters=parameters,
    decoder_rows=decoder_rows,
)
