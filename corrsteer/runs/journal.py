"""What a collection that is under way has on disk, in a folder of its own that is removed when the run is saved."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from corrsteer.errors import CorrSteerError
from corrsteer.rollouts.rollout import Rollout
from corrsteer.rollouts.rollout_file import RolloutWriter
from corrsteer.runs.activations import Block

FOLDER, ROLLOUTS = "collecting", "rollouts.jsonl"


class Journal:
    """Rollouts, appended batch by batch, and blocks of activations, each in a file.

    Parameters
    ----------
    directory : of the run, in which `collecting/` must not exist yet.

    Raises
    ------
    CorrSteerError : where it does, or cannot be made.
    """

    def __init__(self, directory: Path):
        self.folder: Path = directory / FOLDER
        check_unused(directory)
        try:
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise CorrSteerError(f"{directory} cannot be written to ({error}); give another directory") from None
        self._writer = RolloutWriter(self.folder / ROLLOUTS)

    def add_rollouts(self, rollouts: Sequence[Rollout]) -> None:
        """Append a batch."""
        self._writer.write(rollouts)

    def add_block(self, block: Block) -> Block:
        """Write a block of activations, and give it back as it is read from there."""
        return block.written(self.folder / f"activations_{block.number}.safetensors")

    def remove_blocks(self) -> None:
        """Remove the blocks, which are no longer kept."""
        for path in self.folder.glob("activations_*.safetensors"):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Write nothing more; where nothing was written, leave nothing behind."""
        self._writer.close()
        with contextlib.suppress(OSError):
            if self._writer.path.stat().st_size == 0:
                self._writer.path.unlink()
        with contextlib.suppress(OSError):  # it is not empty
            self.folder.rmdir()


def check_unused(directory: Path) -> None:
    """Raise where a collection was begun that was not finished."""
    if (directory / FOLDER).exists():
        raise CorrSteerError(
            f"directory {directory} holds a collection that was not finished; its completions, in "
            f"{directory / FOLDER / ROLLOUTS}, can be collected from as rollouts. Give another directory, or remove "
            f"{directory / FOLDER}"
        )
