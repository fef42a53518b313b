"""Tasks: prompts with answers, and the graders that turn a completion into rewards."""

from corrsteer.tasks.benchmark import Benchmark
from corrsteer.tasks.control import with_shuffled_rewards
from corrsteer.tasks.examples import Example
from corrsteer.tasks.graders import TaskError
from corrsteer.tasks.grading import BatchGrader, Grader, GraderSpec, Grading, batched
from corrsteer.tasks.layouts import Layout
from corrsteer.tasks.questions import Question
from corrsteer.tasks.registry import benchmarks, load_benchmark
from corrsteer.tasks.task import Task

__all__ = [
    "BatchGrader",
    "Benchmark",
    "Example",
    "Grader",
    "GraderSpec",
    "Grading",
    "Layout",
    "Question",
    "Task",
    "TaskError",
    "batched",
    "benchmarks",
    "load_benchmark",
    "with_shuffled_rewards",
]
