"""Benchmarks by name, and a user's own by ``path/to/file.py:NAME``."""

from __future__ import annotations

import difflib
import importlib.util
import re
from pathlib import Path

from corrsteer.tasks.benchmark import Benchmark
from corrsteer.tasks.benchmarks import bbq, gsm8k, harmbench, mmlu, mmlu_pro, simpleqa, xstest
from corrsteer.tasks.graders import TaskError, one_line

KNOWN = (
    mmlu.MMLU, mmlu_pro.MMLU_PRO, gsm8k.GSM8K, bbq.BBQ, bbq.AMBIG, bbq.DISAMBIG, simpleqa.SIMPLEQA,
    harmbench.HARMBENCH, xstest.XSTEST,
)  # fmt: skip


def benchmarks() -> dict[str, Benchmark]:
    """The benchmarks that are known, by name."""
    return {benchmark.name: benchmark for benchmark in KNOWN}


def load_benchmark(name: str) -> Benchmark:
    """A benchmark by its name, such as ``mmlu`` or ``bbq:ambig``, or a user's own by ``path/to/file.py:NAME``.

    The file is run, and NAME is the name in it of a `Benchmark`.

    Raises
    ------
    TaskError : for a name that no benchmark has, with those that are near; and for a file that has no such benchmark.
    """
    if name in benchmarks():
        return benchmarks()[name]
    if path := _in_file(name):
        return _load(*path)
    near = near_names(name)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(benchmarks())}"
    raise TaskError(f"task {name!r} is no benchmark; {hint}")


def is_benchmark(name: str) -> bool:
    """Whether a name is that of a benchmark, or says that one is in a file."""
    return name in benchmarks() or _in_file(name) is not None


def near_names(name: str) -> list[str]:
    """The names of benchmarks that somebody may have meant."""
    plain = {known.replace("_", "").replace(":", ""): known for known in reversed(benchmarks())}
    near = difflib.get_close_matches(re.sub("[^a-z0-9]", "", name.lower()), plain, n=2, cutoff=0.75)
    return [plain[found] for found in near]


def _in_file(name: str) -> tuple[Path, str] | None:
    path, _, attribute = name.rpartition(":")
    return (Path(path), attribute) if path.endswith(".py") and attribute.isidentifier() else None


def _load(path: Path, attribute: str) -> Benchmark:
    if not path.is_file():
        raise TaskError(f"task {path}:{attribute} is in a file that is not there")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # as the name ends with .py
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # it runs the user's file, which may raise anything
        raise TaskError(f"task {path} cannot be run: {one_line(error)}") from error
    found = getattr(module, attribute, None)
    if not isinstance(found, Benchmark):
        names = [name for name, value in vars(module).items() if isinstance(value, Benchmark)]
        raise TaskError(
            f"task {path}:{attribute} must name a Benchmark, got {type(found).__name__}; the file has "
            f"{', '.join(names) or 'none'}"
        )
    return found
