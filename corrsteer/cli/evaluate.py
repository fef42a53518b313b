"""`corrsteer evaluate`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from corrsteer.cli.app import Json, command, emit
from corrsteer.cli.options import Given
from corrsteer.cli.settings import EvaluateSettings

VALIDATION = {"part": "validation", "limit": None}  # of the task, whatever part is evaluated on


@command
def evaluate(
    steering: Annotated[
        list[Path], typer.Option(help="Steering file that `corrsteer select` wrote; give it again for more of them.")
    ],
    given: Given[EvaluateSettings],
    baselines: Annotated[
        Path | None,
        typer.Option(
            help="Directory of the run that the (first) steering was selected from: compare with a difference of "
            "means, random features and others, each the best of its candidates and scales on the validation part."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Score a task unsteered and steered. What is not given is as it was when the run was collected.

    By default that is the test part of the task that the (first) steering was collected on. Several steerings are
    compared with the same unsteered completions, and take little longer than one; Holm's p is of all of them together.
    With --category-field there are results of each category too.
    """
    from corrsteer.cli import inputs
    from corrsteer.experiments.baselines import baselines as baselines_
    from corrsteer.experiments.evaluation import evaluate as evaluate_
    from corrsteer.experiments.scaling import calibrate_best
    from corrsteer.report.tables import evaluation_table
    from corrsteer.runs.run import Run
    from corrsteer.steering.steering import Steering

    loaded = {str(path): Steering.load(path) for path in steering}
    first = next(iter(loaded.values()))
    settings = given.read(inputs.recorded(first.provenance, "test"))
    task, run = inputs.load_task(settings), None if baselines is None else Run.load(baselines)
    validation = None if run is None else inputs.load_task(settings.model_copy(update=VALIDATION))
    model, tokenizer = inputs.load_model(settings)
    for one in loaded.values():
        one.check(model)
    decoding, compared = inputs.decoding(settings), {}
    for name, one in loaded.items():
        positions, scale = one.applied_as(settings.positions, settings.scale)
        compared[name] = replace(one, positions=positions, scale=scale)
    others: dict[str, Steering] = {}
    if run is not None and validation is not None:
        candidates = baselines_(run, next(iter(compared.values())))
        others = calibrate_best(model, tokenizer, candidates, validation, decoding=decoding)
        compared |= others
    results = evaluate_(model, tokenizer, task, compared, decoding=decoding)
    if len(results) == 1:
        ((name, result),) = results.items()
        emit(result.to_dict(), json, evaluation_table({_label(name, loaded): result}), result.notes)
        return
    text = evaluation_table({_label(name, loaded): result for name, result in results.items()})
    shared = [note for note in next(iter(results.values())).notes if all(note in r.notes for r in results.values())]
    notes = shared + [f"{name}: {note}" for name, r in results.items() for note in r.notes if note not in shared]
    for name, other in others.items():
        what, *rest = other.notes
        n = other.provenance["calibration"]["candidates"]
        notes += [f"{name}: {what}, at scale {other.scale:g}, the best of {n} on validation"]
        notes += [f"{name}: {note}" for note in rest]
    found: dict[str, Any] = {"steerings": {name: result.to_dict() for name, result in results.items()}}
    if others:
        found["baselines"] = {
            name: other.provenance["calibration"] | {"notes": other.notes} for name, other in others.items()
        }
    emit(found, json, text, notes)


def _label(path: str, paths: Iterable[str]) -> str:
    """A file's name, for which a table has room, where it tells it from the others."""
    stem = Path(path).stem
    return stem if sum(Path(other).stem == stem for other in paths) == 1 else path
