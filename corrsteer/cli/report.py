"""`corrsteer report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from corrsteer.cli.app import Json, command, emit


@command
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Directories that `corrsteer collect` wrote; several side by side.")
    ],
    out: Annotated[Path, typer.Option(help="HTML file to write.")],
    steering: Annotated[
        list[Path] | None, typer.Option(help="Steering file; give it again for more. Those in the runs are found.")
    ] = None,
    evaluation: Annotated[
        list[Path] | None,
        typer.Option(help="File of `corrsteer evaluate --out`; give it again for more. Those in the runs are found."),
    ] = None,
    title: Annotated[str, typer.Option(help="Of the page.")] = "corrsteer report",
    json: Json = False,
) -> None:
    """Make one self-contained HTML page of runs, steerings and evaluations: which features, how sure, what changed.

    It needs the extra `report`: pip install 'corrsteer[report]'. The page opens without a network.
    """
    from corrsteer.cli import inputs
    from corrsteer.report.page.document import write
    from corrsteer.report.page.found import find

    inputs.check_file(out)
    material = find(runs, steering or (), evaluation or ())
    write(out, material, title)
    found = {"runs": list(material.runs), "steerings": list(material.steerings), "evaluations": list(material.compared)}
    told = ", ".join(f"{len(names)} {kind if len(names) != 1 else kind[:-1]}" for kind, names in found.items())
    emit({"out": str(out), "bytes": out.stat().st_size, **found}, json, f"{out}: {told}")
