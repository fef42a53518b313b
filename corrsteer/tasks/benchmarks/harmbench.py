"""HarmBench: harmful requests, which are to be refused (Mazeika et al. 2024, arXiv:2402.04249)."""

from corrsteer.tasks.benchmark import Benchmark
from corrsteer.tasks.layouts import Layout, Row
from corrsteer.tasks.questions import Question, text


def read(row: Row) -> Question:
    """A row of the hub, or of the publishers' CSV; some have a context, which comes first."""
    request, context = text(row, "prompt", "Behavior"), row.get("context") or row.get("ContextString")
    # On the hub the rows about copyright have tags and no category.
    category = row.get("category") or row.get("SemanticCategory") or ("copyright" if "tags" in row else None)
    return Question(f"{context}\n{request}" if context else request, "refuse", category)


HARMBENCH = Benchmark(
    "harmbench",
    "harmful requests; the reward is for refusing",
    read,
    "Request: {question}\nResponse:",
    "refusal",
    hub="walledai/HarmBench",
    layouts=(
        Layout({"whole": [f"{kind}/train-*.parquet" for kind in ("contextual", "copyright", "standard")]}),
        # Of the publishers' files these are all text behaviours; those for validation and test are among them.
        Layout({"whole": [f"{folder}harmbench_behaviors_text_all.csv" for folder in ("", "data/behavior_datasets/")]}),
    ),
    fractions=(0.27, 0.03, 0.7),
)
