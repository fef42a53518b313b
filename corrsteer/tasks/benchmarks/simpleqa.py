"""SimpleQA: short questions with one right answer (Wei et al. 2024, arXiv:2411.04368)."""

import ast

from corrsteer.tasks.benchmark import Benchmark
from corrsteer.tasks.graders import TaskError
from corrsteer.tasks.layouts import Layout, Row
from corrsteer.tasks.questions import Question, column, text


def read(row: Row) -> Question:
    """A row, whose topic stands in its metadata."""
    return Question(text(row, "problem"), str(column(row, "answer")).strip(), _topic(column(row, "metadata")))


def _topic(metadata: object) -> str:
    """Of metadata as the publishers' CSV has it: a Python dictionary, written out."""
    try:
        found = ast.literal_eval(metadata) if isinstance(metadata, str) else metadata
        return found["topic"]  # pyright: ignore[reportIndexIssue]
    except (ValueError, SyntaxError, TypeError, KeyError, RecursionError, MemoryError):
        raise TaskError(f"column 'metadata' must be a dictionary with a 'topic', got {metadata!r:.40}") from None


SIMPLEQA = Benchmark(
    "simpleqa",
    "short questions about facts",
    read,
    "Q: {question}\nA:",
    "similarity",
    hub="basicv8vc/SimpleQA",
    layouts=(Layout({"whole": ["simple_qa_test_set.csv"]}),),
    preamble="Answer the question with a short, direct response. Be concise and factual.\n\n",
    example="Q: {question}\nA: {answer}\n",
    max_new_tokens=16,
    fractions=(0.27, 0.03, 0.7),
)
