"""Memory of encoders: the study's small form runs, and what is committed says what the documents do."""

import json

import pytest

from bench import packing, record


def test_a_packed_encoder_holds_its_weight_once_and_one_as_it_is_twice():
    result = json.loads((record.STUDIES / "packing.json").read_text())
    for one in result["encoders"]:
        held = one["held_bytes"] / one["weight_bytes"]
        assert held == pytest.approx(1 if one["packed"] else 2, abs=0.05)
    for plain, packed in zip(result["encoders"][::2], result["encoders"][1::2]):
        assert plain["sum"] == packed["sum"] and plain["peak_bytes"] > packed["peak_bytes"]


def test_the_study_runs_at_another_shape(tmp_path, capsys):
    packing.main(["--shape", "24", "256", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "packing.json").read_text())
    assert [(one["precision"], one["packed"]) for one in result["encoders"]] == [
        ("fp32", False), ("fp32", True), ("bf16", False), ("bf16", True),
    ]  # fmt: skip
    assert result["encoders"][0]["weight_bytes"] == 24 * 256 * 4 and "packed" in capsys.readouterr().out
