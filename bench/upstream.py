"""SAELens' own tests of SAEs, as they are and with every SAE accelerated: python -m bench.upstream --checkout FOLDER

FOLDER is a checkout of SAELens, near the release that is installed. Its tests run against the installed package, in
processes of their own; nothing is fetched, so that those which need models of the hub fail either way. With every SAE
accelerated, each that is made and is no training SAE has `accelerate` called on it, and calls take the kernels whether
they are faster or not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import record

SUITES = ("tests/saes", "tests/analysis")
WANTED, REPORT = "CORRSTEER_ACCELERATE_EVERY_SAE", "CORRSTEER_OUTCOMES"


@pytest.hookimpl
def pytest_configure(config: pytest.Config) -> None:
    """As a plugin: have every SAE accelerated, where that is wanted."""
    if not os.environ.get(WANTED):
        return
    from sae_lens import SAE
    from sae_lens.saes.sae import TrainingSAE

    from corrsteer import accelerate
    from corrsteer.integrations import saelens_paths

    saelens_paths.slower = lambda *_: ""  # pyright: ignore[reportAttributeAccessIssue]
    made = SAE.__init__

    def init(self: Any, *arguments: Any, **options: Any) -> None:
        made(self, *arguments, **options)
        if not isinstance(self, TrainingSAE):
            accelerate(self)

    SAE.__init__ = init


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """As a plugin: write down how each test ended."""
    if (path := os.environ.get(REPORT)) and (report.when == "call" or report.outcome != "passed"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps([report.nodeid, report.outcome]) + "\n")


def outcomes(checkout: Path, accelerated: bool) -> dict[str, str]:
    """How each of its tests ends."""
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "tests").symlink_to(checkout.resolve() / "tests")  # and not its package, but the installed one
        written = Path(scratch) / "outcomes.jsonl"
        environment = os.environ | {
            REPORT: str(written), WANTED: "1" if accelerated else "", "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join((scratch, str(record.ROOT))),
        }  # fmt: skip
        command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.upstream", "-p", "no:cacheprovider"]
        command += ["--continue-on-collection-errors", *SUITES]
        subprocess.run(command, cwd=scratch, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        found: dict[str, str] = {}
        for name, outcome in _lines(written):
            found[name] = outcome if found.get(name, "passed") == "passed" else found[name]
        return found


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        name, outcome = json.loads(line)
        yield name, outcome


def count(found: dict[str, str]) -> dict[str, int]:
    """How many tests ended in each way."""
    return {kind: sum(outcome == kind for outcome in found.values()) for kind in ("passed", "failed", "skipped")}


HEADER = ("SAELens' tests", "passed", "failed", "skipped")


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row a way to run them."""
    kinds = ("passed", "failed", "skipped")
    return [(name, *(str(result[key][kind]) for kind in kinds))
            for name, key in (("as they are", "plain"), ("every SAE accelerated", "accelerated"))]  # fmt: skip


def lines(result: dict[str, Any]) -> list[str]:
    """Those that pass one way alone."""
    lost = result["lost"]
    return [
        f"The tests are those of SAELens at {result['checkout'][:12]}, against the installed release.",
        f"{len(lost)} pass only without: {', '.join(lost)}." if lost else "None passes only without.",
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.upstream", description=__doc__.splitlines()[0])
    parser.add_argument("--checkout", type=Path, required=True, help="folder with a checkout of SAELens")
    parser.add_argument("--commit", help="of the checkout, where that cannot be asked")
    parser.add_argument("--out", type=Path, default=record.STUDIES, help="where to write upstream.json")
    options = parser.parse_args(arguments)
    if not all((options.checkout / suite).is_dir() for suite in SUITES):
        parser.error(f"--checkout must have {' and '.join(SUITES)}, got {options.checkout}")
    result = record.new(torch.device("cpu")) | {"schema": "corrsteer.upstream"}
    del result["cases"]
    result["checkout"] = options.commit or record.commit_of(options.checkout) or "an unknown commit"
    plain, accelerated = (outcomes(options.checkout, way) for way in (False, True))
    if not plain:
        raise SystemExit("none of the tests ran; run pytest there by hand to see why")
    result |= {"plain": count(plain), "accelerated": count(accelerated)}
    result["lost"] = sorted(name for name, how in plain.items() if how == "passed" != accelerated.get(name))
    print(json.dumps({name: result[name] for name in ("plain", "accelerated", "lost")}, indent=1))
    print(record.write_study(result, options.out))


if __name__ == "__main__":
    main()
