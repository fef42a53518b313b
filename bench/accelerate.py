"""SAELens' SAEs accelerated and not: python -m bench.accelerate

`encode`, which returns the dense matrix, and pooling, by turns, on one thread. `written` is the time to write a dense
matrix of that size alone, which no `encode` can go below. The last lines printed are `FASTER` of
`corrsteer/integrations/saelens_paths.py`.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import record, timing
from corrsteer.integrations import saelens
from corrsteer.sae.encoder import ARCHITECTURES

GEMMA_SCOPE = (2304, 16384)
SIZES = ((512, 4096), GEMMA_SCOPE)
KINDS: dict[str, dict[str, Any]] = {"standard": {}, "jumprelu": {}, "gated": {}, "topk": {"k": 64}}
DTYPES = ("float32", "bfloat16")
TOKENS = (1, 8, 64, 512)
POOLED_TOKENS = (64, 512)
LENGTH = 8  # tokens a sample
ROUNDS = 7
MARGIN = 0.95  # a ratio of times that counts as faster
QUICK = {"sizes": ((32, 64),), "kinds": ("standard",), "tokens": (1, 8), "rounds": 2}


def make_sae(kind: str, size: tuple[int, int], dtype: str) -> Any:
    """A random SAE of which a few features in a hundred are active, as trained ones are."""
    from sae_lens import SAE

    config = {"architecture": kind, "d_in": size[0], "d_sae": size[1], "dtype": dtype, **KINDS[kind]}
    sae = SAE.from_dict(config)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        weight = torch.randn(sae.W_enc.shape, generator=random, dtype=torch.float32, device="cpu")
        sae.W_enc.copy_(weight / size[0] ** 0.5)
        for name in ("b_enc", "b_gate", "threshold"):
            if isinstance(getattr(sae, name, None), torch.nn.Parameter):
                getattr(sae, name).fill_(2.0 if name == "threshold" else -1.0)
    return sae.requires_grad_(False)


def pooled_by_hand(sae: Any, x: Tensor) -> Tensor:
    return type(sae).encode(sae, x).float().mean(1)


def measured(kind: str, size: tuple[int, int], dtype: str, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """A row of `encode`, and for enough tokens one of pooling."""
    sae = make_sae(kind, size, dtype)
    random = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, size[0], generator=random, dtype=torch.float32, device="cpu").to(sae.dtype)
    saelens.accelerate(sae)
    encode = vars(sae)["encode"]
    kernels = lambda _: encode.core(sae.process_sae_in(x))  # noqa: E731  whatever the table says
    written = torch.empty(tokens, size[1], dtype=sae.dtype, device="cpu")
    contestants = {
        "plain": lambda _: type(sae).encode(sae, x),
        "accelerated": kernels,
        "written": lambda _: written.fill_(0.5),
    }
    rows = [row("encode", kind, size, dtype, tokens, contestants, rounds)]
    if tokens in POOLED_TOKENS:
        batch = x.view(-1, LENGTH, size[0])
        starts = torch.arange(0, tokens + 1, LENGTH, dtype=torch.int32, device="cpu")
        pooled = {
            "plain": lambda _: pooled_by_hand(sae, batch),
            "accelerated": lambda _: saelens.pooled_by_kernels(encode, x, starts, "mean"),
        }
        rows.append(row("pooled", kind, size, dtype, tokens, pooled, rounds))
    return rows


def row(what: str, kind: str, size: tuple[int, int], dtype: str, tokens: int, contestants: Any, rounds: int) -> Any:
    start = time.perf_counter()
    timing.interleaved(contestants, 1, timing.WallTimer())
    quick = time.perf_counter() - start < 0.1
    times = timing.interleaved(contestants, rounds * 5 if quick else rounds, timing.WallTimer())
    found: dict[str, Any] = {"call": what, "architecture": kind, "d_in": size[0], "d_sae": size[1], "dtype": dtype}
    found |= {"tokens": tokens, "accelerated_over_plain": timing.ratio(times["accelerated"], times["plain"])}
    return found | {name: timing.summary(of) for name, of in times.items()}


def faster(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str, str], tuple[int, int | None]]:
    """The fewest and most tokens of the longest stretch at which every SAE measured was faster, see `FASTER`."""
    groups: dict[tuple[str, str, str], dict[int, bool]] = {}
    for r in rows:
        group = groups.setdefault((r["call"], ARCHITECTURES[r["architecture"]], r["dtype"]), {})
        won = r["accelerated_over_plain"]["median"] < MARGIN
        group[r["tokens"]] = group.get(r["tokens"], True) and won
    table: dict[tuple[str, str, str], tuple[int, int | None]] = {}
    for key, group in groups.items():
        stretches = [list(tokens) for won, tokens in itertools.groupby(sorted(group), group.__getitem__) if won]
        if stretches:
            longest = max(reversed(stretches), key=len)
            table[key] = (longest[0], None if longest[-1] == max(group) else longest[-1])
    return table


def smallest(rows: Sequence[dict[str, Any]]) -> int:
    return min(r["d_in"] * r["d_sae"] for r in rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=record.STUDIES)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, whose times mean nothing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    sizes, kinds, tokens, rounds = QUICK.values() if options.quick else (SIZES, tuple(KINDS), TOKENS, ROUNDS)
    result = record.new(torch.device("cpu")) | {"schema": "corrsteer.accelerate"}
    del result["cases"]
    result["rows"] = []
    for size in sizes:
        for kind in kinds:
            for dtype in DTYPES:
                for t in tokens:
                    result["rows"] += measured(kind, size, dtype, t, rounds)
                    print(kind, size, dtype, t, result["rows"][-1]["accelerated_over_plain"])
    print(record.write_study(result, options.out))
    for key, tokens in faster(result["rows"]).items():
        print(f"    {key}: {tokens},")
    print("SMALLEST =", smallest(result["rows"]))


if __name__ == "__main__":
    main()
