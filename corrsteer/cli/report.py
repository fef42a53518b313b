"""`corrsteer report`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from corrsteer.cli.app import Json, command, emit

if TYPE_CHECKING:
    from corrsteer.runs.peaks import Extreme
    from corrsteer.runs.run import Run


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
    tokens: Annotated[
        bool,
        typer.Option(
            "--tokens", help="Colour the tokens of completions by a feature's activation; this loads each run's model."
        ),
    ] = False,
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
    write(out, replace(material, read_again=_reader() if tokens else None), title)
    found = {"runs": list(material.runs), "steerings": list(material.steerings), "evaluations": list(material.compared)}
    told = ", ".join(f"{len(names)} {kind if len(names) != 1 else kind[:-1]}" for kind, names in found.items())
    emit({"out": str(out), "bytes": out.stat().st_size, **found}, json, f"{out}: {told}")


def check() -> None:
    """Raise where a report cannot be drawn."""
    from corrsteer.report.page.document import check_plotly

    check_plotly()


def _reader() -> Callable[[Run, int, int, list[Extreme]], list[Extreme]]:
    """Reads completions again by the model and the SAEs that a run records; the last ones are kept."""
    from corrsteer.cli import inputs
    from corrsteer.runs.peaks import with_peaks

    models: dict[Any, Any] = {}
    encoders: dict[Any, Any] = {}

    def read(run: Run, layer: int, feature: int, found: list[Extreme]) -> list[Extreme]:
        settings = inputs.recorded_model(run.provenance)
        if settings.model_dump_json() not in models:
            models.clear()
            models[settings.model_dump_json()] = inputs.load_model(settings)
        model, tokenizer = models[settings.model_dump_json()]
        if (id(run), layer) not in encoders:
            encoders.clear()
            encoders[id(run), layer] = inputs.recorded_encoders(run.provenance, model, [layer])[layer]
        return with_peaks(run, model, tokenizer, encoders[id(run), layer], layer, feature, found)

    return read
