"""The comparison of vLLM with transformers: its figures mean what they say, and the documents hold the result.

That it runs is tested where vLLM is: `make test-vllm`.
"""

import json
import os

import pytest
import tiny_pipeline

from bench import record, table, vllm
from bench.teacher_forcing import ACTIVE
from corrsteer import Decoding, collect


@pytest.fixture(scope="module")
def run():
    return collect(
        tiny_pipeline.model(), tiny_pipeline.tokenizer(), tiny_pipeline.encoders(), tiny_pipeline.task(40),
        decoding=Decoding(max_new_tokens=3), permutations=0, progress=False,
    )  # fmt: skip


def test_the_same_correlations_are_not_apart_and_their_opposites_are_by_twice_as_much(run):
    active = run.moments[1]["max"].n_active >= ACTIVE
    of = vllm.apart({"transformers": run, "vllm": run}, 1, range(40))
    assert of["features"] == active.sum() > 0 and of["samples"] == 40 and of["same_best"]
    assert of["median"] == of["p99"] == of["max"] == 0 and of["best"] == run.correlation(1)[active].max() > 0
    opposite = run.statistics(rewards={"reward": 1 - run.rewards})
    of = vllm.apart({"transformers": run, "vllm": opposite}, 1, range(40))
    assert of["max"] == pytest.approx(2 * run.correlation(1)[active].abs().max().item()) and not of["same_best"]


def test_where_no_feature_is_active_often_enough_nothing_is_said(run):
    few = vllm.apart({"transformers": run, "vllm": run}, 1, range(ACTIVE - 1))
    assert few == {"samples": ACTIVE - 1, "features": 0}
    (row,) = vllm.rows({"worlds": [{"dtype": "float32", "correlations": {"1": {"identical": few}}}]})
    assert row == ("float32", "1", "completed identically", "7", "0", "-", "-", "-", "-", "-")
    assert len(row) == len(vllm.HEADER)


def test_more_threads_than_cores_are_refused_before_anything_is_set():
    before = dict(os.environ)
    with pytest.raises(SystemExit, match="--threads must be at most the"):
        vllm.one_process(10_000)
    assert dict(os.environ) == before


def test_the_committed_result_is_the_full_one():
    path = record.STUDIES / "vllm.json"
    committed = json.loads(path.read_text())
    assert (committed["schema"], committed["version"]) == ("corrsteer.vllm", record.VERSION)
    assert not committed["quick"] and not committed["dirty"]
    assert [world["dtype"] for world in committed["worlds"]] == ["bfloat16", "float32"]
    assert all(world["samples"] == 128 for world in committed["worlds"])
    assert all(line in table.vllm(path) for line in vllm.lines(committed))
