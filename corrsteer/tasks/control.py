"""Negative controls: a task whose rewards have nothing to do with its completions."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from corrsteer.arguments import whole
from corrsteer.tasks.examples import Example
from corrsteer.tasks.graders import TaskError
from corrsteer.tasks.grading import Grading
from corrsteer.tasks.task import Task


def with_shuffled_rewards(task: Task, rewards: Sequence[float], seed: int = 0) -> Task:
    """The same prompts, each graded by another example's reward, so that whatever is found in them is chance.

    Parameters
    ----------
    rewards : of the task's examples, in their order, such as `Run.rewards`.
    seed : of the shuffle.

    Raises
    ------
    TaskError : for rewards of another number, or that are not finite.
    """
    if len(rewards) != len(task):
        raise TaskError(f"rewards must be those of the task's {len(task)} examples, got {len(rewards)}")
    shuffled = [float(reward) for reward in rewards]
    if not all(map(math.isfinite, shuffled)):
        raise TaskError(
            "rewards must be finite, got NaN or infinite ones; take the rewards of a run that went to its end"
        )
    random.Random(whole("seed", seed, 0)).shuffle(shuffled)
    given = dict(zip((example.source for example in task.examples), shuffled))
    return replace(task, grading=Grading.of(partial(_given, given), "shuffled rewards"))


def _given(rewards: dict[str, float], completion: str, example: Example) -> float:
    return rewards[example.source]
