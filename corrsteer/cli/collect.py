"""`corrsteer collect`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from corrsteer import processes
from corrsteer.cli.app import Json, command
from corrsteer.cli.names import from_anywhere, task_from_anywhere
from corrsteer.cli.options import Given
from corrsteer.cli.settings import CollectSettings
from corrsteer.cli.task_defaults import defaults
from corrsteer.errors import CorrSteerError

if TYPE_CHECKING:
    from corrsteer.rollouts.rollout import Rollout

OF_TASKS = ("task", "data", "shots", "part", "split", "split_seed", "prompt_field", "answer_field",
            "samples_per_prompt")  # fmt: skip


@command
def collect(
    given: Given[CollectSettings],
    force: Annotated[
        bool, typer.Option("--force", help="Replace what was begun or finished there before.")
    ] = False,
    finish: Annotated[
        bool, typer.Option("--finish", help="Make a run of what was collected there so far, and collect no more.")
    ] = False,
    json: Json = False,
) -> None:
    """Generate and grade a task's completions, or read some that exist, and correlate every SAE feature with the
    reward.

    The same command goes on with a collection that was not finished.
    """
    settings = given.read(defaults(given))
    from corrsteer.cli import collected, inputs
    from corrsteer.experiments.selection import selectable
    from corrsteer.runs.collect import collect as collect_
    from corrsteer.runs.journal import FOLDER
    from corrsteer.runs.options import Options

    asked = inputs.statistics_options(settings)
    asked |= {name: getattr(settings, name) for name in ("shuffle_seed", "patience")}
    Options(**asked, patience_layers=None)  # refuses what it must before a model is loaded
    if settings.keep_bos and settings.positions != "all":
        raise CorrSteerError("keep_bos is of prompts, which positions 'all' reads; give --positions all too")
    sources = inputs.parse_saes(settings.sae)
    inputs.check_saes(sources)
    samples = _samples(settings)
    if settings.rollouts is not None and (settings.out / FOLDER).resolve() in settings.rollouts.resolve().parents:
        raise CorrSteerError(
            f"rollouts {settings.rollouts} would be removed, as they are what a collection has in {settings.out}; "
            f"copy them, or give another directory as --out"
        )
    inputs.check_folder(settings.out)
    model, tokenizer = inputs.load_model(settings)
    encoders = inputs.load_encoders(sources, model)
    if settings.precision:
        encoders = {layer: encoder.to(precision=settings.precision) for layer, encoder in encoders.items()}
    encoders = inputs.pack_where_read(encoders, model, settings.backend)
    run = collect_(
        model,
        tokenizer,
        encoders,
        **samples,
        decoding=inputs.decoding(settings),
        exclude_tokens=() if settings.keep_bos else None,
        hook_offset=settings.hook_offset,
        patience_layers=selectable(encoders) or None,
        directory=settings.out,
        anew=force,
        finish=finish,
        record={"settings": _recorded(settings, samples.get("rollouts"))},
        progress=processes.rank() == 0,
        **asked,
    )
    collected.emit_run(run, settings.out, json)


def _samples(settings: CollectSettings) -> dict[str, Any]:
    """What is collected from: a task, or rollouts and what grades them."""
    from corrsteer.cli import inputs
    from corrsteer.rollouts.asked import check_samples
    from corrsteer.rollouts.regrading import task_of
    from corrsteer.rollouts.rollout import as_chat, rewarded_by
    from corrsteer.rollouts.rollout_file import read_rollouts

    if settings.rollouts is None:
        check_samples(settings.samples_per_prompt, inputs.decoding(settings))  # before a model is loaded
        if settings.grader == ["none"]:
            raise CorrSteerError(
                "grader must be one or more, as activations are correlated with rewards, got none; for completions "
                "without rewards there is `corrsteer rollouts`"
            )
        return {"task": inputs.load_task(settings), "samples_per_prompt": settings.samples_per_prompt}
    if strange := sorted(settings.model_fields_set & set(OF_TASKS)):
        raise CorrSteerError(
            f"{', '.join(strange)} cannot be used with rollouts, which are prompts and completions themselves; leave "
            f"{'it' if len(strange) == 1 else 'them'} out"
        )
    rollouts = read_rollouts(settings.rollouts)[: settings.limit]
    regrades = "grader" in settings.model_fields_set
    task = task_of(rollouts, inputs.parse_graders(settings.grader, settings.device) if regrades else None)
    if settings.reward is not None and regrades:
        task = task.rewarded_by(settings.reward)
    elif settings.reward is not None:
        rollouts = [rewarded_by(rollout, settings.reward) for rollout in rollouts]
    if settings.chat:
        rollouts = [as_chat(rollout, settings.system) for rollout in rollouts]
    return {"task": task, "rollouts": rollouts}


def _recorded(settings: CollectSettings, rollouts: Sequence[Rollout] | None) -> dict[str, Any]:
    """The settings that it takes to evaluate on the same task with the same model."""
    recorded = settings.model_dump(mode="json", exclude={"out", "sae", "rollouts"})
    recorded["task"] = recorded["task"] and task_from_anywhere(recorded["task"])
    for name in ("data", "model"):
        recorded[name] = recorded[name] and from_anywhere(recorded[name])
    if rollouts is not None and "grader" not in settings.model_fields_set:
        recorded["grader"] = ["none"]  # rewards came with the rollouts
    if rollouts is not None:  # what is generated later is generated as they were
        from corrsteer.runs.samples import decoding_of

        theirs = decoding_of(rollouts) or {}
        recorded |= {name: theirs[name] for name in theirs if name in recorded.keys() - settings.model_fields_set}
        if (labels := theirs.get("first_token_among")) and "options_only" not in settings.model_fields_set:
            recorded |= {"option": labels, "options_only": True}
    return recorded
