"""Other rewards for rollouts that are there: from graders, and from a file."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from corrsteer.arguments import as_path
from corrsteer.rollouts.rollout import Rollout, RolloutError, check_characters, finite
from corrsteer.rollouts.rollout_file import read_lines
from corrsteer.tasks import Example, GraderSpec, Task
from corrsteer.tasks.grading import Grading


def task_of(rollouts: Sequence[Rollout], grader: GraderSpec = None, name: str = "rollouts") -> Task:
    """A task whose examples are those of rollouts, one each and in their order, so that they can be graded again.

    An example has the rollout's answer, its `meta` as `fields`, and as its prompt the text, or of chat messages the
    last of the user's. It is for grading and for being told apart: a conversation cannot be generated from it again.

    Parameters
    ----------
    grader : as for `Task.from_rows`; None for a task without rewards.

    Raises
    ------
    TaskError : for what is no grader, or an example whose answer it cannot do with.
    RolloutError : without any rollouts.
    """
    if not rollouts:
        raise RolloutError("rollouts must be one or more, got none")
    examples = tuple(Example(each.prompt_text, each.answer, each.meta, each.where) for each in rollouts)
    messages = [each.prompt for each in rollouts if isinstance(each.prompt, tuple)]
    systems = [m[0]["content"] if m[0]["role"] == "system" else None for m in messages]
    chat = len(messages) == len(rollouts)
    same = chat and isinstance(systems[0], str) and all(system == systems[0] for system in systems)
    return Task(name, examples, Grading(()), chat, systems[0] if same else None).graded_by(grader)


def regraded(rollouts: Sequence[Rollout], grader: GraderSpec, batch_size: int = 256) -> list[Rollout]:
    """The rollouts with the rewards that graders give, and no others.

    Parameters
    ----------
    batch_size : how many a batched grader is given at once.

    Raises
    ------
    TaskError : for a grader that fails, or returns something else than it must.
    RolloutError : for a completion whose text is not known, see `fill_in`.
    """
    task = task_of(rollouts, grader)
    for rollout in rollouts:
        if rollout.completion is None:
            raise RolloutError(f"{rollout.where}: the completion's text is not known; fill it in with a tokenizer")
    graded: list[Rollout] = []
    for at in range(0, len(rollouts), batch_size):
        some = rollouts[at : at + batch_size]
        rewards = task.grade([each.completion or "" for each in some], task.examples[at : at + batch_size])
        graded += [replace(each, rewards=given) for each, given in zip(some, rewards)]
    return graded


def join_rewards(
    rollouts: Sequence[Rollout], path: str | os.PathLike[str], names: Sequence[str] | None = None
) -> list[Rollout]:
    """The rollouts with rewards from a file, found by id; those that they had come after.

    Parameters
    ----------
    path : JSONL, an object a line, or CSV with a header: an `id`, and a number for each reward. In JSONL, `rewards` may
        hold the numbers by name, as in a file of rollouts.
    names : which of the file's columns are rewards, the default first; by default all but `id`.

    Raises
    ------
    RolloutError : for an id that no rollout has, that is there twice, or that is missing; for a reward that is no
        finite number, and for lines with different rewards.
    """
    path = as_path("path", path)
    where: dict[str, str] = {}
    given: dict[str, dict[str, float]] = {}
    known = {rollout.id for rollout in rollouts}

    def take(number: int, row: Any) -> None:
        key, rewards = _row(row, names)
        if key in given:
            raise RolloutError(f"id {key!r} was there before, in {where[key]}; give each rollout's rewards once")
        first = next(iter(given.values()), rewards)
        given[key], where[key] = rewards, f"{path.name}:{number}"
        if key not in known:
            raise RolloutError(f"id {key!r} is no rollout's")
        if set(rewards) != set(first):
            raise RolloutError(
                f"every line must have the same rewards, got {', '.join(rewards)} after {', '.join(first)}"
            )

    read_lines(path, take, "reward", lines=_csv_rows(path) if path.suffix.lower() == ".csv" else None)
    missing = [rollout.id for rollout in rollouts if rollout.id not in given]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise RolloutError(f"{path.name} must have rewards of every rollout, but has none of {missing[0]!r}{more}")
    order = list(next(iter(given.values())))
    return [
        replace(each, rewards={name: given[each.id][name] for name in order} | _others(each, order))
        for each in rollouts
    ]


def _others(rollout: Rollout, names: Sequence[str]) -> dict[str, float]:
    return {name: reward for name, reward in rollout.rewards.items() if name not in names}


def _row(row: Any, names: Sequence[str] | None) -> tuple[str, dict[str, float]]:
    """The id and the rewards of a line."""
    if not isinstance(row, Mapping):
        raise RolloutError(f"a line must be an object with an id and rewards, got {type(row).__name__}")
    key = row.get("id")
    if isinstance(key, int) and not isinstance(key, bool):
        key = str(key)
    if not isinstance(key, str) or not key:
        raise RolloutError(f"id must be text that is not empty, got {key!r:.40}")
    columns = {name: value for name, value in row.items() if name not in ("id", "rewards")}
    if isinstance(row.get("rewards"), Mapping):  # a file of rollouts, whose other fields are none
        columns = dict(row["rewards"])
    for name in names or ():
        if name not in columns:
            raise RolloutError(f"there is no reward {name!r} among {', '.join(map(str, columns)) or 'none'}")
    rewards = {name: finite(name, columns[name]) for name in names or columns}
    for name in rewards:
        check_characters("a reward's name", name)
    if not rewards:
        raise RolloutError("there must be at least one reward beside the id, got none")
    return key, rewards


def _csv_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows by the number of the line that they end on, numbers as numbers."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            if reader.fieldnames and len(set(reader.fieldnames)) < len(reader.fieldnames):
                raise RolloutError(f"{path.name}: a column is there twice in {', '.join(reader.fieldnames)}")
            for row in reader:
                if None in row or None in row.values():
                    yield reader.line_num, RolloutError(f"there must be {len(reader.fieldnames or ())} columns")
                else:
                    yield reader.line_num, {name: text if name == "id" else _number(text) for name, text in row.items()}
    except OSError as error:
        raise RolloutError(f"cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise RolloutError(f"{path.name} is not CSV in UTF-8: {error}") from error


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
