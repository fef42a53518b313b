"""`corrsteer figure`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from corrsteer.cli.app import Json, command, emit


class Kind(str, Enum):
    """What a figure shows."""

    progress = "progress"
    correlation = "correlation"
    frequency = "frequency"


@command
def figure(
    kind: Annotated[
        Kind,
        typer.Argument(
            help="progress: the score over the samples that steerings were selected on. correlation: the highest r "
            "over the samples collected. frequency: how often selected features are active."
        ),
    ],
    runs: Annotated[list[Path], typer.Argument(help="Directories that `corrsteer collect` wrote.")],
    out: Annotated[Path, typer.Option(help="File to write: .pdf, .svg or .png.")],
    json: Json = False,
) -> None:
    """Draw a figure for a column of a two-column page.

    Progress is of the steerings and evaluations in the run's directory, see `corrsteer select --samples`. The selected
    features of a run are those of the steerings in its directory, or without any the best of each layer.
    It needs the extra `report`: pip install 'corrsteer[report]'.
    """
    from corrsteer.cli import inputs
    from corrsteer.report import figures
    from corrsteer.report.page.found import find
    from corrsteer.runs.run import Run

    inputs.check_file(out)
    if kind is Kind.correlation:
        figures.correlation(figures.by_task({str(path): Run.load(path) for path in runs}), out)
        emit({"out": str(out)}, json, f"written to {out}")
        return
    found = {str(path): find([path]) for path in runs}
    loaded = {path: run for path, material in found.items() for run in material.runs.values()}
    named = figures.by_task(loaded)
    if kind is Kind.progress:
        figures.progress(dict(zip(named, found.values())), out)
    else:
        features = [
            list({(f.layer, f.index): f for one in material.steerings.values() for f in one.features}.values())
            for material in found.values()
        ]
        selected = {name: of_run for name, of_run in zip(named, features) if of_run}
        figures.frequency(named, out, selected)
    emit({"out": str(out)}, json, f"written to {out}")
