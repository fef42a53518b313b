"""What encoders hold in memory, as they are and packed: python -m bench.packing

Each encoder is made, and encodes some tokens, in a process of its own, which says by how much it has grown: at most,
and once everything but the encoder is let go.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench import record, resident
from corrsteer import SparseEncoder, encode, pack
from corrsteer.report.tables import table
from corrsteer.sae.encoder import PRECISIONS

SHAPE = (2304, 16384)  # of Gemma Scope 2B
TOKENS = 64
MIB = 1 << 20


def make(precision: str, d_in: int, d_sae: int, packs: bool) -> SparseEncoder:
    """A jumprelu encoder with random weights."""
    weight, generator = torch.empty(d_sae, d_in, dtype=PRECISIONS[precision], device="cpu"), torch.Generator()
    for some in weight.split(1024):
        some.copy_(torch.randn(some.shape, generator=generator, dtype=torch.float32, device="cpu"))
    vectors = {name: torch.zeros(d_sae, dtype=torch.float32, device="cpu") for name in ("bias", "threshold")}
    encoder = SparseEncoder(d_in, d_sae, "jumprelu", weight=weight, **vectors)
    return pack(encoder) if packs else encoder


def held(precision: str, d_in: int, d_sae: int, packs: bool) -> dict[str, Any]:
    """Bytes by which this process grows with an encoder that is used."""
    x = torch.ones(TOKENS, d_in, dtype=PRECISIONS[precision], device="cpu")
    encode(x[:, :4].contiguous(), make(precision, 4, 4, packs))  # what is loaded when first used
    before, kept, sums = resident.now(), [], []

    def use() -> None:
        kept.append(make(precision, d_in, d_sae, packs))
        sums.append(float(encode(x, kept[0]).double().sum()))

    peak = resident.peak(use)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return {"peak_bytes": peak, "held_bytes": resident.now() - before, "sum": sums[0]}


HEADER = ("weights", "encoder", "weight, MiB", "held, MiB", "held / weight", "at most, MiB")


def rows(result: dict[str, Any]) -> list[list[str]]:
    """A row an encoder."""
    return [
        [
            one["precision"], "packed" if one["packed"] else "as it is", f"{one['weight_bytes'] / MIB:.0f}",
            f"{one['held_bytes'] / MIB:.0f}", f"{one['held_bytes'] / one['weight_bytes']:.2f}",
            f"{one['peak_bytes'] / MIB:.0f}",
        ]
        for one in result["encoders"]
    ]  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.packing", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=record.STUDIES, help="where to write packing.json")
    parser.add_argument("--shape", type=int, nargs=2, default=SHAPE, metavar=("D_IN", "D_SAE"), help="of the encoders")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what a process of its own is to do
    options = parser.parse_args(arguments)
    if options.one is not None:
        print(json.dumps(held(**json.loads(options.one))))
        return
    result = record.new(torch.device("cpu"))
    del result["cases"]
    d_in, d_sae = options.shape
    result |= {"schema": "corrsteer.packing", "d_in": d_in, "d_sae": d_sae, "tokens": TOKENS, "encoders": []}
    for precision in ("fp32", "bf16"):
        for packs in (False, True):
            one = {"precision": precision, "d_in": d_in, "d_sae": d_sae, "packs": packs}
            command = [sys.executable, "-m", "bench.packing", "--one", json.dumps(one)]
            done = subprocess.run(command, cwd=record.ROOT, capture_output=True, text=True, check=True)
            described = {"precision": precision, "packed": packs}
            described["weight_bytes"] = d_in * d_sae * PRECISIONS[precision].itemsize
            result["encoders"].append(described | json.loads(done.stdout.splitlines()[-1]))
    print(table(HEADER, rows(result)))
    print(record.write_study(result, options.out))


if __name__ == "__main__":
    main()
