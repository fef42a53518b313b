"""What steering every layer costs a decode step: python -m bench.hooks [--before CHECKOUT]

Steps of a random Llama with a cache of 64 tokens: unsteered, steered by one vector, by rows that differ, and by a hook
a layer that adds in place and does nothing else, which is the least that it can cost. They take turns, round by round.
A cost is the median of the rounds' own differences. With the checkout of another commit, its code takes turns as well,
in a process of its own; build its extensions first (python setup.py build_ext --inplace).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from bench import record
from corrsteer.compatibility import installed
from corrsteer.report.tables import table

# name -> size of the model and of the batch, threads, and what share of a step steering may take
SETTINGS: dict[str, tuple[dict[str, int], float | None]] = {
    "wide": ({"hidden": 2048, "layers": 8, "batch": 8, "threads": 2}, 0.01),
    "deep": ({"hidden": 256, "layers": 24, "batch": 32, "threads": 2}, 0.02),
    "host": ({"hidden": 64, "layers": 24, "batch": 1, "threads": 1}, None),  # where hardly anything is computed
}
MOST_US = {"one vector": 15, "rows that differ": 25}  # of host time a layer and step
MOST_ENTER_MS = {"one vector": 1, "rows that differ": 10}  # of 24 layers
QUICK: dict[str, tuple[dict[str, int], float | None]] = {  # for a test
    "tiny": ({"hidden": 64, "layers": 2, "batch": 3, "threads": 1}, None),
}
ROUNDS = 60


@contextlib.contextmanager
def steps_of(checkout: Path, setting: dict[str, int]) -> Iterator[tuple[IO[str], IO[str]]]:
    """`decode_steps` in a process of its own, with the code of a checkout: what it reads, and what it writes."""
    source = (record.ROOT / "bench" / "decode_steps.py").read_text(encoding="utf-8")
    command = [sys.executable, "-c", source]  # which finds the packages of the folder that it runs in first
    with subprocess.Popen(
        command, cwd=checkout, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        print(json.dumps(setting), file=process.stdin, flush=True)
        yield process.stdin, process.stdout
        process.stdin.close()


def answer(stream: IO[str], checkout: Path) -> Any:
    line = stream.readline()
    if not line:
        raise SystemExit(f"bench/decode_steps.py failed in {checkout}; run it there to see why")
    return json.loads(line)


def measured(name: str, setting: dict[str, int], codes: dict[str, Path], rounds: int) -> list[dict[str, Any]]:
    """A row of the result for each code and context."""
    with contextlib.ExitStack() as stack:
        started = {code: stack.enter_context(steps_of(path, setting)) for code, path in codes.items()}
        backends = {code: answer(out, codes[code])["steer_add"] for code, (_, out) in started.items()}
        if len(set(backends.values())) > 1:
            raise SystemExit(f"steer_add must run on the same backend in both checkouts, got {backends}; build both")
        times: dict[str, list[dict[str, dict[str, float]]]] = {code: [] for code in codes}
        for number in tqdm(range(rounds), desc=name):
            for code, (into, out) in started.items():
                print(number, file=into, flush=True)
                times[code].append(answer(out, codes[code]))
    rows = []
    for code, of_code in times.items():
        unsteered = np.array([found["unsteered"]["step"] for found in of_code])
        for context in of_code[0]:
            step = np.array([found[context]["step"] for found in of_code])
            row: dict[str, Any] = {"setting": name, "code": code, "context": context, "rounds": rounds}
            row["step_s"] = float(np.median(step))
            if context != "unsteered":
                row["share"] = quantiles(step / unsteered - 1)
                row["layer_us"] = quantiles((step - unsteered) / setting["layers"] * 1e6)
                row["enter_us"] = quantiles([found[context]["enter"] * 1e6 for found in of_code])
            rows.append(row)
    return rows


def quantiles(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    p20, median, p80 = np.percentile(values, (20, 50, 80))
    return {"median": float(median), "p20": float(p20), "p80": float(p80)}


def study(before: Path | None, rounds: int, quick: bool = False, commit: str | None = None) -> dict[str, Any]:
    """Everything, as the result file has it."""
    settings = QUICK if quick else SETTINGS
    codes = {"now": record.ROOT} | ({"before": before} if before else {})
    result = record.new(torch.device("cpu"), commit) | {"schema": "corrsteer.hooks"}
    del result["cases"]
    result["device"].pop("threads")  # each setting has its own
    result["packages"]["transformers"] = installed("transformers")
    result["before"] = before and record.commit_of(before)
    result["settings"] = {name: setting for name, (setting, _) in settings.items()}
    result["steps"] = [row for name, (setting, _) in settings.items() for row in measured(name, setting, codes, rounds)]
    return result


def missed(result: dict[str, Any]) -> list[str]:
    """Which targets the code of now does not keep."""
    found = []
    for row in result["steps"]:
        if row["code"] != "now" or row["context"] not in MOST_US:
            continue
        name, context = row["setting"], row["context"]
        limits = {"share": (SETTINGS | QUICK)[name][1], "layer_us": MOST_US[context] if name == "host" else None}
        limits["enter_us"] = 1000 * MOST_ENTER_MS[context] if result["settings"][name]["layers"] == 24 else None
        for column, most in limits.items():
            if most is not None and row[column]["median"] > most:
                found.append(f"{name}, {context}: {column} is {row[column]['median']:.3g}, and may be {most:g}")
    return found


def summary(result: dict[str, Any]) -> list[str]:
    """What it comes to, in sentences."""
    lines = []
    for name, setting in result["settings"].items():
        of = {r["context"]: r for r in result["steps"] if r["setting"] == name and r["code"] == "now"}
        share = max(of[context]["share"]["median"] for context in MOST_US)
        layer, least = (
            max(of[context]["layer_us"]["median"] for context in contexts) for contexts in (MOST_US, ["torch's hooks"])
        )
        lines.append(
            f"{words(setting)}: a step takes {share:.1%} longer, {layer:.1f} µs a layer, where torch's own hooks and "
            f"one addition take {least:.1f}"
        )
    return [*lines, *(f"above its target: {line}" for line in missed(result))]


def words(setting: dict[str, int]) -> str:
    return "hidden {hidden}, {layers} layers, batch {batch}, {threads} thread(s)".format(**setting)


HEADER = ("model", "code", "steered by", "step, ms", "longer by", "µs a layer", "ms to enter")


def rows_of(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the table."""
    rows = []
    for row in result["steps"]:
        setting = result["settings"][row["setting"]]
        rows.append(
            (
                words(setting),
                row["code"],
                "-" if row["context"] == "unsteered" else row["context"],
                f"{1000 * row['step_s']:.3f}",
                f"{row['share']['median']:.2%}" if "share" in row else "-",
                f"{row['layer_us']['median']:.1f}" if "layer_us" in row else "-",
                f"{row['enter_us']['median'] / 1000:.2f}" if row["context"] in MOST_US else "-",
            )
        )
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.hooks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=record.STUDIES, metavar="DIR", help="where the result file goes")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="of the commit to compare with")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--commit", help="of these sources, where they are not in a git repository")
    parser.add_argument("--quick", action="store_true", help="a tiny model, for a test")
    options = parser.parse_args(arguments)
    before = options.before and options.before.resolve()
    result = study(before, options.rounds, options.quick, options.commit)
    path = record.write_study(result, options.out)
    print(table(HEADER, rows_of(result), indent=""), *summary(result), path, sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
