"""Qwen Scope: topk SAEs, a file a layer.

A file holds tensors alone. How many features a token has is in the name of its repository, such as
`SAE-Res-Qwen3-1.7B-Base-W32K-L0_50`, which a download keeps.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from corrsteer.errors import CorrSteerError
from corrsteer.sae.formats.format import Format, Stored, read_parameters, read_rows
from corrsteer.sae.formats.stores import TorchFile

PATTERN = "layer*.sae.pt"
LAYOUT = {
    "W_enc": Stored("W_enc", transposed=True),
    "W_dec": Stored("W_dec", transposed=True),
    "b_enc": Stored("b_enc"),
    "b_dec": Stored("b_dec"),
}


def _file(path: Path) -> Path:
    files = sorted(path.glob(PATTERN)) if path.is_dir() else [path]
    if len(files) != 1:
        raise CorrSteerError(f"{path} holds SAEs of {len(files)} layers; give the file of one, such as {files[0]}")
    return files[0]


def config(path: Path) -> dict[str, Any]:
    file = _file(path).absolute()
    layer = re.fullmatch(r"layer(\d+)\.sae\.pt", file.name)
    named = list(re.finditer(r"SAE-Res-([\w.-]+)-W\d+K-L0_(\d+)", file.as_posix()))
    if layer is None or not named:
        raise CorrSteerError(
            f"{file} does not say how many features a token has, and nor does its path; keep it in a folder that is "
            f"named as published, such as SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"
        )
    hook_name = f"blocks.{layer[1]}.hook_resid_post"
    metadata = {"hook_name": hook_name, "model_name": f"Qwen/{named[-1][1]}"}
    return {"architecture": "topk", "k": int(named[-1][2]), "metadata": metadata}


def parameters(path: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    return read_parameters(TorchFile(_file(path)), LAYOUT, config)


def decoder_rows(path: Path, features: Sequence[int]) -> Tensor:
    return read_rows(TorchFile(_file(path)), LAYOUT["W_dec"], features)


FORMAT = Format(
    name="qwen_scope",
    title="Qwen Scope",
    files="the file `layerN.sae.pt`, in a folder named as published",
    activations="`topk`",
    weights=PATTERN,
    origin=_file,
    config=config,
    parameters=parameters,
    decoder_rows=decoder_rows,
    is_file=True,
)
