"""The demo: its numbers, its data, and the weights it ships."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from corrsteer import SparseEncoder, encode
from corrsteer.demo import sums, train
from corrsteer.demo.run import HERE, load

MEGABYTE = 10**6


def run_demo(folder, *arguments, **environment):
    """What `corrsteer demo --json` prints, run from another directory without a network."""
    done = subprocess.run(
        [sys.executable, "-m", "corrsteer", "demo", "--json", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"stderr": done.stderr}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return run_demo(tmp_path_factory.mktemp("elsewhere"))


def test_steering_lifts_accuracy_on_sums_that_nothing_was_selected_on(result):
    strategies = result["strategies"]
    assert set(strategies) == {"single", "all", "pruned", "search"}
    best = max(strategies.values(), key=lambda s: s["steered"])
    assert result["seconds"] < 60
    assert best["unsteered"] <= 0.65 and best["steered"] >= 0.80 and best["p_value"] < 1e-6


def test_every_strategys_numbers_agree_with_each_other(result):
    n = result["samples"]["test"]
    for strategy in result["strategies"].values():
        assert strategy["n"] == n
        gained = strategy["improved"] - strategy["worsened"]
        assert strategy["steered"] == pytest.approx(strategy["unsteered"] + gained / n)
    assert [f["layer"] for f in result["strategies"]["all"]["features"]] == [1, 2, 3]
    assert len(result["strategies"]["single"]["features"]) == 1


def test_it_says_what_it_is_doing_and_shows_every_strategy(result):
    said = result["stderr"]
    for words in ("1. Collect", "2. Select", "3. Steer", "CorrSteer-S", "CorrSteer-A", "CorrSteer-P", "McNemar", "->"):
        assert words in said


def test_the_table_gives_p_values_and_intervals_and_what_is_real_survives(result):
    for feature in result["features"].values():
        assert (
            feature["statistics"]["p_adjusted"] == 1 / 1001
            and feature["statistics"]["low"] < feature["statistics"]["correlation"] < feature["statistics"]["high"]
        )
    assert "95 % interval" in result["stderr"] and "adjusted p" in result["stderr"]
    assert (
        "any of all 2048 features" in result["stderr"]
        and "chance" not in result["stderr"].split("2. Select")[1].split("Adjusted p:")[0]
    )


def test_with_shuffled_rewards_nothing_survives_and_the_command_says_so(tmp_path):
    control = run_demo(tmp_path, "--shuffle-rewards")
    assert control["survivors"] == [] and control["samples"] == 2090 and control["shuffled"]
    assert all(f["statistics"]["p_adjusted"] > 0.05 for f in control["features"].values())
    said = control["stderr"]
    assert "No feature survives alpha = 0.05" in said and "There is nothing to find here, and nothing was found" in said
    assert any("no feature survives alpha=0.05" in note for note in control["notes"])


def test_the_native_backend_runs_by_itself_and_selects_what_the_reference_does(result, tmp_path):
    assert result["backends"] == ["native"] and "Activations: native backend" in result["stderr"]
    eager = run_demo(tmp_path, CORRSTEER_BACKEND="reference")
    assert eager["backends"] == ["reference"] and "Activations: reference backend" in eager["stderr"]
    for strategy, mine in result["strategies"].items():
        theirs = eager["strategies"][strategy]["features"]
        assert [(f["layer"], f["index"]) for f in mine["features"]] == [(f["layer"], f["index"]) for f in theirs]
        for one, other in zip(mine["features"], theirs):
            assert one["statistics"]["correlation"] == pytest.approx(other["statistics"]["correlation"], rel=1e-5)
            assert one["coefficient"] == pytest.approx(other["coefficient"], rel=1e-5)


def test_no_sum_is_in_two_splits_in_either_order():
    splits = sums.splits()
    numbers = [
        {frozenset(map(int, re.findall(r"\d+", row["prompt"]))) for row in rows}
        for rows in (splits.train, splits.validation, splits.test)
    ]
    assert [len(rows) for rows in (splits.validation, splits.test)] == [len(numbers[1]), len(numbers[2])] == [300, 500]
    assert not (numbers[0] & numbers[1] or numbers[0] & numbers[2] or numbers[1] & numbers[2])
    assert sums.splits(0) == sums.splits(0) != sums.splits(1)


def test_half_of_the_documents_are_signed_and_each_author_adds_in_their_way():
    rng = random.Random(0)
    documents = [sums.document(rng) for _ in range(2000)]
    signed = [d for d in documents if "?" not in d]
    assert 0.45 < len(signed) / len(documents) < 0.55
    for text in signed:
        for a, b, author, answer in re.findall(r"(\d+)\+(\d+)=([AB])(\d+)\n", text):
            assert (int(answer) == int(a) + int(b)) == (author == "A" or int(a) % 10 + int(b) % 10 < 10)


def test_signed_prompts_follow_their_author_at_least_98_times_in_100():
    model, tokenizer, _ = load()
    shares = train.follows(model, tokenizer, n=400)
    assert shares[sums.CAREFUL] >= 0.98 and shares[sums.SLOPPY] >= 0.98, shares


def test_the_shipped_saes_are_saelens_own_and_encode_as_there():
    from sae_lens import SAE

    x = torch.randn(50, 128)
    for layer in range(4):
        sae = SAE.load_from_disk(HERE / "sae" / f"layer_{layer}")
        encoder = SparseEncoder.load(HERE / "sae" / f"layer_{layer}")
        assert encoder.hook_name == f"blocks.{layer}.hook_resid_post"
        torch.testing.assert_close(encode(x, encoder), sae.encode(x).detach(), rtol=1e-4, atol=1e-4)


def test_the_shipped_weights_are_safetensors_of_at_most_6_megabytes():
    files = [f for folder in ("model", "sae") for f in (HERE / folder).rglob("*") if f.is_file()]
    assert {f.suffix for f in files} == {".json", ".safetensors"}
    assert sum(f.stat().st_size for f in files) <= 6 * MEGABYTE


def test_the_training_script_trains_both_and_writes_what_the_demo_loads(tmp_path, monkeypatch):
    arguments = [
        "--out",
        tmp_path,
        "--steps",
        2,
        "--batch",
        4,
        "--sae-samples",
        4096,
        "--documents",
        256,
        "--d-sae",
        32,
    ]
    monkeypatch.setattr(sys, "argv", ["train", *map(str, arguments)])
    train.main()
    monkeypatch.setattr("corrsteer.demo.run.HERE", Path(tmp_path))
    model, tokenizer, encoders = load()
    assert tokenizer.decode(tokenizer("12+34=?")["input_ids"][1:]) == "12+34=?"
    assert model.config.num_hidden_layers == len(encoders) == 4 and encoders[2].d_sae == 32
