"""`corrsteer evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from corrsteer.cli.app import Json, command, emit
from corrsteer.cli.options import Given
from corrsteer.cli.settings import EvaluateSettings


@command
def evaluate(
    steering: Annotated[Path, typer.Option(help="Steering file that `corrsteer select` wrote.")],
    given: Given[EvaluateSettings],
    json: Json = False,
) -> None:
    """Score a task unsteered and steered. What is not given is as it was when the run was collected.

    By default that is the test part of the task that the steering was collected on.
    """
    from corrsteer.cli import inputs
    from corrsteer.experiments.evaluation import evaluate as evaluate_
    from corrsteer.report.tables import table
    from corrsteer.steering.steering import Steering

    loaded = Steering.load(steering)
    settings = given.read(inputs.recorded(loaded.provenance, "test"))
    task = inputs.load_task(settings)
    model, tokenizer = inputs.load_model(settings)
    loaded.check(model)
    result = evaluate_(
        model, tokenizer, task, loaded,
        positions=settings.positions, scale=settings.scale, decoding=inputs.decoding(settings),
    )  # fmt: skip
    ratio = "no reward changed" if result.side_effect_ratio is None else f"{result.side_effect_ratio:.3f}"
    text = table(
        ("samples", str(result.n)),
        [
            ("unsteered reward", f"{result.unsteered:.4f}"),
            ("steered reward", f"{result.steered:.4f}"),
            ("improved", str(result.improved)),
            ("worsened", str(result.worsened)),
            ("changed, reward equal", str(result.changed_equal)),
            ("side-effect ratio", ratio),
            ("McNemar exact p", f"{result.p_value:.3g}"),
        ],
        indent="",
    )
    emit(result.to_dict(), json, text, result.notes)
