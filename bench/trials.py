"""Whole jobs of many steerings, against the plain way: python -m bench.trials

What is compared does the same work and must come to the same decisions, or no time is reported:

- `loop`: a plain hook and `model.generate`, one prompt at a time, for the unsteered model and each candidate;
- `one at a time`: a batched run for each, as `Steering.apply` and `grade` make it;
- `trials`: `run_trials`, which reads prompts once;
- `evaluation`: a batched run of the unsteered model alone.

And generation with and without reading once what prompts begin with. Every ratio is between rounds of one run.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import record
from bench.timing import WallTimer, interleaved, ratio, summary
from corrsteer import Decoding, Steering, Task, Trial, demo, run_trials
from corrsteer.compatibility import installed
from corrsteer.experiments.trials import UNSTEERED
from corrsteer.lm.generation import Completion, Generator, stop_tokens, tokenize
from corrsteer.lm.hook_points import decoder_layers
from corrsteer.lm.sampling import sample_keys
from corrsteer.report.tables import table
from corrsteer.rollouts.grading import grade

FULL: dict[str, Any] = {
    "rounds": 1, "samples": {"demo": 100, "random": 12}, "hidden": 512, "layers": 12, "lengths": (64, 128),
    "new": (1, 16), "shared": (0.0, 0.5, 0.9), "prefix_prompts": 16, "prefix_tokens": 96,
}  # fmt: skip
QUICK: dict[str, Any] = FULL | {
    "rounds": 1, "samples": {"demo": 12, "random": 6}, "hidden": 32, "layers": 3, "lengths": (4, 9), "new": (1, 3),
    "prefix_prompts": 8, "prefix_tokens": 20,
}  # fmt: skip
VOCABULARY = 8192


class Numbers:
    """A tokenizer of texts that are numbers."""

    pad_token_id, eos_token_id = 0, None

    def __call__(self, texts: Sequence[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}

    def batch_decode(self, rows: Sequence[Sequence[int]], skip_special_tokens: bool) -> list[str]:
        return [" ".join(map(str, row)) for row in rows]


@dataclass
class World:
    """A model, a task, and what is to be tried on it."""

    model: Any
    tokenizer: Any
    task: Task
    candidates: list[Steering]


def random_world(grid: dict[str, Any]) -> World:
    """A random Llama and prompts of random tokens; a candidate for each layer but the first."""
    model, rng = random_model(grid), random.Random(0)
    rows = [
        {"prompt": " ".join(str(rng.randrange(3, VOCABULARY)) for _ in range(rng.randint(*grid["lengths"])))}
        for _ in range(grid["samples"]["random"])
    ]

    def first_token_is_odd(text: str, _: object) -> float:
        return float(int(text.split()[0]) % 2)

    task = Task.from_rows(rows, grader=first_token_is_odd, answer_field=None, name="random")
    generator = torch.Generator("cpu").manual_seed(1)
    shape = (grid["layers"], grid["hidden"])
    directions = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    candidates = [
        Steering.from_vectors({f"blocks.{layer}.hook_resid_post": directions[layer]})
        for layer in range(1, grid["layers"])
    ]
    return World(model, Numbers(), task, candidates)


def random_model(grid: dict[str, Any]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=grid["hidden"], intermediate_size=11 * grid["hidden"] // 4,
        num_hidden_layers=grid["layers"], num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=1024,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def demo_world(grid: dict[str, Any]) -> World:
    """The demo's model and validation sums, and a candidate for each layer but the first."""
    model, tokenizer, encoders = demo.load()
    _, validation, _ = demo.tasks()
    candidates = []
    for layer in sorted(encoders)[1:]:
        decoder = encoders[layer].decoder
        assert decoder is not None, "the demo's encoders know theirs"
        candidates.append(Steering.from_vectors({f"blocks.{layer}.hook_resid_post": 2 * decoder.rows([7])[0]}))
    return World(model, tokenizer, validation.take(grid["samples"]["demo"]), candidates)


def loop(world: World, decoding: Decoding) -> list[float]:
    """The plain way: a hook on the layer, and one prompt after the other; the score of each."""
    prompts = tokenize(world.model, world.tokenizer, world.task, decoding)
    stops = stop_tokens(world.model, world.tokenizer)
    scores = []
    for steering in [None, *world.candidates]:
        total = 0.0
        with _plain_hook(world.model, steering):
            for prompt, example in zip(prompts, world.task.examples):
                ids = torch.tensor([prompt], dtype=torch.int64, device="cpu")
                out = world.model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=decoding.max_new_tokens,
                    do_sample=False, eos_token_id=stops or None, pad_token_id=0,
                )  # fmt: skip
                written = out[0, len(prompt) :].tolist()
                end = next((at for at, token in enumerate(written) if token in stops), len(written))
                text = world.tokenizer.batch_decode([written[:end]], skip_special_tokens=True)[0]
                total += world.task.reward(text, example)
        scores.append(total / len(prompts))
    return scores


@contextlib.contextmanager
def _plain_hook(model: nn.Module, steering: Steering | None) -> Iterator[None]:
    """Add a vector to the last position of each pass, without any of this package's hooks."""
    if steering is None:
        yield
        return
    ((point, vector),) = steering.vectors(model).items()

    def add(_module: nn.Module, _args: Any, output: Any) -> None:
        h: Tensor = output[0] if isinstance(output, tuple) else output
        h[:, -1] += vector

    handle = decoder_layers(model)[1][point.layer].register_forward_hook(add)
    yield
    handle.remove()


def trials(world: World, decoding: Decoding) -> list[float]:
    """The scores by `run_trials`."""
    tried = [UNSTEERED, *map(Trial, world.candidates)]
    return [g.score for g in run_trials(world.model, world.tokenizer, world.task, tried, decoding, progress=False)]


def one_at_a_time(world: World, decoding: Decoding) -> list[float]:
    """The scores by a batched run for each."""
    scores = []
    for steering in [None, *world.candidates]:
        with contextlib.nullcontext() if steering is None else steering.apply(world.model):
            scores.append(grade(world.model, world.tokenizer, world.task, decoding, progress=False).score)
    return scores


def evaluation(world: World, decoding: Decoding) -> list[float]:
    """The score of the unsteered model alone."""
    return [grade(world.model, world.tokenizer, world.task, decoding, progress=False).score]


def kept(scores: Sequence[float]) -> list[int]:
    """The decision of CorrSteer-P: which candidates beat the unsteered score."""
    return [at for at, score in enumerate(scores[1:]) if score > scores[0]]


WAYS: dict[str, Callable[[World, Decoding], list[float]]] = {
    "trials": trials, "one at a time": one_at_a_time, "evaluation": evaluation,
}  # fmt: skip


def pruning_rows(grid: dict[str, Any]) -> list[dict[str, Any]]:
    """CorrSteer-P's trials, each way."""
    worlds = {"demo": demo_world(grid), "random": random_world(grid)}
    return [
        {"model": name} | pruning_row(world, Decoding(max_new_tokens=new), grid["rounds"])
        for name, world in worlds.items()
        for new in grid["new"]
    ]


def pruning_row(world: World, decoding: Decoding, rounds: int) -> dict[str, Any]:
    """What each way gave and took."""
    found = {way: run(world, decoding) for way, run in WAYS.items()}  # which warms up as well
    contestants = {way: functools.partial(_in_a_round, run, world, decoding) for way, run in WAYS.items()}
    times, timer = interleaved(contestants, rounds, WallTimer()), WallTimer()
    # The loop takes minutes, so it runs once, between two of the trials that its ratio is to.
    around = [timer(lambda: trials(world, decoding))]
    times["loop"] = [timer(lambda: found.update(loop=loop(world, decoding)))]
    around.append(timer(lambda: trials(world, decoding)))
    decisions = {way: kept(scores) for way, scores in found.items() if way != "evaluation"}
    if any(decision != decisions["loop"] for decision in decisions.values()):
        raise SystemExit(f"the ways come to different decisions: {decisions}")
    completions = len(world.task) * (1 + len(world.candidates))
    return {
        "new_tokens": decoding.max_new_tokens, "samples": len(world.task), "candidates": len(world.candidates),
        "kept": decisions["trials"], "same_scores": found["loop"] == found["trials"] == found["one at a time"],
        "times": {way: summary(of) for way, of in times.items()},
        "loop / trials": times["loop"][0] / (sum(around) / 2),
        "one at a time / trials": ratio(times["one at a time"], times["trials"])["median"],
        "trials / evaluation": ratio(times["trials"], times["evaluation"])["median"],
        "completions_per_second": {
            way: 1000 * completions / summary(times[way])["median_ms"] for way in ("trials", "one at a time")
        },
    }  # fmt: skip


def _in_a_round(run: Callable[[World, Decoding], object], world: World, decoding: Decoding, _round: int) -> None:
    run(world, decoding)


def prefix_rows(grid: dict[str, Any]) -> list[dict[str, Any]]:
    """Generation with and without reading once what prompts begin with, by the share of tokens that they do."""
    model = random_model(grid)
    return [
        prefix_row(model, grid, round(share * grid["prefix_tokens"]), new)
        for share in grid["shared"]
        for new in grid["new"]
    ]


def prefix_row(model: nn.Module, grid: dict[str, Any], shared: int, new: int) -> dict[str, Any]:
    """What both ways gave and took, of prompts that begin with so many of the same tokens."""
    rng, n = random.Random(2), grid["prefix_tokens"]
    head = [rng.randrange(3, VOCABULARY) for _ in range(shared)]
    prompts = [head + [rng.randrange(3, VOCABULARY) for _ in range(n - shared)] for _ in range(grid["prefix_prompts"])]
    generator, keys = Generator(model, Numbers(), Decoding(max_new_tokens=new)), sample_keys(prompts)

    def run(share: bool) -> list[Completion]:
        return generator.complete(prompts, keys, share=share)

    same = sum(a == b for a, b in zip(run(True), run(False)))
    contestants = {"shared": lambda _: run(True), "apart": lambda _: run(False)}
    times = interleaved(contestants, 2 * grid["rounds"] + 1, WallTimer())
    return {
        "shared_tokens": shared, "tokens": n, "prompts": len(prompts), "new_tokens": new, "same_completions": same,
        "times": {way: summary(of) for way, of in times.items()},
        "apart / shared": ratio(times["apart"], times["shared"])["median"],
    }  # fmt: skip


PRUNING = ("model", "new tokens", "samples", "candidates", "loop / trials", "one at a time / trials",
           "trials / evaluation", "completions/s")  # fmt: skip
PREFIX = ("tokens shared", "of", "new tokens", "apart / shared", "same completions")


def pruning_table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows of a table."""
    return [
        (
            row["model"], str(row["new_tokens"]), str(row["samples"]), str(row["candidates"]),
            *(f"{row[name]:.1f}" for name in ("loop / trials", "one at a time / trials")),
            f"{row['trials / evaluation']:.2f}", f"{row['completions_per_second']['trials']:.0f}",
        )
        for row in result["pruning"]
    ]  # fmt: skip


def prefix_table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows of a table."""
    return [
        (
            str(row["shared_tokens"]), str(row["tokens"]), str(row["new_tokens"]), f"{row['apart / shared']:.2f}",
            f"{row['same_completions']} of {row['prompts']}",
        )
        for row in result["prefix"]
    ]  # fmt: skip


# what a row's ratio is to be, by its new tokens
TARGETS: dict[str, tuple[dict[int, float], bool]] = {
    "loop / trials": ({1: 20, 16: 8}, True),  # at least
    "trials / evaluation": ({1: 2.5}, False),  # at most
}


def reached(result: dict[str, Any]) -> list[str]:
    """A line a target: what was reached."""
    lines = []
    for name, (by_tokens, at_least) in TARGETS.items():
        for new, target in by_tokens.items():
            found = [
                row[name]
                for row in result["pruning"]
                if row["new_tokens"] == new and (at_least or row["model"] == "random")
            ]
            if found:
                words = f"at least {target:g}" if at_least else f"at most {target:g}"
                least, most = min(found), max(found)
                got = f"{least:.1f}" if least == most else f"{least:.1f} and {most:.1f}"
                lines.append(f"`{name}` {words} at {new} new token{'s' * (new > 1)}: {got}")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.trials", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=record.STUDIES, help="folder for the result")
    parser.add_argument("--quick", action="store_true", help="a small form, which shows that it runs")
    options = parser.parse_args(arguments)
    grid = QUICK if options.quick else FULL
    head = record.new(torch.device("cpu"))
    del head["cases"]
    head["packages"]["transformers"] = installed("transformers")
    result = {
        **head, "schema": "corrsteer.trials", "quick": options.quick, "grid": grid,
        "pruning": pruning_rows(grid), "prefix": prefix_rows(grid),
    }  # fmt: skip
    print(table(PRUNING, pruning_table(result), indent=""))
    print(table(PREFIX, prefix_table(result), indent=""))
    print(record.write_study(result, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
