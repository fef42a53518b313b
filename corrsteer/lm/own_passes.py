"""Forward passes that are run for a purpose of corrsteer's own, which hooks must know of."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

_now = threading.local()


@contextlib.contextmanager
def probe() -> Iterator[None]:
    """Passes of this thread are only to look at the model: nothing is captured or steered."""
    with _set("probing"):
        yield


@contextlib.contextmanager
def read_ahead() -> Iterator[None]:
    """Calls of `generate` in this thread read the beginning of longer prompts: none of their tokens is a last one."""
    with _set("reading_ahead"):
        yield


def probing() -> bool:
    """Whether `probe` is open in this thread."""
    return getattr(_now, "probing", False)


def reading_ahead() -> bool:
    """Whether `read_ahead` is open in this thread."""
    return getattr(_now, "reading_ahead", False)


@contextlib.contextmanager
def _set(name: str) -> Iterator[None]:
    before = getattr(_now, name, False)
    setattr(_now, name, True)
    try:
        yield
    finally:
        setattr(_now, name, before)
