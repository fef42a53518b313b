"""The batches of a collection: those that are there, those read here, and those that other processes read."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from corrsteer.rollouts.journal import POLL
from corrsteer.runs.batches import Batch, BatchReader
from corrsteer.runs.journal import CollectionJournal, batch_name


@dataclass(frozen=True)
class SharedBatches:
    """Batches by the number of their block, and theirs in it.

    Attributes
    ----------
    blocks : samples by the number of their block, in the order in which blocks are taken.
    plans : each block's batches, as places in it.
    """

    reader: BatchReader
    blocks: Mapping[int, Sequence[int]]
    plans: Mapping[int, Sequence[Sequence[int]]]
    journal: CollectionJournal | None

    def get(self, number: int, batch: int) -> Batch:
        """A batch of a block, read here unless it is there. While another process reads it, others are read."""
        if self.journal is None:
            return self._read(number, batch)
        while not self.journal.has(number, batch):
            found = self._make_one((number, batch))
            if found is None:
                time.sleep(POLL)
            elif found[0] == (number, batch):
                return found[1]
        return self.journal.read(number, batch)

    def there(self, number: int, batch: int) -> Batch | None:
        """A batch, if it is there."""
        assert self.journal is not None, "batches are kept in one"
        return self.journal.read(number, batch) if self.journal.has(number, batch) else None

    def help(self) -> bool:
        """Have the collecting process put blocks together, and read batches for it; becoming that process is True, and
        False that it is done."""
        assert self.journal is not None, "processes share one"
        shared = self.journal.journal
        while not shared.finished:
            if shared.collects():
                return not shared.finished
            if self._make_one() is None:
                time.sleep(POLL)
        return False

    def _make_one(self, first: tuple[int, int] | None = None) -> tuple[tuple[int, int], Batch] | None:
        """Read a batch that is not there and that nobody is at, the first from there on; None where there is none."""
        assert self.journal is not None, "processes share one"
        for number, batch in self._units(first):
            if self.journal.has(number, batch):
                continue
            with self.journal.journal.claimed(batch_name(number, batch)) as mine:
                if mine and not self.journal.has_block(number):
                    found = self._read(number, batch)
                    self.journal.write(number, batch, found)
                    return (number, batch), found
        return None

    def _units(self, first: tuple[int, int] | None) -> Iterator[tuple[int, int]]:
        every = [(number, batch) for number in self.blocks for batch in range(len(self.plans[number]))]
        return iter(every if first is None else every[every.index(first) :])

    def _read(self, number: int, batch: int) -> Batch:
        block = self.blocks[number]
        return self.reader.read([block[place] for place in self.plans[number][batch]])
