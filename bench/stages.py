"""The stages of `python -m bench.gpu`, which starts this: one case after the other, the result written around each.

A kernel that reads where it must not takes the process' use of the GPU with it, and one that hangs takes the process.
So this is a process of its own: it is ended by a case that takes too long, and ends itself where the GPU no longer
answers, and `bench.gpu` starts it again, behind the case that ended it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import faulthandler
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from bench import checks, contestants, counters, eager, measure, page, record, shapes, table
from bench.gpu import BROKEN, FINISHED, USAGE, WRONG, options_of
from corrsteer.errors import CorrSteerError
from corrsteer.ops import cuda_backend, registry

# Stages in the order in which they run: where their records are kept in the result, and how many seconds they have
# until all stages have had theirs. Tests have a share of all the time.
KEPT_IN = {
    "check": "checks", "shapes": "cases", "host": "cases", "profile": "counters", "sanitize": "sanitizer",
    "tests": "tests", "rest": "cases",
}  # fmt: skip
LIMITS = {"check": 60.0, "shapes": 90.0, "host": 30.0, "profile": 120.0, "sanitize": 180.0}
TESTS_SHARE = 0.3
OPTIONAL = ("profile", "sanitize")
FINAL = ("measured", "wrong", "failed")  # what is one of these is not run again
SECONDS, TOY_SECONDS = 2.0, 0.02  # of timing a case
LONGEST = 240.0  # seconds that a case in this process may take; torch.compile's longest is the measure
CUT_OFF = "the run was cut off in it"
OF_KIND = {  # the operations that a case is about, whose checks must hold
    "encode_update": ("encode_update",), "host": ("encode_update",), "graph": ("encode_update",),
    "permutations": ("encode_update", "encode_pool", "update_moments", "update_sums"),
    "update_moments": ("update_moments",), "update_sums": ("update_sums",),
    "steer_add": ("steer_add",), "steer_host": ("steer_add",),
}  # fmt: skip


@dataclass
class Item:
    """A case of a stage: its record before it has run, and what runs it and makes its record."""

    stage: str
    planned: dict[str, Any]
    run: Callable[[], dict[str, Any]]
    skipped: Callable[[], str] = lambda: ""  # why it cannot run here
    longest: float = LONGEST
    takes: float = 0.0  # seconds that must be left for it to start


@dataclass
class Run:
    """A result as it grows: `items` are all that it shall hold, `records` what it holds of each."""

    result: dict[str, Any]
    out: Path
    deadline: measure.Deadline
    force: bool = False
    items: list[Item] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    parent: int = field(default_factory=os.getppid)

    def save(self) -> Path:
        """Write the result, with what is known of each stage and what follows, in words."""
        if os.getppid() != self.parent:  # whoever started this was killed, and the file may be another run's by now
            sys.exit(BROKEN)
        for kept in dict.fromkeys(KEPT_IN.values()):
            self.result[kept] = [r for item, r in zip(self.items, self.records) if KEPT_IN[item.stage] == kept]
        self.result["stages"] = {name: self._stage(name) for name in dict.fromkeys(item.stage for item in self.items)}
        self.result["page"] = page.words(self.result)
        return record.write(self.result, self.out)

    def _stage(self, name: str) -> dict[str, Any]:
        """`done`, or what is missing."""
        mine = [r for item, r in zip(self.items, self.records) if item.stage == name]
        missing = sum(r["status"] not in (*FINAL, "skipped") for r in mine)
        seconds = sum(r.get("seconds", 0.0) for r in mine)
        status = "not finished" if missing else "done"
        return {"status": status, "missing": missing, "of": len(mine), "seconds": seconds}

    def go(self, limits: dict[str, float]) -> int:
        """Run what is missing, stage by stage within its limit; and then what these left, while there is time."""
        said: set[int] = set()
        for bounded in (True, False):
            for name in KEPT_IN:
                seconds = limits.get(name, math.inf) if bounded else math.inf
                ends = measure.Deadline(min(seconds, self.deadline.left()))
                for at, item in enumerate(self.items):
                    if item.stage == name and self.records[at]["status"] not in FINAL and at not in said:
                        self._one(at, item, ends, said)
        self.save()
        return FINISHED if self.good() else WRONG

    def _one(self, at: int, item: Item, ends: measure.Deadline, said: set[int]) -> None:
        self.records[at] = item.planned | {"status": "not measured", "reason": "the time was used up"}
        if ends.left() <= 0 or self.deadline.left() <= item.takes:
            return
        skipped = measure.pathless(item.skipped())
        if reason := skipped or self._forbidden(item):
            said.add(at)
            self.records[at] |= {"status": "skipped" if skipped else "not measured", "reason": reason}
            print(f"{item.stage}: {item.planned['name']}: {self.records[at]['status']}, {reason}", flush=True)
            return
        self.records[at] = item.planned | {"status": "started", "reason": CUT_OFF}
        self.save()
        start = time.monotonic()
        with ended_after(item.longest):
            try:
                found = item.run()
            except Exception as error:  # clearing up after a GPU that no longer answers raises too
                found = {"status": "failed", "reason": measure.words(error)}
        self.records[at] = item.planned | found | {"seconds": time.monotonic() - start}
        said.add(at)
        self.save()
        print(f"{item.stage}: {line(self.records[at])}", flush=True)
        if not answers():
            print("the GPU no longer answers this process, and another takes over", file=sys.stderr, flush=True)
            sys.exit(BROKEN)

    def _forbidden(self, item: Item) -> str:
        """Why times are not taken: they are not believed of what computes wrongly."""
        if self.force or KEPT_IN[item.stage] not in ("cases", "counters"):
            return ""
        if item.stage == "rest" and any(r["status"] in ("wrong", "failed") for r in self.of("tests")):
            return "the GPU tests did not pass"
        for check in self.of("check"):
            ours = {name.partition(", ")[0] for name in item.planned["ours"]}
            about = check["operation"] in OF_KIND[item.planned["kind"]] and check["ours"] in ours
            if about and check["status"] in ("wrong", "failed"):
                return f"a check of {check['operation']} did not hold ({check['name']})"
        return ""

    def of(self, stage: str) -> list[dict[str, Any]]:
        """The records of a stage."""
        return [r for item, r in zip(self.items, self.records) if item.stage == stage]

    def good(self) -> bool:
        """Whether nothing is known to be wrong."""
        return not any(r["status"] in ("wrong", "failed") for r in self.records) and not page.unstable(self.result)


@contextlib.contextmanager
def ended_after(seconds: float) -> Iterator[None]:
    """The process ends where this takes longer, also while it waits for a GPU that hangs."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def answers() -> bool:
    """Whether the GPU can still be used: one illegal access ends it for the whole process."""
    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def line(found: dict[str, Any]) -> str:
    """What to print of a record."""
    if "contestants" in found:
        return measure.line(found)
    more = f"error {found['error']} of {found['bound']}" if "error" in found else found.get("reason", "")
    return f"{found['name']}: {found['status']}{more and f', {more}'}"


def checked(check: checks.Check, device: torch.device, backend: str) -> dict[str, Any]:
    """What came of a check."""
    try:
        found = check.run(device, backend)
    except Exception as error:  # a kernel that cannot run must not take the others with it
        return {"status": "failed", "ok": False, "reason": measure.words(error)}
    finally:
        if device.type == "cuda" and check.gib:
            torch.cuda.empty_cache()
    return {"status": "measured" if found["ok"] else "wrong"} | found


def backends_of(case: shapes.Case, backend: str) -> list[str]:
    """The backend that everything is about, by each of its ways; for steering the compiled one, if it is built."""
    call = registry.Call("steer_add", torch.device("cuda"), torch.bfloat16)
    steers = case.kind.startswith("steer") and cuda_backend.verify(call).ok
    return [*contestants.ways_of(backend, case), *["cuda"] * (steers and backend == "triton")]


def timed(stage: str, case: shapes.Case, device: torch.device, backend: str, seconds: float) -> Item:
    """A case of a stage that takes times."""
    backends = backends_of(case, backend)
    planned = asdict(case) | {"name": case.name, "stage": stage, "ours": backends}

    def run() -> dict[str, Any]:
        return measure.one(case, device, backends, seconds)

    def skipped() -> str:
        return "not on a CPU" if case.kind == "graph" and device.type != "cuda" else ""

    return Item(stage, planned, run, skipped, takes=measure.COMPILING if case.compiled else 0.0)


def tests(seconds: float, device: torch.device) -> Item:
    """The tests marked `gpu`, all of them in one case."""

    def run() -> dict[str, Any]:
        found = run_tests(seconds)
        reason = "the time was used up" if found["timed_out"] else f"{found.get('failed')} failed"
        return found | ({"status": "measured"} if tests_passed(found) else {"status": "failed", "reason": reason})

    def skipped() -> str:
        return "" if device.type == "cuda" else "not on a CPU"

    return Item("tests", {"name": "pytest -m gpu"}, run, skipped, seconds + 60, takes=10.0)


def run_tests(seconds: float) -> dict[str, Any]:
    """Run the tests marked `gpu` with no plugin but pytest's own, their output as it comes; counts and duration."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-m", "pytest", "tests", "-m", "gpu", "-q", f"--junitxml={report}"]
        environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        try:
            status = subprocess.run(command, cwd=record.ROOT, env=environment, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            status = None
        counts = count(report.read_text(encoding="utf-8")) if report.exists() else {}
    return {**counts, "exit_status": status, "timed_out": status is None}


def count(junit: str) -> dict[str, int]:
    """Outcomes in a JUnit report."""
    totals = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in ElementTree.fromstring(junit).iter("testsuite"):
        for name in totals:
            totals[name] += int(suite.get(name, 0))
    failed = totals["failures"] + totals["errors"]
    return {"passed": totals["tests"] - failed - totals["skipped"], "failed": failed, "skipped": totals["skipped"]}


def tests_passed(found: dict[str, Any]) -> bool:
    """Whether there were tests and all that ran passed."""
    return found.get("exit_status") == 0 and found.get("passed", 0) > 0


def items_of(options: argparse.Namespace, device: torch.device, backend: str) -> list[Item]:
    """All cases of all stages that were asked for."""
    found: dict[str, list[Item]] = {name: [] for name in KEPT_IN}
    for check in checks.checks():
        found["check"].append(
            Item(
                "check", check.planned(backend),
                lambda check=check: checked(check, device, backend),
                lambda check=check: check.skipped(device, backend),
            )
        )  # fmt: skip
    stages = shapes.toy_stages() if options.dry_run else shapes.gpu_stages()
    seconds = TOY_SECONDS if options.dry_run else SECONDS
    for name, cases in stages.items():
        found[name] = [timed(name, case, device, backend, seconds) for case in cases]
    found["tests"] = [tests(TESTS_SHARE * 60 * options.minutes, device)]
    if options.profile:
        found["profile"] = [
            Item("profile", planned, run, skipped, counters.LONGEST + 60)
            for planned, run, skipped in counters.profiled(stages["shapes"][:3], device, backend, backends_of)
        ]
    if options.sanitize:
        found["sanitize"] = [
            Item("sanitize", planned, run, skipped, counters.LONGEST + 60)
            for planned, run, skipped in counters.sanitized(device, backend)
        ]
    return [item for name in KEPT_IN for item in found[name]]


def continued(run: Run, options: argparse.Namespace) -> None:
    """Take over what an earlier run left of the same sources and versions.

    Raises
    ------
    CorrSteerError : where the file there is of others.
    """
    unreached = {"status": "not measured", "reason": "the run was stopped before"}
    run.records = [item.planned | unreached for item in run.items]
    path = options.out / f"{record.stem(run.result)}.json"
    again = None if options.ended else options.again  # what was begun anew is not begun a second time
    if not path.exists() or again == []:
        return
    old = json.loads(path.read_text(encoding="utf-8"))
    same = ("schema", "version", "sources", "packages", "python", "device")
    if other := [name for name in same if old.get(name) != run.result[name]]:
        raise CorrSteerError(
            f"--out must be a folder whose {path.name} is of the same sources and machine, got one of other "
            f"{', '.join(other)}; give another folder, or --again to measure everything anew in its place"
        )
    left = {}
    for stage, kept in KEPT_IN.items():
        for found in old.get(kept, []):
            if kept != "cases" or found["stage"] == stage:
                left[stage, found["name"]] = found
    for at, item in enumerate(run.items):
        found = left.pop((item.stage, item.planned["name"]), {})
        if options.ended and found.get("status") == "started":
            found |= {"status": "failed", "reason": f"the process was ended in it ({options.ended})"}
        same_case = all(found.get(name) == value for name, value in item.planned.items())
        if same_case and found["status"] in FINAL and item.stage not in (again or ()):
            run.records[at] = found
    # of stages that are not asked for this time
    for (stage, name), found in left.items():
        if stage in OPTIONAL and found["status"] in FINAL:
            run.items.append(Item(stage, {"name": name}, lambda found=found: found))
            run.records.append(found)
    run.result["date"], run.result["commit"], run.result["dirty"] = old["date"], old["commit"], old["dirty"]
    run.result["continued"] = old["continued"]
    if not options.ended:
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        run.result["continued"] = [*old["continued"], now]
        kept = sum(r["status"] in FINAL for r in run.records)
        print(f"{path.name} continues: {kept} of {len(run.items)} cases are there (--again measures anew)", flush=True)


def main(arguments: list[str] | None = None) -> int:
    options = options_of(arguments)
    if options.dry_run:
        eager.SAE_LENS = False  # importing SAELens takes longer than all stages
        torch.set_num_threads(1)
        device, backend = torch.device("cpu"), "reference"
    elif torch.cuda.is_available():
        device, backend = torch.device("cuda", torch.cuda.current_device()), "triton"
    else:
        print(
            f"bench.gpu needs an NVIDIA GPU and a PyTorch build with CUDA; torch {torch.__version__} sees none here. "
            f"For CPUs there is python -m bench.cpu, and --dry-run tries the stages out.",
            file=sys.stderr,
        )
        return USAGE
    head = record.new(device, options.commit) | {"sources": record.sources(), "continued": [], "forced": options.force}
    if options.dry_run:
        head["schema"] = record.DRY_RUN
    run = Run(head, options.out, measure.Deadline(60 * options.minutes), options.force)
    run.items = items_of(options, device, backend)
    try:
        continued(run, options)
        run.save()
    except CorrSteerError as error:
        print(error, file=sys.stderr)
        return USAGE
    status = run.go(LIMITS)
    print(f"\n{table.text(run.result)}\n\n" + "\n".join(run.result["page"]) + f"\n\n{run.save()}")
    return status


if __name__ == "__main__":
    sys.exit(main())
