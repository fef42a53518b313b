"""The measurement of what steering costs a decode step: its small form, and what the committed result says."""

import json

import pytest
import torch

from bench import decode_steps, hooks, record, table

STEERED = ("one vector", "rows that differ")


@pytest.fixture(scope="module")
def result():
    return hooks.study(before=record.ROOT, rounds=2, quick=True, commit="0123456789abcdef")


def made_up(layer_us):
    """A result of 24 layers in which steering takes so long a layer, and ten times that to enter."""
    setting, _ = hooks.SETTINGS["host"]
    values = {"share": 0.5, "layer_us": layer_us, "enter_us": 240 * layer_us}
    cost = {"step_s": 1.0} | {name: {"median": value} for name, value in values.items()}
    rows = [{"setting": "host", "code": "now", "context": context, **cost} for context in ("torch's hooks", *STEERED)]
    return {"settings": {"host": setting}, "steps": rows}


def test_both_codes_take_turns_and_say_what_each_context_costs(result):
    assert result["schema"] == "corrsteer.hooks" and result["before"] == record.commit_of(record.ROOT)
    assert result["commit"] == "0123456789abcdef" and result["packages"]["transformers"]
    contexts = ["unsteered", "torch's hooks", *STEERED]
    assert [(r["code"], r["context"]) for r in result["steps"]] == [(c, x) for c in ("now", "before") for x in contexts]
    for row in result["steps"]:
        assert row["step_s"] > 0 and row["rounds"] == 2
        assert ("share" in row) == (row["context"] != "unsteered")
    assert all(len(row) == len(hooks.HEADER) for row in hooks.rows_of(result))
    assert hooks.summary(result)[0].startswith("hidden 64, 2 layers, batch 3, 1 thread(s): a step takes")


def test_what_takes_longer_than_it_may_is_said():
    assert hooks.missed(made_up(4.0)) == []
    assert hooks.missed(made_up(16.0)) == [
        "host, one vector: layer_us is 16, and may be 15",
        "host, one vector: enter_us is 3.84e+03, and may be 1000",
    ]


def test_a_step_that_plain_hooks_do_not_make_is_not_timed(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    steps = decode_steps.Steps(**hooks.QUICK["tiny"][0])
    steps.check()
    steps.contexts["one vector"] = steps.contexts["rows that differ"]
    with pytest.raises(SystemExit, match="a step with one vector is not what plain hooks make of it"):
        steps.check()


def test_a_checkout_in_which_it_cannot_run_is_named(tmp_path):
    (tmp_path / "corrsteer").mkdir()
    (tmp_path / "corrsteer" / "__init__.py").write_text("")
    with pytest.raises(SystemExit, match=f"decode_steps.py failed in {tmp_path}"):
        hooks.measured("tiny", hooks.QUICK["tiny"][0], {"before": tmp_path}, 1)


def test_the_document_says_how_to_measure_what_is_not_measured(tmp_path, result):
    assert "python -m bench.hooks" in table.hooks(tmp_path / "hooks.json")
    path = record.write_study(result, tmp_path)
    assert path.name == "hooks.json" and "| hidden 64, 2 layers, batch 3, 1 thread(s) | now |" in table.hooks(path)


def test_the_committed_result_is_whole_and_the_document_says_which_promises_it_misses():
    path = record.STUDIES / "hooks.json"
    committed = json.loads(path.read_text())
    assert list(committed["settings"]) == list(hooks.SETTINGS) and not committed["dirty"]
    said = (record.ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert all(f"above its target: {line}" in said for line in hooks.missed(committed))
    before = {(r["setting"], r["context"]): r for r in committed["steps"] if r["code"] == "before"}
    for row in committed["steps"]:
        if row["code"] == "now" and row["context"] in hooks.MOST_US and row["setting"] == "host":
            assert row["layer_us"]["median"] < before["host", row["context"]]["layer_us"]["median"]
