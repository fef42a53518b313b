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
from unittest.mock import patch

import torch
import triton

from bench import contestants, record, timing
from bench.shapes import Case
from corrsteer.files import write_utf8
from corrsteer.kernels import launch

TOKENS = (64, 128, 4096)  # the last stands for all above, and is raced first
FORMS = {  # in the order in which they are raced
    "encode_pool_short": {"steps": 8},
    "encode_pool_singles": {"steps": 1},
    "encode_pool": {"steps": 64},
    "encode_pool_both": {"steps": 8, "pool": "both"},
}
KINDS = {"native": "bf16", "bf16x2": "bf16x2", "tf32x3": "fp32"}
LEAST = 50.0  # seconds that a race has while there are so many
SHARED_MEMORY = 227 * 1024  # bytes that a program may take on sm_90 and sm_100
# Of each form: features and tokens of a tile, warps, stages, SUBTILE and WIDE_SUBTILE, the most promising first. All
# compile for sm_90 without spills in 16-bit numbers: python -m bench.resources --raced --arch 90. At 4 warps and up to
# 100 KB two programs fit on a multiprocessor, and the epilogue of one can run under the product of the other.
RACED = {
    "encode_pool_short": (
        (128, 128, 4, 3, 16, 32), (128, 256, 8, 4, 16, 128), (256, 128, 8, 3, 16, 32), (128, 256, 8, 4, 16, 64),
        (128, 64, 4, 4, 16, 64), (64, 256, 4, 4, 16, 128), (128, 128, 8, 4, 16, 128), (64, 128, 4, 6, 16, 128),
        (128, 64, 4, 6, 16, 64), (64, 64, 4, 6, 16, 64),
    ),
    "encode_pool_singles": (
        (128, 128, 4, 3, 16, 16), (256, 128, 8, 3, 16, 32), (128, 128, 8, 4, 16, 32), (128, 64, 4, 4, 16, 32),
        (64, 128, 4, 6, 16, 32), (128, 64, 4, 6, 16, 32), (64, 64, 4, 6, 16, 32),
    ),
    "encode_pool": (
        (128, 128, 4, 3, 16, 64), (128, 256, 8, 4, 16, 64), (256, 128, 8, 4, 16, 64), (128, 256, 8, 4, 32, 64),
        (128, 128, 4, 3, 32, 64), (128, 64, 4, 4, 16, 64), (64, 256, 4, 4, 16, 64), (128, 128, 8, 4, 16, 64),
        (64, 128, 4, 6, 16, 64), (128, 64, 4, 6, 16, 64), (64, 64, 4, 6, 16, 64),
    ),
    "encode_pool_both": (
        (128, 128, 4, 3, 16, 64), (128, 256, 8, 4, 16, 64), (256, 128, 8, 4, 16, 64), (128, 128, 8, 4, 16, 64),
        (128, 64, 4, 4, 16, 64), (64, 128, 4, 6, 16, 64),
    ),
}  # fmt: skip


def candidates(kind: str, tokens: int, descriptors: int, form: str = "encode_pool") -> Iterator[dict[str, int]]:
    """Entries worth trying: of those that are raced, the ones that shared memory holds."""
    block_k = 64 if kind != "tf32x3" else 32
    row = (2 if kind != "tf32x3" else 4) * block_k  # bytes
    weights = 2 if kind == "bf16x2" else 1
    for BF, BT, warps, stages, subtile, wide in RACED[form]:
        if BT > max(64, tokens) or stages * (weights * BF + BT) * row > SHARED_MEMORY:
            continue
        entry = {
            "BF": BF, "BT": BT, "BK": block_k, "SUBTILE": subtile, "WIDE_SUBTILE": wide, "GROUP_SIZE": 8,
            "max_tiles_per_chunk": 1024 // BT, "descriptors": descriptors, "num_warps": warps, "num_stages": stages,
        }  # fmt: skip
        if form == "encode_pool_short" and kind != "tf32x3":  # pooled by a product with the segment matrix
            entry["BF16_SPLITS"] = 3 if kind == "bf16x2" else 2
        yield entry


WAY = ("way", "panel_features", "panel_tokens")  # what an entry that goes by panels has besides


def fastest(case: Case, entries: list[dict], device: torch.device, deadline: float) -> tuple[dict, list[dict]]:
    """The entry of least median time, the first being the one in use; and what was measured of each."""
    ours = contestants.contestants(case, device, ["triton"])["triton"]()
    timer, measured = timing.CudaTimer(), []
    for at, entry in enumerate(entries):
        if at and time.monotonic() > deadline:
            print(f"  out of time: {len(entries) - at} candidates not tried")
            break
        with patch.object(launch, "config", lambda *_, entry=entry: entry):
            try:
                wrong = not ours.check()["ok"]
                times = timing.interleaved({"it": ours.call}, 3 if wrong else 15, timer)["it"][2:]
            except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError, RuntimeError) as e:
                measured.append(entry | {"failed": type(e).__name__})
                continue
        measured.append(entry | ({"wrong": True} if wrong else timing.summary(times)))
    right = [m for m in measured if "median_ms" in m]
    if not right:
        raise SystemExit(f"no candidate computes {case.name} rightly; run python -m bench.gpu to see what is wrong")
    best = min(right, key=lambda m: m["median_ms"])
    print(f"  {case.name}: {right[0]['median_ms']:.3f} -> {best['median_ms']:.3f} ms", flush=True)
    return {name: best[name] for name in (*entries[0], "BF16_SPLITS", *WAY) if name in best}, measured


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
    device = torch.device("cuda", torch.cuda.current_device())
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
            break
        case = Case("encode_update", 2304, 16384, tokens, precision=KINDS[kind], **FORMS[name])
        used = launch.entries(device, "encode_pool", kind, (name.removeprefix("encode_pool_"),))
        in_use = dict(launch.config(device, "encode_pool", kind, tokens, (name.removeprefix("encode_pool_"),)))
        in_use.pop("up_to_tokens", None)
        entries = [in_use, *(c for c in candidates(kind, tokens, in_use["descriptors"], name) if c != in_use)]
        # the races before have what they need, as they matter most; half an hour is enough for all
        share = time.monotonic() + max(left / (len(jobs) - at), min(left, LEAST))
        best, log[f"{kind} {name} {tokens}"] = fastest(case, entries, device, share)
        of_kind = file.setdefault(name, {})
        of_kind[kind] = placed(of_kind.get(kind, used), best, tokens if tokens != TOKENS[-1] else None)
        path = options.out / f"{torch.cuda.get_device_name(device).replace(' ', '_')}.json"
        write_utf8(path, json.dumps(file, indent=1) + "\n")  # after each, so that a run cut off leaves what it found
        if options.log:
            write_utf8(options.log, json.dumps(log, indent=1) + "\n")
        print(f"written to {path}", flush=True)
    return 0


def placed(entries: list[dict], best: dict, up_to: int | None) -> list[dict]:
    """`entries` with another one for that many tokens; None for all above the others' bounds."""
    bounds = {entry.get("up_to_tokens"): entry for entry in entries}
    bounds[up_to] = ({} if up_to is None else {"up_to_tokens": up_to}) | best
    return [bounds[bound] for bound in sorted(bounds, key=lambda bound: float("inf") if bound is None else bound)]


if __name__ == "__main__":
    sys.exit(main())
