"""One block of a collection: its examples are generated and graded, encoded and pooled, and folded into the run.

The block is what labels are permuted within, so it enters the run whole; what goes wrong leaves the run with the
batches before it.
"""

from __future__ import annotations

import contextlib
import random
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from corrsteer import ops
from corrsteer.errors import CorrSteerError
from corrsteer.lm.capture import Capture
from corrsteer.lm.generation import Generator
from corrsteer.lm.hook_points import HookPoint
from corrsteer.ops import Moments
from corrsteer.runs.options import Options
from corrsteer.runs.pooling import RESIDUAL_POOLINGS, BatchPool
from corrsteer.runs.run import Run
from corrsteer.sae.encoder import SparseEncoder
from corrsteer.stats import stability
from corrsteer.tasks import Example, Task

_Moments = dict[int, dict[str, Moments]]  # layer -> pooling -> moments


def shuffled_blocks(lengths: Sequence[int], block_size: int, seed: int) -> dict[int, list[int]]:
    """Examples by the number of their block, in the order in which blocks are taken.

    Examples are shuffled. The block of the longest prompt comes first, so that what is too large for the memory fails
    at once; it keeps its number.
    """
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    blocks = dict(enumerate(order[at : at + block_size] for at in range(0, len(order), block_size)))
    first = max(blocks, key=lambda number: max(lengths[i] for i in blocks[number]))
    return {first: blocks.pop(first), **blocks}


@dataclass
class _Rows:
    """What is known of a block's samples, a row each, before they enter the run.

    Attributes
    ----------
    pooled, residuals : layer -> pooling -> `[N, d_sae]` activations and `[N, d_in]` residuals, float32.
    rewards : `[N]` float64 on the CPU; NaN where a sample has not been graded, whose other rows are not set either.
    """

    pooled: dict[int, dict[str, Tensor]]
    residuals: dict[int, dict[str, Tensor]]
    rewards: Tensor

    def keep(self, there: Tensor) -> None:
        """Leave out all samples but these, of what is pooled."""
        for of_layer in (*self.pooled.values(), *self.residuals.values()):
            for pool, rows in of_layer.items():
                of_layer[pool] = rows[there.to(rows.device)]


@dataclass
class BlockCollector:
    """What every block of one collection needs."""

    run: Run
    generator: Generator
    encoders: Mapping[int, SparseEncoder]
    task: Task
    prompts: list[list[int]]
    keys: list[int]  # of the samples
    options: Options

    def collect(self, number: int, block: list[int], done: Callable[[int], object]) -> None:
        """Generate and grade a block's examples, then fold them into the run; `done` is told how many, batch by batch.

        What goes wrong in a batch leaves the run with those before it.
        """
        rows = self._rows_of(len(block))
        try:
            for batch in self.generator.plan([self.prompts[i] for i in block], share=self._shares):
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

        def rows(layer: int, pools: Sequence[str], width: int) -> dict[str, Tensor]:
            device = self._device(layer)
            return {pool: torch.empty(n, width, dtype=torch.float32, device=device) for pool in pools}

        return _Rows(
            {layer: rows(layer, self.options.pools, e.d_sae) for layer, e in self.encoders.items()},
            {layer: rows(layer, RESIDUAL_POOLINGS, e.d_in) for layer, e in self.encoders.items()},
            torch.full((n,), torch.nan, dtype=torch.float64, device="cpu"),
        )

    def _batch(self, batch: list[int], at: list[int], rows: _Rows) -> None:
        """Generate, grade, encode and pool some examples, into these rows of their block."""
        examples = [self.task.examples[i] for i in batch]
        pools = {
            layer: BatchPool(encoder, len(batch), self.options.pools, self.options.backend)
            for layer, encoder in self.encoders.items()
        }
        generator = self.generator
        with Capture(
            generator.model,
            self.run.points,
            stop_tokens=generator.stops,
            positions=self.options.positions,
            max_new_tokens=generator.decoding.max_new_tokens,
            exclude_tokens=self.options.exclude_tokens,
            buffer_bytes=self.options.buffer_bytes,
            sink=lambda layer, x, cu_seqlens: pools[layer].add(*self._checked(layer, x, cu_seqlens, examples)),
        ) as capture:
            completions = generator.complete(
                [self.prompts[i] for i in batch], [self.keys[i] for i in batch],
                share=self._shares, capture=capture,
            )  # fmt: skip
        grades = [self.task.grade(written.text, example) for written, example in zip(completions, examples)]
        for layer, pool in pools.items():
            x, cu_seqlens = self._checked(layer, *capture.packed(layer), examples)
            last_prompt = capture.last_prompt(layer).to(x.device)  # it is among the tokens that were checked
            for into, found in zip((rows.pooled, rows.residuals), pool.finish(x, cu_seqlens, last_prompt)):
                for name, values in found.items():
                    into[layer][name][at] = values
        rows.rewards[at] = torch.tensor(grades, dtype=torch.float64, device="cpu")

    def _fold(self, number: int, block: list[int], rows: _Rows) -> None:
        """Fold what there is of a block into the run: all of it, or nothing."""
        there = rows.rewards.isfinite().nonzero()[:, 0]
        if len(there) == 0:
            return
        run, y = self.run, rows.rewards[there]
        known = run.rewards.clone()
        known[[block[i] for i in there.tolist()]] = y
        with _uninterrupted():
            if len(there) < len(block):
                rows.keep(there)
            moments = self._updated(run.moments, rows.pooled, y)
            residuals = self._updated(run.residuals, rows.residuals, y)
            try:
                for layer, pools in rows.pooled.items():
                    for pool, pooled in pools.items():
                        run.evidence[layer][pool].update(pooled, y, number, backend=self.options.backend)
            except Exception:
                # Part of the layers have the block now, and a copy of everything is too much to keep for this.
                run.evidence = {}
                run.notes.append("a block could not be added to the evidence, so there are no intervals or tests")
                raise
            finally:
                run.moments, run.residuals, run.rewards = moments, residuals, known
            kept = {layer: evidences[run.pool] for layer, evidences in run.evidence.items()}
            if kept:
                run.snapshots.append(stability.snapshot(kept))

    def _updated(self, states: _Moments, rows: Mapping[int, Mapping[str, Tensor]], y: Tensor) -> _Moments:
        """Moments with a block's rows folded in; those given are left as they are."""
        fresh: _Moments = {layer: {} for layer in states}
        for layer, pools in rows.items():
            for pool, of_pool in pools.items():
                state = states[layer][pool]
                fresh[layer][pool] = Moments(state.d_sae, device=state.device)
                ops.update_moments(of_pool, y.to(state.device), fresh[layer][pool], backend=self.options.backend)
                fresh[layer][pool].merge(state)
        return fresh

    @property
    def _shares(self) -> bool:
        """Whether what prompts begin with may be read once: not where it is captured of each."""
        return self.options.positions == "generated"

    def _device(self, layer: int) -> torch.device:
        return self.run.moments[layer][self.run.pool].device

    def _checked(self, layer: int, x: Tensor, cu_seqlens: Tensor, examples: list[Example]) -> tuple[Tensor, Tensor]:
        """The captured tokens on the device of the layer's moments, after a look for NaN."""
        device = self._device(layer)
        x, cu_seqlens = x.to(device), cu_seqlens.to(device)
        _check_finite(x, cu_seqlens, self.run.points[layer], examples)
        return x, cu_seqlens


def _check_finite(x: Tensor, cu_seqlens: Tensor, point: HookPoint, examples: list[Example]) -> None:
    finite = torch.isfinite(x).all(dim=1)
    if bool(finite.all()):
        return
    at = int((~finite).nonzero()[0])
    sample = int(torch.searchsorted(cu_seqlens, at, right=True)) - 1
    raise CorrSteerError(
        f"the model's activations at {point} are NaN or infinite for {examples[sample].source}; "
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
