"""Rollouts of a saved run, which are read when they are first asked for."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from corrsteer.errors import CorrSteerError
from corrsteer.rollouts.rollout import Rollout, rewarded_by
from corrsteer.rollouts.rollout_file import read_rollouts
from corrsteer.runs.file_stamps import Stamp, check_stamp


@dataclass(frozen=True)
class StoredRollouts(Sequence["Rollout | None"]):
    """Rollouts by the number of their sample, None where there is none.

    Attributes
    ----------
    path, stamp : their file, as it was.
    order : which sample each of its lines is.
    n : samples.
    reward : the reward that comes first in each; None for the one that does in the file.
    """

    path: Path
    order: list[int]
    n: int
    stamp: Stamp
    reward: str | None = None

    def __len__(self) -> int:
        return self.n

    @overload
    def __getitem__(self, index: int) -> Rollout | None: ...
    @overload
    def __getitem__(self, index: slice) -> list[Rollout | None]: ...
    def __getitem__(self, index: int | slice) -> Rollout | None | list[Rollout | None]:
        return self._read[index]

    @functools.cached_property
    def _read(self) -> list[Rollout | None]:
        check_stamp(self.path, self.stamp)
        read = read_rollouts(self.path)
        if len(read) != len(self.order):
            raise CorrSteerError(
                f"{self.path} is damaged: it must have {len(self.order)} rollouts, got {len(read)}; collect again"
            )
        rollouts: list[Rollout | None] = [None] * self.n
        for sample, rollout in zip(self.order, read):
            rollouts[sample] = rollout
        return rollouts if self.reward is None else rewarded_first(rollouts, self.reward)


def rewarded_first(rollouts: Sequence[Rollout | None], reward: str) -> list[Rollout | None]:
    """The same with one of their rewards before the others, which is then their default."""
    return [rollout and rewarded_by(rollout, reward) for rollout in rollouts]
