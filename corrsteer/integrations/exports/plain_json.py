"""JSON with everything that a steering holds, for programs that read nothing else."""

from __future__ import annotations

import shlex
from typing import Any

import torch
from torch import Tensor

from corrsteer.errors import CorrSteerError
from corrsteer.files import to_json, write_utf8
from corrsteer.integrations.exports.form import Export, Form
from corrsteer.lm.token_positions import POSITIONS
from corrsteer.steering.steering import FORMAT, Steering


def write(export: Export) -> str:
    """The steering as `Steering.described` has it, and its directions as lists of numbers."""
    described = export.steering.described() | {"positions": export.positions, "scale": export.scale}
    directions = export.steering.directions.float().cpu().tolist()  # a float32 survives JSON's float64
    write_utf8(export.path, to_json({"format": FORMAT, **described, "directions": directions}) + "\n")
    return f"corrsteer import {shlex.quote(str(export.path))} --out steering.safetensors"


def read(described: dict[str, Any]) -> Steering:
    """What `write` wrote.

    Raises
    ------
    CorrSteerError, KeyError, TypeError, ValueError : for something else.
    """
    if described.get("format") != FORMAT:
        raise CorrSteerError(f"format must be {FORMAT!r}, got {described.get('format')!r}; export it again")
    rows: list[Tensor] = [torch.tensor(row, dtype=torch.float32, device="cpu") for row in described["directions"]]
    return Steering.from_described(described, torch.stack(rows))


FORM = Form(
    "json",
    "everything that a steering holds, as JSON",
    POSITIONS,
    "`corrsteer import` reads it back, the same to the bit",
    write,
)
