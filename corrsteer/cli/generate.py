"""`corrsteer generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from corrsteer.cli.app import Json, command, emit
from corrsteer.cli.options import Given
from corrsteer.cli.settings import GenerateSettings


@command
def generate(
    steering: Annotated[Path, typer.Option(help="Steering file that `corrsteer select` wrote.")],
    prompt: Annotated[list[str], typer.Option(help="A prompt; give it again for more.")],
    given: Given[GenerateSettings],
    json: Json = False,
) -> None:
    """Complete prompts unsteered and steered, side by side."""
    from corrsteer.cli import inputs
    from corrsteer.experiments.trials import UNSTEERED, Trial, run_trials
    from corrsteer.steering.steering import Steering
    from corrsteer.tasks import Task

    loaded = Steering.load(steering)
    settings = given.read(inputs.recorded(loaded.provenance, "all"))
    task = Task.from_rows(
        [{"prompt": text} for text in prompt],
        grader=lambda completion, example: 0.0,
        answer_field=None,
        chat=settings.chat,
        system=settings.system,
    )
    model, tokenizer = inputs.load_model(settings)
    loaded.check(model)
    trials = [UNSTEERED, Trial(loaded, settings.scale, settings.positions)]
    before, after = run_trials(model, tokenizer, task, trials, inputs.decoding(settings), progress=False)
    pairs = [
        {"prompt": p, "unsteered": b, "steered": a} for p, b, a in zip(prompt, before.completions, after.completions)
    ]
    text = "\n".join(f"{p['prompt']!r}\n  unsteered: {p['unsteered']!r}\n  steered:   {p['steered']!r}" for p in pairs)
    emit({"completions": pairs}, json, text)
