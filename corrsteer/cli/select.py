"""`corrsteer select`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from corrsteer import processes
from corrsteer.cli.app import Force, Json, command, emit
from corrsteer.cli.options import Given
from corrsteer.cli.settings import SEARCH, SelectSettings
from corrsteer.cli.task_defaults import defaults
from corrsteer.errors import CorrSteerError


class NothingSelected(CorrSteerError):
    """No feature does what the strategy asks for; the message says why."""


@command
def select(
    run: Annotated[Path, typer.Argument(help="Directory that `corrsteer collect` wrote.")],
    given: Given[SelectSettings],
    out: Annotated[Path, typer.Option(help="Steering file to write.")] = Path("steering.safetensors"),
    strategy: Annotated[
        str,
        typer.Option(
            help="single (the best feature of all layers), all (the best of each layer), pruned (those that alone "
            "beat the unsteered score on the validation part of the run's task) or search (what does best there, of "
            "many features and scales)."
        ),
    ] = "all",
    score: Annotated[
        str,
        typer.Option(
            help="What to rank by: pearson, point_biserial, contrastive or squared_ratio, or, where "
            "activations were kept, mutual_information, auroc or spearman."
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
        str | None,
        typer.Option(
            help="mean_positive, mean_positive_active or contrastive; by default the first, and to search the second."
        ),
    ] = None,
    direction: Annotated[
        str | None,
        typer.Option(
            help="positive, negative or both: correlations to select; by default positive, and to search both."
        ),
    ] = None,
    layer: Annotated[list[int] | None, typer.Option(help="Only these layers; by default all but layer 0.")] = None,
    samples: Annotated[
        int | None,
        typer.Option(help="Use only the first so many samples of the run, which must hold activations.", min=2),
    ] = None,
    top_k: Annotated[int, typer.Option(help="Rows of each layer's table.")] = 5,
    force: Force = False,
    json: Json = False,
) -> None:
    """Choose features and coefficients from a collected run, and write a steering file.

    `--reward` is any of the run's. The model, its task and how it is steered are options of `--strategy pruned` and
    `search`; by default they are as collected. The same command goes on with a
    search that was not finished.
    """
    from corrsteer.cli import inputs, kept
    from corrsteer.experiments.search import SearchOptions
    from corrsteer.experiments.selection import STEERED, chosen
    from corrsteer.experiments.selection import select as select_
    from corrsteer.report.tables import feature_table, search_tables
    from corrsteer.runs.run import Run
    from corrsteer.runs.run_files import INDEX

    inputs.check_file(out)
    loaded = Run.load(run)
    if (reward := given.flags["reward"]) is not None or samples is not None:
        loaded = loaded.statistics(reward, samples=None if samples is None else range(samples))
    if samples is not None:
        loaded.provenance = loaded.provenance | {"first_samples": samples}
    choices = chosen(strategy, score, alpha, correction, interval, coefficient, direction, layer, top_k)
    choices = choices.checked(loaded)  # before a model is loaded
    trials: dict[str, Any] = {}
    searching = [f"--{name.replace('_', '-')}" for name in SEARCH]
    if strategy in STEERED:
        if strategy != "search" and (strange := [name for name in given.names if name in searching]):
            raise CorrSteerError(f"{', '.join(strange)} can only be used with --strategy search")
        settings = given.read(defaults(given, inputs.recorded(loaded.provenance, "validation")))
        trials = {"scale": 1.0 if settings.scale is None else settings.scale, "decoding": inputs.decoding(settings)}
        trials["positions"] = settings.positions or "generated"
        if strategy == "search":
            names = {name: getattr(settings, name) for name in SEARCH if name not in ("also_all", "search_seed")}
            trials["options"] = SearchOptions(**names, seed=settings.search_seed)
            if settings.also_all:
                trials["positions"] = (trials["positions"], "all")
        trials["validation"] = inputs.load_task(settings)
        trials["model"], trials["tokenizer"] = inputs.load_model(settings)
    elif names := [name for name in given.names if name != "--reward"]:
        raise CorrSteerError(
            f"{', '.join(names)} can only be used with --strategy pruned or search, which run the model"
        )
    if trials:
        job = kept.job(
            "select", trials["model"], {"validation": trials["validation"]}, trials["decoding"], {},
            run=kept.digest_of(run / INDEX), reward=loaded.reward, samples=samples, **vars(choices),
            positions=trials["positions"], scale=trials["scale"],
            options=trials.get("options") and asdict(trials["options"]),
        )  # fmt: skip
        steering = kept.steering(
            out, job, force,
            lambda journal: select_(
                loaded, **vars(choices), **trials, journal=journal, progress=processes.rank() == 0
            ),
        )  # fmt: skip
    else:
        steering = select_(loaded, **vars(choices))
    searched, notes = steering.provenance.get("search"), steering.notes
    if not steering.features:
        if searched:
            emit({"search": searched}, json, search_tables(searched))
        raise NothingSelected("; ".join(notes))
    if not trials:
        steering.save(out)
    result = {
        "out": str(out),
        "features": [asdict(f) for f in steering.features],
        "table": {str(at): [asdict(f) for f in rows] for at, rows in steering.table.items()},
        "notes": steering.notes,
    }
    if searched:
        result |= {"positions": steering.positions, "scale": steering.scale, "search": searched}
    rows = [f for layer_rows in steering.table.values() for f in layer_rows]
    text = feature_table(rows, {"selected": steering.features}, every_coefficient=True)
    if searched:
        text += "\n\n" + search_tables(searched)
        text += f"\n{steering.notes[0]}\nscale {steering.scale:g}, positions {steering.positions}"
        notes = notes[1:]  # the confirmation, which has been said
    emit(result, json, f"{text}\n{len(steering.features)} features written to {out}", notes)
