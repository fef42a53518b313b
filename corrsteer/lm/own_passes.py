"""Forward passes that are run for a purpose of corrsteer's own, which hooks must know of."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

_now = threading.local()


@contextlib.contextmanager
def probe() -> Iterator[None]:
    """Passes of this thread are only to look at the model: nothing is captured or steered."""
    with _set("probing", True):
        yield


@contextlib.contextmanager
def prompts_of_width(width: int) -> Iterator[None]:
    """Prompts of calls of `generate` in this thread have so many columns, whether it is given their beginning, or them
    with what was generated before."""
    with _set("width", width):
        yield


def probing() -> bool:
    """Whether `probe` is open in this thread."""
    return getattr(_now, "probing", False)


def prompt_width() -> int | None:
    """What `prompts_of_width` was told; None where calls are given whole prompts."""
    return getattr(_now, "width", None)


@contextlib.contextmanager
def _set(name: str, value: object) -> Iterator[None]:
    before = getattr(_now, name, None)
    setattr(_now, name, value)
    try:
        yield
    finally:
        setattr(_now, name, before)
