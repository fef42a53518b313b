"""Scores: SciPy's and scikit-learn's on the same data, and of every permutation."""

import numpy as np
import pytest
import torch
from evidences import made, orders
from scipy import stats

from corrsteer import CorrSteerError, Evidence, inference, scores
from corrsteer.stats.evidence import STREAMED


@pytest.mark.parametrize("labels", ("binary", "real"))
def test_pearson_is_scipys_and_that_of_the_moments(labels):
    evidence, moments, z, y = made(labels=labels)
    r = scores.correlation(evidence)
    np.testing.assert_allclose(r, [stats.pearsonr(column, y)[0] for column in z.T], atol=1e-12)
    torch.testing.assert_close(r, moments.correlation()[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("labels", ("binary", "real"))
def test_point_biserial_is_scipys_of_whether_the_reward_is_positive(labels):
    evidence, _, z, y = made(labels=labels)
    expected = [stats.pointbiserialr(y > 0, column)[0] for column in z.T]
    np.testing.assert_allclose(scores.score(evidence, "point_biserial"), expected, atol=1e-12)


def test_contrastive_and_squared_ratio_compare_the_groups_means_and_mean_squares():
    evidence, moments, z, y = made(labels="real")
    above, below = z[y > 0], z[y <= 0]
    np.testing.assert_allclose(scores.score(evidence, "contrastive"), above.mean(0) - below.mean(0), atol=1e-12)
    torch.testing.assert_close(scores.score(evidence, "contrastive"), moments.coefficient("contrastive")[0])
    a, b = (above**2).mean(0), (below**2).mean(0)
    np.testing.assert_allclose(scores.score(evidence, "squared_ratio"), (a - b) / (a + b), atol=1e-12)
    ratio = (1 + scores.score(evidence, "squared_ratio")) / (1 - scores.score(evidence, "squared_ratio"))
    np.testing.assert_allclose(ratio, a / b, rtol=1e-9)


@pytest.mark.parametrize("name", STREAMED)
def test_a_feature_that_never_varies_and_rewards_of_one_group_score_0(name):
    evidence = Evidence(2, permutations=9, scores=STREAMED)
    z = torch.stack([torch.zeros(30), torch.linspace(0.1, 1, 30)], 1)
    evidence.update(z, torch.arange(30) % 2, 0)
    assert scores.score(evidence, name)[0] == 0 and inference.significance({0: evidence}, name)[0].p[0] == 1
    if name == "pearson":
        return
    evidence = Evidence(2, scores=STREAMED)
    evidence.update(z, torch.ones(30), 0)
    assert not bool(scores.score(evidence, name).any())


def test_scores_that_were_not_collected_or_have_no_meaning_are_refused():
    evidence, *_ = made()
    with pytest.raises(CorrSteerError, match="score 'auroc' needs each sample's activations, which were not"):
        scores.score(evidence, "auroc")
    with pytest.raises(CorrSteerError, match="score must be one of pearson, "):
        scores.score(evidence, "kendall")


@pytest.mark.parametrize("name", STREAMED)
def test_every_scores_permutations_are_that_score_of_permuted_rewards(name):
    evidence, _, z, y = made(n=200, d=6, permutations=7, scores=STREAMED)
    permuted = scores.permuted(evidence, name, slice(None), 0)
    for at, order in enumerate(orders(evidence, 200)):
        again = Evidence(6, scores=STREAMED)
        again.update(torch.from_numpy(z).float(), torch.from_numpy(y[order]), 0)
        torch.testing.assert_close(permuted[:, at].abs(), scores.score(again, name).abs(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ("point_biserial", "contrastive"))
def test_two_valued_rewards_need_no_columns_of_their_own_for_the_groups_scores(name):
    without, with_ = (made(permutations=30, scores=scores)[0] for scores in (("pearson",), STREAMED))
    assert not without.has("permuted_positive") and scores.testable(without, name)
    one, other = (scores.permuted(e, name, slice(None), 0) for e in (without, with_))
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    real = made(permutations=30, labels="real")[0]
    assert not scores.testable(real, name)
    with pytest.raises(CorrSteerError, match=f"score '{name}' of layer 3 has no permutations to be tested by"):
        inference.significance({3: real}, name)
