"""Inference: against SciPy and scikit-learn on the same data, against brute force, and against the promises made."""

import numpy as np
import pytest
import torch
from evidences import made, orders
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from corrsteer import CorrSteerError, Evidence, Moments, inference, scores, update_moments
from corrsteer.ops.moments import COEFFICIENTS
from corrsteer.stats.evidence import STREAMED
from corrsteer.stats.inference import intervals

# Intervals


@pytest.mark.parametrize("labels", ("binary", "real"))
def test_the_delta_interval_is_formed_from_every_samples_influence(labels):
    evidence, _, z, y = made(labels=labels)
    n, t = len(y), stats.t
    a, b = (z - z.mean(0)) / z.std(0), ((y - y.mean()) / y.std())[:, None]
    r = (a * b).mean(0)
    influence = a * b - r / 2 * (a**2 + b**2)
    squares = (influence**2).sum(0)
    error = np.sqrt((influence**2 * (1 + 2 * (1 + a**2) / n)).sum(0)) / n / (1 - r**2)
    few = n / ((a**4).mean(0) * (b**4).mean(0)) < 2
    assert 0 < few.sum() < 25 or labels == "binary"
    skew = (influence**3).sum(0) / squares**1.5
    quantile = t.isf(0.05, n / np.maximum((a**4).mean(0), (b**4).mean(0)))

    def unskewed(q):
        return 3 / skew * (np.cbrt(1 + skew * (q - skew / 6)) - 1)

    low, high = inference.delta_interval(evidence, 0.9)
    expected, expected_high = (np.tanh(np.arctanh(r) - error * unskewed(q)) for q in (quantile, -quantile))
    fisher = [end.numpy() for end in inference.interval(evidence, "fisher", 0.9)]
    np.testing.assert_allclose(low, np.where(few, np.minimum(expected, fisher[0]), expected), atol=1e-9)
    np.testing.assert_allclose(high, np.where(few, np.maximum(expected_high, fisher[1]), expected_high), atol=1e-9)
    few = torch.tensor([3, 1])
    torch.testing.assert_close(inference.delta_interval(evidence, 0.9, few)[0], low[few], rtol=0, atol=1e-12)


def test_halls_transformation_and_its_inverse_undo_each_other():
    t, s = torch.linspace(-3, 3, 13, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    g = t + s * t**2 / 3 + s**2 * t**3 / 27 + s / 6
    torch.testing.assert_close(intervals._unskewed(g, s.expand(13)), t)
    assert torch.equal(intervals._unskewed(t, torch.zeros(13, dtype=torch.float64)), t)


def test_fishers_interval_is_scipys():
    evidence, _, z, y = made()
    low, high = inference.interval(evidence, "fisher", 0.9)
    for i in range(5):
        expected = stats.pearsonr(z[:, i], y).confidence_interval(0.9)
        assert (float(low[i]), float(high[i])) == pytest.approx(tuple(expected), abs=1e-12)


def test_bootstrap_replicates_are_weighted_correlations():
    evidence, _, z, y = made(bootstrap=40)
    w = np.concatenate([evidence._bootstrap_weights(100, k).numpy() for k in range(3)])
    replicates = inference.bootstrap_correlations(evidence)
    for b in (0, 17, 39):
        covariance = np.cov(np.column_stack([z, y]).T, fweights=w[:, b].astype(int))
        r = covariance[-1, :-1] / np.sqrt(np.diag(covariance)[:-1] * covariance[-1, -1])
        np.testing.assert_allclose(replicates[:, b], r, atol=1e-10)


def test_the_bootstrap_interval_agrees_with_the_delta_interval_where_there_is_much_data():
    evidence, *_ = made(n=3000, d=8, bootstrap=1000)
    (low, high), (low_, high_) = (inference.interval(evidence, m) for m in ("delta", "bootstrap"))
    assert float(((low - low_).abs() / (high - low)).max()) < 0.15
    assert float(((high - high_).abs() / (high - low)).max()) < 0.15


@pytest.mark.parametrize("method", inference.METHODS)
def test_intervals_hold_r_and_narrow_with_data_and_widen_with_the_level(method):
    small, large = (made(n=n, bootstrap=200, seed=4)[0] for n in (200, 2000))
    r = scores.correlation(small)
    (low, high), (low_, high_) = (inference.interval(small, method, level) for level in (0.8, 0.99))
    assert bool(((low_ < low) & (low < r) & (r < high) & (high < high_)).all())
    assert bool(((low_ > -1) & (high_ < 1)).all())
    widths = [inference.interval(e, method)[1] - inference.interval(e, method)[0] for e in (small, large)]
    assert float(widths[1].mean()) < 0.5 * float(widths[0].mean())


def test_where_there_is_no_interval_it_is_nan_and_the_others_stay():
    rng = np.random.default_rng(0)
    z = torch.from_numpy(rng.exponential(size=(50, 3)))
    z[:, 0] = 0
    z[:, 1] += 500  # its sixth moment would be rounding errors
    evidence = Evidence(3)
    evidence.update(z.float(), torch.from_numpy(rng.standard_normal(50)), 0)
    assert inference.delta_interval(evidence)[0].isnan().tolist() == [True, True, False]
    constant = Evidence(3, bootstrap=20)
    constant.update(z.float(), torch.ones(50), 0)
    for method in inference.METHODS:
        assert all(bool(end.isnan().all()) for end in inference.interval(constant, method))
    assert inference.interval(evidence, "fisher")[0].isnan().tolist() == [True, False, False]


def test_a_perfect_correlation_has_an_interval_that_ends_at_1():
    evidence = Evidence(1)
    z = torch.linspace(0, 1, 40)[:, None]
    evidence.update(z, z[:, 0], 0)
    low, high = inference.delta_interval(evidence)
    assert float(low) > 0.99 and float(high) <= 1
    for offset in range(20):  # where every sample's influence is rounding
        evidence = Evidence(1)
        evidence.update(z + offset / 7, 3 * z[:, 0].double() + offset, 0)
        assert float(inference.delta_interval(evidence)[0]) > 0.999


def test_bad_choices_of_interval_are_named():
    evidence, *_ = made()
    with pytest.raises(CorrSteerError, match="method must be one of delta, fisher, bootstrap, got 'exact'"):
        inference.interval(evidence, "exact")
    with pytest.raises(CorrSteerError, match="level must be between 0 and 1, got 95"):
        inference.interval(evidence, level=95)
    with pytest.raises(CorrSteerError, match="at least 20 bootstrap replicates .* got 0; collect with bootstrap=500"):
        inference.interval(evidence, "bootstrap")


@pytest.mark.parametrize("active", (1, 2, 3, 5, 12))
def test_a_bootstrap_interval_of_very_few_active_samples_holds_r_and_does_not_cross(active):
    """Where the acceleration is large BCa's formula has a pole, past which it would give the other end."""
    rng = np.random.default_rng(active)
    z = np.zeros((400, 40), dtype=np.float32)
    for column in z.T:
        column[rng.choice(400, active, replace=False)] = rng.exponential(size=active)
    evidence = Evidence(40, bootstrap=200)
    evidence.update(torch.from_numpy(z), torch.from_numpy((rng.random(400) < 0.5).astype(float)), 0)
    r = scores.correlation(evidence)
    for level in (0.95, 0.99):
        low, high = inference.interval(evidence, "bootstrap", level)
        assert bool(((low <= r) & (r <= high) & (low < high)).all())


def test_where_hardly_any_sample_is_both_active_and_rewarded_intervals_still_hold_the_truth():
    """Rewards of 0.05, features of 0.05, 1000 samples, independent: 2.5 samples are both, and often none."""
    rng = np.random.default_rng(0)
    hits = {"delta": 0, "bootstrap": 0}
    for run in range(20):
        z = (rng.random((1000, 100)) < 0.05) * rng.exponential(size=(1000, 100))
        evidence = Evidence(100, bootstrap=200, seed=run)
        evidence.update(torch.from_numpy(z).float(), torch.from_numpy((rng.random(1000) < 0.05).astype(float)), 0)
        for method in hits:
            low, high = inference.interval(evidence, method)
            hits[method] += int(((low <= 0) & (0 <= high)).sum())
    assert all(n / 2000 > 0.94 for n in hits.values()), hits


# Tests


def brute(scores, null):
    """p, step-down maxT and nothing clever: `scores: [D]`, `null: [D, P]`, both as sizes."""
    P, tie = null.shape[1], 1e-6 * scores.max()
    p = (1 + (null >= scores[:, None] - tie).sum(1)) / (P + 1)
    order = np.argsort(-scores, kind="stable")
    adjusted, before = np.empty(len(scores)), 0.0
    for rank, i in enumerate(order):
        largest = null[order[rank:]].max(0)
        before = adjusted[i] = max(before, (1 + (largest >= scores[i] - tie).sum()) / (P + 1))
    return p, adjusted


@pytest.mark.parametrize("labels", ("binary", "real"))
def test_p_values_are_those_of_brute_force_over_all_layers(labels):
    layers = {layer: made(seed=1, d=15, labels=labels, permutations=99, effect=0.2 * layer) for layer in (1, 2)}
    # the same rewards for both layers, as in a run
    first = layers[1]
    second = Evidence(15, permutations=99)
    z2 = np.random.default_rng(7).exponential(size=(300, 15)).astype(np.float32)
    for block, at in enumerate(range(0, 300, 100)):
        second.update(torch.from_numpy(z2[at : at + 100]), torch.from_numpy(first[3][at : at + 100]), block)
    evidences, data = {1: first[0], 2: second}, {1: first[2], 2: z2.astype(float)}
    y, order = first[3], orders(first[0], 300)
    sizes, null = {}, {}
    for layer, z in data.items():
        a, b = (z - z.mean(0)) / z.std(0), (y - y.mean()) / y.std()
        sizes[layer], null[layer] = abs(a.T @ b) / 300, abs(a.T @ b[order].T) / 300
    tested = inference.significance(evidences)
    every = brute(np.concatenate(list(sizes.values())), np.concatenate(list(null.values())))
    for at, layer in enumerate((1, 2)):
        p, p_layer = brute(sizes[layer], null[layer])
        np.testing.assert_allclose(tested[layer].p, p)
        np.testing.assert_allclose(tested[layer].p_layer, p_layer)
        np.testing.assert_allclose(tested[layer].p_adjusted, every[1][15 * at : 15 * at + 15])
        assert bool((tested[layer].p <= tested[layer].p_layer).all())
        assert bool((tested[layer].p_layer <= tested[layer].p_adjusted).all())


def test_q_values_are_scipys_benjamini_hochberg_of_the_pooled_null():
    evidence, _, z, y = made(d=40, permutations=199)
    a, b = (z - z.mean(0)) / z.std(0), (y - y.mean()) / y.std()
    size, null = abs(a.T @ b) / 300, np.sort((abs(a.T @ b[orders(evidence, 300)].T) / 300).ravel())
    pooled = (1 + null.size - np.searchsorted(null, size)) / (1 + null.size)
    np.testing.assert_allclose(
        inference.significance({0: evidence})[0].q, stats.false_discovery_control(pooled), rtol=5e-3
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1e-9, 1), min_size=1, max_size=30))
def test_benjamini_hochberg_is_scipys(p):
    got = inference.benjamini_hochberg(torch.tensor(p, dtype=torch.float64))
    np.testing.assert_allclose(got, stats.false_discovery_control(p), rtol=1e-12)


def test_contrastive_tests_do_not_mind_the_size_of_activations():
    rng = np.random.default_rng(3)
    z = rng.exponential(size=(200, 6)).astype(np.float32)
    y = (rng.random(200) < 0.5).astype(float)
    z[:, 2] += 0.8 * y
    plain, scaled = Evidence(6, permutations=99), Evidence(6, permutations=99)
    plain.update(torch.from_numpy(z), torch.from_numpy(y), 0)
    z[:, 4] *= 1e7
    scaled.update(torch.from_numpy(z), torch.from_numpy(y), 0)
    one, other = (inference.significance({0: e}, "contrastive")[0] for e in (plain, scaled))
    for name in ("p", "p_layer", "p_adjusted", "q"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-3, atol=1e-3)
    assert one.p_adjusted[2] == 0.01


@pytest.mark.parametrize("name", STREAMED)
def test_an_activation_that_is_not_a_number_spoils_its_own_feature_alone(name):
    rng = np.random.default_rng(0)
    z, y = torch.from_numpy(rng.exponential(size=(60, 4)).astype(np.float32)), torch.arange(60) % 2
    for bad in (float("nan"), float("inf")):
        spoilt = z.clone()
        spoilt[7, 2] = bad
        clean, other = (Evidence(4, permutations=19, scores=STREAMED) for _ in range(2))
        clean.update(z, y, 0)
        other.update(spoilt, y, 0)
        kept = [0, 1, 3]
        torch.testing.assert_close(scores.score(other, name)[kept], scores.score(clean, name)[kept])
        assert scores.score(other, name)[2] == 0
        one, two = (inference.significance({0: e}, name)[0].p for e in (clean, other))
        assert torch.equal(one[kept], two[kept]) and two[2] == 1


def test_evidences_that_do_not_belong_together_are_refused():
    of = {"permutations": 19, "d": 5}
    first, other_seed, other_size = made(**of)[0], made(**of)[0], made(permutations=29, d=5)[0]
    other_seed.seed = 1
    fewer = made(n=200, **of)[0]
    other_rewards = made(seed=9, **of)[0]
    for wrong in (other_seed, other_size, fewer, other_rewards):
        with pytest.raises(
            CorrSteerError, match="must be of the same samples and permutations, but layer 2 has Evidence"
        ):
            inference.significance({1: first, 2: wrong})
    with pytest.raises(CorrSteerError, match="evidences must hold at least one layer, got none"):
        inference.significance({})


@pytest.mark.parametrize("label", (-1, 1, 2))
def test_a_label_that_does_not_exist_is_refused(label):
    evidence, *_ = made(d=3, permutations=5, scores=STREAMED, bootstrap=20)
    for name in STREAMED:
        with pytest.raises(CorrSteerError, match=rf"label must lie in 0..0, got {label}"):
            scores.score(evidence, name, label=label)
    for method in inference.METHODS:
        with pytest.raises(CorrSteerError, match="label must lie in 0..0"):
            inference.interval(evidence, method, label=label)


def test_labels_are_scored_and_tested_each_for_itself():
    rng = np.random.default_rng(1)
    z = rng.exponential(size=(120, 5)).astype(np.float32) * (rng.random((120, 5)) < 0.5)
    y = np.column_stack([rng.random(120) < 0.4, z[:, 1] + rng.standard_normal(120)]).astype(float)
    settings = {"permutations": 29, "bootstrap": 25, "scores": STREAMED}
    both, alone = Evidence(5, 2, **settings), [Evidence(5, **settings) for _ in range(2)]
    both.update(torch.from_numpy(z), torch.from_numpy(y), 4)
    for label in (0, 1):
        alone[label].update(torch.from_numpy(z), torch.from_numpy(y[:, label]), 4)
        for name in STREAMED:
            torch.testing.assert_close(scores.score(both, name, label=label), scores.score(alone[label], name))
            one, other = (
                inference.significance({0: e}, name, label=k)[0] for e, k in ((both, label), (alone[label], 0))
            )
            assert torch.equal(one.p_adjusted, other.p_adjusted)
        for method in inference.METHODS:
            torch.testing.assert_close(
                torch.stack(inference.interval(both, method, label=label)),
                torch.stack(inference.interval(alone[label], method)),
            )


def test_many_features_are_tested_in_parts_with_the_same_result(monkeypatch):
    evidence, *_ = made(d=50, permutations=49)
    whole = inference.significance({0: evidence})[0]
    monkeypatch.setattr("corrsteer.stats.inference.permutation.FEATURES_AT_A_TIME", 7)
    parts = inference.significance({0: evidence})[0]
    for name in ("p", "p_layer", "p_adjusted", "q"):
        assert torch.equal(getattr(whole, name), getattr(parts, name)), name


def test_a_feature_that_goes_with_the_reward_survives_and_the_others_do_not():
    tested = inference.significance({0: made(effect=2.0, permutations=499)[0]})[0]
    assert tested.p_adjusted[0] == 1 / 500 and float(tested.q[0]) < 0.01
    assert float(tested.p_adjusted[1:].min()) > 0.05


# Coefficients


@pytest.mark.parametrize("labels", ("binary", "real"))
@pytest.mark.parametrize("kind", COEFFICIENTS)
def test_standard_errors_of_coefficients_are_scipys(kind, labels):
    evidence, moments, z, y = made(labels=labels)
    got = inference.coefficient_error(evidence, moments, kind)
    for i, column in enumerate(z.T):
        above, below = column[y > 0], column[y <= 0]
        expected = {
            "mean_positive": stats.sem(above),
            "mean_positive_active": stats.sem(above[above > 0]),
            "contrastive": np.hypot(stats.sem(above), stats.sem(below)),
        }[kind]
        assert float(got[i]) == pytest.approx(expected, rel=1e-6)


def test_signed_activations_have_no_error_of_the_active_mean_and_tiny_groups_none_at_all():
    z, y = torch.tensor([[1.0], [-1.0], [2.0]]), torch.tensor([1.0, 1.0, 0.0])
    evidence, moments = Evidence(1), Moments(1)
    evidence.update(z, y, 0)
    update_moments(z, y, moments)
    assert bool(inference.coefficient_error(evidence, moments, "mean_positive_active").isnan())
    assert bool(inference.coefficient_error(evidence, moments, "contrastive").isnan())
    assert float(inference.coefficient_error(evidence, moments, "mean_positive")) == pytest.approx(1)
