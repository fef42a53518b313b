"""MMLU: four options, 57 subjects (Hendrycks et al. 2021, arXiv:2009.03300)."""

import re

from corrsteer.tasks.benchmark import Benchmark
from corrsteer.tasks.layouts import Layout, Row
from corrsteer.tasks.questions import CHOICE, SHOWN_CHOICE, Question, column, label, text, texts


def read(row: Row) -> Question:
    """Of the hub, which has options as a list and counts answers from 0, or of the publishers' CSV."""
    options = texts(row, "choices") if "choices" in row else tuple(text(row, at) for at in "ABCD")
    # Auxiliary training rows have no subject: on the hub it is empty, in CSV the file is named after another task, such
    # as mc_test.
    of_file = re.fullmatch("(?!auxiliary_train/)[^/]*/(.+)_(?:dev|val|test)", row.get("file", ""))
    subject = of_file[1] if of_file else row.get("subject") or None
    return Question(text(row, "question"), label(column(row, "answer"), options), subject, options)


MMLU = Benchmark(
    "mmlu",
    "multiple choice in 57 subjects",
    read,
    CHOICE,
    "choice",
    hub="cais/mmlu",
    layouts=(
        Layout(
            {
                "train": ["all/auxiliary_train-*.parquet"],
                "validation": ["all/validation-*.parquet"],
                "test": ["all/test-*.parquet"],
                "shots": ["all/dev-*.parquet"],
            }
        ),
        Layout(
            {
                "train": ["auxiliary_train/*.csv", "data/auxiliary_train/*.csv"],
                "validation": ["val/*_val.csv", "data/val/*_val.csv"],
                "test": ["test/*_test.csv", "data/test/*_test.csv"],
                "shots": ["dev/*_dev.csv", "data/dev/*_dev.csv"],
            },
            columns=("question", "A", "B", "C", "D", "answer"),
            file_column="file",
        ),
    ),
    example=SHOWN_CHOICE,
    options=("A", "B", "C", "D"),
    max_new_tokens=1,
)
