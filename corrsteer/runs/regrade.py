"""`regrade`: other rewards for completions that exist, and what follows from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from corrsteer.arguments import check_type
from corrsteer.errors import CorrSteerError
from corrsteer.rollouts.regrading import regraded
from corrsteer.rollouts.rollout import Rollout
from corrsteer.rollouts.rollout_file import alike
from corrsteer.runs.run import Run
from corrsteer.runs.stored_rollouts import rewarded_first
from corrsteer.tasks import GraderSpec
from corrsteer.tasks.grading import Grading


def regrade(
    run: Run, grader: GraderSpec = None, *, rollouts: Iterable[Rollout] | None = None, **statistics: Any
) -> Run:
    """A run of the same completions with other rewards, from the activations that were kept.

    Parameters
    ----------
    run : whose activations were kept.
    grader : as for `Task.from_rows`; its rewards replace those that there were.
    rollouts : instead of a grader, the run's own by their ids with other rewards, see `join_rewards`. Those that are
        not among them are left out of the statistics.
    statistics : as for `Run.statistics`.

    Raises
    ------
    CorrSteerError : where activations were not kept (collect from the rollouts instead, which takes the model), or
        the rollouts are others.
    TaskError : for a grader that fails, or needs answers that the rollouts do not hold.
    """
    check_type("run", run, Run, "a Run, as collect returns")
    if (grader is None) == (rollouts is None):
        raise CorrSteerError("grader or rollouts must be given, and not both")
    if run.activations is None:
        raise CorrSteerError(
            "the run holds no activations, so that other rewards take the model again: "
            "collect(model, tokenizer, encoders, rollouts=...)"
        )
    there = {rollout.id: sample for sample, rollout in enumerate(run.rollouts) if rollout is not None}
    if not there:
        raise CorrSteerError("the run holds no completions, so that they cannot be graded again; collect again")
    if rollouts is None:
        rollouts = regraded([rollout for rollout in run.rollouts if rollout is not None], grader)
    rollouts = alike(rollouts)
    if strange := [rollout.id for rollout in rollouts if rollout.id not in there]:
        raise CorrSteerError(f"rollouts must be the run's, but it has none of id {strange[0]!r}; take run.rollouts")
    if without := [rollout.id for rollout in rollouts if not rollout.rewards]:
        raise CorrSteerError(f"rollouts must hold rewards, but {without[0]!r} has none; grade them")
    if not rollouts:
        raise CorrSteerError("rollouts must be one or more of the run's, got none")
    known: list[Rollout | None] = [None] * len(run.rollouts)
    for rollout in rollouts:
        known[there[rollout.id]] = rollout
    again = run.statistics(rewards=_rewards(known), **statistics)
    again.rollouts = rewarded_first(known, again.reward)
    if "task" in again.provenance:  # of rewards from elsewhere it is not known what gave them
        graders = str(Grading.of(grader))
        again.provenance = again.provenance | {"task": again.provenance["task"] | {"grader": graders}}
    return again


def _rewards(rollouts: Sequence[Rollout | None]) -> dict[str, Tensor]:
    """Rewards by name, `[n]` float64 each; NaN where there is no rollout."""
    names = next(rollout.rewards for rollout in rollouts if rollout is not None)
    found = {name: torch.full((len(rollouts),), torch.nan, dtype=torch.float64, device="cpu") for name in names}
    for sample, rollout in enumerate(rollouts):
        for name, of_name in found.items():
            if rollout is not None:
                of_name[sample] = rollout.rewards[name]
    return found
