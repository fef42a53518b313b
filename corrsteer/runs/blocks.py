"""One block of a collection: its completions are had and graded, encoded and pooled, and folded into the run.

The block is what labels are permuted within, so it enters the run whole; what goes wrong leaves the run with the
batches before it.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from corrsteer import ops
from corrsteer.errors import CorrSteerError
from corrsteer.lm.hook_points import HookPoint
from corrsteer.ops import Moments
from corrsteer.rollouts.rollout import Rollout
from corrsteer.runs.journal import Journal
from corrsteer.runs.keeper import Keeper
from corrsteer.runs.options import Options
from corrsteer.runs.pooling import BatchPool, empty_rows
from corrsteer.runs.run import Run
from corrsteer.runs.samples import Samples
from corrsteer.sae.encoder import SparseEncoder
from corrsteer.stats import stability

_Moments = dict[int, dict[str, Moments]]  # layer -> pooling -> moments


@dataclass
class _Rows:
    """What is known of a block's samples, a row each, before they enter the run.

    Attributes
    ----------
    pooled, residuals : layer -> pooling -> `[N, d_sae]` activations and `[N, d_in]` residuals, float32.
    rollouts : graded; None where a sample has not been, whose other rows are not set either.
    """

    pooled: dict[int, dict[str, Tensor]]
    residuals: dict[int, dict[str, Tensor]]
    rollouts: list[Rollout | None]

    def keep(self, there: Sequence[int]) -> None:
        """Leave out all samples but these, of what is pooled."""
        for of_layer in (*self.pooled.values(), *self.residuals.values()):
            for pool, rows in of_layer.items():
                of_layer[pool] = rows[torch.tensor(there, dtype=torch.int64, device=rows.device)]


@dataclass
class BlockCollector:
    """What every block of one collection needs."""

    run: Run
    samples: Samples
    encoders: Mapping[int, SparseEncoder]
    keeper: Keeper
    options: Options
    journal: Journal | None = None

    def collect(self, number: int, block: list[int], done: Callable[[int], object]) -> None:
        """Take in a block's samples, then fold them into the run; `done` is told how many, batch by batch.

        What goes wrong in a batch leaves the run with those before it.
        """
        rows = self._rows_of(len(block))
        try:
            for batch in self.samples.source.plan(block):
                self._batch([block[row] for row in batch], batch, rows)
                done(len(batch))
        except BaseException:
            # Should folding fail as well, that has been noted, and the first reason is the one to give.
            with contextlib.suppress(Exception):
                self._fold(number, block, rows)
            raise
        self._fold(number, block, rows)

    def _rows_of(self, n: int) -> _Rows:
        """Room for n samples."""
        made = {layer: empty_rows(n, e, self.options.pools, self._device(layer)) for layer, e in self.encoders.items()}
        pooled = {layer: rows for layer, (rows, _) in made.items()}
        residuals = {layer: rows for layer, (_, rows) in made.items()}
        return _Rows(pooled, residuals, [None] * n)

    def _batch(self, batch: list[int], at: list[int], rows: _Rows) -> None:
        """Have some samples' completions, grade, encode and pool them, into these rows of their block."""
        pools = {
            layer: BatchPool(
                encoder, len(batch), self.options.pools, self.options.backend,
                starts_at_last_prompt=self.options.positions == "generated",
            )  # fmt: skip
            for layer, encoder in self.encoders.items()
        }
        rollouts, residuals = self.samples.source.read(
            batch, lambda layer, x, cu_seqlens: pools[layer].add(*self._checked(layer, x, cu_seqlens, batch))
        )
        rewards = self.samples.grade(rollouts, batch)
        graded = [replace(rollout, rewards=dict(given)) for rollout, given in zip(rollouts, rewards)]
        if self.journal:
            self.journal.add_rollouts(graded)
        for layer, pool in pools.items():
            x, cu_seqlens = self._checked(layer, *residuals.packed(layer), batch)
            last_prompt = residuals.last_prompt(layer).to(x.device)  # it is among the tokens that were checked
            for into, found in zip((rows.pooled, rows.residuals), pool.finish(x, cu_seqlens, last_prompt)):
                for name, values in found.items():
                    into[layer][name][at] = values
        for row, rollout in zip(at, graded):
            rows.rollouts[row] = rollout

    def _fold(self, number: int, block: list[int], rows: _Rows) -> None:
        """Fold what there is of a block into the run: all of it, or nothing."""
        there = [row for row, rollout in enumerate(rows.rollouts) if rollout is not None]
        if not there:
            return
        run = self.run
        samples = [block[row] for row in there]
        rollouts = {block[row]: rollout for row, rollout in enumerate(rows.rollouts) if rollout is not None}
        names = list(next(iter(rollouts.values())).rewards)
        given = [[rollout.rewards[name] for name in names] for rollout in rollouts.values()]
        y = torch.tensor(given, dtype=torch.float64, device="cpu")
        if len(there) < len(block):
            rows.keep(there)
        self.keeper.make_room(rows.pooled)
        with _uninterrupted():
            moments = self._updated(run.moments, rows.pooled, y)
            residuals = self._updated(run.residuals, rows.residuals, y)
            try:
                self.keeper.add(number, samples, rows.pooled, y[:, 0], self._groups(samples))
            except Exception:
                # Part of the layers have the block now, and a copy of everything is too much to keep for this.
                self.keeper.give_up()
                raise
            finally:
                run.moments, run.residuals = moments, residuals
                run.add_rollouts(rollouts)
            kept = {layer: evidences[run.pool] for layer, evidences in run.evidence.items()}
            if kept:
                run.snapshots.append(stability.snapshot(kept))

    def _updated(self, states: _Moments, rows: Mapping[int, Mapping[str, Tensor]], y: Tensor) -> _Moments:
        """Moments with a block's rows folded in; those given are left as they are."""
        fresh: _Moments = {layer: {} for layer in states}
        for layer, pools in rows.items():
            for pool, of_pool in pools.items():
                state = states[layer][pool]
                fresh[layer][pool] = Moments(state.d_sae, y.shape[1], device=state.device)
                ops.update_moments(of_pool, y.to(state.device), fresh[layer][pool], backend=self.options.backend)
                if state.n:  # of the first block it is not known before how many rewards there are
                    fresh[layer][pool].merge(state)
        return fresh

    def _groups(self, samples: Sequence[int]) -> list[int] | None:
        """Which prompts some samples are of; None where each is of its own."""
        groups = self.samples.groups
        return [groups[i] for i in samples] if groups else None

    def _device(self, layer: int) -> torch.device:
        return self.run.moments[layer][self.run.pool].device

    def _checked(self, layer: int, x: Tensor, cu_seqlens: Tensor, batch: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The captured tokens on the device of the layer's moments, after a look for NaN."""
        device = self._device(layer)
        x, cu_seqlens = x.to(device), cu_seqlens.to(device)
        self._check_finite(x, cu_seqlens, self.run.points[layer], batch)
        return x, cu_seqlens

    def _check_finite(self, x: Tensor, cu_seqlens: Tensor, point: HookPoint, batch: Sequence[int]) -> None:
        finite = torch.isfinite(x).all(dim=1)
        if bool(finite.all()):
            return
        at = int((~finite).nonzero()[0])
        sample = batch[int(torch.searchsorted(cu_seqlens, at, right=True)) - 1]
        raise CorrSteerError(
            f"the model's activations at {point} are NaN or infinite for {self.samples.origin(sample)}; "
            f"load the model in bfloat16 or float32, or take the example out"
        )


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Have an interrupt from the keyboard wait until the end."""
    before = signal.getsignal(signal.SIGINT)
    if before is None or threading.current_thread() is not threading.main_thread():  # it is not Python's to change
        yield
        return
    waiting = []
    signal.signal(signal.SIGINT, lambda *_: waiting.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if waiting:
        signal.raise_signal(signal.SIGINT)
