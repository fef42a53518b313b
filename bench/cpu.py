"""The same comparisons on a CPU, small enough for any machine: python -m bench.cpu --out bench/results"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from bench import contestants, measure, record, shapes, table
from corrsteer.ops import registry

SECONDS = 4.0  # of timing a case
DEVICE = torch.device("cpu")


def backends_of(case: shapes.Case) -> list[str]:
    """The backends that run a case on a CPU, but not those that are there to be right rather than fast: Triton's
    interpreter, and the reference where it would take long."""
    dtype = contestants.X_DTYPES.get(case.precision, torch.bfloat16)
    encoder = (case.activation, case.precision) if case.kind in ("encode_update", "permutations") else ()
    operation = "encode_update" if case.kind == "permutations" else case.kind
    call = registry.Call(operation, DEVICE, dtype, *encoder)
    slow = ("triton", "reference") if case.d_in * case.d_sae > 1 << 22 else ("triton",)
    return [b.name for b in registry.registered() if b.name not in slow and registry.judge(b, call).ok]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the result file goes")
    parser.add_argument("--minutes", type=float, default=40, help="for everything; no case is started afterwards")
    parser.add_argument("--commit", help="of these sources, where they are not in a git repository")
    parser.add_argument("--full", action="store_true", help="SAEs of real models' sizes: half an hour, 10 GB")
    parser.add_argument("--compile", action="store_true", help="also torch.compile; needs a C++ compiler")
    options = parser.parse_args(arguments)

    result = record.new(DEVICE, options.commit)
    measure.all_cases(
        result,
        shapes.cpu_cases(options.full, options.compile),
        DEVICE,
        backends_of,
        measure.Deadline(60 * options.minutes),
        save=lambda: record.write(result, options.out),
        seconds=SECONDS,
    )
    print(f"\n{table.text(result)}\n\n{record.write(result, options.out)}")
    return 0 if all(case["status"] in measure.USUAL for case in result["cases"]) else 1


if __name__ == "__main__":
    sys.exit(main())
