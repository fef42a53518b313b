"""`regrade`: other rewards for completions that exist, and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from corrsteer.arguments import check_type
from corrsteer.errors import CorrSteerError
from corrsteer.rollouts.regrading import regraded
from corrsteer.rollouts.rollout import Rollout
from corrsteer.runs.run import Run
from corrsteer.tasks import GraderSpec


def regrade(
    run: Run, grader: GraderSpec = None, *, rollouts: Sequence[Rollout] | None = None, **statistics: Any
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
    there = [rollout for rollout in run.rollouts if rollout is not None]
    rollouts = regraded(there, grader) if rollouts is None else rollouts
    samples = {rollout.id: sample for sample, rollout in enumerate(run.rollouts) if rollout is not None}
    if strange := [rollout.id for rollout in rollouts if rollout.id not in samples]:
        raise CorrSteerError(f"rollouts must be the run's, but it has none of id {strange[0]!r}; take run.rollouts")
    known: list[Rollout | None] = [None] * len(run.rollouts)
    for rollout in rollouts:
        known[samples[rollout.id]] = rollout
    again = run.statistics(rewards=_rewards(known), **statistics)
    again.rollouts = known
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
