"""Gemma Scope, of Gemma 2: jumprelu SAEs and transcoders (Lieberum et al. 2024).

A file holds tensors alone. What it was trained on is in its published path, such as
`gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71`, which a download keeps.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from corrsteer.errors import CorrSteerError
from corrsteer.sae.formats.format import Format, Stored, read_parameters, read_rows
from corrsteer.sae.formats.stores import Npz

WEIGHTS = "params.npz"
LAYOUT = {name: Stored(name) for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
LOWER = {"W_enc": Stored("w_enc"), "W_dec": Stored("w_dec")}  # as some of the files have it
HOOKS = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z", "transcoders": "ln2.hook_normalized"}


def config(path: Path) -> dict[str, Any]:
    model, site = _last(r"gemma-scope-((?:\d+\w+)-(?:pt|it))-(res|mlp|att|transcoders)(?![a-z])", path) or ("", "")
    (layer,) = _last(r"layer_(\d+)", path) or ("",)
    if not model or not layer:
        raise CorrSteerError(
            f"{path / WEIGHTS} does not say where it was trained, and nor does its path; keep it in folders that are "
            f"named as published, such as gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"
        )
    store = Npz(path / WEIGHTS)
    if "scaling_factor" in store.names() and not bool((store.read("scaling_factor") == 1).all()):
        raise CorrSteerError(f"{path / WEIGHTS} holds a scaling_factor other than 1, which is not known how to apply")
    metadata = {"hook_name": f"blocks.{layer}.{HOOKS[site]}", "model_name": f"gemma-2-{model.removesuffix('-pt')}"}
    if site == "transcoders":
        metadata["hook_name_out"] = f"blocks.{layer}.hook_mlp_out"
    return {
        "architecture": "jumprelu_transcoder" if site == "transcoders" else "jumprelu",
        "reshape_activations": "hook_z" if site == "att" else "none",
        "metadata": metadata,
    }


def _last(pattern: str, path: Path) -> tuple[str, ...] | None:
    """The groups of a pattern where a path matches it last."""
    found = list(re.finditer(pattern, path.absolute().as_posix()))
    return found[-1].groups() if found else None


def _layout(store: Npz) -> dict[str, Stored]:
    return LAYOUT | {name: lower for name, lower in LOWER.items() if lower.name in store.names()}


def parameters(path: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    store = Npz(path / WEIGHTS)
    return read_parameters(store, _layout(store), config)


def decoder_rows(path: Path, features: Sequence[int]) -> Tensor:
    store = Npz(path / WEIGHTS)
    return read_rows(store, _layout(store)["W_dec"], features)


FORMAT = Format(
    name="gemma_scope",
    title="Gemma Scope",
    files=f"`{WEIGHTS}`, in folders named as published",
    activations="`jumprelu`",
    weights=WEIGHTS,
    origin=lambda path: path / WEIGHTS,
    config=config,
    parameters=parameters,
    decoder_rows=decoder_rows,
)
