"""The measurement of jobs that several processes share: its small form runs, and its ratios are of its times."""

import json

import pytest

from bench import record, spread, table


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("studies")
    assert spread.main(["--quick", "--out", str(folder)]) == 0
    return json.loads((folder / "spread.json").read_text())


def test_every_way_takes_time_and_the_ratios_are_of_them(result):
    collect, trials = result["jobs"]
    for row in (collect, trials):
        one, two = (row["times"][name]["median_ms"] for name in ("one", "two"))
        assert row["efficiency"] == pytest.approx(one / two / 2)
    assert collect["journal / none"] == pytest.approx(
        collect["times"]["one"]["median_ms"] / collect["times"]["no journal"]["median_ms"]
    )
    assert len(spread.rows(result)) == 2 and len(spread.rows(result)[0]) == len(spread.HEADER)


def test_the_committed_result_is_of_the_full_size():
    study = record.STUDIES / "spread.json"
    if not study.exists():
        assert "Not measured yet" in table.spread(study)
        return
    result = json.loads(study.read_text())
    assert not result["quick"] and {row["job"] for row in result["jobs"]} == set(spread.JOBS)
