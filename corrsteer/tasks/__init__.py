"""Tasks: prompts with answers, and the graders that turn a completion into a reward."""

from .control import with_shuffled_rewards
from .examples import Example, Task
from .graders import Grader, TaskError

__all__ = ["Example", "Grader", "Task", "TaskError", "with_shuffled_rewards"]
