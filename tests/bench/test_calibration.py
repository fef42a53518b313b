"""The study of what p-values and intervals promise: its data, and what the committed result says."""

import json

import numpy as np
import pytest
import torch

from bench import calibration, clusters, record


@pytest.fixture(scope="module")
def committed():
    return json.loads((record.STUDIES / "calibration.json").read_text())


@pytest.mark.parametrize("kind", ("binary 0.5", "binary 0.1", "normal"))
@pytest.mark.parametrize("tail", calibration.TAILS)
def test_the_true_correlation_is_that_of_very_many_samples(kind, tail):
    rng = np.random.default_rng(0)
    y = calibration.draw_rewards(rng, kind, 400_000)
    z, truth = calibration.dependent_features(rng, y, kind, 0.2, tail, 0.7, 1)
    assert np.corrcoef(z[:, 0], y)[0, 1] == pytest.approx(truth, abs=0.01) and truth > 0.02


@pytest.mark.parametrize("together", (False, True))
def test_null_features_are_sparse_heavy_tailed_and_correlated_only_if_asked(together):
    z = calibration.null_features(np.random.default_rng(0), 5000, 60, together)
    share = (z > 0).mean(0)
    assert (z >= 0).all() and share.min() < 0.005 and 0.2 < share.max() < 0.6
    common = [i for i in range(10) if share[i] > 0.02]
    r = np.corrcoef(z[:, common].T)[np.triu_indices(len(common), 1)]
    assert (r.mean() > 0.15) if together else (abs(r).max() < 0.1)


def within_prompts(values):
    of_prompts = values.reshape(-1, clusters.COMPLETIONS, values.shape[-1])
    return (of_prompts - of_prompts.mean(1, keepdims=True)).reshape(values.shape)


@pytest.mark.parametrize("frequency", (0.05, 0.3))
def test_the_true_correlations_of_clustered_samples_are_those_of_very_many_prompts(frequency):
    z, y, truth = clusters.known_samples(np.random.default_rng(0), 30_000, frequency, 3)
    y = y[:, None]
    assert np.corrcoef(z.T, y.T)[-1, :-1] == pytest.approx(truth[False], abs=0.01) and truth[False] > 0.07
    z, y = within_prompts(z), within_prompts(y)
    r = (z * y).sum(0) / np.sqrt((z**2).sum(0) * (y**2).sum())
    assert r == pytest.approx(truth[True], abs=0.008) and truth[True] > 0.01


def test_null_samples_go_with_their_prompt_and_not_with_the_reward():
    z, y = clusters.null_samples(np.random.default_rng(0), "normal", 4000, 8)
    neighbour = np.corrcoef(y[::8], y[1::8])[0, 1]
    assert neighbour == pytest.approx(clusters.OF_REWARDS, abs=0.05)
    assert np.corrcoef(z[::8, 0], z[1::8, 0])[0, 1] > 0.2 and abs(np.corrcoef(z.T, y)[-1, :-1]).max() < 0.06


def test_the_study_runs_and_says_what_it_found():
    torch.manual_seed(0)
    result = calibration.study(3, quick=True, only=("family_wise", "coverage", "demo"))
    assert len(result["family_wise"]) == 4 and len(result["demo"]) == 1 and len(result["coverage"]) > 3
    assert all(row["adjusted_below_raw"] == 0 and row["family_wise_error"] < 0.3 for row in result["family_wise"])
    for row in result["coverage"]:
        assert row["intervals"] > 100 and 0.7 < row["coverage"]["delta"] <= 1
    lines = calibration.summary(result)
    assert "family-wise error of maxT at 0.05" in lines[0] and "of 1 seeds" in lines[1]
    assert all(len(row) == len(calibration.COVERAGE_HEADER) for row in calibration.coverage_rows(result))


def test_the_study_of_several_completions_runs_and_says_what_it_found():
    parts = [name for name in calibration.PARTS if name.startswith("clustered")]
    result = calibration.study(3, quick=True, only=parts)
    assert [name for name in result if name in calibration.PARTS] == parts
    assert [len(result[name]) for name in parts] == [6, 4, 8]
    for row in result["clustered_coverage"]:
        assert row["intervals"] > 90 and 0.7 < row["coverage"]["cluster"] <= 1
    lines = clusters.summary(result)
    assert "permuting whole prompts" in lines[0] and "a feature that goes with the answer: r is 0." in lines[2]
    assert all(len(row) == len(clusters.COVERAGE_HEADER) for row in clusters.coverage_rows(result))


def test_the_committed_result_of_several_completions_keeps_its_promises(committed):
    for row in committed["clustered_family_wise"]:
        assert row["runs"] >= 500
        if row["permuted"] == "single samples":
            assert row["family_wise_error"] > 0.5
        else:
            assert 0.02 <= row["family_wise_error"] <= 0.08
    of = {(row["permuted"], row["feature"]): row for row in committed["clustered_confounded"]}
    by_chance = of["within prompts", "goes with the prompt"]
    assert abs(by_chance["correlation"]) < 0.01 and by_chance["significant"] < 0.05
    assert of["whole prompts", "goes with the prompt"]["significant"] > 0.8
    assert of["within prompts", "goes with the answer"]["significant"] > 0.5
    assert len(committed["clustered_coverage"]) == 2 * len(clusters.CELLS)
    for row in committed["clustered_coverage"]:
        if row["prompts"] * row["completions"] * row["frequency"] >= calibration.ENOUGH:
            assert 0.93 <= row["coverage"]["cluster"] <= 0.97 and 0.92 <= row["coverage"]["bootstrap"] <= 0.99


def test_the_committed_result_is_whole_and_keeps_its_promises(committed):
    assert committed["schema"] == "corrsteer.calibration" and committed["seed"] == 0
    assert len(committed["family_wise"]) == 4 and all(row["runs"] >= 2000 for row in committed["family_wise"])
    for row in committed["family_wise"]:
        assert 0.03 <= row["family_wise_error"] <= 0.07 and row["adjusted_below_raw"] == 0
    assert len(committed["coverage"]) == len(calibration.CELLS)
    enough = [row for row in committed["coverage"] if row["active_samples"] >= calibration.ENOUGH]
    promised = [row for row in enough if row["tail"] != "lognormal 1.0" and row["rewards"] != "binary 0.1"]
    assert len(promised) == 108
    for row in promised:
        assert row["holds"]["delta"] and 0.92 <= row["coverage"].get("bootstrap", 0.95) <= 0.97
    assert sum(row["survivors"] == 0 for row in committed["demo"]) >= 19 and len(committed["demo"]) == 20
