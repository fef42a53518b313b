"""The same completions by vLLM and by transformers: build/vllm/bin/python -m bench.vllm

In the environment that `make test-vllm` makes. Both engines complete the same prompts greedily, in turns, in one
process with equally many threads. Features of random SAEs are correlated with the reward, once while transformers
generates, once by reading vLLM's completions. Times are of the CPU. With one thread, the default, other work on the
machine changes little.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import record, smollm2, teacher_forcing
from bench.timing import CpuTimer, interleaved, ratio, summary
from corrsteer import Decoding, Run, collect, generate_rollouts
from corrsteer.compatibility import installed
from corrsteer.lm.generation import Completion, Generator
from corrsteer.lm.sampling import sample_keys
from corrsteer.lm.vllm_engine import VllmGenerator, load_vllm
from corrsteer.report.tables import table

ENGINES = ("transformers", "vllm")
FULL: dict[str, Any] = {
    "rounds": 5, "samples": 128, "new": 16, "d_sae": 4096, "k": 32, "layers": (10, 20), "context": 256, "threads": 1,
}  # fmt: skip
QUICK: dict[str, Any] = FULL | {"rounds": 1, "samples": 24, "d_sae": 256}


def one_process(threads: int) -> None:
    """Have vLLM run here, with so many threads, before it is imported: a child's would not count as this process's."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    if len(cores) < threads:
        raise SystemExit(f"--threads must be at most the {len(cores)} cores that there are, got {threads}")
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    torch.set_num_threads(threads)


def measured(folder: Path, dtype: str, grid: dict[str, Any]) -> dict[str, Any]:
    """A row of the result: how fast both are, and how alike."""
    world = teacher_forcing.chat_world(folder, dtype, grid["samples"])
    model, tokenizer, task = world.model, world.tokenizer, world.task
    decoding = Decoding(max_new_tokens=grid["new"])
    llm = load_vllm(str(folder), dtype=dtype, enforce_eager=True, max_model_len=grid["context"])
    if multiprocessing.active_children() or torch.get_num_threads() != grid["threads"]:
        raise SystemExit("vLLM must run in this process with the threads that it was given; see `one_process`")
    engines: dict[str, Any] = {
        "transformers": Generator(model, tokenizer, decoding), "vllm": VllmGenerator(llm, tokenizer, decoding)
    }  # fmt: skip
    prompts = engines["transformers"].tokenize(task)
    if prompts != engines["vllm"].tokenize(task):
        raise SystemExit("both engines must be given the same tokens, but tokenise the prompts differently")
    keys = sample_keys(prompts)

    def complete(name: str) -> list[Completion]:
        if name == "vllm":
            llm.reset_prefix_cache()  # of the round before
        found: dict[int, Completion] = {}
        for batch in engines[name].plan(prompts):
            found |= zip(batch, engines[name].complete([prompts[i] for i in batch], [keys[i] for i in batch]))
        return [found[i] for i in range(len(prompts))]

    written = {name: complete(name) for name in ENGINES}
    times = interleaved({name: lambda _, name=name: complete(name) for name in ENGINES}, grid["rounds"], CpuTimer())
    same = [i for i, (mine, theirs) in enumerate(zip(*written.values())) if mine.ids == theirs.ids]
    tokens = {name: sum(each.tokens for each in completions) for name, completions in written.items()}

    width = model.config.hidden_size
    encoders = {layer: teacher_forcing.random_encoder(width, grid, layer) for layer in grid["layers"]}
    settings: dict[str, Any] = {
        "decoding": decoding, "permutations": 0, "keep_activations": "always", "progress": False
    }  # fmt: skip
    batches = generate_rollouts(llm, tokenizer, task, decoding, progress=False)
    by_id = {rollout.id: rollout for batch in batches for rollout in batch}
    rollouts = [by_id[example.source] for example in task.examples]
    runs = {
        "transformers": collect(model, tokenizer, encoders, task, **settings),
        "vllm": collect(model, tokenizer, encoders, rollouts=rollouts, **settings),
    }
    return {
        "dtype": dtype, "samples": len(prompts), "prompt_tokens": sum(map(len, prompts)) / len(prompts),
        "tokens": tokens, "scores": {name: float(run.rewards.mean()) for name, run in runs.items()},
        "identical": len(same) / len(prompts),
        "times": {name: summary(of) for name, of in times.items()},
        "tokens_per_second": {name: tokens[name] / summary(of)["median_ms"] * 1e3 for name, of in times.items()},
        # Both wrote about as much; by tokens, not by time alone.
        "vllm / transformers": ratio(times["transformers"], times["vllm"])["median"]
        * tokens["vllm"] / tokens["transformers"],
        "correlations": {
            str(layer): {"all": apart(runs, layer, range(len(prompts))), "identical": apart(runs, layer, same)}
            for layer in encoders
        },
    }  # fmt: skip


def apart(runs: dict[str, Run], layer: int, samples: Sequence[int]) -> dict[str, Any]:
    """How far apart both engines' correlations are over some samples, of features that are active often enough."""
    of = [run.statistics(samples=samples) for run in runs.values()]
    (r, enough), (expected, also) = (
        (run.correlation(layer), run.moments[layer][run.pool].n_active >= teacher_forcing.ACTIVE) for run in of
    )
    both = enough & also
    away = (r - expected).abs()[both]
    if not len(away):
        return {"samples": len(samples), "features": 0}
    spread = {name: float(away.quantile(q)) for name, q in (("median", 0.5), ("p99", 0.99), ("max", 1.0))}
    return {
        "samples": len(samples), "features": int(both.sum()), **spread, "best": float(expected[both].max()),
        "same_best": int(r.argmax()) == int(expected.argmax()),
    }  # fmt: skip


HEADER = (
    "weights", "layer", "samples", "number", "features", "r apart, median", "99 %", "most", "highest r", "same feature",
)  # fmt: skip


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows of a table, for each layer that has an SAE: over all samples, and over those completed identically."""
    return [
        (
            world["dtype"], layer, {"all": "all", "identical": "completed identically"}[which], str(of["samples"]),
            str(of["features"]),
            *(f"{of[name]:.1e}" if of["features"] else "-" for name in ("median", "p99", "max")),
            *((f"{of['best']:.2f}", "yes" if of["same_best"] else "no") if of["features"] else "--"),
        )
        for world in result["worlds"]
        for layer, kinds in world["correlations"].items()
        for which, of in kinds.items()
    ]  # fmt: skip


def lines(result: dict[str, Any]) -> list[str]:
    """A line each for weights of a dtype: how fast, and how many completions are the same."""
    return [
        f"{world['dtype']}: {world['samples']} prompts of {world['prompt_tokens']:.0f} tokens, at most "
        f"{result['grid']['new']} new ones, {world['times']['vllm']['rounds']} rounds; vLLM generates "
        f"{world['tokens_per_second']['vllm']:.0f} tokens a second of CPU time, transformers "
        f"{world['tokens_per_second']['transformers']:.0f} ({world['vllm / transformers']:.2f} times); "
        f"{world['identical']:.1%} of completions are identical; of vLLM's {world['scores']['vllm']:.1%} are right, of "
        f"transformers' {world['scores']['transformers']:.1%}"
        for world in result["worlds"]
    ]


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.vllm", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=record.STUDIES, help="folder for the result")
    parser.add_argument("--quick", action="store_true", help="a small form, which shows that it runs")
    parser.add_argument("--model", type=Path, help="folder of a chat model, by default SmolLM2-135M-Instruct")
    parser.add_argument(
        "--dtypes", nargs="+", default=["bfloat16", "float32"], help="of the weights, one after another"
    )
    parser.add_argument("--threads", type=int, default=FULL["threads"], help="of each engine")
    parser.add_argument("--rounds", type=int, help=f"otherwise {FULL['rounds']}")
    options = parser.parse_args(arguments)
    grid = dict(QUICK if options.quick else FULL) | {"threads": options.threads}
    grid["rounds"] = options.rounds or grid["rounds"]
    one_process(options.threads)
    head = record.new(torch.device("cpu"))
    del head["cases"]
    head["packages"] |= {"transformers": installed("transformers"), "vllm-cpu": installed("vllm-cpu")}
    with tempfile.TemporaryDirectory() as made:
        folder = options.model or smollm2.write(Path(made))
        worlds = [measured(folder, dtype, grid) for dtype in options.dtypes]
    result = {**head, "schema": "corrsteer.vllm", "quick": options.quick, "grid": grid, "worlds": worlds}
    print(table(HEADER, rows(result), indent=""))
    print("\n".join(lines(result)))
    print(record.write_study(result, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
