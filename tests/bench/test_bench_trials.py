"""The measurement of whole jobs: its small form runs, and every way does the same work."""

import json

import pytest

from bench import record, table, trials


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("studies")
    assert trials.main(["--quick", "--out", str(folder)]) == 0
    return json.loads((folder / "trials.json").read_text())


def test_every_way_scores_the_same_and_takes_time(result):
    assert [(row["model"], row["new_tokens"]) for row in result["pruning"]] == [
        ("demo", 1), ("demo", 3), ("random", 1), ("random", 3),
    ]  # fmt: skip
    for row in result["pruning"]:
        assert row["same_scores"]
        assert set(row["times"]) == {"trials", "one at a time", "evaluation", "loop"}
        assert all(times["median_ms"] > 0 for times in row["times"].values())
        assert row["loop / trials"] > 1, "one prompt at a time is slower, on any machine"


def test_a_shared_prefix_changes_no_completion(result):
    assert [row["shared_tokens"] for row in result["prefix"]] == [0, 0, 10, 10, 18, 18]
    assert all(row["same_completions"] == row["prompts"] == 8 for row in result["prefix"])


def test_ways_that_come_to_other_decisions_are_not_timed(monkeypatch):
    monkeypatch.setitem(trials.WAYS, "trials", lambda world, decoding: [0.0] + [1.0] * len(world.candidates))
    with pytest.raises(SystemExit, match="the ways come to different decisions"):
        trials.pruning_rows(trials.QUICK)


def test_targets_are_reported_with_what_was_reached(result):
    rows = [{"model": "demo", "new_tokens": 1, "loop / trials": 30.0, "trials / evaluation": 9.0},
            {"model": "random", "new_tokens": 1, "loop / trials": 19.0, "trials / evaluation": 1.8}]  # fmt: skip
    assert trials.reached({"pruning": rows}) == [
        "`loop / trials` at least 20 at 1 new token: 19.0 and 30.0",
        "`trials / evaluation` at most 2.5 at 1 new token: 1.8",
    ]
    assert len(trials.pruning_table(result)) == 4 and len(trials.prefix_table(result)) == 6


def test_the_committed_result_is_the_full_one():
    path = record.STUDIES / "trials.json"
    committed = json.loads(path.read_text())
    assert (committed["schema"], committed["version"]) == ("corrsteer.trials", record.VERSION)
    assert not committed["quick"]
    assert trials.reached(committed)[0] in table.trials(path)
