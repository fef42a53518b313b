"""`corrsteer export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from corrsteer.cli.app import Json, command, emit
from corrsteer.errors import CorrSteerError


@command
def export(
    steering: Annotated[Path, typer.Argument(help="Steering file that `corrsteer select` wrote.")],
    to: Annotated[
        str, typer.Option(help="lm-eval, gguf, vllm-lens, easysteer, hotwire, neuronpedia, json, paper or model.")
    ],
    out: Annotated[Path, typer.Option(help="File to write; a folder for easysteer, hotwire and model.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Hugging Face model, which lm-eval and model need; by default the one that it was selected on. Others "
            "check against one that is given."
        ),
    ] = None,
    positions: Annotated[
        str | None, typer.Option(help="generated, all or prompt; by default as the steering file says.")
    ] = None,
    scale: Annotated[
        float | None, typer.Option(help="Multiplies the coefficients; by default as the steering file says.")
    ] = None,
    json: Json = False,
) -> None:
    """Write a steering in a form that another tool takes, and say how to use it.

    What the form cannot say is refused.
    """
    from corrsteer.cli import inputs
    from corrsteer.cli.settings import ModelSettings
    from corrsteer.integrations.exports import checked, export_steering
    from corrsteer.lm.meta_model import model_without_weights
    from corrsteer.steering.steering import Steering

    loaded = Steering.load(steering)
    needs = checked(loaded, to, positions, scale).needs or ("structure" if model else "")  # before a model is loaded
    found = None
    if needs and model is None and not loaded.provenance.get("settings", {}).get("model"):
        raise CorrSteerError(f"model must be given for the format {to}, as {steering} names none; give --model")
    if needs:
        settings = inputs.recorded_model(loaded.provenance) if model is None else ModelSettings(model=model)
        inputs.check_model(settings)
        structure = needs == "structure"
        found = model_without_weights(settings.model, "float32") if structure else inputs.load_model(settings)[0]
    usage = export_steering(loaded, to, out, found, positions, scale)
    emit({"out": str(out), "format": to, "usage": usage}, json, usage)
