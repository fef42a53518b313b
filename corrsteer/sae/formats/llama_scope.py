"""Llama Scope: jumprelu SAEs and transcoders with one threshold (He et al. 2024).

They were trained on tokens scaled to a norm of √d_in on average, and to write tokens that are scaled so. Both scales
are folded in: weights and threshold are multiplied by that of what is read, as by SAELens, and decoder rows are divided
by that of what is written. Of SAEs the two are one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corrsteer.arguments import number
from corrsteer.errors import CorrSteerError
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
MEANT = {"act_fn": "jumprelu", "apply_decoder_bias_to_pre_encoder": False}  # settings that say how to encode


def _weights(path: Path) -> Path:
    return path / "checkpoints" / WEIGHTS


def config(path: Path) -> dict[str, Any]:
    origin = path / CONFIG
    found = read_json(origin)
    for name, value in MEANT.items():
        if found.get(name, value) != value:
            raise CorrSteerError(f"{name} of {origin} must be {value!r}, got {found[name]!r}")
    reads = entry(found, "hook_point_in", origin)
    writes = found.get("hook_point_out") or reads
    metadata = {"hook_name": reads, "model_name": "meta-llama/Llama-3.1-8B"}
    return {
        "architecture": "jumprelu" if writes == reads else "jumprelu_transcoder",
        "dtype": "float32",  # what is scaled is no bfloat16 any more
        "metadata": metadata | ({} if writes == reads else {"hook_name_out": writes}),
    }


def _scale(path: Path, of: str) -> float:
    """What tokens are multiplied by where they are read (`in`) or written (`out`)."""
    origin = path / CONFIG
    found = read_json(origin)
    norms = entry(found, "dataset_average_activation_norm", origin)
    norm = norms.get(of, norms.get("in")) if isinstance(norms, dict) else norms
    norm = number(f"dataset_average_activation_norm of {origin}", norm)
    d_model = number(f"d_model of {origin}", entry(found, "d_model", origin), 1)
    if norm <= 0:
        raise CorrSteerError(f"dataset_average_activation_norm of {origin} must be above 0, got {norm:g}")
    return d_model**0.5 / norm


def parameters(path: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    origin, scale = path / CONFIG, _scale(path, "in")
    threshold = number(f"jump_relu_threshold of {origin}", entry(read_json(origin), "jump_relu_threshold", origin))
    found = read_parameters(Safetensors(_weights(path)), LAYOUT, config)
    found["W_enc"] = found["W_enc"].float() * scale
    found["threshold"] = torch.tensor(threshold * scale, dtype=torch.float32, device="cpu")
    return found


def decoder_rows(path: Path, features: Sequence[int]) -> Tensor:
    return read_rows(Safetensors(_weights(path)), LAYOUT["W_dec"], features).float() / _scale(path, "out")


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
