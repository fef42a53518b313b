"""`corrsteer evaluate`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from corrsteer.cli.app import Json, command, emit
from corrsteer.cli.options import Given
from corrsteer.cli.settings import EvaluateSettings


@command
def evaluate(
    steering: Annotated[
        list[Path], typer.Option(help="Steering file that `corrsteer select` wrote; give it again for more of them.")
    ],
    given: Given[EvaluateSettings],
    json: Json = False,
) -> None:
    """Score a task unsteered and steered. What is not given is as it was when the run was collected.

    By default that is the test part of the task that the (first) steering was collected on. Several steerings are
    compared with the same unsteered completions, and take little longer than one; Holm's p is of all of them together.
    With --category-field there are results of each category too.
    """
    from corrsteer.cli import inputs
    from corrsteer.experiments.evaluation import evaluate as evaluate_
    from corrsteer.report.tables import evaluation_table
    from corrsteer.steering.steering import Steering

    loaded = {str(path): Steering.load(path) for path in steering}
    first = next(iter(loaded.values()))
    settings = given.read(inputs.recorded(first.provenance, "test"))
    task = inputs.load_task(settings)
    model, tokenizer = inputs.load_model(settings)
    for one in loaded.values():
        one.check(model)
    results = evaluate_(
        model, tokenizer, task, loaded,
        positions=settings.positions, scale=settings.scale, decoding=inputs.decoding(settings),
    )  # fmt: skip
    if len(results) == 1:
        ((name, result),) = results.items()
        emit(result.to_dict(), json, evaluation_table({_label(name, loaded): result}), result.notes)
        return
    text = evaluation_table({_label(name, loaded): result for name, result in results.items()})
    notes = [f"{name}: {note}" for name, result in results.items() for note in result.notes]
    emit({"steerings": {name: result.to_dict() for name, result in results.items()}}, json, text, notes)


def _label(path: str, paths: Iterable[str]) -> str:
    """A file's name, for which a table has room, where it tells it from the others."""
    stem = Path(path).stem
    return stem if sum(Path(other).stem == stem for other in paths) == 1 else path
