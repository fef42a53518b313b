"""`corrsteer run`: a recipe from its prompts to its report, in one directory."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from inspect import unwrap
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from corrsteer import processes
from corrsteer.cli import collect, evaluate, report, select
from corrsteer.cli.app import Force, Json, command, emit, say
from corrsteer.cli.options import Given
from corrsteer.cli.settings import (
    SEARCH,
    CollectSettings,
    EvaluateSettings,
    RecipeSettings,
    SelectSettings,
    Settings,
    given_in,
)
from corrsteer.cli.settings import read as read_settings
from corrsteer.errors import CorrSteerError

S = TypeVar("S", bound=Settings)


@command
def run(
    recipe: Annotated[Path, typer.Argument(help="YAML file with the settings of collect, and those of a recipe.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Directory for all of it; by default named as the recipe, and --limit, in this one."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Use only so many examples of each part, for a trial.", min=1)
    ] = None,
    model: Annotated[str | None, typer.Option(help="Another place of the model than the recipe's.")] = None,
    device: Annotated[str | None, typer.Option(help="As for collect; by default the recipe's.")] = None,
    data: Annotated[Path | None, typer.Option(help="A copy of the task's dataset; by default from the hub.")] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Collect, select by every strategy of a recipe, evaluate them beside the baselines, and write a report.

    Each step is that of the command of its name. The same command goes on with what was not finished.
    """
    from corrsteer.experiments import race

    known = {*CollectSettings.model_fields, *RecipeSettings.model_fields, *SEARCH}
    written = given_in(recipe)
    if strange := sorted(written.keys() - known):
        raise CorrSteerError(f"recipe {recipe} has {', '.join(strange)}, which no step of a run takes; leave it out")
    asked = {"limit": limit, "model": model, "device": device, "data": None if data is None else str(data)}
    required = {name for name, field in CollectSettings.model_fields.items() if field.is_required()} - {"out"}
    if lacking := sorted(required - written.keys() - {name for name, value in asked.items() if value is not None}):
        raise CorrSteerError(f"recipe {recipe} must have {' and '.join(lacking)}, and does not say; add it")
    plan = read_settings(RecipeSettings, recipe, {})
    if plan.report:
        report.check()  # before anything takes hours
    if limit is not None and limit < 2 * race.FIRST and "search" in plan.strategies:
        raise CorrSteerError(
            f"limit must be at least {2 * race.FIRST} to search, which takes {race.FIRST} validation samples and as "
            f"many to confirm, got {limit}"
        )
    name = recipe.stem if limit is None else f"{recipe.stem}-limit-{limit}"
    directory = Path(name) if out is None else out
    with contextlib.redirect_stdout(sys.stderr) if json else contextlib.nullcontext():
        found = _steps(recipe, plan, directory, asked, force)
    emit(found, json, f"{recipe.stem}: all of it is in {directory}")


def _steps(recipe: Path, plan: RecipeSettings, directory: Path, asked: dict[str, Any], force: bool) -> dict[str, Any]:
    """Every step, and what each left."""
    from corrsteer.cli import inputs

    with inputs.one_model():
        with _stage(directory, "collect"):
            unwrap(collect.collect)(_given(CollectSettings, recipe, asked | {"out": directory}), force=force)
        steerings = []
        for strategy in plan.strategies:
            path = directory / f"{strategy}.safetensors"
            with _stage(directory, strategy):
                try:
                    _select(recipe, plan, directory, path, strategy, asked, force)
                    steerings.append(path)
                except select.NothingSelected as error:
                    path.unlink(missing_ok=True)  # of settings that were begun anew
                    say(f"{strategy}: {error}")
        evaluation = None
        if steerings:
            evaluation = directory / "evaluation.json"
            with _stage(directory, "evaluate"):
                unwrap(evaluate.evaluate)(
                    steerings, _given(EvaluateSettings, None, {"limit": asked["limit"]}),
                    baselines=directory if plan.baselines else None, out=evaluation,
                    validation_limit=asked["limit"] if plan.baselines else None, force=force,
                )  # fmt: skip
        page = None
        if plan.report and processes.rank() == 0:
            page = directory / "report.html"
            with _stage(directory, "report"):
                unwrap(report.report)([directory], page, tokens=True, title=recipe.stem)
    return {
        "out": str(directory), "steerings": list(map(str, steerings)),
        "evaluation": evaluation and str(evaluation), "report": page and str(page),
    }  # fmt: skip


def _select(
    recipe: Path, plan: RecipeSettings, directory: Path, path: Path, strategy: str, asked: dict[str, Any], force: bool
) -> None:
    flags: dict[str, Any] = {}
    if strategy in ("pruned", "search"):
        flags["limit"] = asked["limit"]
    coefficient = plan.coefficient
    if strategy == "search":
        searched = read_settings(SelectSettings, recipe, {"model": asked["model"]})
        flags |= {name: getattr(searched, name) for name in SEARCH if name in searched.model_fields_set}
        coefficient = None  # its own, which a recipe says nothing of
    given = _given(SelectSettings, None, flags)
    unwrap(select.select)(
        directory, given, out=path, strategy=strategy, coefficient=coefficient, layer=plan.layer, force=force
    )


def _given(kind: type[S], config: Path | None, flags: dict[str, Any]) -> Given[S]:
    """What a command takes for its settings: those that it has, None where nothing is said."""
    return Given(kind, config, {name: flags.get(name) for name in kind.model_fields})


@contextlib.contextmanager
def _stage(directory: Path, name: str) -> Iterator[None]:
    """Say which step begins, and add what it takes to the directory's record, however it ends."""
    from corrsteer.files import to_json, write_utf8
    from corrsteer.report.page.found import STAGES, read_stages

    say(f"{name} ...")
    begun = time.perf_counter()
    def note() -> None:
        if processes.rank() == 0 and directory.is_dir():
            path = directory / STAGES
            taken = read_stages(path)
            taken[name] = taken.get(name, 0.0) + time.perf_counter() - begun
            write_utf8(path, to_json(taken, indent=1) + "\n")

    try:
        yield
    except BaseException:
        with contextlib.suppress(CorrSteerError):  # which would take the place of what has happened
            note()
        raise
    note()
