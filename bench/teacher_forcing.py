"""Completions read again against completions captured while they are generated: python -m bench.teacher_forcing

How near the residuals of every layer are, relative to their norms, and the correlations of random SAEs' activations;
and how much CPU time it takes to read, to generate, and to generate with a capture, in turns. With --model, of a chat
model of your own as well: what is 27+14? With one thread, OMP_NUM_THREADS=1, other work on the machine changes little.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import record, search, trials
from bench.timing import CpuTimer, interleaved, ratio, summary
from corrsteer import Capture, Decoding, HookPoint, Moments, SparseEncoder, Task, TeacherForcing, encode_pool
from corrsteer import update_moments as update
from corrsteer.compatibility import installed
from corrsteer.lm.generation import Generator, stop_tokens, tokenize
from corrsteer.lm.hook_points import decoder_layers
from corrsteer.lm.sampling import sample_keys
from corrsteer.report.tables import table

FULL: dict[str, Any] = {
    "rounds": 5, "samples": {"random": 64, "chat": 256}, "hidden": 512, "layers": 6, "lengths": (32, 64), "new": 16,
    "d_sae": 4096, "k": 32, "batch_tokens": 4096,
}  # fmt: skip
QUICK: dict[str, Any] = FULL | {
    "rounds": 1, "samples": {"random": 12, "chat": 12}, "hidden": 32, "layers": 3, "lengths": (4, 9), "new": 4,
    "d_sae": 64, "k": 8,
}  # fmt: skip
ACTIVE = 8  # samples that a feature is active in at least, for its correlation to be compared


@dataclass
class World:
    """A model, and what it is to complete."""

    name: str
    dtype: str
    model: Any
    tokenizer: Any
    task: Task


class Written:
    """A tokenizer's tokens that end a completion, and completions as tuples of token ids."""

    def __init__(self, tokenizer: Any):
        self.pad_token_id, self.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id

    def batch_decode(self, rows: Sequence[Sequence[int]], skip_special_tokens: bool) -> list[tuple[int, ...]]:
        """The ids themselves."""
        return [tuple(row) for row in rows]


def random_world(grid: dict[str, Any]) -> World:
    """A random Llama and prompts of random tokens."""
    world = trials.random_world(grid)
    return World("random", "float32", world.model, world.tokenizer, world.task)


def chat_world(folder: Path, dtype: str, samples: int) -> World:
    """Sums, asked of a chat model in one way."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    rows = [
        {"prompt": search.QUESTIONS[0].format(a, b), "answer": str(a + b)} for a in range(20, 36) for b in range(10, 26)
    ]
    task = Task.from_rows(rows[:samples], grader="number", chat=True, name="sums")
    return World("chat", dtype, model, AutoTokenizer.from_pretrained(folder), task)


def measured(world: World, grid: dict[str, Any]) -> dict[str, Any]:
    """A row of the result: how near, and how fast."""
    model, layers = world.model, len(decoder_layers(world.model)[1])
    points = {layer: HookPoint(layer) for layer in range(layers)}
    decoding = Decoding(max_new_tokens=grid["new"], batch_tokens=grid["batch_tokens"])
    prompts = tokenize(model, world.tokenizer, world.task, decoding)
    generator, keys = Generator(model, Written(world.tokenizer), decoding), sample_keys(prompts)  # pyright: ignore
    stops = stop_tokens(model, world.tokenizer)
    generator.__dict__["stops"] = stops
    batches = generator.plan(prompts)

    def capture(batch: list[int]) -> tuple[Capture, list[Any]]:
        with Capture(model, points, stop_tokens=stops, max_new_tokens=grid["new"]) as captured:
            written = generator.complete([prompts[i] for i in batch], [keys[i] for i in batch], capture=captured)
        return captured, [completion.text for completion in written]

    captured: dict[int, dict[int, Tensor]] = {layer: {} for layer in points}  # layer -> sample -> its residuals
    completions: dict[int, Any] = {}
    for batch in batches:
        of_batch, written = capture(batch)
        completions.update(zip(batch, written))
        for layer, rows in captured.items():
            rows.update(zip(batch, _split(*of_batch.packed(layer))))
    sequences = [(prompt, completions[i]) for i, prompt in enumerate(prompts)]
    reading = TeacherForcing(model, points, batch_tokens=grid["batch_tokens"])
    plan = reading.plan(sequences)
    read: dict[int, dict[int, Tensor]] = {layer: {} for layer in points}
    for batch in plan:
        residuals = reading.read([sequences[i] for i in batch])
        for layer, rows in read.items():
            rows.update(zip(batch, _split(*residuals.packed(layer))))

    def generate(_round: int) -> None:
        for batch in batches:
            generator.complete([prompts[i] for i in batch], [keys[i] for i in batch])

    contestants = {
        "read": lambda _: [reading.read([sequences[i] for i in batch]) for batch in reading.plan(sequences)],
        "generate": generate,
        "generate and capture": lambda _: [capture(batch) for batch in batches],
    }
    times = interleaved(contestants, grid["rounds"], CpuTimer())
    decode = world.tokenizer.batch_decode
    rewards = [
        world.task.reward(decode([completions[i]], skip_special_tokens=True)[0] or "0", example)
        for i, example in enumerate(world.task.examples)
    ]
    chosen = sorted({0, layers // 4, layers // 2, 3 * layers // 4, layers - 1})
    return {
        "model": world.name, "dtype": world.dtype, "samples": len(prompts), "layers": layers,
        "prompt_tokens": sum(map(len, prompts)) / len(prompts),
        "new_tokens": sum(map(len, completions.values())) / len(prompts), "score": sum(rewards) / len(rewards),
        "residuals": {str(layer): _apart(read[layer], captured[layer]) for layer in points},
        "correlations": {
            str(layer): correlations(read[layer], captured[layer], rewards, grid, layer) for layer in chosen
        },
        "times": {name: summary(of) for name, of in times.items()},
        "generate / read": ratio(times["generate"], times["read"])["median"],
        "generate and capture / read": ratio(times["generate and capture"], times["read"])["median"],
    }  # fmt: skip


def correlations(
    read: dict[int, Tensor], captured: dict[int, Tensor], rewards: list[float], grid: dict[str, Any], layer: int
) -> dict[str, Any]:
    """How far apart the correlations of a random SAE's features are, by the residuals that were read and captured."""
    encoder = random_encoder(next(iter(read.values())).shape[1], grid, layer)
    y = torch.tensor(rewards, dtype=torch.float64, device="cpu")[:, None]
    found = []
    for rows in (read, captured):
        x = torch.cat([rows[i] for i in range(len(rows))])
        ends = [0, *torch.tensor([len(rows[i]) for i in range(len(rows))], dtype=torch.int64, device="cpu").cumsum(0)]
        cu_seqlens = torch.tensor(ends, dtype=torch.int32, device="cpu")
        pooled, moments = encode_pool(x, cu_seqlens, encoder, pool="max"), Moments(encoder.d_sae)
        update(pooled, y, moments)
        found.append((moments.correlation()[0], (pooled > 0).sum(0) >= ACTIVE))
    (r, _), (expected, active) = found
    apart = (r - expected).abs()[active]
    if not len(apart):
        return {"features": 0, "median": 0.0, "p99": 0.0, "max": 0.0, "same_best": False}
    return {"features": int(active.sum()), **_spread(apart), "same_best": int(r.argmax()) == int(expected.argmax())}


def random_encoder(d_in: int, grid: dict[str, Any], seed: int) -> SparseEncoder:
    """An SAE of random directions, with so many active features a token."""
    generator = torch.Generator("cpu").manual_seed(seed)
    weight = torch.randn(grid["d_sae"], d_in, generator=generator, dtype=torch.float32, device="cpu")
    bias = torch.zeros(grid["d_sae"], dtype=torch.float32, device="cpu")
    return SparseEncoder(d_in, grid["d_sae"], "topk", weight=weight / d_in**0.5, bias=bias, k=grid["k"])


def _split(x: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    return list(x.split(cu_seqlens.diff().tolist()))


def _apart(read: dict[int, Tensor], captured: dict[int, Tensor]) -> dict[str, float]:
    """How far apart residuals are, relative to their norms."""
    x, expected = (torch.cat([rows[i] for i in range(len(rows))]).double() for rows in (read, captured))
    return _spread((x - expected).norm(dim=1) / expected.norm(dim=1))


def _spread(of: Tensor) -> dict[str, float]:
    of = of.double()
    return {"median": float(of.median()), "p99": float(of.quantile(0.99)), "max": float(of.max())}


HEADER = ("model", "weights", "layer", "residuals, median", "99 %", "most", "features", "r, median", "99 %", "most")


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows of a table, of the layers that have an SAE."""
    return [
        (
            world["model"], world["dtype"], layer,
            *(f"{world['residuals'][layer][name]:.1e}" for name in ("median", "p99", "max")),
            str(of["features"]),
            *(f"{of[name]:.1e}" if of["features"] else "-" for name in ("median", "p99", "max")),
        )
        for world in result["worlds"]
        for layer, of in world["correlations"].items()
    ]  # fmt: skip


def lines(result: dict[str, Any]) -> list[str]:
    """A line a model: what was read, and how much longer it takes to generate."""
    return [
        f"{world['model']}, {world['dtype']}, {world['layers']} layers: {world['samples']} completions of "
        f"{world['new_tokens']:.1f} tokens after {world['prompt_tokens']:.0f}, {world['times']['read']['rounds']} "
        f"rounds; to generate them takes {world['generate / read']:.2f} times the CPU time of reading them, and with a "
        f"capture {world['generate and capture / read']:.2f} times"
        for world in result["worlds"]
    ]


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.teacher_forcing", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=record.STUDIES, help="folder for the result")
    parser.add_argument("--quick", action="store_true", help="a small form, which shows that it runs")
    parser.add_argument("--model", type=Path, help="folder of a chat model to measure as well")
    parser.add_argument(
        "--dtypes", nargs="+", default=["bfloat16", "float32"], help="of its weights, one after another"
    )
    parser.add_argument("--samples", type=int, help="of each model, otherwise 64 and 256")
    parser.add_argument("--rounds", type=int, help="otherwise 5")
    options = parser.parse_args(arguments)
    grid = dict(QUICK if options.quick else FULL)
    grid["rounds"] = options.rounds or grid["rounds"]
    if options.samples:
        grid["samples"] = dict.fromkeys(grid["samples"], options.samples)
    head = record.new(torch.device("cpu"))
    del head["cases"]
    head["packages"]["transformers"] = installed("transformers")
    worlds = [measured(random_world(grid), grid)]
    for dtype in options.dtypes if options.model else ():
        worlds.append(measured(chat_world(options.model, dtype, grid["samples"]["chat"]), grid))
    result = {**head, "schema": "corrsteer.teacher_forcing", "quick": options.quick, "grid": grid, "worlds": worlds}
    print(table(HEADER, rows(result), indent=""))
    print("\n".join(lines(result)))
    print(record.write_study(result, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
