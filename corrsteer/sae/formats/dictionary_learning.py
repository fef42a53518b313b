"""What dictionary_learning writes: a trainer's configuration and a state dict."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from corrsteer.errors import CorrSteerError
from corrsteer.sae.formats.format import Format, Stored, entry, read_json, read_parameters, read_rows
from corrsteer.sae.formats.stores import TorchFile

CONFIG, WEIGHTS = "config.json", "ae.pt"

_LINEAR = {
    "W_enc": Stored("encoder.weight", transposed=True),
    "W_dec": Stored("decoder.weight", transposed=True),
    "b_enc": Stored("encoder.bias"),
    "b_dec": Stored("b_dec"),
    "threshold": Stored("threshold"),
}
_GATED = {name: Stored(stored) for name, stored in (("b_gate", "gate_bias"), ("b_mag", "mag_bias"), ("r_mag", "r_mag"))}
_PLAIN = {name: Stored(name) for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
LAYOUTS = {
    "AutoEncoder": _LINEAR | {"b_dec": Stored("bias")},
    "AutoEncoderNew": _LINEAR | {"b_dec": Stored("decoder.bias")},
    "GatedAutoEncoder": _LINEAR | _GATED | {"b_dec": Stored("decoder_bias")},
    "AutoEncoderTopK": _LINEAR,
    "BatchTopKSAE": _LINEAR,
    "MatryoshkaBatchTopKSAE": _PLAIN,
    "JumpReluAutoEncoder": _PLAIN,
}
SETTINGS: dict[str, dict[str, Any]] = {
    # whose decoder its own loader normalises, and its encoder with it
    "AutoEncoder": {"architecture": "standard", "apply_b_dec_to_input": True, "rescale_acts_by_decoder_norm": True},
    "AutoEncoderNew": {"architecture": "standard"},
    "GatedAutoEncoder": {"architecture": "gated", "apply_b_dec_to_input": True},
    "AutoEncoderTopK": {"architecture": "topk", "apply_b_dec_to_input": True},
    # whose encode compares with a threshold that training kept
    "BatchTopKSAE": {"architecture": "jumprelu", "apply_b_dec_to_input": True},
    "MatryoshkaBatchTopKSAE": {"architecture": "jumprelu", "apply_b_dec_to_input": True},
    "JumpReluAutoEncoder": {"architecture": "jumprelu"},
}
PLACES = {
    "resid_post": "resid_post", "resid_pre": "resid_pre", "attention_out": "attn_out", "attn_out": "attn_out",
    "mlp_out": "mlp_out",
}  # fmt: skip


def _trainer(path: Path) -> dict[str, Any]:
    origin = path / CONFIG
    found = entry(read_json(origin), "trainer", origin)
    if not isinstance(found, dict) or found.get("dict_class") not in LAYOUTS:
        name = found.get("dict_class") if isinstance(found, dict) else found
        raise CorrSteerError(f"dict_class of {origin} must be one of {', '.join(LAYOUTS)}, got {name!r}")
    return found


def config(path: Path) -> dict[str, Any]:
    origin, trainer = path / CONFIG, _trainer(path)
    buffer = read_json(origin).get("buffer") or {}
    if buffer.get("io", "out") != "out":
        raise CorrSteerError(f"io in {origin} must be 'out', an SAE of what a module puts out, got {buffer['io']!r}")
    metadata = {"hook_name": _place(trainer, origin), "model_name": trainer.get("lm_name")}
    settings = SETTINGS[trainer["dict_class"]] | {"metadata": metadata}
    if settings["architecture"] == "topk":
        settings["k"] = entry(trainer, "k", origin)
    return settings


def _place(trainer: dict[str, Any], origin: Path) -> str:
    """Where it was trained: at what a layer puts out, unless its submodule has another name."""
    submodule = trainer.get("submodule_name")
    if submodule is None:
        return f"blocks.{entry(trainer, 'layer', origin)}.hook_resid_post"
    known = re.match("|".join(PLACES), submodule)
    return f"blocks.{entry(trainer, 'layer', origin)}.hook_{PLACES[known[0]]}" if known else submodule


def parameters(path: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    return read_parameters(TorchFile(path / WEIGHTS), LAYOUTS[_trainer(path)["dict_class"]], config)


def decoder_rows(path: Path, features: Sequence[int]) -> Tensor:
    return read_rows(TorchFile(path / WEIGHTS), LAYOUTS[_trainer(path)["dict_class"]]["W_dec"], features)


FORMAT = Format(
    name="dictionary_learning",
    title="dictionary_learning",
    files=f"`{CONFIG}`, `{WEIGHTS}`",
    activations="`relu`, `jumprelu`, `gated`, `topk`",
    weights=WEIGHTS,
    origin=lambda path: path / CONFIG,
    config=config,
    parameters=parameters,
    decoder_rows=decoder_rows,
)
