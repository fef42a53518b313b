"""`corrsteer select`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from corrsteer.cli.app import Json, command, emit
from corrsteer.cli.options import Given
from corrsteer.cli.settings import EvaluateSettings
from corrsteer.errors import CorrSteerError


@command
def select(
    run: Annotated[Path, typer.Argument(help="Directory that `corrsteer collect` wrote.")],
    given: Given[EvaluateSettings],
    out: Annotated[Path, typer.Option(help="Steering file to write.")] = Path("steering.safetensors"),
    strategy: Annotated[
        str,
        typer.Option(
            help="single (the best feature of all layers), all (the best of each layer), or pruned (those that alone "
            "beat the unsteered score on the validation part of the run's task)."
        ),
    ] = "all",
    score: Annotated[
        str,
        typer.Option(
            help="What to rank by: pearson, point_biserial, contrastive or squared_ratio, or, if collected with it, "
            "mutual_information, auroc or spearman."
        ),
    ] = "pearson",
    alpha: Annotated[
        float | None, typer.Option(help="Keep only features whose corrected p-value is at most this.")
    ] = None,
    correction: Annotated[
        str,
        typer.Option(
            help="maxT (any feature of all layers does as well by chance), layer (of its layer) or bh (share of false "
            "discoveries)."
        ),
    ] = "maxT",
    interval: Annotated[str, typer.Option(help="delta, bootstrap or fisher.")] = "delta",
    coefficient: Annotated[
        str, typer.Option(help="mean_positive, mean_positive_active or contrastive.")
    ] = "mean_positive",
    direction: Annotated[str, typer.Option(help="positive, negative or both: correlations to select.")] = "positive",
    layer: Annotated[list[int] | None, typer.Option(help="Only these layers; by default all but layer 0.")] = None,
    top_k: Annotated[int, typer.Option(help="Rows of each layer's table.")] = 5,
    json: Json = False,
) -> None:
    """Choose features and coefficients from a collected run, and write a steering file.

    The model, its task and how it is steered are options of `--strategy pruned`; by default they are as collected.
    """
    from corrsteer.cli import inputs
    from corrsteer.experiments.selection import Choices
    from corrsteer.experiments.selection import select as select_
    from corrsteer.report.tables import feature_table
    from corrsteer.runs.run import Run

    inputs.check_file(out)
    loaded = Run.load(run)
    choices = Choices(strategy, score, alpha, correction, interval, coefficient, direction, layer, top_k)
    choices = choices.checked(loaded)  # before a model is loaded
    pruning: dict[str, Any] = {}
    if strategy == "pruned":
        settings = given.read(inputs.recorded(loaded.provenance, "validation"))
        validation = inputs.load_task(settings)
        model, tokenizer = inputs.load_model(settings)
        pruning = {
            "model": model, "tokenizer": tokenizer, "validation": validation, "decoding": inputs.decoding(settings),
            "positions": settings.positions, "scale": settings.scale,
        }  # fmt: skip
    elif given.names:
        raise CorrSteerError(f"{', '.join(given.names)} can only be used with --strategy pruned, which runs the model")
    steering = select_(loaded, **vars(choices), **pruning)
    if not steering.features:
        raise CorrSteerError("; ".join(steering.notes))
    steering.save(out)
    result = {
        "out": str(out),
        "features": [asdict(f) for f in steering.features],
        "table": {str(at): [asdict(f) for f in rows] for at, rows in steering.table.items()},
        "notes": steering.notes,
    }
    rows = [f for layer_rows in steering.table.values() for f in layer_rows]
    text = feature_table(rows, {"selected": steering.features}, every_coefficient=True)
    emit(result, json, f"{text}\n{len(steering.features)} features written to {out}", steering.notes)
