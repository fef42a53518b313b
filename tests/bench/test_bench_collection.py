"""The measurement of collections against their parts: its small form runs, and the profile adds up."""

import json

import pytest

from bench import collection, record, table


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("studies")
    assert collection.main(["--quick", "--out", str(folder)]) == 0
    return json.loads((folder / "collection.json").read_text())


def test_every_part_takes_time_and_the_ratios_are_of_them(result):
    assert [row["new_tokens"] for row in result["collections"]] == [1, 3]
    for row in result["collections"]:
        assert row["kept_tokens"] == row["new_tokens"]
        assert set(row["times"]) == {"collect", "collect with permutations", "generate", "encode"}
        assert all(times["median_ms"] > 0 for times in row["times"].values())
        parts = sum(row["times"][name]["median_ms"] for name in ("generate", "encode"))
        assert row["collect / parts"] == pytest.approx(row["times"]["collect"]["median_ms"] / parts)
        assert 0 < row["generate / parts"] < 1 < row["collect / parts"]


def test_a_profile_has_the_own_time_of_every_stage(result):
    for row in result["collections"]:
        assert sum(row["profile"].values()) == pytest.approx(1)
        assert {"language model", "encode and pool", collection.REST} <= set(row["profile"])
        assert row["profile"]["language model"] > 0.05
    assert len(collection.profile_rows(result)) == len(collection.rows(result)) == 2


def test_what_is_not_there_is_left_out_of_the_profile():
    assert collection._found("corrsteer.lm.capture:Capture.packed") is not None
    assert collection._found("corrsteer.lm.capture:Capture.nothing") is None
    assert collection._found("corrsteer.nothing:nothing") is None


def test_targets_are_reported_with_what_was_reached():
    rows = [{"collect / parts": 1.02, "with permutations / parts": 1.3}] * 2
    without, with_them = collection.reached({"grid": {"permutations": 1000}, "collections": rows})
    assert without.startswith("`collect` without permutations") and without.endswith("1.02 to 1.02, in 2 of 2 cases")
    assert with_them.startswith("`collect` with 1000") and with_them.endswith("1.30 to 1.30, in 0 of 2 cases")


def test_the_committed_result_is_the_full_one():
    path = record.STUDIES / "collection.json"
    committed = json.loads(path.read_text())
    assert (committed["schema"], committed["version"]) == ("corrsteer.collection", record.VERSION)
    assert not committed["quick"]
    assert {row["model"] for row in committed["collections"]} == {"random", "chat"}
    assert collection.reached(committed)[0] in table.collection(path)
