"""What a benchmark, or a task of lm-evaluation-harness, says of its own settings: defaults, which are overridden."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from corrsteer.cli.names import same_task
from corrsteer.cli.options import Given
from corrsteer.cli.settings import GenerationSettings
from corrsteer.errors import CorrSteerError

if TYPE_CHECKING:
    from corrsteer.tasks import Benchmark

OF_OTHERS = ("split", "prompt_field", "answer_field")  # of files and hub datasets
# What is said of one task, and is not meant for another that has settings of its own, nor after one that had.
OF_ONE_TASK = (
    *OF_OTHERS, "data", "shots", "category_field", "option", "options_only", "grader", "reward", "max_new_tokens",
    "chat", "system", "split_seed",
)  # fmt: skip


def defaults(given: Given[Any], recorded: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a command's settings are where they are not given.

    Parameters
    ----------
    recorded : the settings that something was collected with. They hold for its own task. Those of a benchmark, or of
        a task of lm-evaluation-harness, are left out where another task is asked for; between files and datasets on the
        hub, which have none of their own, they hold too.

    Raises
    ------
    CorrSteerError : for a setting that a benchmark or a task of lm-evaluation-harness does not have.
    """
    from corrsteer.integrations.lm_eval_tasks import is_lm_eval
    from corrsteer.tasks.benchmark import OWN
    from corrsteer.tasks.registry import is_benchmark, load_benchmark

    known, asked = dict(recorded or {}), given.asked("task")
    there = known.get("task")
    task = there if asked is None else asked
    if not isinstance(task, str):
        return known
    _check_settings(task, given)
    if there is not None and same_task(task, there):
        return known
    if there is not None and (_has_own(task) or _has_own(there)):
        known = {name: value for name, value in known.items() if name not in OF_ONE_TASK}
    if is_lm_eval(task):
        return known | {"grader": [OWN]}
    return known | of_benchmark(load_benchmark(task), given) if is_benchmark(task) else known


def _has_own(task: str) -> bool:
    """Whether a task has settings of its own."""
    from corrsteer.integrations.lm_eval_tasks import is_lm_eval
    from corrsteer.tasks.registry import is_benchmark

    return is_lm_eval(task) or is_benchmark(task)


def _check_settings(task: str, given: Given[Any]) -> None:
    """Raise for what is given and is not of such a task."""
    from corrsteer.integrations.lm_eval_tasks import is_lm_eval
    from corrsteer.tasks.registry import is_benchmark

    harness = is_lm_eval(task)
    for name in (*OF_OTHERS, "data", "shots") if harness else OF_OTHERS if is_benchmark(task) else ():
        if (value := given.asked(name)) is None:
            continue
        if not harness:
            raise CorrSteerError(
                f"{name} is of JSONL files and datasets on the hub, and {task} is a benchmark, which has its own; "
                f"leave it out"
            )
        own = task.partition(",")[0]
        instead = f"write --task {own},{name}={value}" if name in ("split", "shots") else (
            "leave it out, or give a YAML file of your own as --task lm-eval:FILE.yaml"
        )  # fmt: skip
        raise CorrSteerError(f"{name} is not of {own}, which lm-evaluation-harness reads by itself; {instead}")


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
