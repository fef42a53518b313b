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
    frequency = "frequency"


@command
def figure(
    kind: Annotated[
        Kind,
        typer.Argument(
            help="progress: the highest correlation over samples. frequency: how often selected features are active."
        ),
    ],
    runs: Annotated[list[Path], typer.Argument(help="Directories that `corrsteer collect` wrote.")],
    out: Annotated[Path, typer.Option(help="File to write: .pdf, .svg or .png.")],
    json: Json = False,
) -> None:
    """Draw one of the paper's figures, for a column of a two-column page.

    The selected features of a run are those of the steerings in its directory, or without any the best of each layer.
    It needs the extra `report`: pip install 'corrsteer[report]'.
    """
    from corrsteer.cli import inputs
    from corrsteer.report import figures
    from corrsteer.report.page.found import find
    from corrsteer.runs.run import Run

    inputs.check_file(out)
    if kind is Kind.progress:
        figures.progress(figures.by_task({str(path): Run.load(path) for path in runs}), out)
    else:
        found = {str(path): find([path]) for path in runs}
        loaded = {path: run for path, material in found.items() for run in material.runs.values()}
        named = figures.by_task(loaded)
        features = [
            list({(f.layer, f.index): f for one in material.steerings.values() for f in one.features}.values())
            for material in found.values()
        ]
        selected = {name: of_run for name, of_run in zip(named, features) if of_run}
        figures.frequency(named, out, selected)
    emit({"out": str(out)}, json, f"written to {out}")
