"""A collection against its parts: python -m bench.collection

`collect`, without permutations and with 1000, against bare generation in batches of the same sizes and the encoding of
as many tokens, in turns; and where a collection's time goes, stage by stage. Times are of the CPU: with one thread,
OMP_NUM_THREADS=1, other work on the machine changes little. With --model, of a chat model of your own as well.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import record, teacher_forcing, trials
from bench.stage_clock import REST, StageClock
from bench.timing import CpuTimer, interleaved, ratio, summary
from corrsteer import Capture, Decoding, HookPoint, collect, encode_pool
from corrsteer.compatibility import installed
from corrsteer.lm.generation import Generator, stop_tokens, tokenize
from corrsteer.lm.hook_points import decoder_layers
from corrsteer.lm.sampling import sample_keys
from corrsteer.report.tables import table

FULL: dict[str, Any] = {
    "rounds": 5, "samples": {"random": 128, "chat": 128}, "hidden": 1024, "layers": 6, "lengths": (16, 48),
    "new": {"random": (1, 16, 64), "chat": (1, 16)}, "d_sae": {"random": 16384, "chat": 4096}, "permutations": 1000,
}  # fmt: skip
QUICK: dict[str, Any] = FULL | {
    "rounds": 1, "samples": {"random": 12, "chat": 12}, "hidden": 32, "layers": 3, "lengths": (4, 9),
    "new": {"random": (1, 3), "chat": (1, 3)}, "d_sae": {"random": 64, "chat": 64}, "permutations": 19,
}  # fmt: skip
TARGET = 1.05  # the time of a collection over that of its parts

# stage -> functions whose own time it is, without that of other stages inside; those that are not there are left out
STAGES: dict[str, tuple[str, ...]] = {
    "tokenising": ("corrsteer.lm.generation:Generator.tokenize",),
    "planning": ("corrsteer.lm.generation:Generator.plan",),
    "language model": ("corrsteer.lm.generation:Generator.complete",),
    "capture": tuple(
        f"corrsteer.lm.capture:Capture.{name}"
        for name in ("__enter__", "__exit__", "_store", "stopping_criterion", "keep_rows")
    ),
    "packing": ("corrsteer.lm.capture:Capture.packed", "corrsteer.lm.capture:Capture.last_prompt"),
    "encode and pool": ("corrsteer.ops:encode_pool",),
    "pooled residuals": ("corrsteer.runs.pooling:BatchPool._add_residuals",),
    "moments": ("corrsteer.ops:update_moments",),
    "evidence": ("corrsteer.stats.evidence:Evidence.update", "corrsteer.stats.stability:snapshot"),
    "keeping rows": tuple(f"corrsteer.runs.keeper:Keeper.{name}" for name in ("make_room", "add", "finish")),
    "grading": ("corrsteer.tasks.task:Task.grade",),
}


def profiled(job: Callable[[], object]) -> dict[str, float]:
    """The share of each stage's own time in a job's CPU time, without that of the stages inside it."""
    clock = StageClock(torch.device("cpu"))
    found = [(*place, stage) for stage, targets in STAGES.items() for place in map(_found, targets) if place]
    with clock.watching(found, operations=False):
        job()
    total = sum(clock.seconds.values())
    return {stage: seconds / total for stage, seconds in clock.seconds.items()}


def _found(target: str) -> tuple[Any, str] | None:
    """Where a function is, and its name; None where it is not."""
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    try:
        owner: Any = functools.reduce(getattr, owners, importlib.import_module(module))
    except (ImportError, AttributeError):
        return None
    return (owner, name) if hasattr(owner, name) else None


def measured(world: teacher_forcing.World, grid: dict[str, Any], new: int) -> dict[str, Any]:
    """A row of the result: what a collection takes, and its parts."""
    model, layers = world.model, len(decoder_layers(world.model)[1])
    d_sae = {"d_sae": grid["d_sae"][world.name], "k": 32}
    width = model.config.hidden_size
    first = 1 if world.name == "random" else 0
    encoders = {layer: teacher_forcing.random_encoder(width, d_sae, layer) for layer in range(first, layers)}
    decoding = Decoding(max_new_tokens=new)
    prompts = tokenize(model, world.tokenizer, world.task, decoding)
    generator, keys = Generator(model, world.tokenizer, decoding), sample_keys(prompts)
    batches = generator.plan(prompts)

    def collected(permutations: int) -> None:
        collect(
            model, world.tokenizer, encoders, world.task, decoding=decoding, permutations=permutations, progress=False
        )

    def generate(_round: int) -> None:
        for batch in batches:
            generator.complete([prompts[i] for i in batch], [keys[i] for i in batch])

    parts: list[tuple[int, Tensor, Tensor]] = []  # layer, x, cu_seqlens
    for batch in batches:
        with Capture(
            model, {layer: HookPoint(layer) for layer in encoders}, max_new_tokens=new,
            stop_tokens=stop_tokens(model, world.tokenizer),
        ) as capture:  # fmt: skip
            generator.complete([prompts[i] for i in batch], [keys[i] for i in batch], capture=capture)
        parts += [(layer, *capture.packed(layer)) for layer in encoders]

    def encode(_round: int) -> None:
        for layer, x, cu_seqlens in parts:
            encode_pool(x, cu_seqlens, encoders[layer], pool="max")

    collected(grid["permutations"])  # which packs the encoders' weights, among others
    profile = profiled(lambda: collected(grid["permutations"]))
    contestants = {
        "collect": lambda _: collected(0),
        "collect with permutations": lambda _: collected(grid["permutations"]),
        "generate": generate,
        "encode": encode,
    }
    times = interleaved(contestants, grid["rounds"], CpuTimer())
    both = [a + b for a, b in zip(times["generate"], times["encode"])]
    return {
        "model": world.name, "dtype": world.dtype, "new_tokens": new, "samples": len(prompts),
        "encoders": len(encoders), "d_sae": d_sae["d_sae"],
        "kept_tokens": sum(len(x) for _, x, _ in parts) / len(encoders) / len(prompts),
        "times": {name: summary(of) for name, of in times.items()},
        "collect / parts": ratio(times["collect"], both)["median"],
        "with permutations / parts": ratio(times["collect with permutations"], both)["median"],
        "generate / parts": ratio(times["generate"], both)["median"],
        "profile": profile,
    }  # fmt: skip


HEADER = ("model", "new tokens", "kept", "samples", "SAEs", "collect / parts", "with permutations", "generate / parts")
PROFILE = ("model", "new tokens", *STAGES, REST)


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows of a table."""
    return [
        (
            row["model"], str(row["new_tokens"]), f"{row['kept_tokens']:.1f}", str(row["samples"]),
            f"{row['encoders']} of {row['d_sae']}", *(
                f"{row[name]:.2f}" for name in ("collect / parts", "with permutations / parts", "generate / parts")
            ),
        )
        for row in result["collections"]
    ]  # fmt: skip


def profile_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows of a table: where the time of a collection with permutations goes."""
    return [
        (row["model"], str(row["new_tokens"]), *(_share(row["profile"].get(stage)) for stage in PROFILE[2:]))
        for row in result["collections"]
    ]


def _share(of: float | None) -> str:
    return "-" if of is None else f"{of:.1%}"


def reached(result: dict[str, Any]) -> list[str]:
    """A line a way: what its ratio is to be, and was."""
    lines = []
    for name, words in (
        ("collect / parts", "without permutations"),
        ("with permutations / parts", f"with {result['grid']['permutations']}"),
    ):
        found = [row[name] for row in result["collections"]]
        lines.append(
            f"`collect` {words}, over generation and encoding alone, at most {TARGET}: "
            f"{min(found):.2f} to {max(found):.2f}, in {sum(r <= TARGET for r in found)} of {len(found)} cases"
        )
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.collection", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=record.STUDIES, help="folder for the result")
    parser.add_argument("--quick", action="store_true", help="a small form, which shows that it runs")
    parser.add_argument("--model", type=Path, help="folder of a chat model to measure as well")
    parser.add_argument("--dtype", default="bfloat16", help="of its weights")
    parser.add_argument("--samples", type=int, help="of each model, otherwise 128")
    parser.add_argument("--rounds", type=int, help="otherwise 5")
    options = parser.parse_args(arguments)
    grid = dict(QUICK if options.quick else FULL)
    grid["rounds"] = options.rounds or grid["rounds"]
    if options.samples:
        grid["samples"] = dict.fromkeys(grid["samples"], options.samples)
    head = record.new(torch.device("cpu"))
    del head["cases"]
    head["packages"]["transformers"] = installed("transformers")
    world = trials.random_world(grid)
    worlds = [teacher_forcing.World("random", "float32", world.model, world.tokenizer, world.task)]
    if options.model:
        worlds.append(teacher_forcing.chat_world(options.model, options.dtype, grid["samples"]["chat"]))
    result = {
        **head, "schema": "corrsteer.collection", "quick": options.quick, "grid": grid,
        "collections": [measured(world, grid, new) for world in worlds for new in grid["new"][world.name]],
    }  # fmt: skip
    print(table(HEADER, rows(result), indent=""))
    print(table(PROFILE, profile_rows(result), indent=""))
    print("\n".join(reached(result)))
    print(record.write_study(result, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
