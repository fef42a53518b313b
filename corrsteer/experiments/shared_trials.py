"""Trials whose graded completions are kept in a journal: gone on with, and shared among processes.

A unit is the rows that are written together. A process takes all of a part, whose prompts it reads once, while there
are parts that nobody has; then it helps others with theirs, from the end on.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from corrsteer.errors import CorrSteerError
from corrsteer.experiments.trial_batches import GradedRow, Part
from corrsteer.files import to_json
from corrsteer.rollouts.journal import POLL, Journal


def complete_shared(parts: Sequence[Part], journal: Journal, call: str) -> Iterator[list[GradedRow]]:
    """All rows, as they are known: written here, before, or by another process.

    Parameters
    ----------
    call : what tells this call from others. Calls with a journal are the same in the same order.

    Raises
    ------
    CorrSteerError : where the journal holds another call here.
    """
    journal.calls += 1
    left = [_KeptPart(part, journal, f"trials_{journal.calls}.{number}", call) for number, part in enumerate(parts)]
    while left:
        waiting = []
        for part in left:
            with part.claimed() as mine:
                if mine:
                    yield from part.write()
                    continue
            if part.whole:
                yield from part.read()
            else:
                waiting.append(part)
        if waiting and len(waiting) == len(left) and not any(part.help() for part in waiting):
            time.sleep(POLL)
        left = waiting


@dataclass
class _KeptPart:
    """A part, and its rows in a journal: a unit for each batch, and one that says which there are, once all are."""

    part: Part
    journal: Journal
    name: str
    call: str

    def claimed(self) -> contextlib.AbstractContextManager[bool]:
        """Whether all of it is this process' to write."""
        return self.journal.claimed(self.name)

    @property
    def whole(self) -> bool:
        """Whether all rows are there."""
        return self.journal.has(self.name)

    def read(self) -> Iterator[list[GradedRow]]:
        """Rows that are there."""
        for start in self.journal.read(self.name):
            yield self._rows(start)

    def write(self) -> Iterator[list[GradedRow]]:
        """Write what is not there, and wait for what helpers are at."""
        starts = range(0, len(self.part.rows), self._most)
        for start in starts:
            self._write(start)
            if self.journal.has(self._unit(start)):
                yield self._rows(start)
                continue
            for _ in self.journal.share([self._unit(start)], lambda _, at=start: self._text(at)):
                yield self._rows(start)
        self.journal.write(self.name, "".join(f"{start}\n" for start in starts))
        self.part.forget()

    def help(self) -> bool:
        """Write one batch that nobody is at, the last such; whether there was one."""
        if self.part.fits_one_batch:
            return False
        for start in reversed(range(0, len(self.part.rows), self._most)):
            if self.whole:
                break
            if self._write(start):
                return True
        self.part.forget()
        return False

    @functools.cached_property
    def _most(self) -> int:
        """Rows of a batch: as the first has it, if it is there, so that prompts need not be read to know."""
        first = self._unit(0)
        return len(self._rows(0)) if self.journal.has(first) else self.part.most

    def _write(self, start: int) -> bool:
        with self.journal.claimed(self._unit(start)) as mine:
            if mine:
                self.journal.write(self._unit(start), self._text(start))
            return mine

    def _text(self, start: int) -> str:
        lines = [{"call": self.call}, *self.part.write(start, self._most)]
        return "".join(to_json(line) + "\n" for line in lines)

    def _rows(self, start: int) -> list[GradedRow]:
        described, *rows = self.journal.read(self._unit(start))
        if described != {"call": self.call}:
            raise CorrSteerError(
                f"{self.journal.path(self._unit(start))} holds other trials than are asked for here, as if they had "
                f"been asked for in another order; remove {self.journal.folder} to begin anew"
            )
        return [GradedRow(*row) for row in rows]

    def _unit(self, start: int) -> str:
        return f"{self.name}.{start}"
