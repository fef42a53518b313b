"""Test on the GPU, then time on it, in one command: python -m bench.gpu --out bench/results

Needs PyTorch with CUDA, Triton, numpy, safetensors and pytest; nothing is downloaded. The result file is rewritten
after every case, so that a run which is stopped leaves what it had.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from bench import measure, record, shapes, table
from corrsteer.ops import cuda_backend, registry

SECONDS = 2.0  # of timing a case
TESTS_SHARE = 0.5  # of the time, at most


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    if not torch.cuda.is_available():
        print(
            f"bench.gpu needs an NVIDIA GPU and a PyTorch build with CUDA; torch {torch.__version__} sees none here. "
            f"For CPUs there is python -m bench.cpu.",
            file=sys.stderr,
        )
        return 2
    deadline = measure.Deadline(60 * options.minutes)
    tests = run_tests(TESTS_SHARE * 60 * options.minutes)
    return run(
        options, torch.device("cuda", torch.cuda.current_device()), "triton", shapes.gpu_cases(), tests, deadline
    )


def run(
    options: argparse.Namespace,
    device: torch.device,
    backend: str,
    cases: list[shapes.Case],
    tests: dict[str, Any],
    deadline: measure.Deadline,
) -> int:
    """Time the cases, if the tests passed; write the result, show it, and return the exit status."""
    result = record.new(device, options.commit) | {"forced": options.force, "tests": tests}
    print(f"GPU tests: {tests}", flush=True)

    def save() -> Path:
        return record.write(result, options.out)

    if tests_passed(tests) or options.force:
        measure.all_cases(result, cases, device, lambda case: backends_of(case, backend), deadline, save, SECONDS)
    else:
        reason = "the GPU tests did not pass"
        result["cases"] = [measure.not_measured(case, backends_of(case, backend), reason) for case in cases]
        print(f"{reason}: nothing is timed, unless with --force", file=sys.stderr)
    print(f"\n{table.text(result)}\n\n{save()}")
    return 0 if tests_passed(tests) and all(c["status"] in measure.USUAL for c in result["cases"]) else 1


def backends_of(case: shapes.Case, backend: str) -> list[str]:
    """The backend that everything is about, and for steering the compiled one, where it has been built."""
    call = registry.Call("steer_add", torch.device("cuda"), torch.bfloat16)
    steers = case.kind.startswith("steer") and cuda_backend.verify(call).ok
    return [backend, "cuda"] if steers else [backend]


def run_tests(seconds: float) -> dict[str, Any]:
    """Run the tests marked `gpu` with no plugin but pytest's own, their output as it comes; counts and duration."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-m", "pytest", "tests", "-m", "gpu", "-q", f"--junitxml={report}"]
        environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        start = time.monotonic()
        try:
            status = subprocess.run(command, cwd=record.ROOT, env=environment, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            status = None
        counts = count(report.read_text(encoding="utf-8")) if report.exists() else {}
    return {**counts, "exit_status": status, "timed_out": status is None, "seconds": time.monotonic() - start}


def count(junit: str) -> dict[str, int]:
    """Outcomes in a JUnit report."""
    totals = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in ElementTree.fromstring(junit).iter("testsuite"):
        for name in totals:
            totals[name] += int(suite.get(name, 0))
    failed = totals["failures"] + totals["errors"]
    return {"passed": totals["tests"] - failed - totals["skipped"], "failed": failed, "skipped": totals["skipped"]}


def tests_passed(tests: dict[str, Any]) -> bool:
    """Whether there were tests and all that ran passed."""
    return tests.get("exit_status") == 0 and tests.get("passed", 0) > 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the result file goes")
    parser.add_argument("--minutes", type=float, default=8, help="for everything; no case is started afterwards")
    parser.add_argument("--force", action="store_true", help="time even if tests fail; the result says so")
    parser.add_argument("--commit", help="of these sources, where they are not in a git repository")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
