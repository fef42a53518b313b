"""What EleutherAI's sparsify writes, a directory a hook point: topk or groupmax SAEs and transcoders.

The directory is named after the module whose output was trained on, such as `layers.20` or `layers.20.mlp`; a
transcoder reads that module's input.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from corrsteer.errors import CorrSteerError
from corrsteer.sae.formats.format import Format, Stored, entry, read_json, read_parameters, read_rows
from corrsteer.sae.formats.stores import Safetensors

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
LAYOUT = {
    "W_enc": Stored("encoder.weight", transposed=True),
    "W_dec": Stored("W_dec"),
    "b_enc": Stored("encoder.bias"),
    "b_dec": Stored("b_dec"),
}
ARCHITECTURES = {
    ("topk", False): "topk",
    ("groupmax", False): "groupmax",
    ("topk", True): "topk_transcoder",
    ("groupmax", True): "groupmax_transcoder",
}


def config(path: Path) -> dict[str, Any]:
    origin = path / CONFIG
    found = read_json(origin)
    activation, transcodes = found.get("activation", "topk"), bool(found.get("transcode", False))
    architecture = ARCHITECTURES.get((activation, transcodes))
    if architecture is None:
        raise CorrSteerError(f"activation of {origin} must be topk or groupmax, got {activation!r}")
    if found.get("signed"):
        raise CorrSteerError(f"{origin} is of an SAE with signed activations, which sparsify 1 has no more")
    place = path.absolute().name
    if not re.search(r"(^|\.)\d+(\.|$)", place):
        raise CorrSteerError(
            f"{path} must be named after the module whose output was trained on, such as layers.20, got {place!r}; "
            f"rename the directory"
        )
    metadata = {"hook_name": f"{place}.input", "hook_name_out": place} if transcodes else {"hook_name": place}
    k = entry(found, "k", origin)
    return {"architecture": architecture, "k": k, "apply_b_dec_to_input": not transcodes, "metadata": metadata}


def parameters(path: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    return read_parameters(Safetensors(path / WEIGHTS), LAYOUT, config)


def decoder_rows(path: Path, features: Sequence[int]) -> Tensor:
    return read_rows(Safetensors(path / WEIGHTS), LAYOUT["W_dec"], features)


FORMAT = Format(
    name="sparsify",
    title="sparsify",
    files=f"`{CONFIG}`, `{WEIGHTS}`, in a directory named after the module",
    activations="`topk`, `groupmax`",
    weights=WEIGHTS,
    origin=lambda path: path / CONFIG,
    config=config,
    parameters=parameters,
    decoder_rows=decoder_rows,
)
