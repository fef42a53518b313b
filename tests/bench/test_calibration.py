"""The study of what p-values and intervals promise: its data, and what the committed result says."""

import json

import numpy as np
import pytest
import torch

from bench import calibration, record


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


def test_the_study_runs_and_says_what_it_found():
    torch.manual_seed(0)
    result = calibration.study(3, quick=True)
    assert len(result["family_wise"]) == 4 and len(result["demo"]) == 1 and len(result["coverage"]) > 3
    assert all(row["adjusted_below_raw"] == 0 and row["family_wise_error"] < 0.3 for row in result["family_wise"])
    for row in result["coverage"]:
        assert row["intervals"] > 100 and 0.7 < row["coverage"]["delta"] <= 1
    lines = calibration.summary(result)
    assert "family-wise error of maxT at 0.05" in lines[0] and "of 1 seeds" in lines[1]
    assert all(len(row) == len(calibration.COVERAGE_HEADER) for row in calibration.coverage_rows(result))


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
