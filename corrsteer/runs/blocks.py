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
from corrsteer.ops import Moments, RunningPool
from corrsteer.runs.options import Options
from corrsteer.runs.run import Run
from corrsteer.sae.encoder import SparseEncoder
from corrsteer.stats import stability
from corrsteer.tasks import Example, Task


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
        pooled = {
            layer: {
                pool: torch.empty(len(block), e.d_sae, dtype=torch.float32, device=self._device(layer))
                for pool in self.options.pools
            }
            for layer, e in self.encoders.items()
        }
        rewards = torch.full((len(block),), torch.nan, dtype=torch.float64, device="cpu")
        try:
            for rows in self.generator.plan([self.prompts[i] for i in block], share=self._shares):
                self._batch([block[row] for row in rows], rows, pooled, rewards)
                done(len(rows))
        except BaseException:
            # Should folding fail as well, that has been noted, and the first reason is the one to give.
            with contextlib.suppress(Exception):
                self._fold(number, block, pooled, rewards)
            raise
        self._fold(number, block, pooled, rewards)

    def _batch(self, batch: list[int], rows: list[int], pooled: dict[int, dict[str, Tensor]], rewards: Tensor) -> None:
        """Generate, grade, encode and pool some examples, into these rows of a block's activations and rewards."""
        examples = [self.task.examples[i] for i in batch]
        running: dict[int, RunningPool] = {}

        def take(layer: int, x: Tensor, cu_seqlens: Tensor) -> None:
            if layer not in running:
                running[layer] = RunningPool(self.encoders[layer], len(batch), self.options.backend)
            running[layer].add(*self._checked(layer, x, cu_seqlens, examples))

        generator = self.generator
        with Capture(
            generator.model,
            self.run.points,
            stop_tokens=generator.stops,
            positions=self.options.positions,
            max_new_tokens=generator.decoding.max_new_tokens,
            exclude_tokens=self.options.exclude_tokens,
            buffer_bytes=self.options.buffer_bytes,
            sink=take,
        ) as capture:
            completions = generator.complete(
                [self.prompts[i] for i in batch], [self.keys[i] for i in batch],
                share=self._shares, criteria=[capture.stopping_criterion],
            )  # fmt: skip
        grades = [self.task.grade(written.text, example) for written, example in zip(completions, examples)]
        for layer, encoder in self.encoders.items():
            x, cu_seqlens = self._checked(layer, *capture.packed(layer), examples)
            if capture.flushed:
                running[layer].add(x, cu_seqlens)
                found = {pool: running[layer].result(pool) for pool in self.options.pools}
            else:
                pools = self.options.pools
                pool = pools[0] if len(pools) == 1 else "both"
                out = ops.encode_pool(x, cu_seqlens, encoder, pool, backend=self.options.backend)
                found = dict(zip(("mean", "max"), out)) if isinstance(out, tuple) else {pool: out}
            for pool, values in found.items():
                pooled[layer][pool][rows] = values
        rewards[rows] = torch.tensor(grades, dtype=torch.float64, device="cpu")

    def _fold(self, number: int, block: list[int], pooled: dict[int, dict[str, Tensor]], rewards: Tensor) -> None:
        """Fold what there is of a block into the run: all of it, or nothing."""
        there = rewards.isfinite().nonzero()[:, 0]
        if len(there) == 0:
            return
        whole = len(there) == len(block)
        fresh = {
            layer: {pool: Moments(state.d_sae, device=state.device) for pool, state in states.items()}
            for layer, states in self.run.moments.items()
        }
        known = self.run.rewards.clone()
        known[[block[i] for i in there.tolist()]] = rewards[there]
        with _uninterrupted():
            for layer, pools in pooled.items():
                for pool, rows in pools.items():
                    pools[pool] = rows if whole else rows[there.to(rows.device)]
                    y = rewards[there].to(rows.device)
                    ops.update_moments(pools[pool], y, fresh[layer][pool], backend=self.options.backend)
                    fresh[layer][pool].merge(self.run.moments[layer][pool])
            try:
                for layer, pools in pooled.items():
                    for pool, rows in pools.items():
                        self.run.evidence[layer][pool].update(
                            rows, rewards[there], number, backend=self.options.backend
                        )
            except Exception:
                # Part of the layers have the block now, and a copy of everything is too much to keep for this.
                self.run.evidence = {}
                self.run.notes.append("a block could not be added to the evidence, so there are no intervals or tests")
                raise
            finally:
                self.run.moments, self.run.rewards = fresh, known
            kept = {layer: evidences[self.run.pool] for layer, evidences in self.run.evidence.items()}
            if kept:
                self.run.snapshots.append(stability.snapshot(kept))

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
