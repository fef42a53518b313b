"""`corrsteer evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from corrsteer.cli.app import Json, command, emit
from corrsteer.cli.options import Given
from corrsteer.cli.settings import EvaluateSettings

if TYPE_CHECKING:
    from corrsteer.experiments.evaluation import Evaluation


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
    compared with the same unsteered completions, and take little longer than one.
    """
    from corrsteer.cli import inputs
    from corrsteer.experiments.evaluation import evaluate as evaluate_
    from corrsteer.report.tables import table
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
    columns = [_column(result) for result in results.values()]
    header = ("samples", *(str(result.n) for result in results.values()))
    rows = [(name, *(column[name] for column in columns)) for name in columns[0]]
    if len(results) == 1:
        result = next(iter(results.values()))
        emit(result.to_dict(), json, table(header, rows, indent=""), result.notes)
        return
    text = table(("", *results), [header, *rows], indent="")
    notes = [f"{name}: {note}" for name, result in results.items() for note in result.notes]
    emit({"steerings": {name: result.to_dict() for name, result in results.items()}}, json, text, notes)


def _column(result: Evaluation) -> dict[str, str]:
    """What is printed of an evaluation."""
    ratio = "no reward changed" if result.side_effect_ratio is None else f"{result.side_effect_ratio:.3f}"
    return {
        "unsteered reward": f"{result.unsteered:.4f}",
        "steered reward": f"{result.steered:.4f}",
        "improved": str(result.improved),
        "worsened": str(result.worsened),
        "changed, reward equal": str(result.changed_equal),
        "side-effect ratio": ratio,
        "McNemar exact p": f"{result.p_value:.3g}",
    }
