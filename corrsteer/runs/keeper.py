"""What becomes of a collection's blocks: rows that are kept, or evidence that is streamed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from corrsteer.errors import CorrSteerError
from corrsteer.runs.activations import Activations, Block
from corrsteer.runs.batches import Pooled
from corrsteer.runs.options import Options
from corrsteer.runs.pooling import row_bytes
from corrsteer.runs.run import Run
from corrsteer.sae.encoder import SparseEncoder
from corrsteer.stats.evidence import Evidence
from corrsteer.tensors import NoMemory
from corrsteer.types import Device

BYTES = 8  # of an activation that is kept, at most
NO_TESTS = "so there are no intervals or tests"


class Keeper:
    """Folds blocks into a run's evidence, and keeps their activations.

    Where these are kept, evidence holds joint moments alone; permutations come from rows, see `stats.stored`. Where
    `auto` gives them up, what was kept is replayed into evidence that holds them all.

    Parameters
    ----------
    block : samples of the largest block.
    streams : whether the activations have been given up before.

    Raises
    ------
    CorrSteerError : where statistics would not fit in `statistics_bytes`, or in the memory there is.
    """

    def __init__(
        self,
        run: Run,
        encoders: Mapping[int, SparseEncoder],
        devices: Mapping[int, torch.device],
        options: Options,
        block: int,
        streams: bool = False,
    ):
        self._run, self._encoders, self._devices = run, encoders, devices
        self._options = options
        self._held = row_bytes(block, encoders.values(), options.pools)
        self._block = block
        if options.keeps(encoders) and not streams:
            run.activations = Activations([], options.permutations, options.bootstrap)
        run.evidence = self._allocated(streams=run.activations is None)

    def make_room(self, pooled: Pooled) -> None:
        """Give up the activations that were kept where a block more would be too many; the run is whole after it."""
        kept, options = self._run.activations, self._options
        if kept is None or options.keep_activations == "always":
            return
        active = sum(int(z.count_nonzero()) for pools in pooled.values() for z in pools.values())
        if kept.nbytes + active * BYTES <= options.activation_bytes:
            return
        try:
            evidence = self._allocated(streams=True)
        except CorrSteerError as error:
            raise CorrSteerError(
                f"activation_bytes={options.activation_bytes} is what the activations of {self._run.n} samples take, "
                f"and without them {error}; or raise activation_bytes"
            ) from None
        for layer, pools in self._run.evidence.items():
            for pool, known in pools.items():
                if evidence[layer][pool].permutations or evidence[layer][pool].bootstrap:
                    self._replay(kept, layer, pool, evidence[layer][pool])
                else:
                    evidence[layer][pool] = known
        lost = [name for name in options.scores if name not in options.streamed_scores]
        self._run.evidence, self._run.activations = evidence, None
        self._run.notes.append(
            f"after {self._run.n} samples activations took activation_bytes={options.activation_bytes}, and were no "
            f"longer kept: statistics are those that were asked for"
            + (f", without {', '.join(lost)}, which {'needs' if len(lost) == 1 else 'need'} them" if lost else "")
        )

    def add(self, block: Block | None, number: int, pooled: Pooled, y: Tensor, groups: Sequence[int] | None) -> None:
        """Take in a block: its rows, where they are kept, pooled activations, rewards `[N]` and prompts."""
        if self._run.activations is not None and block is not None:
            self._run.activations.blocks.append(block)
        for layer, pools in pooled.items():
            for pool, z in pools.items():
                evidence = self._run.evidence[layer][pool]
                evidence.update(z, y, number, groups=groups, backend=self._options.backend)

    def finish(self) -> None:
        """Have evidence ask the rows that were kept for what is resampled."""
        run = self._run
        if run.activations is not None and run.n:
            try:
                run.ask_rows()
            except Exception as error:  # what took hours is not lost to statistics, which can be made again
                run.evidence = {}
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                run.notes.append(f"evidence could not be made of the activations ({reason}); {NO_TESTS}")

    def give_up(self) -> None:
        """Do without evidence, of which part of the layers may have a block that others have not."""
        self._run.evidence = {}
        if self._run.activations is None:
            self._run.notes.append(f"a block could not be added to the evidence; {NO_TESTS}")

    def _replay(self, kept: Activations, layer: int, pool: str, evidence: Evidence) -> None:
        for block in kept.of(layer, pool, self._run.rewards, self._run.groups):
            pooled = block.rows.dense(device=evidence.device)
            evidence.update(pooled, block.y, block.number, groups=block.groups, backend=self._options.backend)

    def _allocated(self, streams: bool) -> dict[int, dict[str, Evidence]]:
        """Empty evidence of every layer and pooling."""
        options = self._options

        def all_of(devices: Mapping[int, Device]) -> dict[int, dict[str, Evidence]]:
            return {
                layer: {pool: options.evidence(encoder, pool, devices[layer], streams) for pool in options.pools}
                for layer, encoder in self._encoders.items()
            }

        planned = all_of(dict.fromkeys(self._encoders, "meta"))
        kept = sum(evidence.nbytes for of_layer in planned.values() for evidence in of_layer.values())
        remedy = (
            f"evidence takes {kept / 2**30:.3g} GiB (8 bytes a feature, permutation and score, three times that a "
            f"bootstrap replicate), a block of {self._block} samples {self._held / 2**30:.3g} GiB; take fewer "
            f"permutations, replicates or scores, or a smaller block_size"
        )
        if kept + self._held > options.statistics_bytes:
            raise CorrSteerError(
                f"statistics_bytes must be at least {kept + self._held}, got {options.statistics_bytes}: {remedy}"
            )
        try:
            return all_of(self._devices)
        except NoMemory as error:
            kind = type(error.__cause__).__name__
            raise CorrSteerError(f"there is no memory for the statistics ({kind}): {remedy}") from error
