"""What judges were asked in this process. It imports nothing, as every command looks here when it ends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class Usage:
    """What was asked of a judge in this process, and what that cost.

    Attributes
    ----------
    requests, cached : replies from the server, and from the disk.
    prompt_tokens, completion_tokens : of the requests, as the server counts them.
    cost : of these, in the prices' currency; None without prices.
    """

    requests: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = None

    def __str__(self) -> str:
        cost = "" if self.cost is None else f", cost {self.cost:.4f}"
        return (
            f"{self.requests} requests and {self.cached} replies from the cache, {self.prompt_tokens} tokens in, "
            f"{self.completion_tokens} out{cost}"
        )


_SPENT: dict[str, Usage] = {}


def usage_of(label: str, *, priced: bool) -> Usage:
    """The tally of a judge, by its label; all judges of one label share it."""
    return _SPENT.setdefault(label, Usage(cost=0.0 if priced else None))


def spent() -> Iterator[str]:
    """A line for each judge that this process has asked something."""
    for label, usage in _SPENT.items():
        if usage.requests or usage.cached:
            yield f"{label}: {usage}"
