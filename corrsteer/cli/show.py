"""`corrsteer show`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from corrsteer.cli.app import Json, command, emit
from corrsteer.errors import CorrSteerError


@command
def show(
    run: Annotated[Path, typer.Argument(help="Directory that `corrsteer collect` wrote.")],
    feature: Annotated[
        str | None,
        typer.Option(help="LAYER/FEATURE: show the completions in which it is most and least active, and where."),
    ] = None,
    reward: Annotated[str | None, typer.Option(help="Name of the reward to look at; by default the run's.")] = None,
    count: Annotated[int, typer.Option(help="Completions at each end, or features a layer.", min=1)] = 3,
    peaks: Annotated[
        bool, typer.Option(help="With --feature, read these completions again to find the token at which it peaks.")
    ] = True,
    json: Json = False,
) -> None:
    """Say what a run holds: samples, rewards, lengths, top features; or the completions of one feature."""
    from corrsteer.report.run_summary import described, extreme_row, extremes_text, summary, top_rows
    from corrsteer.runs.peaks import extremes, with_peaks
    from corrsteer.runs.run import Run

    loaded = Run.load(run)
    if reward is not None:
        loaded = loaded.statistics(reward)
    if feature is None:
        found = described(loaded, count)
        text = summary(found)
        top = {str(layer): top_rows(features) for layer, features in found["top"].items()}
        emit(found | {"top": top}, json, text, loaded.notes)
        return
    matched = re.fullmatch("([0-9]+)/([0-9]+)", feature)
    if not matched:
        raise CorrSteerError(f"feature must be LAYER/FEATURE, such as 20/1234, got {feature!r}")
    layer, index = map(int, matched.groups())
    highest, lowest = extremes(loaded, layer, index, count)
    if peaks:
        from corrsteer.cli import inputs

        model, tokenizer = inputs.load_model(inputs.recorded_model(loaded.provenance))
        encoder = inputs.recorded_encoders(loaded.provenance, model, [layer])[layer]
        asked = (loaded, model, tokenizer, encoder, layer, index)
        highest, lowest = (with_peaks(*asked, ends) for ends in (highest, lowest))
    result = {"highest": [extreme_row(one) for one in highest], "lowest": [extreme_row(one) for one in lowest]}
    emit(result, json, extremes_text(layer, index, highest, lowest))
