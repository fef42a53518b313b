"""What SAELens' `save_model` writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from corrsteer.errors import CorrSteerError
from corrsteer.sae.formats.format import Format, Stored, read_json, read_parameters, read_rows
from corrsteer.sae.formats.stores import Safetensors

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
NAMES = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold", "b_gate", "b_mag", "r_mag")
LAYOUT = {name: Stored(name) for name in NAMES}


def config(path: Path) -> dict[str, Any]:
    found = read_json(path / CONFIG)
    if "sae_lens_version" not in (found.get("metadata") or {}):
        # Written before SAELens 6: its own conversion knows every older layout.
        from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting

        try:
            found = handle_config_defaulting(found)
        except KeyError as error:
            raise CorrSteerError(f"architecture {error} in {path / CONFIG} is not one that SAELens knows") from None
    if not isinstance(found.get("architecture"), str):
        raise CorrSteerError(f"{path / CONFIG} names no architecture; save the SAE again with SAELens 6 or later")
    return {"dtype": "float32"} | found


def parameters(path: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    return read_parameters(Safetensors(path / WEIGHTS), LAYOUT, config)


def decoder_rows(path: Path, features: Sequence[int]) -> Tensor:
    return read_rows(Safetensors(path / WEIGHTS), LAYOUT["W_dec"], features)


FORMAT = Format(
    name="sae_lens",
    title="SAELens",
    files=f"`{CONFIG}`, `{WEIGHTS}`",
    activations="every one of the table above",
    weights=WEIGHTS,
    origin=lambda path: path / CONFIG,
    config=config,
    parameters=parameters,
    decoder_rows=decoder_rows,
)
