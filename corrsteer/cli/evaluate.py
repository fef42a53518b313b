"""`corrsteer evaluate`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from corrsteer import processes
from corrsteer.cli.app import Force, Json, command, emit
from corrsteer.cli.options import Given
from corrsteer.cli.settings import EvaluateSettings
from corrsteer.cli.task_defaults import defaults
from corrsteer.errors import CorrSteerError

if TYPE_CHECKING:
    from corrsteer.rollouts.journal import Journal
    from corrsteer.steering.steering import Steering


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
    out: Annotated[
        Path | None,
        typer.Option(
            help="JSON file to write the result to, with every completion. With it, what was generated is kept as it "
            "comes, and the same command goes on with it."
        ),
    ] = None,
    validation_limit: Annotated[
        int | None,
        typer.Option(help="With --baselines: use only the first so many examples of the validation part.", min=1),
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Score a task unsteered and steered. What is not given is as it was when the run was collected, but for the
    settings of another benchmark, which has its own.

    By default that is the test part of the task that the (first) steering was collected on. Several steerings are
    compared with the same unsteered completions, and take little longer than one; Holm's p is of all of them together.
    With --category-field there are results of each category too. With --out, the same command goes on with an
    evaluation that was not finished.
    """
    from corrsteer.cli import inputs, kept
    from corrsteer.experiments.baselines import baselines as baselines_
    from corrsteer.experiments.evaluation import evaluate as evaluate_
    from corrsteer.experiments.scaling import calibrate_best
    from corrsteer.runs.run import Run
    from corrsteer.runs.run_files import INDEX
    from corrsteer.steering.steering import Steering as Steering_

    if out is None and processes.among_others():
        raise CorrSteerError("out must be given with several processes, which share the work beside it; give --out")
    if validation_limit is not None and baselines is None:
        raise CorrSteerError("validation_limit is of --baselines, which nothing else uses the validation part for")
    if out is not None:
        inputs.check_file(out)
    loaded = {str(path): Steering_.load(path) for path in steering}
    first = next(iter(loaded.values()))
    settings = given.read(defaults(given, inputs.recorded(first.provenance, "test")))
    of_validation = {"part": "validation", "limit": validation_limit}  # whatever part is evaluated on
    task, run = inputs.load_task(settings), None if baselines is None else Run.load(baselines)
    validation = None if run is None else inputs.load_task(settings.model_copy(update=of_validation))
    model, tokenizer = inputs.load_model(settings)
    for one in loaded.values():
        one.check(model)
    decoding, compared = inputs.decoding(settings), {}
    for name, one in loaded.items():
        positions, scale = one.applied_as(settings.positions, settings.scale)
        compared[name] = replace(one, positions=positions, scale=scale)

    def made(journal: Journal | None) -> dict[str, Any]:
        of_model: dict[str, Any] = {
            "decoding": decoding, "journal": journal, "progress": processes.rank() == 0
        }  # fmt: skip
        others: dict[str, Steering] = {}
        if run is not None and validation is not None:
            candidates = baselines_(run, next(iter(compared.values())))
            others = calibrate_best(model, tokenizer, candidates, validation, **of_model)
        results = evaluate_(model, tokenizer, task, compared | others, **of_model)
        found: dict[str, Any] = {"steerings": {name: result.to_dict() for name, result in results.items()}}
        if others:
            found["baselines"] = {
                name: other.provenance["calibration"] | {"scale": other.scale, "notes": other.notes}
                for name, other in others.items()
            }
        return found

    if out is None:
        _show(made(None), loaded, json)
        return
    tasks = {"task": task} | ({} if validation is None else {"validation": validation})
    of_run = None if baselines is None else kept.digest_of(baselines / INDEX)
    job = kept.job(
        "evaluate", model, tasks, decoding, compared, baselines=of_run, category_field=task.category_field
    )
    _show(kept.evaluations(out, job, force, made), loaded, json)


def _show(found: dict[str, Any], loaded: Iterable[str], json: bool) -> None:
    """Print evaluations: one as it is, several by name."""
    from corrsteer.experiments.evaluation import Evaluation
    from corrsteer.report.tables import evaluation_table

    results = {name: Evaluation.from_dict(of_one) for name, of_one in found["steerings"].items()}
    if len(results) == 1:
        ((name, result),) = results.items()
        notes = [*result.notes, *found.get("notes", ())]
        emit(found["steerings"][name], json, evaluation_table({_label(name, loaded): result}), notes)
        return
    text = evaluation_table({_label(name, loaded): result for name, result in results.items()})
    shared = [note for note in next(iter(results.values())).notes if all(note in r.notes for r in results.values())]
    notes = shared + [f"{name}: {note}" for name, r in results.items() for note in r.notes if note not in shared]
    for name, other in found.get("baselines", {}).items():
        what, *rest = other["notes"]
        notes += [f"{name}: {what}, at scale {other['scale']:g}, the best of {other['candidates']} on validation"]
        notes += [f"{name}: {note}" for note in rest]
    notes += found.get("notes", ())  # of how it came about
    emit({name: found[name] for name in ("steerings", "baselines") if name in found}, json, text, notes)


def _label(path: str, paths: Iterable[str]) -> str:
    """A file's name, for which a table has room, where it tells it from the others."""
    stem = Path(path).stem
    return stem if sum(Path(other).stem == stem for other in paths) == 1 else path
