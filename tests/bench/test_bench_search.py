"""The measurement of search: its small form runs, and both ways have the same candidates and samples."""

import json

import pytest

from bench import record, search, table
from corrsteer import select
from corrsteer.experiments.race import FIRST


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("studies")
    assert search.main(["--quick", "--out", str(folder)]) == 0
    return json.loads((folder / "search.json").read_text())


def test_search_finds_what_the_grid_finds_with_fewer_completions(result):
    (world,) = result["worlds"]
    assert world["model"] == "demo" and world["racing"] == world["confirming"] == 2 * FIRST
    ways = world["ways"]
    assert list(ways) == ["search", "search, one feature", "grid"]
    grid, one = ways["grid"], ways["search, one feature"]
    assert grid["trials"] == world["candidates"] * len(world["scales"])
    assert grid["completions"] == world["racing"] * (grid["trials"] + 1) + 2 * world["confirming"]
    assert one["completions"] <= ways["search"]["completions"] < grid["completions"]
    assert world["same"] and one["found"] == grid["found"]
    assert one["test"] == grid["test"] > world["unsteered"]["test"] + 0.2
    assert [len(way["timed"]) for way in ways.values()] == [1, 2, 1]
    assert all(way["seconds"] > 0 for way in ways.values())


def test_a_search_that_finds_something_else_the_second_time_is_not_reported(monkeypatch):
    scales = iter((0.5, 0.5, 2.0))

    def searched(world, run, options):
        steering = select(run, "single", scale=next(scales))
        steering.provenance["search"] = {"grid": {"scales": [1.0]}}
        return steering

    monkeypatch.setattr(search, "searched", searched)
    with pytest.raises(SystemExit, match="found .* the second time"):
        search.measured(search.demo_world(search.QUICK), search.QUICK)


def test_the_parts_of_the_sums_share_no_sum():
    parts = search.sums((30, 20, 10))
    assert [(part.name, len(part)) for part in parts] == [
        ("train sums", 30), ("validation sums", 20), ("test sums", 10),
    ]  # fmt: skip
    asked = [{tuple(filter(str.isdigit, e.prompt)) for e in part.examples} for part in parts]
    assert not asked[0] & asked[1] and not asked[0] & asked[2] and not asked[1] & asked[2]
    example = parts[0].examples[0]
    assert parts[0].reward(f"That is {example.answer}.", example) == 1


def test_saes_without_their_model_are_refused(capsys):
    with pytest.raises(SystemExit):
        search.main(["--quick", "--saes", "1=sae"])
    assert "--model and --saes are given together" in capsys.readouterr().err


def test_the_committed_result_is_the_full_one():
    path = record.STUDIES / "search.json"
    committed = json.loads(path.read_text())
    assert (committed["schema"], committed["version"]) == ("corrsteer.search", record.VERSION)
    assert not committed["quick"]
    for line in search.summary(committed):
        assert line in table.search(path)
    for world in committed["worlds"]:
        assert world["ways"]["search, one feature"]["completions"] < world["ways"]["grid"]["completions"]
