"""Files of rollouts: read whole, with every mistake found before anything is made of it, and written whole."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from corrsteer.arguments import as_path, shown
from corrsteer.files import write_utf8
from corrsteer.rollouts.rollout import Rollout, RolloutError

T = TypeVar("T")


def read_rollouts(path: str | os.PathLike[str]) -> list[Rollout]:
    """Read a UTF-8 file with one JSON object a line, see docs/rollouts.md. Blank lines are skipped.

    Where no line has an ``id``, it is the line's number; where a line has no ``sample``, it is how many lines before it
    have the same prompt.

    Raises
    ------
    RolloutError : for the first line that is no rollout, whose id was there before, or whose rewards have other names
        than those of the first line, with file and line and how many more there are; and for a file without any.
    """
    path = as_path("path", path)
    numbered = not any(isinstance(row, dict) and row.get("id") is not None for row in _parsable(path))

    def rollout(number: int, row: Any) -> Rollout:
        if numbered and isinstance(row, dict):
            row["id"] = number
        found = Rollout.from_row(row, f"{path.name}:{number}")
        if row.get("sample") is None:
            found = replace(found, sample=seen[_prompt_key(found)])
        seen[_prompt_key(found)] += 1
        return alike.check(found)

    seen: Counter[str] = Counter()
    alike = _Alike()
    return read_lines(path, rollout, "rollout")


def write_rollouts(path: str | os.PathLike[str], rollouts: Iterable[Rollout]) -> None:
    """Write a file of rollouts, whole or not at all; one that is there is replaced.

    Raises
    ------
    RolloutError : where two have the same id, or rewards of other names.
    CorrSteerError : where the file cannot be written.
    """
    alike = _Alike()
    write_utf8(path, "".join(alike.check(rollout).to_line() for rollout in rollouts))


def alike(rollouts: Iterable[Rollout]) -> list[Rollout]:
    """The rollouts as one file may hold them: each of its own id, rewards in the order of the first's.

    Raises
    ------
    RolloutError : for what is no rollout, and where two have the same id, or rewards of other names.
    """
    if isinstance(rollouts, (str, bytes)) or not isinstance(rollouts, Iterable):
        raise RolloutError(f"rollouts must be a sequence of them, got {shown(rollouts)}")
    found, checked = list(rollouts), _Alike()
    for at, rollout in enumerate(found):
        if not isinstance(rollout, Rollout):
            reason = "; leave out what a stopped collection did not reach" if rollout is None else ""
            raise RolloutError(f"rollouts[{at}] must be a Rollout, got {shown(rollout)}{reason}")
        found[at] = checked.check(rollout)
    return found


def read_lines(
    path: Path, take: Callable[[int, Any], T], what: str, lines: Iterable[tuple[int, Any]] | None = None
) -> list[T]:
    """What `take` makes of each line's number and JSON; the first mistake is reported, and how many more there are.

    Parameters
    ----------
    lines : numbers and what was read there already, or the mistake; by default lines of JSON.
    """
    taken: list[T] = []
    bad: list[str] = []
    for number, line in _lines(path) if lines is None else lines:
        try:
            if isinstance(line, RolloutError):
                raise line
            taken.append(take(number, _parse(line) if isinstance(line, bytes) else line))
        except RolloutError as error:
            bad.append(f"{path.name}:{number}: {error}")
    if bad:
        raise RolloutError(bad[0] + (f" (and {len(bad) - 1} more bad)" if len(bad) > 1 else ""))
    if not taken:
        raise RolloutError(f"{path.name} has no {what}s; it must have one a line")
    return taken


class _Alike:
    """What rollouts of one file must have in common: rewards of the same names; and what not: their ids."""

    def __init__(self) -> None:
        self.ids: set[str] = set()
        self.names: tuple[str, ...] | None = None

    def check(self, rollout: Rollout) -> Rollout:
        """The rollout, its rewards in the order of the first's."""
        if rollout.id in self.ids:
            raise RolloutError(f"id {rollout.id!r} is there twice; every rollout must have its own")
        if self.names is None:
            self.names = tuple(rollout.rewards)
        if set(self.names) != set(rollout.rewards):
            raise RolloutError(
                f"every rollout must have the same rewards, got {', '.join(rollout.rewards) or 'none'} after "
                f"{', '.join(self.names) or 'none'}"
            )
        self.ids.add(rollout.id)
        if tuple(rollout.rewards) == self.names:
            return rollout
        return replace(rollout, rewards={name: rollout.rewards[name] for name in self.names})


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, by number from 1; they end at newlines, and at nothing else that Unicode has for it."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise RolloutError(f"cannot read {path}: {error.strerror}") from error


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))  # -sig: editors on Windows open a file with a byte order mark
    except UnicodeDecodeError as error:
        raise RolloutError(f"not UTF-8: byte {line[error.start]:#04x} at position {error.start}") from error
    except (ValueError, RecursionError) as error:
        cut_off = "" if line.endswith(b"\n") else "; the line has no end, so the file may have been cut off here"
        raise RolloutError(f"not JSON: {error}{cut_off}") from error


def _parsable(path: Path) -> Iterator[Any]:
    for _, line in _lines(path):
        try:
            yield _parse(line)
        except RolloutError:
            continue


def _prompt_key(rollout: Rollout) -> str:
    return json.dumps(rollout.prompt_ids if rollout.prompt is None else rollout.prompt)
