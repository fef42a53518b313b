"""GSM8K: grade-school word problems whose answer is a number (Cobbe et al. 2021, arXiv:2110.14168)."""

from corrsteer.tasks.benchmark import Benchmark
from corrsteer.tasks.graders import TaskError
from corrsteer.tasks.layouts import Layout, Row
from corrsteer.tasks.questions import Question, text


def read(row: Row) -> Question:
    """A row, whose worked answer ends with the number, after ``####``."""
    worked, mark, number = text(row, "answer").rpartition("####")
    if not mark or not number.strip():
        raise TaskError(f"column 'answer' must end with '#### NUMBER', got {row['answer'][-40:]!r}")
    return Question(text(row, "question"), number.strip())


GSM8K = Benchmark(
    "gsm8k",
    "word problems of grade-school mathematics",
    read,
    "Q: {question}\nA: Give your final numerical answer after ####\n",
    "number",
    hub="openai/gsm8k",
    layouts=(
        Layout({"train": ["main/train-*.parquet"], "test": ["main/test-*.parquet"]}),
        Layout(
            {
                "train": ["train.jsonl", "grade_school_math/data/train.jsonl"],
                "test": ["test.jsonl", "grade_school_math/data/test.jsonl"],
            }
        ),
    ),
    example="Q: {question}\nA: {answer}\n",
    pool="mean",
    max_new_tokens=512,
)
