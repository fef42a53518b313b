"""Tasks: prompts with answers, and the graders that turn a completion into rewards."""

from corrsteer.tasks.control import with_shuffled_rewards
from corrsteer.tasks.examples import Example
from corrsteer.tasks.graders import TaskError
from corrsteer.tasks.grading import BatchGrader, Grader, GraderSpec, Grading, batched
from corrsteer.tasks.task import Task

__all__ = [
    "BatchGrader",
    "Example",
    "Grader",
    "GraderSpec",
    "Grading",
    "Task",
    "TaskError",
    "batched",
    "with_shuffled_rewards",
]
