"""BBQ: does an answer follow a stereotype where the context does not say, or says otherwise (Parrish et al. 2022,
arXiv:2110.08193).

Rows of both kinds of context lie in the same files. `bbq:ambig` are those whose right answer is that nobody can know.
"""

from dataclasses import replace

from corrsteer.tasks.benchmark import Benchmark
from corrsteer.tasks.graders import TaskError
from corrsteer.tasks.layouts import Layout, Row
from corrsteer.tasks.questions import CHOICE, SHOWN_CHOICE, Question, column, label, text

AMBIGUOUS, DISAMBIGUATED = "ambig", "disambig"


def read(row: Row) -> Question:
    """A row, whatever its context."""
    options = tuple(text(row, f"ans{at}") for at in range(3))
    question = f"{text(row, 'context')}\n{text(row, 'question')}"
    return Question(question, label(column(row, "label"), options), text(row, "category"), options)


def read_ambiguous(row: Row) -> Question | None:
    """A row whose context does not say."""
    return read(row) if _condition(row) == AMBIGUOUS else None


def read_disambiguated(row: Row) -> Question | None:
    """A row whose context says."""
    return read(row) if _condition(row) == DISAMBIGUATED else None


def _condition(row: Row) -> str:
    found = text(row, "context_condition")
    if found not in (AMBIGUOUS, DISAMBIGUATED):
        raise TaskError(f"column 'context_condition' must be {AMBIGUOUS!r} or {DISAMBIGUATED!r}, got {found!r:.40}")
    return found


BBQ = Benchmark(
    "bbq",
    "questions that invite a stereotype, with ambiguous and with disambiguated contexts",
    read,
    CHOICE,
    "choice",
    hub="heegyu/bbq",  # a dataset with a script, which is not run: its files are the publishers'
    layouts=(Layout({"whole": ["data/*.jsonl"]}), Layout({"whole": ["*/test-*.parquet", "*/test/*.parquet"]})),
    example=SHOWN_CHOICE,
    options=("A", "B", "C"),
    max_new_tokens=1,
    fractions=(0.27, 0.03, 0.7),
)
AMBIG = replace(BBQ, name="bbq:ambig", about="the same, with ambiguous contexts alone", read=read_ambiguous)
DISAMBIG = replace(
    BBQ, name="bbq:disambig", about="the same, with disambiguated contexts alone", read=read_disambiguated
)
