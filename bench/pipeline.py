"""Whole jobs against the published way of working: python -m bench.pipeline --model DIR

Collection, pruning and evaluation, each by corrsteer and by `bench/published.py`, on two language models: the
SmolLM2-135M-Instruct in DIR, and on a GPU a random one of Gemma 2 2B's shape. Both have random jumprelu SAEs on all
layers, of whose features about 0.5 % are active. Rewards are a bit of the prompt and the completion's first
word.

On a CPU one thread is used, and seconds are what it computed, so that other processes do not count.

Both ways are first run in float32, and have to come to the same rewards, correlations, features and decisions; no time
is taken where they don't. The result is written around every part, and the same command goes on with what is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import measure, record
from bench.pipeline_jobs import NAME, OURS, PLAIN, PUBLISHED, TOLERANCE, Bench, check, job
from bench.pipeline_worlds import GEMMA, SMOLLM2
from bench.stages import ended_after
from corrsteer import CorrSteerError
from corrsteer.compatibility import installed
from corrsteer.report.tables import table

LONGEST = 300.0  # seconds that a part may take on a GPU, which may hang, before the process is ended
FINAL = ("measured", "wrong", "failed")
TRIES = 2  # a part that ends the process so often is not begun again

# What is measured. `jobs`: new tokens -> samples of collection, of pruning and of evaluation, ours and published; and
# how many candidates the published way prunes, as each takes as long. `check`: new tokens, and samples of each job.
GRIDS: dict[str, dict[str, Any]] = {
    "gpu": {
        "settings": [SMOLLM2, GEMMA], "dtype": "bfloat16", "precision": "bf16x2", "rounds": 2,
        "d_sae": {SMOLLM2: 4096, GEMMA: 16384}, "check": {"new": 8, "samples": (64, 2, 16)},
        "jobs": {
            1: {"collection": (512, 64), "pruning": (64, 2), "evaluation": (256, 64), "candidates": 99},
            16: {"collection": (320, 32), "pruning": (16, 1), "evaluation": (160, 16), "candidates": 6},
            64: {"collection": (112, 8), "pruning": (4, 1), "evaluation": (112, 8), "candidates": 1},
        },
    },
    "cpu": {
        "settings": [SMOLLM2], "dtype": "bfloat16", "precision": "bf16x2", "rounds": 1,
        "d_sae": {SMOLLM2: 4096}, "check": {"new": 4, "samples": (16, 1, 4)},
        "jobs": {
            1: {"collection": (16, 8), "pruning": (1, 1), "evaluation": (8, 8), "candidates": 3},
            16: {"collection": (16, 8), "pruning": (1, 1), "evaluation": (8, 8), "candidates": 2},
            64: {"collection": (16, 8), "pruning": (1, 1), "evaluation": (4, 4), "candidates": 1},
        },
    },
    "toy": {
        "settings": [SMOLLM2, GEMMA], "dtype": "float32", "precision": "fp32", "rounds": 2,
        "d_sae": {SMOLLM2: 96, GEMMA: 128}, "check": {"new": 4, "samples": (48, 2, 8)},
        "jobs": {
            1: {"collection": (24, 16), "pruning": (4, 2), "evaluation": (8, 8), "candidates": 9},
            3: {"collection": (24, 16), "pruning": (4, 1), "evaluation": (8, 8), "candidates": 1},
        },
    },
}  # fmt: skip


@dataclass
class Part:
    """A part of the result: its record before it has run, and what runs it."""

    planned: dict[str, Any]
    run: Callable[[], dict[str, Any]]


def parts_of(bench: Bench) -> list[Part]:
    """All parts, in the order in which they run: of each setting its check first."""
    found = []
    for setting in bench.grid["settings"]:
        head = {"setting": setting}
        found.append(Part(head | {"job": "check", "new_tokens": bench.grid["check"]["new"]},
                          lambda setting=setting: check(bench, setting)))  # fmt: skip
        found += [
            Part(head | {"job": name, "new_tokens": new},
                 lambda setting=setting, new=new, name=name: job(bench, setting, new, name))
            for new in bench.grid["jobs"]
            for name in NAME
        ]  # fmt: skip
    return found


def run_parts(result: dict[str, Any], parts: Sequence[Part], save: Callable[[], object], seconds: float) -> None:
    """Run what is missing of a result, which is saved around each part; no part is begun after so many seconds."""
    records, deadline = result["parts"], measure.Deadline(seconds)
    for at, part in enumerate(parts):
        before = records[at]
        if before["status"] in FINAL:
            continue
        checked = next(r for r in records if r["setting"] == part.planned["setting"] and r["job"] == "check")
        reason = ""
        if deadline.left() <= 0:
            reason = "the time was used up"
        elif checked["status"] in ("wrong", "failed"):
            reason = "the check did not hold, and no time is believed"
        elif before.get("tries", 0) >= TRIES:
            records[at] = part.planned | {"status": "failed", "reason": f"the process ended in it {TRIES} times"}
            continue
        if reason:
            records[at] = part.planned | {"status": "not measured", "reason": reason}
            continue
        records[at] = part.planned | {"status": "started", "tries": before.get("tries", 0) + 1}
        save()
        start = time.monotonic()
        limit = ended_after(LONGEST) if result["device"]["type"] == "gpu" else contextlib.nullcontext()
        with limit:
            try:
                found = part.run()
            except Exception as error:
                found = {"status": "failed", "reason": measure.words(error)}
        records[at] = part.planned | found | {"wall_seconds": time.monotonic() - start}
        save()
        print(line(records[at]), flush=True)


def line(part: dict[str, Any]) -> str:
    """What to print of a part."""
    head = f"{part['setting']}, {part['job']}, {part['new_tokens']} new: {part['status']}"
    if "speedup" in part:
        return f"{head}, {part['speedup']:.1f} times as many {part['counts']} a second"
    return f"{head} {part.get('reason') or part.get('found') or ''}"


def stem(result: dict[str, Any]) -> str:
    """What the result file is called: `pipeline` on a CPU, with the device's name on a GPU."""
    return "pipeline" if result["device"]["type"] == "cpu" and not _dry(result) else f"pipeline-{record.stem(result)}"


def _dry(result: dict[str, Any]) -> bool:
    return result["schema"] == record.DRY_RUN


def continued(result: dict[str, Any], path: Path) -> None:
    """Take over what an earlier run left of the same sources and machine.

    Raises
    ------
    CorrSteerError : where the file there is of others.
    """
    old = json.loads(path.read_text(encoding="utf-8"))
    same = ("schema", "version", "sources", "packages", "python", "device", "grid")
    if other := [name for name in same if old.get(name) != result[name]]:
        raise CorrSteerError(
            f"--out must be a folder whose {path.name} is of the same sources and machine, got one of other "
            f"{', '.join(other)}; give another folder, or --again to measure everything anew in its place"
        )
    result["parts"] = old["parts"]
    for name in ("date", "commit", "dirty"):
        result[name] = old[name]


SPEED = ("model", "job", "new tokens", "counted", "published /s", "corrsteer /s", "corrsteer / published")
MEMORY = ("model", "job", "new tokens", "language model", "SAEs, published", "SAEs, corrsteer", "call, published",
          "call, corrsteer", "without p-values")  # fmt: skip
STAGES = ("language model", "capture", "encode and pool", "statistics", "grading", "rest")
SHARES = ("model", "new tokens", "way", "ms a sample", *STAGES)


def measured(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts that have times."""
    return [part for part in result["parts"] if "ways" in part]


def speed_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """How much a second."""
    return [
        (
            part["setting"], part["job"], str(part["new_tokens"]), part["counts"],
            *(f"{part['ways'][way]['per_second']:.3g}" for way in (PUBLISHED, OURS)), f"{part['speedup']:.1f}",
        )
        for part in measured(result)
    ]  # fmt: skip


def memory_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """What is held throughout, and by how much a call grows beyond it, in MiB."""
    rows = []
    for part in measured(result):
        ways = part["ways"]
        held = (ways[way]["saes_bytes"] for way in (PUBLISHED, OURS))
        grown = (ways.get(way, {}).get("call_bytes") for way in (PUBLISHED, OURS, PLAIN))
        cells = ("-" if size is None else f"{size / 2**20:.0f}" for size in (part["model_bytes"], *held, *grown))
        rows.append((part["setting"], part["job"], str(part["new_tokens"]), *cells))
    return rows


def share_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Shares of the time of collection."""
    rows = []
    for part in measured(result):
        for way, of in part["ways"].items():
            if "stages" in of:
                total = sum(of["stages"].values())
                shares = (f"{of['stages'].get(stage, 0) / total:.1%}" for stage in STAGES)
                ms = f"{1000 * total / of['samples']:.3g}"
                rows.append((part["setting"], str(part["new_tokens"]), way, ms, *shares))
    return rows


def summary(result: dict[str, Any]) -> list[str]:
    """What both ways agree on, how much faster each job is, and what was not measured."""
    lines = []
    for setting in result["grid"]["settings"]:
        of = [part for part in result["parts"] if part["setting"] == setting]
        lines += [_agreement(part) for part in of if "found" in part]
        for name in NAME:
            found = {part["new_tokens"]: part["speedup"] for part in of if part["job"] == name and "speedup" in part}
            if found:
                at = ", ".join(f"{ratio:.1f} at {new}" for new, ratio in found.items())
                lines.append(f"{setting}, {name}: corrsteer over published, a second, by new tokens: {at}")
        lines += [
            f"{setting}, {part['job']}, {part['new_tokens']} new: {part['status']}, {part.get('reason', 'cut off')}"
            for part in of
            if part["status"] not in ("measured", "wrong")
        ]
    return lines


def _agreement(part: dict[str, Any]) -> str:
    found = part["found"]
    words = [f"{name} {'the same' if found[name] else 'different'}" for name in ("rewards", "pruning", "evaluation")]
    others = "" if found["features"] else " and others of another r"
    return (
        f"{part['setting']}, both ways in float32: {', '.join(words)}; {found['selected']} features selected, "
        f"{found['same_index']} of them the same{others}; r apart by more than "
        f"{TOLERANCE:g} in {found['r_beyond']:.3%} of features; {found['active']:.2%} of features active"
    )


def text(result: dict[str, Any]) -> str:
    """The tables, for a terminal."""
    tables = ((SPEED, speed_rows), (MEMORY, memory_rows), (SHARES, share_rows))
    found = [table(header, rows(result), indent="") for header, rows in tables if rows(result)]
    return "\n\n".join([*found, "\n".join(summary(result))])


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.pipeline", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=record.STUDIES, metavar="DIR", help="where the result file goes")
    parser.add_argument("--model", type=Path, metavar="DIR", help=f"with {SMOLLM2}")
    parser.add_argument("--minutes", type=float, default=15, help="no part is started afterwards")
    parser.add_argument("--again", action="store_true", help="measure anew what an earlier run has left there")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with toys; times mean nothing")
    parser.add_argument("--commit", help="of these sources, where they are not in a git repository")
    options = parser.parse_args(arguments)
    on_gpu = torch.cuda.is_available() and not options.dry_run
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    if not on_gpu:
        torch.set_num_threads(1)  # whose time can be told from that of other processes
    grid = dict(GRIDS["toy" if options.dry_run else "gpu" if on_gpu else "cpu"])
    if options.model is None and not options.dry_run:
        grid["settings"] = [setting for setting in grid["settings"] if setting != SMOLLM2]
        if not grid["settings"]:
            parser.error(f"--model must be given on a CPU, where {SMOLLM2} is all that is measured")
    if options.dry_run and options.out.resolve() == record.STUDIES:
        parser.error("--out must be another folder than bench/results/studies for a dry run, whose times mean nothing")
    bench = Bench(grid, options.dry_run, device, options.model)
    head = record.new(device, options.commit)
    del head["cases"]
    head["packages"]["transformers"] = installed("transformers")
    schema = record.DRY_RUN if options.dry_run else "corrsteer.pipeline"
    parts = parts_of(bench)
    result = {**head, "schema": schema, "sources": record.sources(), "grid": json.loads(json.dumps(grid))}
    result["parts"] = [
        part.planned | {"status": "not measured", "reason": "the run was stopped before"} for part in parts
    ]
    path = options.out / f"{stem(result)}.json"
    try:
        if path.exists() and not options.again:
            continued(result, path)
    except CorrSteerError as error:
        print(error, file=sys.stderr)
        return 2
    run_parts(result, parts, lambda: record.write_study(result, options.out, path.stem), 60 * options.minutes)
    record.write_study(result, options.out, path.stem)
    print(f"\n{text(result)}\n\n{path}")
    return int(any(part["status"] in ("wrong", "failed") for part in result["parts"]))


if __name__ == "__main__":
    sys.exit(main())
