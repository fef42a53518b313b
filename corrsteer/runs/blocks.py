"""One block of a collection: its batches are put together, and folded into the run.

The block is what labels are permuted within, so it enters the run whole; what goes wrong leaves the run with the
batches before it.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from corrsteer import ops
from corrsteer.ops import Moments
from corrsteer.ops.rows import SparseRows
from corrsteer.rollouts.rollout import Rollout
from corrsteer.runs.activations import Block
from corrsteer.runs.batches import Batch, Pooled
from corrsteer.runs.journal import CollectionJournal, Residuals
from corrsteer.runs.keeper import Keeper
from corrsteer.runs.options import Options
from corrsteer.runs.pooling import empty_rows
from corrsteer.runs.run import Run
from corrsteer.runs.samples import Samples
from corrsteer.sae.encoder import SparseEncoder
from corrsteer.stats import stability

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class _Rows:
    """What is known of a block's samples, a row each.

    Attributes
    ----------
    pooled, residuals : `[N, d_sae]` activations and `[N, d_in]` residuals; rows without a rollout are not set.
    rollouts : graded; None where a sample has not been.
    """

    pooled: Pooled
    residuals: Pooled
    rollouts: list[Rollout | None]

    def take(self, at: Sequence[int], batch: Batch) -> None:
        """Take in a batch, whose samples are at these places of the block."""
        for into, found in ((self.pooled, batch.pooled), (self.residuals, batch.residuals)):
            for layer, pools in found.items():
                for pool, values in pools.items():
                    rows = into[layer][pool]
                    rows[torch.tensor(at, dtype=torch.int64, device=rows.device)] = values
        for row, rollout in zip(at, batch.rollouts):
            self.rollouts[row] = rollout

    def keep(self, there: Sequence[int]) -> None:
        """Leave out all samples but these, of what is pooled."""
        for of_layer in (*self.pooled.values(), *self.residuals.values()):
            for pool, rows in of_layer.items():
                of_layer[pool] = rows[torch.tensor(there, dtype=torch.int64, device=rows.device)]


@dataclass
class BlockCollector:
    """What every block of one collection needs.

    Attributes
    ----------
    folded : the numbers of blocks that are in the run.
    """

    run: Run
    samples: Samples
    encoders: Mapping[int, SparseEncoder]
    keeper: Keeper
    options: Options
    journal: CollectionJournal | None = None
    folded: list[int] = field(default_factory=list)

    def collect(
        self,
        number: int,
        block: list[int],
        batches: Sequence[Sequence[int]],
        read: Callable[[int], Batch | None],
        done: Callable[[int], object],
    ) -> None:
        """Take in a block's samples, then fold them into the run; `done` is told how many, batch by batch.

        What goes wrong in a batch leaves the run with those before it.

        Parameters
        ----------
        batches : places of the block in each.
        read : gives a batch by its number; None where it is to be left out, and the block with it unfinished.
        """
        if self.journal and self.journal.has_block(number):
            self._fold_stored(number, block)
            done(len(block))
            return
        rows = self._rows_of(len(block))
        try:
            for batch, at in enumerate(batches):
                found = read(batch)
                if found is not None:
                    rows.take(at, found)
                    done(len(at))
            residuals = self._sums(rows)
            stored = self._stored(number, block, rows, residuals, len(batches))
        except BaseException:
            # Should folding fail as well, that has been noted, and the first reason is the one to give.
            with contextlib.suppress(Exception):
                self._fold_rows(number, block, rows)
            raise
        if residuals is None:
            self._fold_rows(number, block, rows)
        else:
            rollouts = [rollout for rollout in rows.rollouts if rollout is not None]
            self._fold(number, block, rows.pooled, residuals, rollouts, stored or self._in_memory(number, block, rows))

    def _stored(
        self, number: int, block: list[int], rows: _Rows, residuals: Residuals | None, batches: int
    ) -> Block | None:
        """The block as the journal has it; None without one, and where batches are missing."""
        if self.journal is None or residuals is None:
            return None
        made = Block.of_rows(number, block, _sparse(rows.pooled))
        rollouts = [rollout for rollout in rows.rollouts if rollout is not None]
        return self.journal.write_block(made, residuals, rollouts, batches)

    def _in_memory(self, number: int, samples: list[int], rows: _Rows) -> Block | None:
        kept = self.run.activations is not None
        return Block.of_rows(number, samples, _sparse(rows.pooled)) if kept else None

    def _fold_stored(self, number: int, block: list[int]) -> None:
        """Fold in a block that the journal has."""
        assert self.journal is not None, "there is one"
        if number in self.folded:  # in the state that was gone on from
            self._add_rollouts(block, self.journal.rollouts(number))
            return
        stored, residuals, rollouts = self.journal.read_block(number)
        pooled = {
            layer: {pool: stored.of(layer, pool).dense(device=self._device(layer)) for pool in self.options.pools}
            for layer in self.encoders
        }
        self._fold(number, block, pooled, residuals, rollouts, stored)

    def _fold_rows(self, number: int, block: list[int], rows: _Rows) -> None:
        """Fold in what there is of a block that was not finished, which stays in memory."""
        there = [row for row, rollout in enumerate(rows.rollouts) if rollout is not None]
        if not there:
            return
        if len(there) < len(block):
            rows.keep(there)
        rollouts = [rollout for rollout in rows.rollouts if rollout is not None]
        rows.rollouts = list(rollouts)
        residuals, samples = self._sums(rows), [block[row] for row in there]
        assert residuals is not None, "no row is missing now"
        self._fold(number, samples, rows.pooled, residuals, rollouts, self._in_memory(number, samples, rows))

    def _rows_of(self, n: int) -> _Rows:
        """Room for n samples."""
        made = {layer: empty_rows(n, e, self.options.pools, self._device(layer)) for layer, e in self.encoders.items()}
        pooled = {layer: rows for layer, (rows, _) in made.items()}
        residuals = {layer: rows for layer, (_, rows) in made.items()}
        return _Rows(pooled, residuals, [None] * n)

    def _sums(self, rows: _Rows) -> Residuals | None:
        """Moments of a block's residuals; None where rows are missing."""
        rollouts = [rollout for rollout in rows.rollouts if rollout is not None]
        return self._moments(rows.residuals, _rewards(rollouts)) if len(rollouts) == len(rows.rollouts) else None

    def _moments(self, rows: Pooled, y: Tensor) -> dict[int, dict[str, Moments]]:
        """Moments of a block alone."""
        fresh: dict[int, dict[str, Moments]] = {layer: {} for layer in rows}
        for layer, pools in rows.items():
            for pool, of_pool in pools.items():
                device = self._device(layer)
                fresh[layer][pool] = Moments(of_pool.shape[1], y.shape[1], device=device)
                ops.update_moments(of_pool, y.to(device), fresh[layer][pool], backend=self.options.backend)
        return fresh

    def _fold(
        self,
        number: int,
        samples: list[int],
        pooled: Pooled,
        residuals: Residuals,
        rollouts: list[Rollout],
        rows: Block | None,
    ) -> None:
        """Fold samples of a block into the run."""
        run, y = self.run, _rewards(rollouts)
        self.keeper.make_room(pooled)
        with _uninterrupted():
            moments = _merged(run.moments, self._moments(pooled, y))
            residuals = _merged(run.residuals, residuals)
            try:
                self.keeper.add(rows, number, pooled, y[:, 0], self._groups(samples))
            except Exception:
                # Part of the layers have the block now, and a copy of everything is too much to keep for this.
                self.keeper.give_up()
                raise
            finally:
                run.moments, run.residuals = moments, residuals
                self._add_rollouts(samples, rollouts)
            kept = {layer: evidences[run.pool] for layer, evidences in run.evidence.items()}
            if kept:
                run.snapshots.append(stability.snapshot(kept))
            self.folded.append(number)
        if self.journal and run.activations is None and self.journal.has_block(number):
            self.journal.save_state(run, self.folded)

    def _add_rollouts(self, samples: Sequence[int], rollouts: Sequence[Rollout]) -> None:
        self.run.add_rollouts(dict(zip(samples, rollouts)))

    def _groups(self, samples: Sequence[int]) -> list[int] | None:
        """Which prompts some samples are of; None where each is of its own."""
        groups = self.samples.groups
        return [groups[i] for i in samples] if groups else None

    def _device(self, layer: int) -> torch.device:
        return self.run.moments[layer][self.run.pool].device


def _rewards(rollouts: Sequence[Rollout]) -> Tensor:
    """`[N, R]` float64, in the order of the first one's names."""
    names = list(rollouts[0].rewards) if rollouts else []
    given = [[rollout.rewards[name] for name in names] for rollout in rollouts]
    return torch.tensor(given, dtype=torch.float64, device="cpu")


def _sparse(pooled: Pooled) -> dict[tuple[int, str], SparseRows]:
    return {
        (layer, pool): SparseRows.from_dense(z).to("cpu")
        for layer, pools in pooled.items()
        for pool, z in pools.items()
    }


def _merged(states: Residuals, fresh: Residuals) -> Residuals:
    """Moments with those of a block merged in, which are changed; the states given are left as they are."""
    for layer, pools in fresh.items():
        for pool, moments in pools.items():
            if states[layer][pool].n:  # of the first block it is not known before how many rewards there are
                moments.merge(states[layer][pool])
    return fresh


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Have an interrupt from the keyboard, or a request to end, wait until the end."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    # What is not Python's, or not the main thread's, is not ours to change; what ends at once is left to.
    ours = {number: handler for number, handler in before.items() if callable(handler)}
    if threading.current_thread() is not threading.main_thread():
        ours = {}
    waiting: list[int] = []
    for number in ours:
        signal.signal(number, lambda number, _: waiting.append(number))
    try:
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
    if waiting:
        signal.raise_signal(waiting[0])
