"""`corrsteer regrade`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from corrsteer.cli.app import Json, command, say
from corrsteer.cli.options import Given
from corrsteer.cli.settings import RegradeSettings
from corrsteer.errors import CorrSteerError

if TYPE_CHECKING:
    from corrsteer.rollouts.rollout import Rollout
    from corrsteer.runs.run import Run


@command
def regrade(
    run: Annotated[Path, typer.Argument(help="Directory that `corrsteer collect` wrote.")],
    given: Given[RegradeSettings],
    force: Annotated[bool, typer.Option("--force", help="Replace a run that is already in --out.")] = False,
    json: Json = False,
) -> None:
    """Give a run's completions other rewards, and correlate features with these.

    With the activations that the run kept this takes neither model nor SAE; without them, the completions are read
    again.
    """
    settings = given.read()
    from corrsteer.cli import collected
    from corrsteer.rollouts.rollout import rewarded_by
    from corrsteer.runs.regrade import regrade as regrade_
    from corrsteer.runs.run import Run

    if bool(settings.grader) == (settings.rewards is not None):
        raise CorrSteerError("grader or rewards must be given, and not both: --grader NAME=GRADER, or --rewards FILE")
    if settings.out.resolve() == run.resolve():
        raise CorrSteerError(f"out must be another directory than the run's, got {settings.out}")
    collected.prepare(settings.out, force)
    loaded = Run.load(run)
    rollouts = _rewarded(loaded, settings)
    asked: dict[str, Any] = {
        name: getattr(settings, name) for name in ("permutations", "bootstrap") if getattr(settings, name) is not None
    }
    if settings.within_prompt:
        asked["within_prompt"] = True
    if loaded.activations is not None:
        again = regrade_(loaded, rollouts=rollouts, reward=settings.reward, **asked)
    else:
        say("The run kept no activations, so its completions are read again by its model.")
        if settings.reward is not None:  # before they are read, as of the others no permutations may be kept
            rollouts = [rewarded_by(rollout, settings.reward) for rollout in rollouts]
        again = _read_again(loaded, rollouts, asked)
    again.provenance |= {"settings": _recorded(loaded, settings)}
    collected.save(again, settings.out)
    collected.emit_run(again, settings.out, json)


def _rewarded(run: Run, settings: RegradeSettings) -> list[Rollout]:
    """The run's rollouts with other rewards."""
    from corrsteer.cli import inputs
    from corrsteer.rollouts.regrading import join_rewards, regraded

    there = [rollout for rollout in run.rollouts if rollout is not None]
    if not there:
        raise CorrSteerError("the run holds no completions, so that they cannot be graded again; collect again")
    if settings.rewards is not None:
        return join_rewards(there, settings.rewards)
    return regraded(there, inputs.parse_graders(settings.grader))


def _read_again(run: Run, rollouts: list[Rollout], asked: dict[str, Any]) -> Run:
    """The same collection from its completions."""
    from corrsteer.cli import inputs
    from corrsteer.runs.collect import collect

    known, evidence = run.provenance, next((by_pool[run.pool] for by_pool in run.evidence.values()), None)
    loading = inputs.recorded_model(known)
    model, tokenizer = inputs.load_model(loading)
    options = {name: known[name] for name in ("block_size", "shuffle_seed", "within_prompt")}
    if evidence is not None:
        options |= {name: getattr(evidence, name) for name in ("permutations", "bootstrap", "scores")}
    return collect(
        model, tokenizer, inputs.recorded_encoders(known, model), rollouts=rollouts, pool=run.pool,
        coefficient_pool=run.coefficient_pool, positions=known["positions"], hook_offset=known["hook_offset"],
        exclude_tokens=known["exclude_tokens"] if known["positions"] == "all" else None,
        decoding=inputs.decoding(loading), **options | asked,
    )  # fmt: skip


def _recorded(run: Run, settings: RegradeSettings) -> dict[str, Any]:
    """The settings of the collection, with the graders of now."""
    recorded = run.provenance.get("settings", {})
    # of rewards from a file there is no grader, which what steers the model then asks for
    return recorded | {"grader": settings.grader or ["none"], "reward": settings.reward}
