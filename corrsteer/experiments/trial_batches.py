"""The batches that trials are run in: rows of several trials on the same prompts, which are read once for all.

Which rows are written together depends on the trials and the prompts alone: not on what was written before, nor on how
many processes share the work.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from corrsteer.lm.generation import Generator, Within
from corrsteer.lm.hook_points import HookPoint
from corrsteer.lm.prefill import Begun
from corrsteer.steering.hooks import add_vectors
from corrsteer.tasks import Task


class GradedRow(NamedTuple):
    """A graded completion of a sample under a trial, and its share of the time."""

    trial: int
    sample: int
    text: str
    rewards: dict[str, float]
    tokens: int
    seconds: float
    grading_seconds: float


@dataclass(frozen=True)
class Kind:
    """Trials that steer the same positions.

    Attributes
    ----------
    trials : their numbers, and which of the vectors each adds; -1 for none.
    vectors : hook point -> `[V, d]` float32.
    """

    positions: str
    trials: dict[int, int]
    vectors: dict[HookPoint, Tensor]


@dataclass(frozen=True)
class Samples:
    """What all trials are run on.

    Attributes
    ----------
    prompts, keys : of each example of the task: token ids, and what it is sampled by, see `sample_keys`.
    """

    generator: Generator
    task: Task
    prompts: Sequence[list[int]]
    keys: Sequence[int]


class _Row(NamedTuple):
    """A sample of a trial, and which vector the trial adds."""

    trial: int
    vector: int
    sample: int


class Part:
    """Trials of one kind on some samples, whose rows are written some at a time.

    Attributes
    ----------
    rows : trial by trial, the samples of each.
    """

    def __init__(self, samples: Samples, kind: Kind, batch: Sequence[int]):
        self._samples, self._kind, self._batch = samples, kind, list(batch)
        self._shares = kind.positions == "generated"
        self._reading = 0.0  # seconds, a row
        self.rows: list[_Row] = [
            _Row(trial, vector, sample) for trial, vector in kind.trials.items() for sample in self._batch
        ]

    @functools.cached_property
    def most(self) -> int:
        """How many rows are written together."""
        generator, begun = self._samples.generator, self._begun
        if begun is None:
            return self._limit
        return min(self._limit, begun.most_rows(generator.decoding), _most_trials(generator, begun) * len(self._batch))

    @property
    def fits_one_batch(self) -> bool:
        """Whether all rows may be written together, as far as that is known before prompts are read."""
        return len(self.rows) <= self._limit

    @property
    def _limit(self) -> int:
        longest = max(len(self._samples.prompts[i]) for i in self._batch)
        return self._samples.generator.decoding.rows(longest)

    def write(self, at: int, most: int) -> list[GradedRow]:
        """Complete and grade so many rows, from one on."""
        generator, task, some = self._samples.generator, self._samples.task, self.rows[at : at + most]
        samples, within = [row.sample for row in some], _within(generator.model, self._kind, some)
        drawn, begun = [self._samples.keys[i] for i in samples], self._begun
        started = time.perf_counter()
        if begun is not None:
            places = {sample: place for place, sample in enumerate(self._batch)}
            written = generator.finish(begun.rows([places[i] for i in samples]), drawn, within)
        else:
            prompts = [self._samples.prompts[i] for i in samples]
            written = generator.complete(prompts, drawn, share=self._shares, within=within)
        writing = (time.perf_counter() - started) / sum(completion.tokens for completion in written)
        started = time.perf_counter()
        rewards = task.grade([each.text for each in written], [task.examples[i] for i in samples])
        grading = (time.perf_counter() - started) / len(some)
        return [
            GradedRow(row.trial, row.sample, each.text, given, each.tokens,
                      self._reading + writing * each.tokens, grading)
            for row, each, given in zip(some, written, rewards)
        ]  # fmt: skip

    def forget(self) -> None:
        """Free what was read of the prompts."""
        self.__dict__.pop("_begun", None)

    @functools.cached_property
    def _begun(self) -> Begun | None:
        """The prompts, read once for all trials; None where each batch reads them anew."""
        generator = self._samples.generator
        if not (self._shares and len(self._kind.trials) > 1 and generator.reuse.rows):
            return None
        started = time.perf_counter()
        begun = generator.read([self._samples.prompts[i] for i in self._batch])
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()  # otherwise the rows that are written first would pay for all
        self._reading = (time.perf_counter() - started) / len(self.rows)
        return begun


def complete(parts: Iterable[Part]) -> Iterator[list[GradedRow]]:
    """All rows, in the order in which they are written."""
    for part in parts:
        for at in range(0, len(part.rows), part.most):
            yield part.write(at, part.most)
        part.forget()


def _most_trials(generator: Generator, begun: Begun) -> int:
    """How many trials share batches: with more than one, what was read is copied for each, and weights read less often.

    One trial of all rows shares what was read with the next, without a copy.
    """
    weights = sum(parameter.nbytes for parameter in generator.model.parameters())
    copied = 2 * begun.nbytes  # read and written
    return 1 if copied > weights * generator.decoding.max_new_tokens else generator.decoding.batch_size


def _within(model: nn.Module, kind: Kind, rows: list[_Row]) -> Within:
    def steered(left: Sequence[int]) -> contextlib.AbstractContextManager[Any]:
        """Only what these rows add, where it is not nothing."""
        vectors = [rows[at].vector for at in left]
        used = sorted({vector for vector in vectors if vector >= 0})
        tables = {point: table[used] for point, table in kind.vectors.items() if bool(table[used].any())}
        if not tables:
            return contextlib.nullcontext()
        if used == sorted(set(vectors)) and len(used) == 1:
            return add_vectors(model, tables, None, kind.positions)
        places = {vector: at for at, vector in enumerate(used)}
        chosen = [places.get(vector, -1) for vector in vectors]
        return add_vectors(model, tables, torch.tensor(chosen, dtype=torch.int32, device="cpu"), kind.positions)

    return steered
