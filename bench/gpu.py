"""Check, time and examine the kernels on a GPU, most telling first: python -m bench.gpu --out bench/results

Stages: `check` (every kernel against the reference, at odd sizes), `shapes` (the eight that matter), `host` (time of a
call on the host, graphs, steering), the GPU tests, and `rest`. The result file is written around every case. A run
that is cut off at any moment leaves what it had, and the next with the same --out goes on with what is missing.

Needs PyTorch with CUDA, Triton, numpy, safetensors and pytest; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

FINISHED, USAGE, WRONG, BROKEN = 0, 2, 10, 11  # what `bench.stages` exits with; anything else ended it
RESTARTS = 12
RESULTS = Path(__file__).resolve().parent / "results"
STAGES = ("check", "shapes", "host", "profile", "sanitize", "tests", "rest")


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line of `bench.gpu`, and of `bench.stages`."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the result file goes")
    parser.add_argument("--minutes", type=float, default=15, help="for everything; no case is started afterwards")
    parser.add_argument(
        "--again", nargs="*", choices=STAGES, metavar="STAGE",
        help="measure anew what an earlier run has left there: these stages, or everything",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="time even what fails its checks; the result says so")
    parser.add_argument("--profile", action="store_true", help="also counters of each way, by ncu")
    parser.add_argument("--sanitize", action="store_true", help="also the checks under compute-sanitizer")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, at toy sizes; times mean nothing")
    parser.add_argument("--commit", help="of these sources, where they are not in a git repository")
    parser.add_argument("--ended", help=argparse.SUPPRESS)  # how the process before was ended
    options = parser.parse_args(arguments)
    if options.dry_run and options.out.resolve() == RESULTS:
        parser.error("--out must be another folder than bench/results for a dry run, whose times mean nothing")
    if not options.minutes > 0:
        parser.error(f"--minutes must be above 0, got {options.minutes}")
    return options


def written(folder: Path) -> list[tuple[str, int]]:
    """The result files of a folder, and when they were last written."""
    return sorted((path.name, path.stat().st_mtime_ns) for path in folder.glob("*.json"))


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = options_of(given)
    ends, out = time.monotonic() + 60 * options.minutes, options.out
    found_in = [str(RESULTS.parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, found_in))}
    more: list[str] = []
    for _ in range(RESTARTS):
        left = max(ends - time.monotonic(), 1) / 60
        command = [sys.executable, "-m", "bench.stages", *given, "--minutes", f"{left:.4f}", *more]
        before = written(out)
        status = subprocess.run(command, env=environment).returncode
        if status in (FINISHED, USAGE, WRONG):
            return 1 if status == WRONG else status
        how = "the GPU no longer answered" if status == BROKEN else f"it took too long, or crashed, status {status}"
        if written(out) == before:
            print(f"bench.gpu stops, as its process ended with status {status} before any case", file=sys.stderr)
            return 1
        print(f"bench.gpu goes on behind the case that was running: {how}", file=sys.stderr, flush=True)
        more = ["--ended", how]
    print(f"bench.gpu was ended {RESTARTS} times and stops; the result says in which cases", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
