"""`Question`: what a row of a benchmark asks, and what a function that reads rows is written with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from corrsteer.tasks.graders import TaskError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CHOICE = "{question}\n{options}\nChoose one of the following options only: {labels}\nAnswer:"  # as the paper asks
SHOWN_CHOICE = "{question}\n{options}\nAnswer: {answer}\n"  # one that is answered


@dataclass(frozen=True)
class Question:
    """What a row asks.

    Attributes
    ----------
    text : the question, with what has to be read before it.
    answer : as the grader takes it; for a choice the label.
    category : None where the row does not say.
    options : to choose from, in the order of their labels A, B, ...
    """

    text: str
    answer: str | None = None
    category: str | None = None
    options: tuple[str, ...] = ()


def column(row: Mapping[str, Any], *names: str) -> Any:
    """The first of these columns that a row has.

    Raises
    ------
    TaskError : where it has none.
    """
    for name in names:
        if name in row:
            return row[name]
    raise TaskError(f"no column {' or '.join(map(repr, names))} among {', '.join(map(str, row)) or 'none'}")


def text(row: Mapping[str, Any], *names: str) -> str:
    """The same, which must be text that is not empty."""
    value = column(row, *names)
    if not isinstance(value, str) or not value.strip():
        raise TaskError(f"column {names[0]!r} must be text, got {value!r:.40}")
    return value


def texts(row: Mapping[str, Any], *names: str) -> tuple[str, ...]:
    """The same, which must be a list of such text."""
    value = column(row, *names)
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(one, str) for one in value):
        raise TaskError(f"column {names[0]!r} must be a list of text, got {value!r:.40}")
    return tuple(value)


def label(answer: Any, options: Sequence[str]) -> str:
    """The label of the right option, which is given as its label or as its index, counted from 0.

    Raises
    ------
    TaskError : for what is neither.
    """
    labels = LETTERS[: len(options)]
    known = {found: found for found in labels} | {str(at): found for at, found in enumerate(labels)}
    found = known.get(str(answer).strip()) if isinstance(answer, (str, int)) and answer is not True else None
    if found is None:
        raise TaskError(f"the answer must be one of {listed(labels)}, or its index, got {answer!r:.40}")
    return found


def listed(labels: Sequence[str]) -> str:
    """``A, B, C, or D``."""
    return ", ".join([*labels[:-1], f"or {labels[-1]}"]) if len(labels) > 1 else "".join(labels)
