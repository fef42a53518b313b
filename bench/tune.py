"""Find launch configurations by measurement, on request only: python -m bench.tune --out kernels/configs

Writes `<GPU name>.json`, which that GPU then uses instead of its architecture's file. Every candidate is checked before
it is timed. `python -m bench.resources` says which candidates the compiler makes something of, without a GPU.
"""

from __future__ import annotations

import argparse
import itertools
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

TOKENS = (64, 128, 4096)  # the last stands for all above
FORMS = {
    "encode_pool": {"steps": 8},
    "encode_pool_singles": {"steps": 1},
    "encode_pool_short": {"steps": 8},
    "encode_pool_both": {"steps": 8, "pool": "both"},
}
KINDS = {"native": "bf16", "bf16x2": "bf16x2", "tf32x3": "fp32"}


def candidates(kind: str, tokens: int, descriptors: int) -> Iterator[dict[str, int]]:
    """Entries worth trying: blocks that 16 or fewer warps can hold in registers."""
    block_k = 64 if kind != "tf32x3" else 32
    for BF, BT, stages in itertools.product((64, 128, 256), (64, 128, 256), (2, 3, 4, 6)):
        for warps, subtile in itertools.product((4, 8), (16, 32)):
            fits = 32 <= BF * BT // (32 * warps) <= 128  # accumulators a thread
            if fits and BT <= max(64, tokens):
                yield {
                    "BF": BF, "BT": BT, "BK": block_k, "SUBTILE": subtile, "WIDE_SUBTILE": 64 if subtile == 16 else 32,
                    "GROUP_SIZE": 8, "max_tiles_per_chunk": 1024 // BT, "descriptors": descriptors, "num_warps": warps,
                    "num_stages": stages,
                }  # fmt: skip


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
    return {name: best[name] for name in (*entries[0], "BF16_SPLITS") if name in best}, measured


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the configurations")
    parser.add_argument("--log", type=Path, help="write every measurement here")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--kind", choices=KINDS, action="append", help="all of them by default")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench.tune needs an NVIDIA GPU and a PyTorch build with CUDA", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    file = json.loads(json.dumps(launch.read(launch.file_for(device))))
    jobs = [(kind, name, T) for kind in options.kind or KINDS for name in FORMS for T in reversed(TOKENS)]
    ends, log = time.monotonic() + 60 * options.minutes, {}
    for at, (kind, name, tokens) in enumerate(jobs):
        case = Case("encode_update", 2304, 16384, tokens, precision=KINDS[kind], **FORMS[name])
        in_use = dict(launch.config(device, "encode_pool", kind, tokens, (name.removeprefix("encode_pool_"),)))
        in_use.pop("up_to_tokens", None)
        entries = [in_use, *candidates(kind, tokens, in_use["descriptors"])]
        if name == "encode_pool_short":  # by the product with the segment matrix, or by the loop
            splits = {"BF16_SPLITS": 3 if kind == "bf16x2" else 2}
            entries += [entry | splits for entry in entries[1:]]
        share = time.monotonic() + (ends - time.monotonic()) / (len(jobs) - at)
        best, log[f"{kind} {name} {tokens}"] = fastest(case, entries, device, share)
        if tokens == TOKENS[-1]:
            file.setdefault(name, {})[kind] = [best]
        else:
            file[name][kind].insert(0, {"up_to_tokens": tokens} | best)
    file["about"] = "Measured by python -m bench.tune."
    file["tuned"] = {name: value for name, value in record.new(device).items() if name != "cases"}
    path = options.out / f"{torch.cuda.get_device_name(device).replace(' ', '_')}.json"
    write_utf8(path, json.dumps(file, indent=1) + "\n")
    if options.log:
        write_utf8(options.log, json.dumps(log, indent=1) + "\n")
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
