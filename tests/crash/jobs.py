"""Commands on the demo's model that are killed, or whose writes fail, and what they leave when they are done."""

import contextlib
import errno
import itertools
import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

ERRORS = (errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT)
WRITES = ("fsync", "replace", "link", "unlink", "mkdir", "rmdir", "open")  # calls of `os`, and `open` for writing


@dataclass(frozen=True)
class World:
    """A folder with tasks, and what commands before have left in it."""

    home: Path

    def arguments(self, job, folder):
        """The command of a job that writes into a folder."""
        from corrsteer.demo.run import HERE

        common = ["--model", str(HERE / "model"), "--device", "cpu", "--max-new-tokens", "4", "--batch-size", "16"]
        saes = [part for layer in (1, 2) for part in ("--sae", f"{layer}={HERE / 'sae' / f'layer_{layer}'}")]
        collect = ["collect", *common, *saes, "--task", str(self.home / "train.jsonl"), "--part", "all",
                   "--block-size", "32", "--permutations", "99", "--out", str(folder / "run")]  # fmt: skip
        of_task = [*common, "--task", str(self.home / "validation.jsonl"), "--part", "all"]
        return {
            "collect": collect,
            "streamed": [*collect, "--keep-activations", "never"],
            "search": ["select", str(self.home / "run"), "--strategy", "search", *of_task, "--candidates", "1",
                       "--most-features", "2", "--out", str(folder / "s.safetensors")],
            "evaluate": ["evaluate", "--steering", str(self.home / "s.safetensors"), *of_task,
                         "--out", str(folder / "e.json")],
            "rollouts": ["rollouts", *common, "--task", str(self.home / "train.jsonl"), "--part", "all",
                         "--samples-per-prompt", "2", "--temperature", "1", "--out", str(folder / "r.jsonl")],
        }[job]  # fmt: skip


JOBS = ("collect", "search", "evaluate", "streamed")


def write_world(home, train=96):
    """Tasks of the demo's sums."""
    from corrsteer.demo import sums

    splits = sums.splits(0)
    for name, rows in (("train", splits.train[:train]), ("validation", splits.validation[:64])):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return World(home)


def result(job, folder):
    """What a job has left, to be compared to the bit; but for how long it took."""
    if job == "evaluate":
        return _timeless(json.loads((folder / "e.json").read_bytes()))
    if job == "rollouts":
        return {"r.jsonl": (folder / "r.jsonl").read_bytes()}
    files = [folder / "s.safetensors"] if job == "search" else sorted((folder / "run").iterdir())
    found = {}
    for path in files:
        found[path.name] = json.loads(path.read_bytes()) if path.suffix == ".json" else path.read_bytes()
        if path.suffix == ".safetensors":  # whose metadata comes in any order
            with safe_open(str(path), "pt") as file:
                found[path.name] = {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}
                found[path.name][""] = file.metadata()
    return found


def whole(job, folder):
    """Raise where what lies there while a job is not done is neither whole nor absent."""
    from corrsteer import Run, Steering

    if (folder / "run" / "run.json").exists():
        Run.load(folder / "run")
    if (folder / "s.safetensors").exists():
        Steering.load(folder / "s.safetensors")
    if (folder / "e.json").exists():
        json.loads((folder / "e.json").read_bytes())
    for path in folder.rglob("manifest.json"):
        assert json.loads(path.read_bytes())["begun"]


def differences(found, expected, name=""):
    """What is not the same, in words."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in found.keys() | expected.keys():
            yield from differences(found.get(key), expected.get(key), f"{name}/{key}")
    elif found != expected:
        yield f"{name}: {str(found)[:200]} and not {str(expected)[:200]}"


def _timeless(value):
    if isinstance(value, dict):
        return {name: _timeless(part) for name, part in value.items() if not name.endswith("per_second")}
    return [_timeless(part) for part in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class Fault:
    """What happens at the n-th write: the process is killed before or after it, or it fails with an error."""

    at: int
    kind: str  # before, after, or the number of an error

    def apply(self, count, call):
        if count != self.at:
            return call()
        if self.kind in ("before", "after"):
            if self.kind == "after":
                call()
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(int(self.kind), os.strerror(int(self.kind)))


def run_job(arguments, log, fault=None, count_to=None):
    """In a process of its own: the command, its output to a file; with a fault, or counting its writes to a file."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in front, wherever the tests themselves run
    import torch

    torch.set_num_threads(1)
    from corrsteer.cli import main
    from corrsteer.runs import journal

    journal.EVERY = journal.SHARE = 0.0  # a state is saved of every block, not of every minute

    counter = itertools.count(1)
    last = [0]

    def patched(name, real):
        def call(*arguments, **settings):
            writing = name != "open" or (len(arguments) > 1 and set(str(arguments[1])) & set("wax+"))
            if not writing:
                return real(*arguments, **settings)
            last[0] = next(counter)
            do = lambda: real(*arguments, **settings)  # noqa: E731
            return fault.apply(last[0], do) if fault else do()

        return call

    if fault or count_to:
        import builtins
        import io

        for name in WRITES[:-1]:
            setattr(os, name, patched(name, getattr(os, name)))
        builtins.open = io.open = patched("open", io.open)
    sys.argv = ["corrsteer", *arguments]
    try:
        with contextlib.suppress(BrokenPipeError):
            main()
    finally:
        if count_to:
            Path(count_to).write_text(str(last[0]))
