"""Gemma Scope 2, of Gemma 3: jumprelu SAEs and transcoders, these with or without an affine skip connection."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from corrsteer.errors import CorrSteerError
from corrsteer.sae.formats.format import Format, Stored, entry, read_json, read_parameters, read_rows
from corrsteer.sae.formats.stores import Safetensors

CONFIG, WEIGHTS = "config.json", "params.safetensors"
LAYOUT = {name: Stored(name.lower()) for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
# The places of a Gemma 3 layer that SAEs read and write, and what TransformerLens calls them.
PLACES = {
    "output": "hook_resid_post",
    "self_attn.o_proj.input": "attn.hook_z",
    "post_feedforward_layernorm.output": "hook_mlp_out",
    "pre_feedforward_layernorm.output": "mlp.hook_in",
}


def config(path: Path) -> dict[str, Any]:
    origin = path / CONFIG
    found = read_json(origin)
    if found.get("architecture") != "jump_relu":
        raise CorrSteerError(f"architecture of {origin} must be 'jump_relu', got {found.get('architecture')!r}")
    reads = _place(entry(found, "hf_hook_point_in", origin))
    writes = _place(found.get("hf_hook_point_out") or reads)
    metadata = {"hook_name": reads, "model_name": found.get("model_name")}
    transcodes = writes != reads
    if transcodes:
        metadata["hook_name_out"] = writes
    skips = "skip_" if found.get("affine_connection") else ""
    return {
        "architecture": f"jumprelu_{skips}transcoder" if transcodes else "jumprelu",
        "reshape_activations": "hook_z" if reads.endswith("hook_z") else "none",
        "metadata": metadata,
    }


def _place(name: str) -> str:
    """A module's input or output by TransformerLens' name, where it has one."""
    found = re.fullmatch(r"(?:\w+\.)*layers\.(\d+)\.(.+)", name)
    return f"blocks.{found[1]}.{PLACES[found[2]]}" if found and found[2] in PLACES else name


def parameters(path: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    return read_parameters(Safetensors(path / WEIGHTS), LAYOUT, config)


def decoder_rows(path: Path, features: Sequence[int]) -> Tensor:
    return read_rows(Safetensors(path / WEIGHTS), LAYOUT["W_dec"], features)


FORMAT = Format(
    name="gemma_scope_2",
    title="Gemma Scope 2",
    files=f"`{CONFIG}`, `{WEIGHTS}`",
    activations="`jumprelu`",
    weights=WEIGHTS,
    origin=lambda path: path / CONFIG,
    config=config,
    parameters=parameters,
    decoder_rows=decoder_rows,
)
