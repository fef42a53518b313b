"""Where the time of a job goes: functions are wrapped, and time belongs to the innermost that is running.

On a GPU each change of stage waits for it, so that what was launched in a stage is counted there. That slows a job
down, and so a job is timed without the clock and looked into in a run of its own.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from corrsteer.ops import registry

Place = tuple[Any, str, str]  # a class or module, the name of a function in it, and the stage that it is
REST = "rest"
OPERATIONS = {  # the operations of every backend
    "encode": "encode and pool", "encode_pool": "encode and pool", "encode_update": "encode and pool",
    "update_moments": "statistics", "update_sums": "statistics", "steer_add": "steering",
}  # fmt: skip


def now(device: torch.device) -> float:
    """Seconds by a clock: of the wall, once a GPU has done what it was given; of this process on a CPU."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


class StageClock:
    """Seconds by stage; `rest` is what happens outside of all of them."""

    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = {REST: 0.0}
        self._device = device
        self._open = [REST]

    @contextlib.contextmanager
    def watching(self, places: Iterable[Place], *, operations: bool = True) -> Iterator[None]:
        """Time what happens within, with the functions at these places wrapped, and every operation."""
        with contextlib.ExitStack() as stack:
            for owner, name, stage in places:
                self.seconds.setdefault(stage, 0.0)
                stack.enter_context(mock.patch.object(owner, name, self._wrapped(getattr(owner, name), stage)))
            if operations:
                stack.enter_context(self._operations())
            self._last = self._now()
            yield
            self._lap()

    @contextlib.contextmanager
    def _operations(self) -> Iterator[None]:
        """Backends whose operations are wrapped, in place of those that there are."""
        before = list(reversed(registry.registered()))  # the one tried first is registered last
        for backend in before:
            operations = {name: self._wrapped(call, OPERATIONS[name]) for name, call in backend.operations.items()}
            registry.register(replace(backend, operations=operations))
        try:
            yield
        finally:
            for backend in before:
                registry.register(backend)

    def _wrapped(self, call: Callable[..., Any], stage: str) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._lap()
            self._open.append(stage)
            try:
                return call(*args, **kwargs)
            finally:
                self._lap()
                self._open.pop()

        return timed

    def _lap(self) -> None:
        now = self._now()
        stage = self._open[-1]
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now

    def _now(self) -> float:
        return now(self._device)
