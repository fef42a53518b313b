"""Two processes against one, and a journal against none: python -m bench.spread

A collection and trials of steerings by one process with one thread, and by two that share the work, in turns; and the
collection without a directory, which keeps nothing. What they come to is compared before their times are.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench import record, teacher_forcing, trials
from bench.timing import ratio, summary
from corrsteer import Decoding, Run, Trial, collect, run_trials
from corrsteer.compatibility import installed
from corrsteer.report.tables import table
from corrsteer.rollouts.journal import Journal

FULL: dict[str, Any] = {
    "rounds": 5, "samples": {"random": 512}, "hidden": 1024, "layers": 6, "lengths": (16, 48), "new": 16,
    "d_sae": 16384, "k": 32, "permutations": 1000, "block_size": 128, "batch_size": 32, "validation": 128,
}  # fmt: skip
QUICK: dict[str, Any] = FULL | {
    "rounds": 1, "samples": {"random": 24}, "hidden": 32, "layers": 3, "lengths": (4, 9), "new": 2, "d_sae": 64, "k": 4,
    "permutations": 19, "block_size": 12, "batch_size": 4, "validation": 12,
}  # fmt: skip
TARGET = 0.9  # the efficiency of two processes
JOBS = ("collect", "trials")


class Jobs:
    """What is measured, in a process that has everything loaded."""

    def __init__(self, grid: dict[str, Any]):
        self.world = trials.random_world(grid)
        self.decoding = Decoding(max_new_tokens=grid["new"], batch_size=grid["batch_size"])
        self.grid = grid
        self.encoders = {
            layer: teacher_forcing.random_encoder(grid["hidden"], {"d_sae": grid["d_sae"], "k": grid["k"]}, layer)
            for layer in range(1, grid["layers"])
        }

    def collect(self, directory: Path | None) -> list[float]:
        """A collection; r of a few features."""
        run = collect(
            self.world.model, self.world.tokenizer, self.encoders, self.world.task, decoding=self.decoding,
            directory=directory, progress=False,
            **{name: self.grid[name] for name in ("permutations", "block_size")},
        )  # fmt: skip
        return run.correlation(1)[:8].tolist()

    def trials(self, directory: Path | None) -> list[float]:
        """Trials of a steering of each layer; their scores."""
        assert directory is not None, "they are kept"
        task = self.world.task.take(self.grid["validation"])
        tried = [Trial(), *(Trial(steering, scale) for steering in self.world.candidates for scale in (1.0, 2.0))]
        with Journal(directory, {"job": "trials"}) as journal:
            found = run_trials(
                self.world.model, self.world.tokenizer, task, tried, self.decoding, journal=journal, progress=False
            )
            journal.settle(lambda: None)
        return [graded.score for graded in found]


def work(grid: dict[str, Any]) -> None:
    """In a process of its own: do what each line of the input says, and answer with a line."""
    torch.set_num_threads(1)
    jobs = Jobs(grid)
    print("ready", flush=True)
    for line in sys.stdin:
        job, rank, size, directory = json.loads(line)
        for name, value in (("RANK", rank), ("WORLD_SIZE", size)):
            if size > 1:
                os.environ[name] = str(value)
            else:
                os.environ.pop(name, None)
        print(json.dumps(getattr(jobs, job)(directory and Path(directory))), flush=True)


class Workers:
    """Two of these processes."""

    def __init__(self, grid: dict[str, Any]):
        command = [sys.executable, "-m", "bench.spread", "--work", json.dumps(grid)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self._all = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
            for _ in range(2)
        ]
        for worker in self._all:
            self._answer(worker)

    def run(self, job: str, n: int, directory: Path | None) -> tuple[float, list[float]]:
        """The seconds that the first n take together, and what the job comes to."""
        started = time.perf_counter()
        for rank, worker in enumerate(self._all[:n]):
            assert worker.stdin is not None, "it is a pipe"
            worker.stdin.write(json.dumps((job, rank, n, directory and str(directory))) + "\n")
            worker.stdin.flush()
        answers = [json.loads(self._answer(worker)) for worker in self._all[:n]]
        seconds = time.perf_counter() - started
        if any(answer != answers[0] for answer in answers):
            raise RuntimeError(f"{job}: processes come to different results")
        return seconds, answers[0]

    def end(self) -> None:
        """Have them end."""
        for worker in self._all:
            worker.kill()
            worker.wait()

    @staticmethod
    def _answer(worker: subprocess.Popen[str]) -> str:
        assert worker.stdout is not None, "it is a pipe"
        line = worker.stdout.readline()
        while line and not (line.startswith("[") or line.startswith("ready")):  # what libraries say
            line = worker.stdout.readline()
        if not line:
            raise RuntimeError("a process ended, with what it said above")
        return line


def measured(grid: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each job."""
    workers, home = Workers(grid), Path(tempfile.mkdtemp())
    times: dict[tuple[str, str], list[float]] = {}
    expected: dict[str, list[float]] = {}
    ways = [(job, name, n) for job in JOBS for name, n in (("one", 1), ("two", 2))] + [("collect", "no journal", 1)]
    try:
        for turn in range(grid["rounds"] + 1):  # the first packs weights, among others
            for job, name, n in ways:
                directory = None if name == "no journal" else home / "job"
                seconds, found = workers.run(job, n, directory)
                if found != expected.setdefault(job, found):
                    raise RuntimeError(f"{job} by {name}: another result")
                if job == "collect" and directory is not None and Run.load(directory).n != grid["samples"]["random"]:
                    raise RuntimeError(f"{job} by {name}: samples are missing")
                shutil.rmtree(home / "job", ignore_errors=True)
                if turn:
                    times.setdefault((job, name), []).append(1000 * seconds)
    finally:
        workers.end()
        shutil.rmtree(home, ignore_errors=True)
    rows = []
    for job in JOBS:
        of_job = {name: of for (of_which, name), of in times.items() if of_which == job}
        row = {"job": job, "times": {name: summary(of) for name, of in of_job.items()}}
        row["efficiency"] = ratio(of_job["one"], of_job["two"])["median"] / 2
        if "no journal" in of_job:
            row["journal / none"] = ratio(of_job["one"], of_job["no journal"])["median"]
        rows.append(row)
    return rows


HEADER = ("job", "one process, s", "two, s", "efficiency", "one with a journal / without")


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows of a table."""
    return [
        (
            row["job"], *(f"{row['times'][name]['median_ms'] / 1000:.1f}" for name in ("one", "two")),
            f"{row['efficiency']:.2f}", f"{row['journal / none']:.2f}" if "journal / none" in row else "-",
        )
        for row in result["jobs"]
    ]  # fmt: skip


def reached(result: dict[str, Any]) -> list[str]:
    """A line: what the efficiency is to be, and was."""
    found = ", ".join(f"{row['job']} {row['efficiency']:.2f}" for row in result["jobs"])
    return [f"The efficiency of two processes, with one thread each, against one, at least {TARGET}: {found}"]


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.spread", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=record.STUDIES, help="folder for the result")
    parser.add_argument("--quick", action="store_true", help="a small form, which shows that it runs")
    parser.add_argument("--rounds", type=int, help="otherwise 5")
    parser.add_argument("--samples", type=int, help="otherwise 512")
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work:
        work(options.work)
        return 0
    grid = dict(QUICK if options.quick else FULL)
    grid["rounds"] = options.rounds or grid["rounds"]
    if options.samples:
        grid["samples"] = {"random": options.samples}
    head = record.new(torch.device("cpu"))
    del head["cases"]
    head["packages"]["transformers"] = installed("transformers")
    result = {**head, "schema": "corrsteer.spread", "quick": options.quick, "grid": grid, "jobs": measured(grid)}
    print(table(HEADER, rows(result), indent=""))
    print("\n".join(reached(result)))
    print(record.write_study(result, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
