"""`corrsteer calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from corrsteer import processes
from corrsteer.cli.app import Force, Json, command, emit
from corrsteer.cli.options import Given
from corrsteer.cli.settings import CalibrateSettings
from corrsteer.cli.task_defaults import defaults


@command
def calibrate(
    steering: Annotated[Path, typer.Option(help="Steering file that `corrsteer select` wrote.")],
    out: Annotated[Path, typer.Option(help="Steering file to write, with the chosen scale in it.")],
    given: Given[CalibrateSettings],
    try_scale: Annotated[
        list[float] | None,
        typer.Option(
            help="A scale to try, and no others; give it again for more. By default 0.25 to 2, and further by factors "
            "of 2 as long as that is better."
        ),
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Choose how strongly to steer, by the score of the validation part of the task that was collected on.

    The same command goes on with a calibration that was not finished.
    """
    from corrsteer.cli import inputs, kept
    from corrsteer.experiments.scaling import calibrate_scale, check_scaling
    from corrsteer.report.tables import table
    from corrsteer.steering.steering import Steering

    inputs.check_file(out)
    loaded = Steering.load(steering)
    check_scaling(loaded, try_scale or [1.0])  # before a model is loaded
    settings = given.read(defaults(given, inputs.recorded(loaded.provenance, "validation")))
    validation = inputs.load_task(settings)
    model, tokenizer = inputs.load_model(settings)
    loaded.check(model)
    decoding = inputs.decoding(settings)
    job = kept.job(
        "calibrate", model, {"validation": validation}, decoding, {"steering": loaded},
        try_scale=try_scale, positions=settings.positions,
    )  # fmt: skip
    scaled = kept.steering(
        out, job, force,
        lambda journal: calibrate_scale(
            model, tokenizer, loaded, validation, scales=try_scale, positions=settings.positions, decoding=decoding,
            journal=journal, progress=processes.rank() == 0,
        ),
    )  # fmt: skip
    found = scaled.provenance["calibration"]
    text = table(
        ("scale", "reward", "± error", "improved", "worsened"),
        [
            (
                f"{p['scale']:g}",
                f"{p['score']:.4f}",
                "-" if p["error"] is None else f"{p['error']:.4f}",
                str(p["improved"]),
                str(p["worsened"]),
            )
            for p in found["curve"]
        ],
        indent="",
    )
    done = f"scale {found['scale']:g}, written to {out}"
    emit({"out": str(out), **found}, json, f"{text}\n{done}", scaled.notes)
