"""One case after the other: check ours, time everybody, keep what is known at any moment in the result."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from bench import eager, resident, timing
from bench.contestants import Contestant, contestants
from bench.shapes import Case

COMPILING = 60.0  # seconds that must be left for torch.compile to take part
LEFT_OUT = "torch.compile takes part at a few shapes only, as compiling is slow"


USUAL = ("measured", "not measured")  # outcomes that are nobody's fault


class Deadline:
    """When to stop starting anything; `seconds` from now."""

    def __init__(self, seconds: float):
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds, negative afterwards."""
        return self._end - time.monotonic()


def not_measured(case: Case, backends: Iterable[str], reason: str) -> dict[str, Any]:
    """The record of a case that was not run, with the reason why."""
    return {
        "name": case.name,
        **asdict(case),
        "ours": list(backends),
        "status": "not measured",
        "reason": reason,
        "contestants": {},
        "ratios": {},
    }


def all_cases(
    result: dict[str, Any],
    cases: Sequence[Case],
    device: torch.device,
    backends_of: Callable[[Case], Sequence[str]],
    deadline: Deadline,
    save: Callable[[], object],
    seconds: float,
) -> None:
    """Run the cases in order into `result["cases"]`, saving after each; none is missing there, run or not.

    Parameters
    ----------
    backends_of : ours, by backend, in a case.
    seconds : about how long to time a case, beyond its preparation.
    """
    unreached = "the run was stopped before"
    result["cases"] = [not_measured(case, backends_of(case), unreached) for case in cases]
    save()
    for at, case in enumerate(cases):
        if deadline.left() <= 0:
            result["cases"][at]["reason"] = "the time was used up"
            continue
        if case.compiled and deadline.left() < COMPILING:
            case = replace(case, compiled="")
        result["cases"][at] = one(case, device, backends_of(case), seconds)
        save()
        print(line(result["cases"][at]), flush=True)
    save()


def one(case: Case, device: torch.device, backends: Sequence[str], seconds: float) -> dict[str, Any]:
    """Check, measure and compare the contestants of a case; errors become part of the record.

    Where one of ours is wrong or fails so does the case, but the times of those that are right are kept.
    """
    record = not_measured(case, backends, "") | {"status": "measured"}
    try:
        _fill(record, case, device, backends, seconds)
    except Exception as error:  # of the inputs, or of the device; the cases after this one may fare better
        record |= {"status": "failed", "reason": words(error)}
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return record


def line(record: dict[str, Any]) -> str:
    """What to print of a case."""
    timed = [f"{name} {c['median_ms']:.4g} ms" for name, c in record["contestants"].items() if "median_ms" in c]
    others = [f"{name} {c['status']}" for name, c in record["contestants"].items() if c["status"] not in USUAL]
    bad = [] if record["status"] == "measured" else [f"{record['status']}: {record['reason']}"]
    found = [*bad, *timed, *(others if record["ratios"] else [])]
    return f"{record['name']}: {', '.join(found)}"


def _fill(record: dict[str, Any], case: Case, device: torch.device, backends: Sequence[str], seconds: float) -> None:
    if case.compiled:
        torch._dynamo.reset()  # each shape is compiled by itself, and there is a limit to recompiling
    running: dict[str, Contestant] = {}
    for name, make in contestants(case, device, backends).items():  # ours first
        if name not in record["ours"] and running.keys().isdisjoint(record["ours"]):
            continue  # there is nothing to compare the others with
        entry = record["contestants"][name] = _prepare(name, make, running, device, case.repeats)
        if entry["status"] == "wrong" or (name in record["ours"] and entry["status"] != "measured"):
            statuses = (record["status"], entry["status"])
            record["status"] = "wrong" if "wrong" in statuses else "failed"
            reason = f"{name}: {entry.get('reason') or entry.get('check')}"
            record["reason"] = "; ".join(filter(None, (record["reason"], reason)))
    if running.keys().isdisjoint(record["ours"]):
        return
    if case.kind == "encode_update":
        record["eager_encode"] = eager.encoded_by(case.activation)
        record["dense_bytes"] = dense = 4 * case.tokens * case.d_sae
        if not case.compiled:
            record["contestants"]["compiled"] = {"status": "not measured", "reason": LEFT_OUT}

    timer = _timer(case, device)
    calls = {name: contestant.call for name, contestant in running.items()}
    times = timing.interleaved(calls, timing.rounds_within(seconds, calls, timer), timer)
    for name, each in times.items():
        entry = record["contestants"][name]
        entry |= timing.summary(each)
        if case.kind == "encode_update":
            entry["tflops"] = 2e-9 * case.tokens * case.d_in * case.d_sae / entry["median_ms"]
            entry["peak_share"] = None if entry["peak_bytes"] is None else entry["peak_bytes"] / dense
    if isinstance(timer, timing.CudaTimer):
        record["host_not_ahead"] = timer.exposed
    record["ratios"] = {
        backend: {name: timing.ratio(times[backend], each) for name, each in times.items() if name != backend}
        for backend in record["ours"]
        if backend in times
    }


def _same_bits(fresh: Callable[[], list[torch.Tensor]], runs: int) -> dict[str, int]:
    """Of how many runs all bits are those of the first."""
    first = [array.clone().view(torch.int64) for array in fresh()]  # of float64, so that a NaN equals itself
    same = sum(
        all(torch.equal(one, other.view(torch.int64)) for one, other in zip(first, fresh())) for _ in range(runs - 1)
    )
    return {"runs": runs, "same": 1 + same}


def _prepare(
    name: str, make: Callable, running: dict[str, Contestant], device: torch.device, repeats: int
) -> dict[str, Any]:
    """Make a contestant, run it for the first time and check it; those that are fit to be timed go to `running`."""
    entry: dict[str, Any] = {"status": "measured"}
    try:
        contestant = make()
        start = time.perf_counter()
        first = _peak(contestant, device)
        entry["first_call_s"] = time.perf_counter() - start
        again = _peak(contestant, device)
        # A first call of ours shows a workspace that is kept. On a CPU that is the packed weight, which has its own
        # line; others' first calls also show what compiling took.
        kept = contestant.check is not None and device.type == "cuda"
        entry["peak_bytes"], entry["first_peak_bytes"] = max(first, again) if kept else again, first
        if contestant.holds:
            entry["holds_bytes"] = contestant.holds
        if contestant.check is not None:
            entry["check"] = contestant.check()
            if not entry["check"]["ok"]:
                return entry | {"status": "wrong"}
        if contestant.fresh is not None and repeats:
            entry["same_bits"] = _same_bits(contestant.fresh, repeats)
        running[name] = contestant
    except torch.OutOfMemoryError:
        entry |= {"status": "out of memory"}
    except Exception as error:  # a contestant that cannot run must not take the others with it
        entry |= {"status": "failed", "reason": words(error)}
    if device.type == "cuda" and name not in running:
        torch.cuda.empty_cache()
    return entry


def _peak(contestant: Contestant, device: torch.device) -> int | None:
    """Bytes that a call needs beyond what was allocated before; None where that cannot be known."""
    if device.type != "cuda":
        used = resident.peak(lambda: contestant.call(0))
        return None if used is None else used + contestant.holds
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    contestant.call(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before + contestant.holds


def _timer(case: Case, device: torch.device):
    if device.type != "cuda":
        return timing.WallTimer()
    return timing.HostTimer() if case.kind in ("host", "steer_host") else timing.CudaTimer()


def words(error: Exception) -> str:
    """An error in one line, without the paths that the rest of its text may hold."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {pathless(text[0] if text else '')}"


def pathless(text: str) -> str:
    """The beginning of a line, without the paths in it: a result names nothing of a host."""
    return " ".join(word for word in text.split() if "/" not in word)[:300]
