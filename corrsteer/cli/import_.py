"""`corrsteer import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from corrsteer.cli.app import Json, command, emit


@command
def import_(
    file: Annotated[
        Path,
        typer.Argument(
            help="A control vector (.gguf), tensors by layer (.pt, .pth, .bin, .safetensors), or what `corrsteer "
            "export --to json` wrote."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Steering file to write.")],
    layer: Annotated[int | None, typer.Option(help="Of a file with one vector.")] = None,
    kind: Annotated[
        str | None,
        typer.Option(help="resid_pre, resid_post, mlp_out or attn_out: where layers' vectors are added; by default "
        "resid_post."),
    ] = None,
    json: Json = False,
) -> None:
    """Make a steering of vectors that another tool made, so that it can be calibrated, evaluated and compared."""
    from corrsteer.cli import inputs
    from corrsteer.integrations.imports import import_steering

    inputs.check_file(out)
    steering = import_steering(file, layer, kind)
    steering.save(out)
    points = [feature.hook_point for feature in steering.features]
    found = {"out": str(out), "hook_points": points, "positions": steering.positions, "scale": steering.scale}
    emit(found, json, f"{len(points)} vectors at {', '.join(points)} written to {out}", steering.notes)
