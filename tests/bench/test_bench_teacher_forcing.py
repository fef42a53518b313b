"""The measurement of completions that are read again: its small form runs, and what is read is what was captured."""

import json

import pytest
import torch

from bench import record, table, teacher_forcing


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("studies")
    assert teacher_forcing.main(["--quick", "--out", str(folder)]) == 0
    return json.loads((folder / "teacher_forcing.json").read_text())


def test_what_is_read_is_what_was_captured(result):
    (world,) = result["worlds"]
    assert len(world["residuals"]) == world["layers"] == 3
    assert all(apart["median"] <= apart["p99"] <= apart["max"] < 1e-5 for apart in world["residuals"].values())
    assert all(of["features"] and of["max"] < 1e-4 and of["same_best"] for of in world["correlations"].values())
    assert world["new_tokens"] == result["grid"]["new"]


def test_every_way_takes_time_and_is_reported(result):
    (world,) = result["worlds"]
    assert set(world["times"]) == {"read", "generate", "generate and capture"}
    assert all(times["median_ms"] > 0 for times in world["times"].values())
    (line,) = teacher_forcing.lines(result)
    assert f"{world['generate / read']:.2f} times the CPU time of reading them" in line
    assert len(teacher_forcing.rows(result)) == len(world["correlations"])


def test_residuals_that_are_not_the_same_show(result):
    some = {0: torch.ones(3, 4), 1: torch.ones(1, 4)}
    apart = teacher_forcing._apart({0: some[0], 1: 2 * some[1]}, some)
    assert apart["median"] == 0 and apart["max"] == 1


def test_the_committed_result_is_the_full_one():
    path = record.STUDIES / "teacher_forcing.json"
    committed = json.loads(path.read_text())
    assert (committed["schema"], committed["version"]) == ("corrsteer.teacher_forcing", record.VERSION)
    assert not committed["quick"]
    assert {world["dtype"] for world in committed["worlds"] if world["model"] == "chat"} == {"bfloat16", "float32"}
    assert teacher_forcing.lines(committed)[0] in table.teacher_forcing(path)
