"""What stored rows of activations take, against sums that stream: python -m bench.stored_rows

The same pooled activations of made-up sparse features and the same rewards, two ways:

- `streaming`: `Evidence.update` with permutations, a block after the other, then `significance`;
- `rows`: each block kept as `SparseRows`, `stored.statistics` of them, then `significance`, for which permuted sums are
  computed some features at a time.

Both must give the same p-values, or no time is reported.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import record
from bench.timing import WallTimer, ratio, summary
from corrsteer import Evidence, Moments, inference, update_moments
from corrsteer.ops.rows import SparseColumns, SparseRows
from corrsteer.report.tables import table
from corrsteer.stats import stored

# features, share of them active in a sample, layers, samples, permutations, rounds
FULL = (
    (16384, 0.005, 1, 4000, 1000, 1),
    (16384, 0.1, 1, 4000, 1000, 1),
    (131072, 0.005, 1, 4000, 100, 1),
    (131072, 0.1, 1, 4000, 100, 1),
    (16384, 0.005, 4, 4000, 250, 1),
)
QUICK = ((300, 0.05, 1, 64, 19, 1), (300, 0.2, 2, 64, 19, 2))
BLOCK = 512
WAYS = ("streaming", "rows")


def blocks_of(features: int, share: float, samples: int, layer: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Blocks of pooled activations, half-normal where active, and rewards that the first feature raises."""
    rewards = torch.Generator("cpu").manual_seed(0)
    for number, first in enumerate(range(0, samples, BLOCK)):
        shape = (min(BLOCK, samples - first), features)
        generator = torch.Generator("cpu").manual_seed(1 + 1000 * layer + number)
        z = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").abs_()
        z *= torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu") < share
        y = torch.randn(shape[0], generator=rewards, dtype=torch.float64, device="cpu")
        yield number, z, (y > 0.5).double()


def streaming(blocks: list[tuple[int, Tensor, Tensor]], permutations: int) -> Evidence:
    """Evidence with permutations, and moments, as blocks come."""
    features = blocks[0][1].shape[1]
    evidence, moments = Evidence(features, permutations=permutations), Moments(features)
    for number, z, y in blocks:
        update_moments(z, y, moments)
        evidence.update(z, y, number)
    return evidence


class Watch:
    """Milliseconds of what was done, by name."""

    def __init__(self):
        self.times: dict[str, list[float]] = {}

    def time(self, name: str, call: Callable[[], Any]) -> Any:
        """What a call gives."""
        found: list[Any] = []
        self.times.setdefault(name, []).append(WallTimer()(lambda: found.append(call())))
        return found[0]


Given = dict[int, list[tuple[int, Tensor, Tensor]]]  # layer -> blocks


def by_streaming(given: Given, permutations: int, watch: Watch) -> tuple[Any, dict[str, int]]:
    """P-values of every layer, and bytes."""
    evidences = watch.time(
        "streaming: sums", lambda: {layer: streaming(blocks, permutations) for layer, blocks in given.items()}
    )
    tested = watch.time("streaming: test", lambda: inference.significance(evidences))
    return tested, {"sums": sum(evidence.resampled.nbytes for evidence in evidences.values())}


def by_rows(given: Given, permutations: int, watch: Watch) -> tuple[Any, dict[str, int]]:
    """P-values of every layer, and bytes."""

    def keep() -> dict[int, list[tuple[int, SparseRows, Tensor]]]:
        return {k: [(number, SparseRows.from_dense(z), y) for number, z, y in blocks] for k, blocks in given.items()}

    kept = watch.time("rows: keep", keep)
    features = given[0][0][1].shape[1]

    def summed() -> dict[int, Evidence]:
        return {k: stored.statistics(blocks, features, permutations=permutations)[1] for k, blocks in kept.items()}

    evidences = watch.time("rows: sums", summed)
    tested = watch.time("rows: test", lambda: inference.significance(evidences))
    watch.time("rows: test of ranks", lambda: inference.significance(evidences, "spearman"))
    rows = [[of_block for _, of_block, _ in blocks] for blocks in kept.values()]
    return tested, {
        "rows": sum(of_block.nbytes for blocks in rows for of_block in blocks),
        "columns": sum(SparseColumns.from_rows(blocks, features).nbytes for blocks in rows),
    }


def measured(case: tuple[int, float, int, int, int, int]) -> dict[str, Any]:
    """What both ways took, and whether they say the same."""
    features, share, layers, samples, permutations, rounds = case
    given, watch, size = {k: list(blocks_of(features, share, samples, k)) for k in range(layers)}, Watch(), {}
    for _ in range(rounds):
        of_rows, bytes_of_rows = by_rows(given, permutations, watch)
        of_streaming, bytes_of_sums = by_streaming(given, permutations, watch)
        size = bytes_of_rows | bytes_of_sums
        for layer, p in itertools.product(range(layers), ("p", "p_layer", "p_adjusted")):
            if not torch.equal(getattr(of_rows[layer], p), getattr(of_streaming[layer], p)):
                raise SystemExit(f"the ways come to different p-values: {case}")
    of_way = {way: [sum(parts) for parts in zip(*(watch.times[n] for n in watch.times if _of(n, way)))] for way in WAYS}
    return {
        "features": features, "share": share, "layers": layers, "samples": samples, "permutations": permutations,
        "bytes": size, "bytes_a_sample_and_layer": size["rows"] / samples / layers,
        "times": {name: summary(of) for name, of in watch.times.items()},
        "rows / streaming": ratio(of_way["rows"], of_way["streaming"])["median"],
    }  # fmt: skip


def _of(name: str, way: str) -> bool:
    return name.startswith(way) and not name.endswith("ranks")


def listed(features: int, share: float, rounds: int) -> dict[str, Any]:
    """What a block's rows take to be made, by the backend and against reading the block once."""
    (_, z, _), timer = next(blocks_of(features, share, BLOCK, 0)), WallTimer()
    calls = {
        "native": lambda: SparseRows.from_dense(z, backend="native"),
        "reference": lambda: SparseRows.from_dense(z, backend="reference"),
        "sum": lambda: z.sum(),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(timer(call))
    return {
        "features": features, "share": share, "samples": len(z),
        "times": {name: summary(of) for name, of in times.items()},
        "reference / native": ratio(times["reference"], times["native"])["median"],
        "native / sum": ratio(times["native"], times["sum"])["median"],
    }  # fmt: skip


HEADER = ("features", "active", "layers", "permutations", "bytes a sample and layer", "rows, MB", "as columns, MB",
          "1000 permuted sums, MB", "streaming, s", "rows, s", "rows / streaming", "test of ranks, s")  # fmt: skip
MADE = ("features", "active", "native, ms", "torch.nonzero, ms", "torch.nonzero / native", "native / z.sum()")


def rows_of(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows of the table of whole jobs."""
    lines = []
    for case in result["cases"]:
        of_way = {
            way: sum(t["median_ms"] for name, t in case["times"].items() if _of(name, way)) / 1000 for way in WAYS
        }
        lines.append((
            str(case["features"]), f"{case['share']:.1%}", str(case["layers"]), str(case["permutations"]),
            f"{case['bytes_a_sample_and_layer']:.0f}",
            *(f"{case['bytes'][name] / 1e6:.0f}" for name in ("rows", "columns")), f"{_sums_of_1000(case) / 1e6:.0f}",
            f"{of_way['streaming']:.1f}", f"{of_way['rows']:.1f}", f"{case['rows / streaming']:.2f}",
            f"{case['times']['rows: test of ranks']['median_ms'] / 1000:.1f}",
        ))  # fmt: skip
    return lines


def made_of(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows of the table of what it takes to make rows."""
    return [
        (
            str(row["features"]), f"{row['share']:.1%}",
            *(f"{row['times'][name]['median_ms']:.1f}" for name in ("native", "reference")),
            f"{row['reference / native']:.1f}", f"{row['native / sum']:.1f}",
        )
        for row in result["made"]
    ]  # fmt: skip


def _sums_of_1000(case: dict[str, Any]) -> float:
    return case["bytes"]["sums"] / case["permutations"] * 1000


def lines(result: dict[str, Any]) -> list[str]:
    """A line each: what was measured, and what follows."""
    cases = result["cases"]
    smaller = [_sums_of_1000(case) / case["bytes"]["columns"] for case in cases]
    times = [case["rows / streaming"] for case in cases]
    sizes = sorted({case["samples"] for case in cases})
    return [
        f"{' and '.join(map(str, sizes))} samples in blocks of {result['block']}; all p-values are the same both ways",
        f"1000 permuted sums are {min(smaller):.1f} to {max(smaller):.0f} times as large as the columns they are of",
        f"rows take {min(times):.2f} to {max(times):.2f} of the time of streaming, tests included, and then have every "
        "other score, and other permutations, without another pass",
    ]


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.stored_rows", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=record.STUDIES, help="folder for the result")
    parser.add_argument("--quick", action="store_true", help="a small form, which shows that it runs")
    options = parser.parse_args(arguments)
    cases = QUICK if options.quick else FULL
    head = record.new(torch.device("cpu"))
    head |= {"schema": "corrsteer.stored_rows", "quick": options.quick, "block": BLOCK}
    head["made"] = [listed(*of, 3 if options.quick else 9) for of in sorted({case[:2] for case in cases})]
    head["cases"] = [measured(case) for case in cases]
    print(table(MADE, made_of(head), indent=""))
    print(table(HEADER, rows_of(head), indent=""))
    print(record.write_study(head, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
