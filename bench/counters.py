"""What the GPU's own instruments say: counters by ncu, and memory errors by compute-sanitizer, where they are there.

`ncu` runs this file, which launches a contestant of a case once between two marks: python -m bench.counters CASE OURS
"""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from bench import contestants, measure, record
from bench.shapes import Case

# What the result calls a counter -> ncu's metric. Several metrics match the last, one a reason.
METRICS = {
    "microseconds": "gpu__time_duration.sum",
    "tensor_core_percent": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "issue_slots_percent": "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "l2_bytes": "lts__t_bytes.sum",
    "dram_bytes": "dram__bytes.sum",
    "registers": "launch__registers_per_thread",
    "occupancy_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
}
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
STALLS = "regex:smsp__average_warps_issue_stalled_.*_per_issue_active"
UNITS = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3}
UNITS |= {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
# A tool that may not count here, or takes too long, says nothing of the kernels: what it was for is not measured.
TOOLS = ("memcheck", "racecheck")
LONGEST = 150.0  # seconds of one run of a tool

Planned = tuple[dict[str, Any], Callable[[], dict[str, Any]], Callable[[], str]]  # a record, what runs it, why it can't


def absent(tool: str, device: torch.device) -> str:
    """Why a tool cannot run here; empty where it can."""
    if device.type != "cuda":
        return "not on a CPU"
    return "" if shutil.which(tool) else f"{tool} is not installed, or not in PATH"


def profiled(
    cases: Sequence[Case], device: torch.device, backend: str, backends_of: Callable[[Case, str], list[str]]
) -> Iterator[Planned]:
    """Of each case, ours by each way, and the bare product."""
    for case in cases:
        for name in [*backends_of(case, backend), "matmul"]:
            planned = {"name": f"{case.name}: {name}", "kind": case.kind, "ours": [name]}

            def run(case: Case = case, name: str = name) -> dict[str, Any]:
                command = ["ncu", "--csv", "--page", "raw", "--profile-from-start", "off", "--target-processes", "all"]
                command += ["--metrics", ",".join([*METRICS.values(), STALLS])]
                command += [sys.executable, "-m", "bench.counters", json.dumps(asdict(case)), name]
                done = _run(command)
                if isinstance(done, str):
                    return {"status": "not measured", "reason": done}
                kernels = read(done.stdout)
                if done.returncode or not kernels:
                    return {
                        "status": "not measured",
                        "reason": f"ncu counted nothing: {_last(done.stderr or done.stdout)}",
                    }
                return {"status": "measured", "kernels": kernels}

            yield planned, run, lambda: absent("ncu", device)


def sanitized(device: torch.device, backend: str) -> Iterator[Planned]:
    """The checks, but for the large ones, under each tool of compute-sanitizer."""
    for tool in TOOLS:
        planned = {"name": f"compute-sanitizer {tool}"}

        def run(tool: str = tool) -> dict[str, Any]:
            command = ["compute-sanitizer", "--tool", tool, sys.executable, "-m", "bench.checks", "--small"]
            done = _run([*command, "--backend", backend])
            if isinstance(done, str):
                return {"status": "not measured", "reason": done}
            return found_by(done.stdout + done.stderr)

        yield planned, run, lambda: absent("compute-sanitizer", device)


def found_by(said: str) -> dict[str, Any]:
    """What compute-sanitizer said of a run: the number of errors, and the first of them."""
    counts = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", said)
    if not counts:
        return {"status": "not measured", "reason": f"compute-sanitizer ended without a summary: {_last(said)}"}
    errors = sum(map(int, counts))
    lines = [line.removeprefix("=========").strip() for line in said.splitlines() if line.startswith("=========")]
    first = next((line for line in lines if re.match(r"Invalid|Error|Warning|Potential|Race|Program hit", line)), "")
    return {"status": "wrong" if errors else "measured", "errors": errors, "reason": measure.pathless(first)}


def read(said: str) -> list[dict[str, Any]]:
    """ncu's table, a row a kernel: its name, `METRICS` (times in µs, sizes in bytes) and the reasons of stalls.

    A metric that this GPU or ncu does not have is None.
    """
    lines = [line for line in said.splitlines() if line.startswith('"')]
    header, units, *rows = csv.reader(io.StringIO("\n".join(lines))) if len(lines) > 1 else ([], [])
    kernels = []
    for row in rows:
        values, unit = dict(zip(header, row)), dict(zip(header, units))
        stalls = {found[1]: _number(values[name]) for name in header if (found := STALL.fullmatch(name))}
        kernel: dict[str, Any] = {"kernel": values.get("Kernel Name", "")}
        for name, metric in METRICS.items():
            number = _number(values.get(metric, ""))
            kernel[name] = None if number is None else number * UNITS.get(unit[metric], 1.0)
        known = {reason: value for reason, value in stalls.items() if value is not None}
        kernel["stalls"] = dict(sorted(known.items(), key=lambda stall: -stall[1]))
        kernels.append(kernel)
    return kernels


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:  # n/a
        return None


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str] | str:
    try:
        return subprocess.run(command, cwd=record.ROOT, capture_output=True, text=True, timeout=LONGEST)
    except subprocess.TimeoutExpired:
        return f"{command[0]} took longer than {LONGEST:.0f} s"


def _last(said: str) -> str:
    """The last line."""
    return measure.pathless((said.strip().splitlines() or ["it said nothing"])[-1])


def main(arguments: Sequence[str]) -> int:
    case, name = Case(**json.loads(arguments[0])), arguments[1]
    device = torch.device("cuda", torch.cuda.current_device())
    contestant = contestants.contestants(case, device, [name] if name != "matmul" else [])[name]()
    for at in range(3):  # compile, and warm up
        contestant.call(at)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    contestant.call(3)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
