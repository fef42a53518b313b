"""The study of stored rows: its small form runs, and both ways say the same."""

import json

import pytest
import torch

from bench import record, stored_rows, table


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("studies")
    assert stored_rows.main(["--quick", "--out", str(folder)]) == 0
    return json.loads((folder / "stored_rows.json").read_text())


def test_bytes_are_those_of_the_activations_and_of_the_permuted_sums(result):
    for case in result["cases"]:
        active = case["share"] * case["features"] * case["samples"] * case["layers"]
        assert case["bytes"]["rows"] == pytest.approx(6 * active + 8 * case["layers"] * (case["samples"] + 1), rel=0.1)
        assert case["bytes"]["sums"] == 8 * case["features"] * case["permutations"] * case["layers"]
        assert case["bytes_a_sample_and_layer"] * case["samples"] * case["layers"] == case["bytes"]["rows"]


def test_every_part_of_both_ways_has_a_time(result):
    for case in result["cases"]:
        assert set(case["times"]) == {
            "streaming: sums", "streaming: test", "rows: keep", "rows: sums", "rows: test", "rows: test of ranks",
        }  # fmt: skip
        assert all(times["median_ms"] > 0 for times in case["times"].values())
    assert len(stored_rows.rows_of(result)) == len(stored_rows.made_of(result)) == 2


def test_ways_that_say_something_else_are_not_timed(monkeypatch):
    wrong = stored_rows.streaming

    def other(blocks, permutations):
        return wrong([(number, z, y.flip(0)) for number, z, y in blocks], permutations)

    monkeypatch.setattr(stored_rows, "streaming", other)
    with pytest.raises(SystemExit, match="the ways come to different p-values"):
        stored_rows.measured((40, 0.3, 1, 600, 99, 1))


def test_blocks_are_as_sparse_as_asked_and_the_same_each_time():
    (one, *_), (other, *_) = (list(stored_rows.blocks_of(2000, 0.05, 600, 1)) for _ in range(2))
    assert torch.equal(one[1], other[1]) and float((one[1] != 0).double().mean()) == pytest.approx(0.05, rel=0.05)


def test_the_committed_result_is_the_full_one():
    path = record.STUDIES / "stored_rows.json"
    committed = json.loads(path.read_text())
    assert (committed["schema"], committed["version"]) == ("corrsteer.stored_rows", record.VERSION)
    assert not committed["quick"] and len(committed["cases"]) == len(stored_rows.FULL)
    assert stored_rows.lines(committed)[0] in table.stored_rows(path)
