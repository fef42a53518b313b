"""Whole jobs against the published way of working: python -m bench.pipeline --model DIR

Collection, pruning and evaluation, each by corrsteer and by `bench/published.py`, on two language models: the
SmolLM2-135M-Instruct in DIR, and on a GPU a random one of Gemma 2 2B's shape. Both have random jumprelu SAEs on all
layers, of which 0.5 % of the features are active. Rewards are a bit of the completion's first word.

On a CPU one thread is used, and seconds are what it computed, so that other processes do not count.

Both ways are first run in float32, and have to come to the same rewards, correlations, features and decisions; no time
is taken where they don't. The result is written around every part, and the same command goes on with what is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import random
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import measure, published, record, resident
from bench.published import Chosen, Sae
from bench.stage_clock import Place, StageClock, now
from bench.stages import ended_after
from bench.trials import Numbers
from corrsteer import Capture, CorrSteerError, Decoding, Evidence, Run, SparseEncoder, Steering, Task, collect, evaluate
from corrsteer.compatibility import installed
from corrsteer.experiments.selection import select
from corrsteer.report.tables import table
from corrsteer.sae.sources import decoder_in_memory

SMOLLM2, GEMMA = "SmolLM2-135M-Instruct", "Gemma 2 2B, random"
SHAPES = {SMOLLM2: (30, 576), GEMMA: (26, 2304)}  # layers and width
NAME = {"collection": "samples", "pruning": "completions", "evaluation": "samples"}  # what is counted of a job
OURS, PLAIN, PUBLISHED = "corrsteer", "corrsteer without p-values", "published"
SPREAD = 2.576  # standard deviations above the mean, where 0.5 % of a normal distribution lies
CALIBRATION = (16, 8)  # prompts and new tokens that thresholds are set by
PRUNED = 4  # layers whose features the check prunes
TOLERANCE, OUTSIDE = 1e-4, 1e-3  # of r; and the share of features, on whose threshold a token may lie, beyond it
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


def first_word_bit(completion: str, _example: object) -> float:
    """A reward that takes no sense to earn: a bit of the completion's first word."""
    words = completion.split()
    return float(zlib.crc32(words[0].encode()) & 1) if words else 0.0


@dataclass
class World:
    """A language model with SAEs on all layers, and samples."""

    model: Any
    tokenizer: Any
    encoders: dict[int, SparseEncoder]
    saes: dict[int, Sae]  # the same, as the published way holds them
    train: Task
    validation: Task
    test: Task
    runs: dict[int, tuple[Run, Steering]] = field(default_factory=dict)  # by new tokens

    @property
    def kept_bytes(self) -> dict[str, int]:
        """What each way's SAEs take, for as long as it runs."""
        parts = ("weight", "weight_low", "bias", "threshold")
        tensors = [getattr(encoder, part) for encoder in self.encoders.values() for part in parts]
        ours = sum(tensor.nbytes for tensor in tensors if tensor is not None)
        return {OURS: ours, PLAIN: ours, PUBLISHED: sum(sae.nbytes for sae in self.saes.values())}


def chat_tasks(samples: Sequence[int]) -> list[Task]:
    """Lists for a chat model to go on with, none of them twice: it begins in many ways, and writes for long."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(0).shuffle(pairs)
    prompts = iter([f"What comes after {a}, {b}? Go on with the list." for a, b in pairs])
    return _tasks(samples, prompts, chat=True)


def random_tasks(samples: Sequence[int], vocabulary: int, lengths: tuple[int, int]) -> list[Task]:
    """Prompts of random tokens."""
    rng = random.Random(0)

    def prompts() -> Iterator[str]:
        while True:
            yield " ".join(str(rng.randrange(3, vocabulary)) for _ in range(rng.randint(*lengths)))

    return _tasks(samples, prompts(), chat=False)


def _tasks(samples: Sequence[int], prompts: Iterator[str], chat: bool) -> list[Task]:
    return [
        Task.from_rows(
            [{"prompt": next(prompts)} for _ in range(n)],
            grader=first_word_bit, answer_field=None, chat=chat, name=name,
        )
        for name, n in zip(("train", "validation", "test"), samples)
    ]  # fmt: skip


def random_model(name: str, toy: bool, dtype: torch.dtype, device: torch.device) -> Any:
    """A model with random weights, made on the device: of Gemma 2 2B's shape, or a toy of an architecture."""
    from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

    torch.manual_seed(0)
    small = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    }  # fmt: skip
    own = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    if name == GEMMA:  # whose defaults are those of Gemma 2 2B
        size = small | {"query_pre_attn_scalar": 16, "initializer_range": 0.3} if toy else {}
        config = Gemma2Config(**size, **own)
    else:
        config = LlamaConfig(**small, **own, initializer_range=0.3)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    return model.requires_grad_(False)


@torch.no_grad()
def random_saes(
    model: Any, tokenizer: Any, task: Task, d_sae: int, precision: str, device: torch.device
) -> tuple[dict[int, SparseEncoder], dict[int, Sae]]:
    """SAEs on all layers with random directions, of which each token has about 0.5 % active; ours and published.

    Decoder directions are the encoder's. Ours lie on the CPU, in place of the disk that they are read from otherwise.
    """
    prompts, new = CALIBRATION
    layers = range(model.config.num_hidden_layers)
    seen: dict[int, list[Tensor]] = {layer: [] for layer in layers}

    def look(layer: int, h: Tensor) -> None:
        seen[layer].append(h[:, -1].float())

    with published.at_last_position(model, layers, look):
        published.graded(model, tokenizer, task.take(prompts), new, batch=prompts)
    generator = torch.Generator(device).manual_seed(1)
    encoders, saes = {}, {}
    for layer in layers:
        x = torch.cat(seen.pop(layer))
        d_in = x.shape[1]
        weight = torch.randn(d_sae, d_in, generator=generator, dtype=torch.float32, device=device) / d_in**0.5
        p = x @ weight.T
        bias, threshold = -p.mean(0), SPREAD * p.std(0)
        directions = weight / weight.norm(dim=1, keepdim=True)
        saes[layer] = Sae(weight.T.contiguous(), bias, threshold, directions)
        encoders[layer] = SparseEncoder(
            d_in, d_sae, "jumprelu", weight=weight, bias=bias, threshold=threshold,
            hook_name=f"blocks.{layer}.hook_resid_post", decoder=decoder_in_memory(directions.cpu(), False),
        ).to(precision=precision)  # fmt: skip
    return encoders, saes


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
            world.runs[new] = _collected(world, n, new)
            if not world.runs[new][1].features:
                raise CorrSteerError("no feature was selected, so there is nothing to prune or evaluate; collect more")
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


def chat_model(folder: Path, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval().requires_grad_(False)
    shape = (model.config.num_hidden_layers, model.config.hidden_size)
    if shape != SHAPES[SMOLLM2]:
        raise CorrSteerError(
            f"--model must be a folder with {SMOLLM2}, of 30 layers of width 576, got {shape[0]} of width {shape[1]}"
        )
    return model, AutoTokenizer.from_pretrained(folder)


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
    rows: dict[str, dict[str, Any]] = {
        label: {
            "samples": way.samples,
            "counted": way.counted,
            "seconds": seconds[label],
            "per_second": way.counted / statistics.median(seconds[label]),
            "saes_bytes": world.kept_bytes[label],
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
                lines.append(f"{setting}, {name}: corrsteer does as many times as much a second, by new tokens: {at}")
        lines += [
            f"{setting}, {part['job']}, {part['new_tokens']} new: {part['status']}, {part.get('reason', 'cut off')}"
            for part in of
            if part["status"] not in ("measured", "wrong")
        ]
    return lines


def _agreement(part: dict[str, Any]) -> str:
    found = part["found"]
    words = [f"{name} {'the same' if found[name] else 'different'}" for name in ("rewards", "pruning", "evaluation")]
    return (
        f"{part['setting']}, both ways in float32: {', '.join(words)}; {found['selected']} features selected, of "
        f"{found['same_index']} the same index, the others {'tie' if found['features'] else 'differ'}; r apart by more "
        f"than {TOLERANCE:g} in {found['r_beyond']:.3%} of features; {found['active']:.2%} of features active"
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
