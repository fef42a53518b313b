"""What a benchmark, or a task of lm-evaluation-harness, says of its own settings: defaults, which are overridden."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from corrsteer.cli.options import Given
from corrsteer.cli.settings import GenerationSettings
from corrsteer.errors import CorrSteerError

if TYPE_CHECKING:
    from corrsteer.tasks import Benchmark

OF_OTHERS = ("split", "prompt_field", "answer_field")  # of files and hub datasets


def defaults(given: Given[Any], recorded: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a command's settings are where they are not given.

    Parameters
    ----------
    recorded : the settings that something was collected with, which are those of its task; another benchmark has its
        own.

    Raises
    ------
    CorrSteerError : for a setting that a benchmark does not have.
    """
    from corrsteer.integrations.lm_eval_tasks import is_lm_eval
    from corrsteer.tasks.benchmark import OWN
    from corrsteer.tasks.registry import is_benchmark, load_benchmark

    known, asked = dict(recorded or {}), given.asked("task")
    task = known.get("task") if asked is None else asked
    if isinstance(task, str) and is_lm_eval(task) and task != known.get("task"):
        return known | {"grader": [OWN]}
    if not isinstance(task, str) or not is_benchmark(task):
        return known
    for name in OF_OTHERS:
        if given.asked(name) is not None:
            raise CorrSteerError(
                f"{name} is of JSONL files and datasets on the hub, and {task} is a benchmark, which has its own; "
                f"leave it out"
            )
    return known if task == known.get("task") else known | of_benchmark(load_benchmark(task), given)


def of_benchmark(benchmark: Benchmark, given: Given[Any]) -> dict[str, Any]:
    """A benchmark's own settings."""
    from corrsteer.tasks.benchmark import CATEGORY

    own: dict[str, Any] = {
        "grader": _entries(benchmark.grader), "category_field": CATEGORY, "chat": benchmark.chat,
        "option": list(benchmark.options or ()), "pool": benchmark.pool, "max_new_tokens": benchmark.max_new_tokens,
        "split_seed": benchmark.seed, "data": None, "shots": 0, "system": None, "reward": None,
    }  # fmt: skip
    if issubclass(given.kind, GenerationSettings) and given.asked("part") in (None, "train"):
        own["limit"] = benchmark.samples
    return own


def _entries(grader: object) -> list[str]:
    """A grader as ``--grader`` takes it; one that has no name is the benchmark's own."""
    from corrsteer.tasks.benchmark import OWN

    if isinstance(grader, str):
        return [grader]
    if isinstance(grader, Mapping) and all(isinstance(one, str) for one in grader.values()):
        return [f"{name}={one}" for name, one in grader.items()]
    return ["none"] if grader is None else [OWN]
