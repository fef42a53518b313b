"""`Example`: one prompt and what is known about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Example:
    """One prompt and what is known about it.

    ``answer`` is a tuple where several answers are acceptable, and None only where the grader does without.
    ``fields`` holds the row's other keys untouched. ``source`` says where the row stood: ``train.jsonl:12``.
    """

    prompt: str
    answer: str | tuple[str, ...] | None
    fields: dict[str, Any]
    source: str
