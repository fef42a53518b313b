"""Search against the exhaustive grid: python -m bench.search

- `search` is `select(run, "search")`, and `search, one feature` the same without a second feature in its steering;
- `grid` tries the same candidates at every scale that the search came to, on every sample that the search could have
  raced on, and takes the best; that one and no steering are run on the samples that confirm, as a search does.

All are scored on those, and on test samples; nothing was chosen by either. The search for one
feature is timed before and after the grid, and has to come to the same both times.

With --model and --saes it also measures a chat model of your own: what is 27+14?
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from bench import record
from corrsteer import Decoding, SearchOptions, SparseEncoder, Steering, Task, Trial, collect, demo, run_trials, select
from corrsteer.compatibility import installed
from corrsteer.experiments.selection import candidates, chosen, decoder_rows
from corrsteer.experiments.trials import UNSTEERED
from corrsteer.report.tables import table
from corrsteer.runs.run import Run

FULL: dict[str, Any] = {
    "samples": {"demo": (1500, 300, 300), "chat": (256, 160, 120)}, "candidates": {"demo": 3, "chat": 1},
    "most_features": 3, "seed": 0,
}  # fmt: skip
QUICK: dict[str, Any] = FULL | {
    "samples": {"demo": (300, 64, 60), "chat": (60, 64, 30)}, "candidates": {"demo": 1, "chat": 1},
}  # fmt: skip
QUESTIONS = (
    "What is {}+{}? Answer with the number only.", "What is {} + {}? Answer with the number only.",
    "Compute {}+{}. Answer with the number only.",
)  # fmt: skip

ONE = "search, one feature"  # what the grid is compared with

T = TypeVar("T")


@dataclass
class World:
    """What is searched: a model, its SAEs, and samples that share no prompt."""

    name: str
    candidates: int  # of each layer, pooling and sign
    model: Any
    tokenizer: Any
    encoders: dict[int, SparseEncoder]
    train: Task
    validation: Task
    test: Task
    decoding: Decoding


def demo_world(grid: dict[str, Any]) -> World:
    """The demo's."""
    model, tokenizer, encoders = demo.load()
    parts = (task.take(n) for task, n in zip(demo.tasks(), grid["samples"]["demo"]))
    return World("demo", grid["candidates"]["demo"], model, tokenizer, encoders, *parts, Decoding(max_new_tokens=4))


def chat_world(folder: Path, saes: dict[int, Path], dtype: str, new: int, grid: dict[str, Any]) -> World:
    """Sums, asked of a chat model; those of the samples of one part are in no other."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    encoders = {layer: SparseEncoder.load(path) for layer, path in saes.items()}
    name = encoders[min(encoders)].metadata.get("model_name") or "chat"
    return World(
        name, grid["candidates"]["chat"], model, AutoTokenizer.from_pretrained(folder), encoders,
        *sums(grid["samples"]["chat"]), Decoding(max_new_tokens=new),
    )  # fmt: skip


def sums(samples: Sequence[int], seed: int = 0) -> list[Task]:
    """A part for each number of samples: sums of 20 to 35 and 10 to 25, each asked in as many ways as there are."""
    rng = random.Random(seed)
    pairs = [(a, b) for a in range(20, 36) for b in range(10, 26)]
    rng.shuffle(pairs)
    parts = []
    for name, n in zip(("train", "validation", "test"), samples):
        own = [pairs.pop() for _ in range(-(-n // len(QUESTIONS)))]
        rows = [{"prompt": q.format(a, b), "answer": str(a + b)} for a, b in own for q in QUESTIONS]
        rng.shuffle(rows)
        parts.append(Task.from_rows(rows[:n], grader="number", chat=True, name=f"{name} sums"))
    return parts


def searched(world: World, run: Run, options: SearchOptions) -> Steering:
    """What a search finds."""
    return select(
        run, "search", model=world.model, tokenizer=world.tokenizer, validation=world.validation,
        decoding=world.decoding, options=options, encoders=world.encoders, progress=False,
    )  # fmt: skip


def scored(world: World, tried: Sequence[Trial], task: Task) -> list[float]:
    """The score of each trial, of all samples."""
    results = run_trials(world.model, world.tokenizer, task, tried, world.decoding, progress=False)
    return [graded.score for graded in results]


def exhaustive(world: World, tried: Sequence[Trial], racing: Task, confirming: Task) -> tuple[int, list[float]]:
    """Which trial is the best of all, with the score of each; the first is no steering."""
    scores = scored(world, tried, racing)
    best = max(range(len(scores)), key=scores.__getitem__)
    scored(world, [tried[0], tried[best]], confirming)
    return best, scores


def timed(run: Callable[[], T]) -> tuple[T, float]:
    """What it gives, and the seconds that it takes."""
    started = time.perf_counter()
    found = run()
    return found, time.perf_counter() - started


def measured(world: World, grid: dict[str, Any]) -> dict[str, Any]:
    """A row of the result: what each way takes and finds."""
    run = collect(
        world.model, world.tokenizer, world.encoders, world.train, decoding=world.decoding, permutations=0,
        progress=False,
    )  # fmt: skip
    options = {
        "search": SearchOptions(world.candidates, grid["most_features"], seed=grid["seed"]),
        ONE: SearchOptions(world.candidates, 1, seed=grid["seed"]),
    }
    found, seconds = {}, {name: [] for name in options}
    for name, each in options.items():
        found[name], took = timed(lambda each=each: searched(world, run, each))
        if "search" not in found[name].provenance:
            raise SystemExit(f"{world.name}: there is nothing to search: {'; '.join(found[name].notes)}")
        seconds[name].append(took)

    # the same samples that the search divides
    confirm = options["search"].confirm
    racing, confirming, _ = world.validation.split(1 - confirm, confirm, 0, seed=grid["seed"])
    of_one = found[ONE].provenance["search"]
    choices = chosen("search", "pearson", None, "maxT", "delta", None, None, None, 10).checked(run)
    features = candidates(run, choices, world.candidates)
    alone = Steering(features, decoder_rows(run, features, world.encoders)).alone()
    tried = [Trial(steering, scale) for steering in alone for scale in of_one["grid"]["scales"]]
    (best, scores), took = timed(lambda: exhaustive(world, [UNSTEERED, *tried], racing, confirming))
    seconds["grid"] = [took]
    again, took = timed(lambda: searched(world, run, options[ONE]))
    seconds[ONE].append(took)
    if _what(again) != _what(found[ONE]):
        raise SystemExit(f"{world.name}: {ONE} found {_what(again)} the second time, {_what(found[ONE])} before")

    steered = {name: Trial(of if of.features else None, of.scale, of.positions) for name, of in found.items()}
    steered["grid"] = [UNSTEERED, *tried][best]
    held = {
        part: scored(world, [UNSTEERED, *steered.values()], task)
        for part, task in (("confirmation", confirming), ("test", world.test))
    }
    in_grid = {"trials": len(tried), "completions": len(racing) * len(scores) + 2 * len(confirming)}
    ways = {}
    for at, name in enumerate(steered, 1):
        of = found.get(name)
        counted = of.provenance["search"] if of else in_grid
        ways[name] = {
            "trials": counted["trials"], "completions": counted["completions"],
            "seconds": statistics.fmean(seconds[name]), "timed": seconds[name],
            "found": _what(steered[name]),
            **{part: scores_of[at] for part, scores_of in held.items()},
        }  # fmt: skip
    return {
        "model": world.name, "layers": sorted(world.encoders),
        "d_sae": [world.encoders[at].d_sae for at in sorted(world.encoders)],
        "new_tokens": world.decoding.max_new_tokens, "collected": run.n, "racing": len(racing),
        "confirming": len(confirming), "testing": len(world.test), "candidates": len(features),
        "scales": of_one["grid"]["scales"], "unsteered": {part: of[0] for part, of in held.items()},
        "same": ways["grid"]["found"] == ways[ONE]["found"], "ways": ways,
    }  # fmt: skip


def _what(steered: Steering | Trial) -> list[str]:
    """Features with what they are multiplied by, as a person reads them."""
    steering = steered.steering if isinstance(steered, Trial) else steered
    features = steering.features if steering else []
    return [f"{steered.scale * feature.coefficient:+.2f} × {feature.layer}/{feature.index}" for feature in features]


HEADER = ("model", "way", "trials", "completions", "seconds", "layer/feature", "confirmation", "test")


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows of a table."""
    lines = []
    for world in result["worlds"]:
        unsteered = (f"{world['unsteered'][part]:.3f}" for part in ("confirmation", "test"))
        lines.append((world["model"], "unsteered", "-", "-", "-", "-", *unsteered))
        for name, way in world["ways"].items():
            lines.append(
                (
                    world["model"], name, str(way["trials"]), str(way["completions"]), f"{way['seconds']:.1f}",
                    ", ".join(way["found"]) or "none", f"{way['confirmation']:.3f}", f"{way['test']:.3f}",
                )
            )  # fmt: skip
    return lines


def summary(result: dict[str, Any]) -> list[str]:
    """Two lines a model: the sizes, and how much more the grid takes than search does."""
    lines = []
    for world in result["worlds"]:
        grid, one = world["ways"]["grid"], world["ways"][ONE]
        name, scales, layers = world["model"], world["scales"], ", ".join(map(str, world["layers"]))
        full = one["trials"] * world["racing"]
        lines += [
            f"{name}: SAEs of layers {layers} with {max(world['d_sae'])} features, {world['collected']} samples, "
            f"{world['new_tokens']} new tokens; {world['candidates']} candidates at {len(scales)} scales from "
            f"{scales[0]:g} to {scales[-1]:g} on {world['racing']} samples, {world['confirming']} to confirm by, "
            f"{world['testing']} to test",
            f"{name}: the grid takes {grid['completions'] / one['completions']:.1f} times the completions of a search "
            f"for one feature and {grid['seconds'] / one['seconds']:.1f} times the seconds, and finds "
            f"{'the same' if world['same'] else 'another'}; the search's {one['trials']} trials in full would take "
            f"{full / one['completions']:.1f} times its completions",
        ]
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.search", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=record.STUDIES, help="folder for the result")
    parser.add_argument("--quick", action="store_true", help="a small form, which shows that it runs")
    parser.add_argument("--model", type=Path, help="folder of a chat model to measure as well")
    parser.add_argument("--saes", nargs="+", default=[], metavar="LAYER=FOLDER", help="its SAEs")
    parser.add_argument("--dtype", default="float32", help="of its weights")
    parser.add_argument("--max-new-tokens", type=int, default=12, help="that it writes")
    options = parser.parse_args(arguments)
    saes = {int(layer): Path(path) for layer, path in (pair.split("=", 1) for pair in options.saes)}
    if (options.model is None) != (not saes):
        parser.error("--model and --saes are given together")
    grid = QUICK if options.quick else FULL
    head = record.new(torch.device("cpu"))
    del head["cases"]
    head["packages"]["transformers"] = installed("transformers")
    worlds = [demo_world(grid)]
    if options.model:
        worlds.append(chat_world(options.model, saes, options.dtype, options.max_new_tokens, grid))
    result = {
        **head, "schema": "corrsteer.search", "quick": options.quick, "grid": grid,
        "worlds": [measured(world, grid) for world in worlds],
    }  # fmt: skip
    print(table(HEADER, rows(result), indent=""))
    print("\n".join(summary(result)))
    print(record.write_study(result, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
