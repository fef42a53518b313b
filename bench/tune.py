"""Find launch configurations by measurement, on request only: python -m bench.tune --out kernels/configs

Writes `<GPU name>.json`, which that GPU then uses instead of its architecture's file. Every candidate is checked before
it is timed. `python -m bench.resources` says which candidates the compiler makes something of, without a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton

from bench import contestants, record, timing
from bench.resources import PANEL_BLOCKS
from bench.shapes import GEMMA_16K, Case
from corrsteer.files import write_utf8
from corrsteer.kernels import launch

SHAPE = GEMMA_16K
TOKENS = (64, 128, 4096)  # the last stands for all above, and is raced first
FORMS = {  # in the order in which they are raced
    "encode_pool_short": {"steps": 8},
    "encode_pool_singles": {"steps": 1},
    "encode_pool": {"steps": 64},
    "encode_pool_both": {"steps": 8, "pool": "both"},
}
KINDS = {"native": "bf16", "bf16x2": "bf16x2", "tf32x3": "fp32"}
ROUNDS = 15  # of timing an entry, of which the first two warm up
LEAST = 50.0  # seconds that a race has while there are so many
SHARED_MEMORY = 227 * 1024  # bytes that a program may take on sm_90 and sm_100
# Of each form: features and tokens of a tile, warps, stages, SUBTILE, WIDE_SUBTILE and whether it is flattened, the
# most promising first. All compile for sm_90 without spills in 16-bit numbers (bench.resources --raced, Triton 3.9).
# At 4 warps and up to 100 KB two programs fit on a multiprocessor, and the epilogue of one can run under the product of
# the other; flattened, it runs while the copy engine fetches the next tile's operands.
RACED = {
    "encode_pool_short": (
        (128, 128, 4, 3, 16, 32, 0), (128, 256, 8, 4, 16, 128, 0), (256, 128, 8, 3, 16, 32, 0),
        (128, 256, 8, 4, 16, 64, 1), (128, 128, 4, 3, 16, 64, 1), (128, 256, 8, 4, 16, 64, 0),
        (128, 64, 4, 4, 16, 64, 0), (64, 256, 4, 4, 16, 128, 0),
        (128, 128, 8, 4, 16, 128, 0), (64, 128, 4, 6, 16, 128, 0), (128, 64, 4, 6, 16, 64, 0),
        (64, 64, 4, 6, 16, 64, 0),
    ),
    "encode_pool_singles": (
        (128, 128, 4, 3, 16, 16, 0), (128, 128, 8, 4, 16, 32, 1), (256, 128, 8, 3, 16, 32, 0),
        (128, 64, 4, 4, 16, 32, 1), (128, 128, 8, 4, 16, 32, 0), (128, 64, 4, 4, 16, 32, 0), (64, 128, 4, 6, 16, 32, 0),
        (128, 64, 4, 6, 16, 32, 0), (64, 64, 4, 6, 16, 32, 0),
    ),
    "encode_pool": (
        (128, 128, 4, 3, 16, 64, 0), (128, 256, 8, 4, 16, 64, 1), (128, 256, 8, 4, 16, 64, 0),
        (128, 128, 4, 3, 16, 64, 1), (256, 128, 8, 4, 16, 64, 0), (256, 128, 8, 4, 16, 64, 1),
        (128, 256, 8, 4, 32, 64, 0), (128, 128, 4, 3, 32, 64, 0), (128, 64, 4, 4, 16, 64, 0),
        (64, 256, 4, 4, 16, 64, 0), (128, 128, 8, 4, 16, 64, 0), (64, 128, 4, 6, 16, 64, 0), (128, 64, 4, 6, 16, 64, 0),
        (64, 64, 4, 6, 16, 64, 0),
    ),
    "encode_pool_both": (
        (128, 128, 4, 3, 16, 64, 0), (128, 256, 8, 4, 16, 64, 1), (128, 256, 8, 4, 16, 64, 0),
        (128, 128, 4, 3, 16, 64, 1), (256, 128, 8, 4, 16, 64, 0), (128, 128, 8, 4, 16, 64, 0),
        (128, 64, 4, 4, 16, 64, 0), (64, 128, 4, 6, 16, 64, 0),
    ),
}  # fmt: skip
# Features and tokens of a panel, after the first few tiles: they share one compiled kernel. At many tokens alone,
# beside which two buffers are small.
PANELS = ((2048, 2048), (2048, 1024), (4096, 1024), (1024, 2048))
PANELS_AFTER = 4
PANELS_FROM = 2048  # tokens above which panels go that won at TOKENS[-1]
MARGIN = 1.03  # by which panels must be faster, as they take memory and the host's time


def candidates(kind: str, tokens: int, descriptors: int, form: str = "encode_pool") -> Iterator[dict[str, Any]]:
    """Entries worth trying: of those that are raced, the ones that shared memory holds, and panels."""
    block_k = 64 if kind != "tf32x3" else 32
    row = (2 if kind != "tf32x3" else 4) * block_k  # bytes
    weights = 2 if kind == "bf16x2" else 1
    for at, (BF, BT, warps, stages, subtile, wide, flatten) in enumerate(RACED[form]):
        if at == PANELS_AFTER and tokens > PANELS_FROM and kind in launch.PANEL_KINDS["encode_pool"]:
            for features, panel_tokens in PANELS:
                size = {"panel_features": features, "panel_tokens": panel_tokens}
                yield PANEL_BLOCKS | {"way": "panels"} | size
        if BT > max(64, tokens) or stages * (weights * BF + BT) * row > SHARED_MEMORY:
            continue
        if flatten and kind == "bf16x2":  # whose two products a step ptxas then waits for one by one
            continue
        entry = {
            "BF": BF, "BT": BT, "BK": block_k, "SUBTILE": subtile, "WIDE_SUBTILE": wide, "GROUP_SIZE": 8,
            "max_tiles_per_chunk": 1024 // BT, "descriptors": descriptors, "num_warps": warps, "num_stages": stages,
        }  # fmt: skip
        # pooled by a product with the segment matrix; flattened, ptxas waits for each product where there are two kinds
        if form == "encode_pool_short" and kind != "tf32x3" and not flatten:
            entry["BF16_SPLITS"] = 3 if kind == "bf16x2" else 2
        yield entry | ({"flatten": 1} if flatten else {})


def cost(measured: dict[str, Any]) -> float:
    """The milliseconds by which a race is decided; with panels those of the host as well, which launches so often."""
    if "host_ms" in measured:
        return MARGIN * max(measured["median_ms"], measured["host_ms"])
    return measured["median_ms"]


def fastest(
    case: Case, entries: list[dict[str, Any]], device: torch.device, deadline: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The entry of least cost, the first of `entries` being the one in use; and what was measured of each.

    Where that goes by panels, the best of those that do not follows, for calls that cannot.
    """
    ours = contestants.contestants(case, device, ["triton"])["triton"]()
    timer, measured, right = timing.CudaTimer(), [], []
    for at, entry in enumerate(entries):
        if at and time.monotonic() > deadline:
            print(f"  out of time: {len(entries) - at} candidates not tried")
            break
        with patch.object(launch, "config", lambda *_, entry=entry: entry):
            try:
                wrong = not ours.check()["ok"]
                times = timing.interleaved({"it": ours.call}, 3 if wrong else ROUNDS, timer)["it"][2:]
                found = {"wrong": True} if wrong else timing.summary(times)
                if entry.get("way") == "panels" and not wrong:
                    times = timing.interleaved({"it": ours.call}, ROUNDS, timing.HostTimer())["it"][2:]
                    found["host_ms"] = timing.summary(times)["median_ms"]
            except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError, RuntimeError) as e:
                found = {"failed": type(e).__name__}
        measured.append(entry | found)
        if "median_ms" in found:
            right.append((cost(found), at))
    tiles = [(ms, at) for ms, at in right if entries[at].get("way") != "panels"]
    if not tiles:
        raise SystemExit(f"no candidate computes {case.name} rightly; run python -m bench.gpu to see what is wrong")
    winners = [entries[at] for at in dict.fromkeys((min(right)[1], min(tiles)[1]))]
    print(f"  {case.name}: {right[0][0]:.3f} -> {min(right)[0]:.3f} ms", flush=True)
    return winners, measured


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the configurations")
    parser.add_argument("--log", type=Path, help="write every measurement here")
    parser.add_argument("--minutes", type=float, default=4, help="no candidate is started afterwards")
    parser.add_argument("--kind", choices=KINDS, action="append", help="of product: native, unless given")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench.tune needs an NVIDIA GPU and a PyTorch build with CUDA", file=sys.stderr)
        return 2
    race(torch.device("cuda", torch.cuda.current_device()), options)
    return 0


def race(device: torch.device, options: argparse.Namespace) -> None:
    """One race after the other, the most important first, each written down at once."""
    file = json.loads(json.dumps(launch.read(launch.file_for(device))))
    kinds = options.kind or ["native"]
    jobs = [(kind, name, T) for T in reversed(TOKENS) for kind in kinds for name in FORMS]
    ends, log = time.monotonic() + 60 * options.minutes, {}
    file["about"] = "Measured by python -m bench.tune; what it had no time for is as it was."
    file["tuned"] = {name: value for name, value in record.new(device).items() if name != "cases"}
    for at, (kind, name, tokens) in enumerate(jobs):
        left = ends - time.monotonic()
        if left <= 0:
            print(f"out of time: {len(jobs) - at} of {len(jobs)} races not run", flush=True)
            return
        case = Case("encode_update", *SHAPE, tokens, precision=KINDS[kind], **FORMS[name])
        used = launch.entries(device, "encode_pool", kind, (name.removeprefix("encode_pool_"),))
        in_use = dict(launch.config(device, "encode_pool", kind, tokens, (name.removeprefix("encode_pool_"),), True))
        in_use.pop("up_to_tokens", None)
        entries = [in_use, *(c for c in candidates(kind, tokens, in_use["descriptors"], name) if c != in_use)]
        # the races before have what they need, as they matter most; half an hour is enough for all
        share = time.monotonic() + max(left / (len(jobs) - at), min(left, LEAST))
        winners, log[f"{kind} {name} {tokens}"] = fastest(case, entries, device, share)
        of_kind = file.setdefault(name, {})
        of_kind[kind] = placed(of_kind.get(kind, used), winners, tokens if tokens != TOKENS[-1] else None)
        path = options.out / f"{torch.cuda.get_device_name(device).replace(' ', '_')}.json"
        write_utf8(path, json.dumps(file, indent=1) + "\n")  # after each, so that a run cut off leaves what it found
        if options.log:
            write_utf8(options.log, json.dumps(log, indent=1) + "\n")
        print(f"written to {path}", flush=True)


def placed(entries: list[dict[str, Any]], winners: list[dict[str, Any]], up_to: int | None) -> list[dict[str, Any]]:
    """`entries` with others for that many tokens; None for all above the others' bounds.

    Of two winners the first goes by panels, for more than PANELS_FROM tokens alone.
    """
    bounds = [(up_to, winner) for winner in winners]
    if len(winners) > 1:
        bounds.insert(0, (PANELS_FROM, winners[-1]))
    new = [({} if bound is None else {"up_to_tokens": bound}) | winner for bound, winner in bounds]
    replaced = (up_to, PANELS_FROM) if up_to is None else (up_to,)
    kept = [entry for entry in entries if entry.get("up_to_tokens") not in replaced]
    return sorted([*kept, *new], key=lambda entry: entry.get("up_to_tokens", float("inf")))


if __name__ == "__main__":
    sys.exit(main())
