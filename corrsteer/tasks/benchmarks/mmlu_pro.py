"""MMLU-Pro: up to ten options, 14 categories (Wang et al. 2024, arXiv:2406.01574).

The paper's code reads a copy, `rbiswasfc/MMLU-Pro`, that has a train part. This is the publishers' own, which has none.
"""

from corrsteer.tasks.benchmark import Benchmark
from corrsteer.tasks.layouts import Layout, Row
from corrsteer.tasks.questions import CHOICE, SHOWN_CHOICE, Question, column, label, text, texts


def read(row: Row) -> Question:
    """A row, without the options that an early release fills up with `N/A`, as the publishers' evaluation does."""
    options = tuple(option for option in texts(row, "options") if option != "N/A")
    answer = label(column(row, "answer"), options)
    return Question(text(row, "question"), answer, text(row, "category"), options)


MMLU_PRO = Benchmark(
    "mmlu_pro",
    "multiple choice among up to ten options in 14 categories",
    read,
    CHOICE,
    "choice",
    hub="TIGER-Lab/MMLU-Pro",
    # Its validation part is 70 questions, 5 of each category, that are kept to be shown.
    layouts=(Layout({"whole": ["data/test-*.parquet"], "shots": ["data/validation-*.parquet"]}),),
    example=SHOWN_CHOICE,
    options=tuple("ABCDEFGHIJ"),
    max_new_tokens=1,
    fractions=(0.27, 0.03, 0.7),
)
