"""Names of tasks, models and data that hold in any folder, so that a later command may run in another."""

from __future__ import annotations

import re
from pathlib import Path


def from_anywhere(name: str) -> str:
    """A name whose path, if it is one of something that is there, is whole."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def task_from_anywhere(task: str) -> str:
    """A task's name, whose path, if it has one, is whole: ``FILE.jsonl``, ``FILE.py:NAME``, ``lm-eval:FILE.yaml``.

    A benchmark is no path, even where a folder has its name, as a copy of its dataset may.
    """
    from corrsteer.integrations.lm_eval_tasks import PREFIX
    from corrsteer.tasks.registry import benchmarks

    if task in benchmarks():
        return task
    if found := re.fullmatch(rf"{PREFIX}([^,]+\.ya?ml)(,.*)?", task):
        return PREFIX + from_anywhere(found[1]) + (found[2] or "")
    if found := re.fullmatch(r"(.+\.py)(:\w+)", task):  # a benchmark of the user's own
        return from_anywhere(found[1]) + found[2]
    return from_anywhere(task)


def same_task(asked: str, recorded: str) -> bool:
    """Whether two names are of one task; of lm-evaluation-harness, whatever its split and number of shots."""
    return _without_options(asked) == _without_options(recorded)


def _without_options(task: str) -> str:
    from corrsteer.integrations.lm_eval_tasks import is_lm_eval

    return task_from_anywhere(task.partition(",")[0] if is_lm_eval(task) else task)
