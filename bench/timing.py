"""How contestants are timed: interleaved round by round, so that a drifting clock hits all of them alike."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

ROUNDS = (5, 200)  # fewest and most


class WallTimer:
    """Milliseconds from a call to its return, on the CPU."""

    def __call__(self, call: Callable[[], object]) -> float:
        start = time.perf_counter_ns()
        call()
        return (time.perf_counter_ns() - start) / 1e6


class CpuTimer:
    """Milliseconds of CPU that a call takes, of all threads of the process, whatever else the machine does meanwhile.

    With several threads they spin while they wait for each other, which counts too: measure with one.
    """

    def __call__(self, call: Callable[[], object]) -> float:
        start = time.process_time_ns()
        call()
        return (time.process_time_ns() - start) / 1e6


class HostTimer(WallTimer):
    """Milliseconds that a call keeps the host; the GPU catches up between calls, where no clock runs."""

    def __call__(self, call: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        return super().__call__(call)


class CudaTimer:
    """Milliseconds of a call on the GPU, between two events.

    The launches are queued behind a delay, so that the GPU never waits for the host: what a call costs the host is
    measured by `HostTimer`. Where the GPU has come to the first event before the last launch was queued, the delay is
    doubled and the call repeated, up to a limit.
    """

    LONGEST = 1 << 23  # clock cycles, some milliseconds

    def __init__(self):
        self.delay = 1 << 18
        self.exposed = 0  # measurements in which the host was not ahead even so

    def __call__(self, call: Callable[[], object]) -> float:
        while True:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(self.delay)
            start.record()
            call()
            end.record()
            ahead = not start.query()
            end.synchronize()
            if ahead or self.delay >= self.LONGEST:
                self.exposed += not ahead
                return start.elapsed_time(end)
            self.delay *= 2


def interleaved(
    contestants: Mapping[str, Callable[[int], object]], rounds: int, timer: Callable[[Callable[[], object]], float]
) -> dict[str, list[float]]:
    """Milliseconds of each contestant in each round.

    Parameters
    ----------
    contestants : by name, a function of the round's number (by which it picks its inputs).
    timer : calls a function once and returns the milliseconds.
    """
    names = list(contestants)
    times: dict[str, list[float]] = {name: [] for name in names}
    for at in range(rounds):
        turn = at % len(names)  # each one goes first in turn, and so follows each other
        for name in names[turn:] + names[:turn]:
            times[name].append(timer(functools.partial(contestants[name], at)))
    return times


def rounds_within(seconds: float, contestants: Mapping[str, Callable[[int], object]], timer) -> int:
    """Warm up with one round, and how many like it fit into `seconds`."""
    start = time.perf_counter()
    interleaved(contestants, 1, timer)
    fewest, most = ROUNDS
    return max(fewest, min(most, int(seconds / (time.perf_counter() - start))))


def summary(times: Sequence[float]) -> dict[str, float]:
    """Median and the middle 60 % of milliseconds."""
    p20, median, p80 = np.percentile(times, (20, 50, 80))
    return {"median_ms": float(median), "p20_ms": float(p20), "p80_ms": float(p80), "rounds": len(times)}


def ratio(times: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Median and the middle 60 % of the rounds' own ratios, times / other."""
    p20, median, p80 = np.percentile(np.divide(times, other), (20, 50, 80))
    return {"median": float(median), "p20": float(p20), "p80": float(p80)}
