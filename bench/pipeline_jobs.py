"""Collection, pruning and evaluation by corrsteer and in the published way: whether they agree, and what they take."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import published, resident
from bench.pipeline_worlds import (
    CALIBRATION,
    SMOLLM2,
    World,
    chat_model,
    chat_tasks,
    random_model,
    random_saes,
    random_tasks,
)
from bench.published import Chosen
from bench.stage_clock import Place, StageClock, now
from bench.trials import Numbers
from corrsteer import Capture, CorrSteerError, Decoding, Evidence, Run, Steering, Task, collect, evaluate
from corrsteer.experiments.selection import select

NAME = {"collection": "samples", "pruning": "completions", "evaluation": "samples"}  # what is counted of a job
OURS, PLAIN, PUBLISHED = "corrsteer", "corrsteer without p-values", "published"
TOLERANCE, OUTSIDE = 1e-4, 1e-3  # of r; and the share of features, on whose threshold a token may lie, beyond it
PRUNED = 4  # layers whose features the check prunes


@dataclass
class Bench:
    """What parts share: the grid, the device, and the world that was made last."""

    grid: dict[str, Any]
    toy: bool
    device: torch.device
    folder: Path | None
    _made: tuple[tuple[str, bool], World] | None = None

    def world(self, setting: str, exact: bool) -> World:
        """A setting's world; `exact`, all of it in float32. Only the last one is kept."""
        if self._made is None or self._made[0] != (setting, exact):
            self._made = None
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self._made = ((setting, exact), self._make(setting, exact))
        return self._made[1]

    def _make(self, setting: str, exact: bool) -> World:
        dtype = torch.float32 if exact else getattr(torch, self.grid["dtype"])
        samples = self._samples()
        if setting == SMOLLM2 and not self.toy:
            assert self.folder is not None, "the command line has seen to it"
            model, tokenizer = chat_model(self.folder, dtype, self.device)
            tasks = chat_tasks(samples)
        else:
            model, tokenizer = random_model(setting, self.toy, dtype, self.device), Numbers()
            tasks = random_tasks(samples, model.config.vocab_size, (4, 9) if self.toy else (48, 80))
        precision = "fp32" if exact else self.grid["precision"]
        saes = random_saes(model, tokenizer, tasks[0], self.grid["d_sae"][setting], precision, self.device)
        return World(model, tokenizer, *saes, *tasks)

    def _samples(self) -> list[int]:
        """How many samples of each task any part takes."""
        check = self.grid["check"]["samples"]
        jobs = self.grid["jobs"].values()
        most = [max(check[at], *(max(of[job]) for of in jobs)) for at, job in enumerate(NAME)]
        return [max(most[0], CALIBRATION[0]), *most[1:]]

    def collected(self, setting: str, new: int) -> tuple[Run, Steering]:
        """A run of the most samples without p-values, and the top feature of every layer."""
        world = self.world(setting, exact=False)
        if new not in world.runs:
            n = self.grid["jobs"][new]["collection"][0]
            run, steering = _collected(world, n, new)
            if not steering.features:
                raise CorrSteerError("no feature was selected, so there is nothing to prune or evaluate; collect more")
            world.runs[new] = run, steering
        return world.runs[new]

    def peak(self, call: Callable[[], object]) -> int | None:
        """Bytes by which memory grows in a call; None where the system does not tell."""
        if self.device.type != "cuda":
            return resident.peak(call)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def _collected(world: World, n: int, new: int) -> tuple[Run, Steering]:
    run = collect(
        world.model, world.tokenizer, world.encoders, world.train.take(n), decoding=Decoding(max_new_tokens=new),
        permutations=0, progress=False,
    )  # fmt: skip
    return run, select(run, "all")


def _chosen(steering: Steering) -> list[Chosen]:
    """A steering's features, as the published way takes them."""
    return [Chosen(int(f.layer or 0), int(f.index or 0), f.coefficient) for f in steering.features]


def check(bench: Bench, setting: str) -> dict[str, Any]:
    """Both ways in float32: what they agree on, and whether that is enough."""
    new, (n, validating, testing) = bench.grid["check"]["new"], bench.grid["check"]["samples"]
    world, decoding = bench.world(setting, exact=True), Decoding(max_new_tokens=new)
    lm = (world.model, world.tokenizer)
    run, steering = _collected(world, n, new)
    theirs = published.collect(*lm, world.saes, world.train.take(n), new)
    found: dict[str, Any] = {"rewards": run.rewards.tolist() == theirs.rewards, "reward": float(run.rewards.mean())}
    r = {layer: (run.correlation(layer).cpu().double().flatten(), theirs.correlation(layer)) for layer in world.saes}
    apart = torch.stack([(a - b).abs() for a, b in r.values()])
    found["r_beyond"] = float((apart > TOLERANCE).double().mean())
    ours, others = _chosen(steering), theirs.best()
    # Features that are active in the same single samples have the same r, and rounding says which is first.
    found["features"] = [one.layer for one in ours] == [one.layer for one in others] and all(
        float(abs(r[a.layer][1][a.index] - r[a.layer][1][b.index])) <= TOLERANCE for a, b in zip(ours, others)
    )
    found["same_index"] = sum(a.index == b.index for a, b in zip(ours, others))
    found["selected"] = len(ours)
    validation, test = world.validation.take(validating), world.test.take(testing)
    layers = sorted(world.saes)[1 :: len(world.saes) // PRUNED]
    pruned = select(run, "pruned", layers=layers, model=world.model, tokenizer=world.tokenizer, validation=validation,
                    decoding=decoding, progress=False)  # fmt: skip
    candidates = [one for one in ours if one.layer in layers]
    tried = pruned.provenance["selection"]
    scores = [one["score"] for one in tried["score_alone"]]
    alone = published.prune(*lm, world.saes, candidates, validation, new)
    found["pruning"] = alone == (tried["unsteered_score"], scores)
    examples = evaluate(*lm, test, steering, decoding=decoding, progress=False).examples
    before, after = published.evaluate(*lm, world.saes, ours, test, new)
    found["evaluation"] = (before[1], after[1]) == (
        [one["reward_before"] for one in examples], [one["reward_after"] for one in examples],
    )  # fmt: skip
    found["completions"] = sum(one["before"] == text for one, text in zip(examples, before[0])) + sum(
        one["after"] == text for one, text in zip(examples, after[0])
    )
    found["active"] = _active(world, new)
    needed = [found[name] for name in ("rewards", "features", "pruning", "evaluation")]
    good = all(needed) and found["r_beyond"] <= OUTSIDE and found["selected"] > 0
    return {"status": "measured" if good else "wrong", "found": found}


def _active(world: World, new: int) -> float:
    """The share of features that are active at a kept step, over some samples and all layers."""
    shares: list[float] = []

    def look(layer: int, h: Tensor) -> None:
        shares.append(float((published.encode(world.saes[layer], h) > 0).double().mean()))

    with published.at_last_position(world.model, list(world.saes), look):
        published.graded(world.model, world.tokenizer, world.test.take(8), new)
    return sum(shares) / len(shares)


def job(bench: Bench, setting: str, new: int, name: str) -> dict[str, Any]:
    """A job by each way, which take turns: how much of it a second, memory and, of collection, each stage's time."""
    world, of = bench.world(setting, exact=False), bench.grid["jobs"][new]
    ways, agree = JOBS[name](bench, setting, new, *of[name])
    # Memory first, in a run that is not timed: it compiles, allocates, and on a CPU begins with no memory to reuse.
    peaks = {label: bench.peak(lambda way=way: way.run(way.samples)) for label, way in ways.items()}
    seconds: dict[str, list[float]] = {label: [] for label in ways}
    for at in range(bench.grid["rounds"]):
        for label in list(ways)[:: -1 if at % 2 else 1]:
            start = now(bench.device)
            ways[label].run(ways[label].samples)
            seconds[label].append(now(bench.device) - start)
    published_bytes = sum(sae.nbytes for sae in world.saes.values())
    rows: dict[str, dict[str, Any]] = {
        label: {
            "samples": way.samples,
            "counted": way.counted,
            "seconds": seconds[label],
            "per_second": way.counted / statistics.median(seconds[label]),
            "saes_bytes": published_bytes if label == PUBLISHED else world.encoder_bytes,
            "call_bytes": peaks[label],
        }
        for label, way in ways.items()
    }
    agreement = agree()
    for label, way in ways.items():
        if way.places:
            clock = StageClock(bench.device)
            with clock.watching([*places(world), *way.places]):
                way.run(way.samples)
            rows[label]["stages"] = clock.seconds
    each = ways[OURS].counted / ways[PUBLISHED].counted
    ratios = [each * theirs / ours for ours, theirs in zip(seconds[OURS], seconds[PUBLISHED])]
    return {
        "status": "measured", "counts": NAME[name], "ways": rows, "agreement": agreement,
        "model_bytes": sum(parameter.nbytes for parameter in world.model.parameters()),
        "speedup": statistics.median(ratios),
    }  # fmt: skip


@dataclass
class Way:
    """A way of doing a job: what does it on so many samples, how many of what is counted that is, and its stages."""

    run: Callable[[int], Any]
    samples: int
    counted: int
    places: Sequence[Place] = ()


def places(world: World) -> list[Place]:
    """Stages that both ways have."""
    kind = type(world.model)
    return [(kind, "generate", "language model"), (kind, "forward", "language model"), (Task, "grade", "grading")]


CAPTURE: list[Place] = [(Capture, name, "capture") for name in ("_store", "stopping_criterion", "packed")]
COLLECTING: dict[str, list[Place]] = {
    OURS: [*CAPTURE, (Evidence, "update", "statistics")],
    PLAIN: [*CAPTURE, (Evidence, "update", "statistics")],
    PUBLISHED: [
        (published, "append", "capture"), (published, "encode", "encode and pool"),
        (published, "pool", "encode and pool"), (published.Sums, "add", "statistics"),
    ],
}  # fmt: skip

_Ways = tuple[dict[str, Way], Callable[[], dict[str, Any]]]


def collection(bench: Bench, setting: str, new: int, mine: int, theirs: int) -> _Ways:
    """`collect` as it is by default, the same without permutations, and the published way."""
    world, last = bench.world(setting, exact=False), {}
    lm = (world.model, world.tokenizer)

    def ours(n: int, label: str, **more: Any) -> None:
        last[label] = collect(*lm, world.encoders, world.train.take(n), decoding=Decoding(max_new_tokens=new),
                              progress=False, **more).rewards.tolist()  # fmt: skip

    def published_way(n: int) -> None:
        last[PUBLISHED] = published.collect(*lm, world.saes, world.train.take(n), new).rewards

    def agree() -> dict[str, Any]:
        return {"rewards": _same(last[OURS], last[PUBLISHED]), "of": min(mine, theirs)}

    ways = {
        OURS: Way(lambda n: ours(n, OURS), mine, mine),
        PLAIN: Way(lambda n: ours(n, PLAIN, permutations=0), mine, mine),
        PUBLISHED: Way(published_way, theirs, theirs),
    }
    for label, way in ways.items():
        way.places = COLLECTING[label]
    return ways, agree


def pruning(bench: Bench, setting: str, new: int, mine: int, theirs: int) -> _Ways:
    """CorrSteer-P: a completion of every validation sample, unsteered and steered by each feature alone."""
    world, (run, steering) = bench.world(setting, exact=False), bench.collected(setting, new)
    features, last = _chosen(steering), {}
    few = features[: bench.grid["jobs"][new]["candidates"]]

    def ours(n: int) -> None:
        last[OURS] = select(
            run, "pruned", model=world.model, tokenizer=world.tokenizer, validation=world.validation.take(n),
            decoding=Decoding(max_new_tokens=new), progress=False,
        )  # fmt: skip

    def published_way(n: int) -> None:
        published.prune(world.model, world.tokenizer, world.saes, few, world.validation.take(n), new)

    def agree() -> dict[str, Any]:
        return {"candidates": len(features), "published_candidates": len(few)}

    ways = {OURS: Way(ours, mine, mine * (1 + len(features)))}
    ways[PUBLISHED] = Way(published_way, theirs, theirs * (1 + len(few)))
    return ways, agree


def evaluation(bench: Bench, setting: str, new: int, mine: int, theirs: int) -> _Ways:
    """Unsteered against steered by the top feature of every layer."""
    world, (_, steering) = bench.world(setting, exact=False), bench.collected(setting, new)
    lm, features, last = (world.model, world.tokenizer), _chosen(steering), {}

    def ours(n: int) -> None:
        decoding = Decoding(max_new_tokens=new)
        last[OURS] = evaluate(*lm, world.test.take(n), steering, decoding=decoding, progress=False).examples

    def published_way(n: int) -> None:
        last[PUBLISHED] = published.evaluate(*lm, world.saes, features, world.test.take(n), new)

    def agree() -> dict[str, Any]:
        before, after = ([one[f"reward_{when}"] for one in last[OURS]] for when in ("before", "after"))
        same = _same(before, last[PUBLISHED][0][1]) + _same(after, last[PUBLISHED][1][1])
        return {"rewards": same, "of": 2 * min(mine, theirs)}

    return {OURS: Way(ours, mine, mine), PUBLISHED: Way(published_way, theirs, theirs)}, agree


JOBS: dict[str, Callable[[Bench, str, int, int, int], _Ways]] = {
    "collection": collection, "pruning": pruning, "evaluation": evaluation,
}  # fmt: skip


def _same(ours: Sequence[float], theirs: Sequence[float]) -> int:
    """Of samples that both have, how many rewards are the same."""
    return sum(a == b for a, b in zip(ours, theirs))
