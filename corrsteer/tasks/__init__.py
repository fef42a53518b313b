"""Tasks: prompts with answers, and the graders that turn a completion into a reward."""

from corrsteer.tasks.control import with_shuffled_rewards
from corrsteer.tasks.examples import Example
from corrsteer.tasks.graders import Grader, TaskError
from corrsteer.tasks.task import Task

__all__ = ["Example", "Grader", "Task", "TaskError", "with_shuffled_rewards"]
