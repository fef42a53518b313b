"""The table of benchmarks in the documents is what the registry says: `python tests/docs/test_table_of_tasks.py`."""

import re
import sys
from pathlib import Path

from corrsteer import benchmarks

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "tasks.md"
BEGIN = "<!-- table of tasks: python tests/docs/test_table_of_tasks.py writes it -->"
END = "<!-- table of tasks: end -->"
HEADER = ("task", "what it asks", "dataset on the hub", "grader", "options", "new tokens", "pooling")


def table():
    """A row a benchmark, in Markdown."""
    rows = [HEADER, ("---",) * len(HEADER)]
    for name, benchmark in benchmarks().items():
        labels = benchmark.options
        options = f"{labels[0]} to {labels[-1]}" if labels else "-"
        rows.append((
            f"`{name}`", benchmark.about, f"`{benchmark.hub}`", f"`{benchmark.grader}`", options,
            str(benchmark.max_new_tokens), benchmark.pool,
        ))  # fmt: skip
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def renewed(page):
    """The page with the table of now."""
    assert page.count(BEGIN) == page.count(END) == 1
    return re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n\n{table()}\n\n{END}", page, flags=re.DOTALL)


def test_the_page_has_the_table_that_the_registry_gives():
    page = PAGE.read_text(encoding="utf-8")
    assert page == renewed(page), "run python tests/docs/test_table_of_tasks.py"


def test_every_benchmark_is_in_the_table_and_plain():
    assert all(f"| `{name}` |" in table() for name in benchmarks())
    assert not any(benchmark.chat for benchmark in benchmarks().values()), "else the table would have to say so"


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    sys.exit(0)
