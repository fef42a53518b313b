"""Several samples of one prompt: what is permuted, what is centred, and what is promised then."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from places import everywhere
from scipy import stats

from corrsteer import CorrSteerError, Evidence, Moments, inference, scores, update_moments
from corrsteer.ops.moments import COEFFICIENTS
from corrsteer.stats import groups as of_prompts
from corrsteer.stats.blocks import shuffled_blocks
from corrsteer.stats.evidence import STREAMED

SETTINGS = {"permutations": 39, "bootstrap": 25, "seed": 3}


def prompts_of(sizes, seed=None):
    """Which prompt each sample is of, in a shuffled order if there is a seed."""
    groups = [g for g, size in enumerate(sizes) for _ in range(size)]
    if seed is not None:
        random.Random(seed).shuffle(groups)
    return groups


def clustered_data(sizes, d=6, seed=0, labels="binary", offset=0.0):
    """Sparse features and rewards that both go with the prompt, the first two features with the reward as well."""
    rng = np.random.default_rng(seed)
    groups = np.array(prompts_of(sizes))
    of_prompt = rng.standard_normal(len(sizes))[groups, None]
    z = (of_prompt + rng.standard_normal((len(groups), d)) > 0) * rng.exponential(size=(len(groups), d))
    y = of_prompt[:, 0] + z[:, 0] - z[:, 1] + rng.standard_normal(len(groups))
    y = (y > 0).astype(float) if labels == "binary" else y + offset
    return torch.from_numpy(z).float(), torch.from_numpy(y), groups


def blocks_of(groups, prompts):
    """Samples of each block, which has so many prompts."""
    return [np.flatnonzero(np.asarray(groups) // prompts == k) for k in range(-(-(max(groups) + 1) // prompts))]


def stream(z, y, groups, blocks, numbers=None, **changes):
    evidence = Evidence(z.shape[1], **SETTINGS | changes)
    for number in range(len(blocks)) if numbers is None else numbers:
        at = blocks[number]
        evidence.update(z[at], y[at], number, groups=groups[at])
    return evidence


def two_pass(values, groups):
    """Values less their mean in each prompt, in float64."""
    out = np.asarray(values).astype(np.float64)
    for g in np.unique(groups):
        out[groups == g] -= out[groups == g].mean(0)
    return out


def correlate(a, b):
    """Of columns of a, and of b; 0 where either is 0."""
    scale = np.sqrt((a**2).sum(0)[:, None] * (b**2).sum(0)[None])
    return np.divide(a.T @ b, scale, out=np.zeros_like(scale), where=scale > 0)


def orders_of(evidence, groups, blocks):
    """`[P, n]`: whose label each sample gets in each permutation."""
    out = np.empty((evidence.permutations, len(groups)), dtype=np.int64)
    for number, at in enumerate(blocks):
        of_block = of_prompts.numbered(groups[at], len(at))[0]
        out[:, at] = at[evidence._permutations(len(at), number, of_block).numpy()]
    return out


# What is permuted


@pytest.mark.parametrize("order", (None, 1))
def test_whole_prompts_of_one_size_change_places_with_their_labels_in_order(order):
    groups = np.array(prompts_of([2, 2, 2, 3, 3, 4, 1, 1], order))
    numbers = of_prompts.numbered(groups, len(groups))[0]
    for row in Evidence(1, permutations=60)._permutations(len(groups), 0, numbers).numpy():
        assert sorted(row) == list(range(len(groups)))
        for g in range(8):
            taken = row[groups == g]
            whose = np.flatnonzero(groups == groups[taken[0]])
            assert taken.tolist() == whose.tolist()  # all of one prompt, in its order
        assert (row[groups == 5] == np.flatnonzero(groups == 5)).all()  # the only prompt of four


def test_every_order_of_prompts_is_as_likely():
    rows = Evidence(1, permutations=12000)._permutations(9, 0, (0, 0, 0, 1, 1, 1, 2, 2, 2))
    counts = torch.unique(rows, dim=0, return_counts=True)[1]
    assert len(counts) == 6 and float(((counts - 2000.0) ** 2 / 2000).sum()) < 20  # chi-squared, 5 degrees of freedom


def test_labels_change_places_within_their_prompt_and_every_order_is_as_likely():
    groups = np.array([0, 1, 0, 1, 0, 2])
    rows = Evidence(1, permutations=24000, within=True)._permutations(6, 0, tuple(groups.tolist())).numpy()
    assert (groups[rows] == groups).all()
    counts = np.unique(rows, axis=0, return_counts=True)[1]
    assert len(counts) == 12 and ((counts - 2000.0) ** 2 / 2000).sum() < 35  # chi-squared, 11 degrees of freedom


def test_prompts_of_one_sample_are_permuted_and_drawn_as_without_groups():
    z, y, _ = clustered_data([1] * 60)
    alone, none = Evidence(6, scores=STREAMED, **SETTINGS), Evidence(6, scores=STREAMED, **SETTINGS)
    for number, at in enumerate((slice(0, 25), slice(25, 60))):
        alone.update(z[at], y[at], number, groups=list(range(100, 200))[at])
        none.update(z[at], y[at], number)
    for name in Evidence.STATE:
        assert torch.equal(getattr(alone, name), getattr(none, name)), name
    assert not alone.clustered and alone.fixed == 0
    for ends, expected in zip(inference.interval(alone), inference.interval(none)):
        assert torch.equal(ends, expected)


def test_samples_that_nothing_moves_are_counted():
    groups = np.array(prompts_of([3, 3, 2, 1, 1]))
    z, y = torch.rand(10, 2), torch.rand(10)
    for within, fixed in ((False, 2), (True, 2)):
        evidence = Evidence(2, permutations=20, within=within)
        evidence.update(z, y, 0, groups=groups)
        assert evidence.fixed == fixed and evidence.clustered and int(evidence.n_groups) == 5
    lonely = Evidence(2, permutations=20)
    lonely.update(z[:3], y[:3], 0, groups=[7, 7, 7])
    assert lonely.fixed == 3
    assert inference.significance({0: lonely})[0].p.tolist() == [1, 1]
    few = Evidence(2)
    few.update(torch.rand(1, 2), torch.rand(1), 0)
    assert few.fixed == 1


def test_prompts_whose_rewards_differ_are_counted():
    evidence = Evidence(1, n_labels=2)
    y = torch.tensor([[1.0, 0], [1, 1], [0, 5], [1, 5], [3, 3]])
    evidence.update(torch.rand(5, 1), y, 0, groups=[4, 4, 2, 2, 9])
    assert evidence.n_informative.tolist() == [1, 1]


# Whole prompts


@pytest.mark.parametrize("name", ("pearson", "point_biserial", "squared_ratio"))
def test_scores_are_those_of_all_samples_and_their_p_values_those_of_permuted_prompts(name):
    z, y, groups = clustered_data([4] * 12 + [3] * 6, labels="real")
    blocks = blocks_of(groups, 9)
    evidence = stream(z, y, groups, blocks, scores=STREAMED)
    plain = Evidence(6, scores=STREAMED)
    plain.update(z, y, 0)
    observed = scores.score(evidence, name)
    torch.testing.assert_close(observed, scores.score(plain, name), rtol=0, atol=1e-9)
    null = []
    for order in orders_of(evidence, groups, blocks):
        other = Evidence(6, scores=STREAMED)
        other.update(z, y[order], 0)
        null.append(scores.score(other, name).abs())
    p = (1 + (torch.stack(null) >= observed.abs() - 1e-9).sum(0)) / 40
    torch.testing.assert_close(inference.significance({0: evidence}, name)[0].p, p.double())


def test_a_prompts_samples_are_drawn_alike():
    w = Evidence(1, bootstrap=400)._bootstrap_weights(6, 2, (0, 1, 1, 0, 2, 1)).numpy()
    assert (w[0] == w[3]).all() and (w[1] == w[2]).all() and (w[1] == w[5]).all()
    assert abs(np.corrcoef(w[[0, 1, 4]])[np.triu_indices(3, 1)]).max() < 0.2 and 0.85 < w.mean() < 1.15


def test_delta_and_fisher_have_no_interval_where_a_prompt_has_several_samples_and_bootstrap_has():
    z, y, groups = clustered_data([4] * 30)
    evidence, moments = stream(z, y, groups, blocks_of(groups, 10), bootstrap=200), Moments(6)
    update_moments(z, y, moments)
    for method in ("delta", "fisher"):
        assert all(bool(end.isnan().all()) for end in inference.interval(evidence, method))
    low, high = inference.interval(evidence, "bootstrap")
    r = scores.correlation(evidence)
    assert bool(((low < r) & (r < high)).all())
    for kind in COEFFICIENTS:
        assert bool(inference.coefficient_error(evidence, moments, kind).isnan().all())


# Within prompts


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_streamed_within_prompts_all_is_as_in_two_passes_in_any_order_and_any_merge(data):
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=8, max_size=20))
    labels, offset = data.draw(st.sampled_from((("binary", 0.0), ("real", 0.0), ("real", 1e4))))
    z, y, groups = clustered_data(sizes, seed=data.draw(st.integers(0, 50)), labels=labels, offset=offset)
    blocks = blocks_of(groups, data.draw(st.sampled_from((3, 7, 20))))
    process = data.draw(st.lists(st.integers(0, 2), min_size=len(blocks), max_size=len(blocks)))
    order = data.draw(st.permutations(range(len(blocks))))
    evidence = Evidence(6, within=True, **SETTINGS)
    for part in data.draw(st.permutations(range(3))):
        evidence.merge(stream(z, y, groups, blocks, [k for k in order if process[k] == part], within=True))
    a, b = two_pass(z, groups), two_pass(y[:, None], groups)
    b[np.abs(b) < 1e-9] = 0  # where a prompt's rewards are equal
    r = correlate(a, b)[:, 0]
    np.testing.assert_allclose(scores.correlation(evidence), r, rtol=0, atol=1e-9)
    permuted = correlate(a, b[orders_of(evidence, groups, blocks), 0].T)
    np.testing.assert_allclose(scores.permuted(evidence, "pearson", slice(None), 0), permuted, rtol=0, atol=1e-9)
    p = (1 + (np.abs(permuted) >= np.abs(r)[:, None] - 1e-6 * max(np.abs(r).max(), 1e-300)).sum(1)) / 40
    np.testing.assert_allclose(inference.significance({0: evidence})[0].p, p)
    assert int(evidence.n_informative) == sum(len(set(y[groups == g].tolist())) > 1 for g in range(len(sizes)))
    assert evidence.fixed == sizes.count(1)


@pytest.mark.parametrize("unit", (1e-12, 1e100))
def test_the_unit_of_rewards_does_not_matter_within_prompts(unit):
    z, y, groups = clustered_data([4] * 12, labels="real")
    blocks = blocks_of(groups, 4)
    r = scores.correlation(stream(z, y, groups, blocks, within=True))
    torch.testing.assert_close(scores.correlation(stream(z, y * unit, groups, blocks, within=True)), r)


def test_what_does_not_vary_within_prompts_has_no_correlation_there():
    _, y, groups = clustered_data([4] * 12)
    z = torch.rand(12, 2)[groups] * 1000  # as pooled at the last prompt token
    evidence = stream(z, y, groups, blocks_of(groups, 6), within=True)
    assert evidence.columns("within2").tolist() == evidence.columns("within4").tolist() == [[0], [0]]
    assert scores.correlation(evidence).tolist() == [0, 0]
    z, of_prompt = torch.rand(48, 2), torch.full((12,), 0.1, dtype=torch.float64)[groups] * torch.from_numpy(groups)
    evidence = stream(z, of_prompt, groups, blocks_of(groups, 6), within=True)
    assert scores.correlation(evidence).tolist() == [0, 0] and int(evidence.n_informative) == 0
    assert all(bool(end.isnan().all()) for end in inference.bootstrap_interval(evidence))


def test_a_feature_that_hardly_varies_within_prompts_loses_nothing_to_rounding():
    _, y, groups = clustered_data([4] * 30)
    z = torch.from_numpy(3000 + 100 * np.random.default_rng(0).random(30)[groups] + 0.01 * y.numpy())[:, None]
    evidence = stream(z.float(), y, groups, blocks_of(groups, 10), within=True)
    expected = correlate(two_pass(z.float(), groups), two_pass(y[:, None], groups))[0]
    np.testing.assert_allclose(scores.correlation(evidence), expected, atol=1e-6)
    squares = (two_pass(z.float(), groups) ** 2).sum(0)
    np.testing.assert_allclose(evidence.columns("within2")[:, 0], squares, rtol=1e-9)
    fourth = sum((two_pass(z.float(), groups)[groups == g] ** 2).sum(0) ** 2 for g in range(30))
    np.testing.assert_allclose(evidence.columns("within4")[:, 0], fourth, rtol=1e-9)


@pytest.mark.parametrize("values", ((0.0, 1.0), (-2.0, 3.0)))
def test_contrastive_within_prompts_is_the_weighted_mean_of_each_prompts_difference(values):
    z, y, groups = clustered_data([5] * 10 + [2] * 10 + [1] * 3)
    y = torch.where(y > 0, *values[::-1]).double()
    evidence = stream(z, y, groups, blocks_of(groups, 6), within=True, scores=("contrastive",))
    z, above = z.double().numpy(), y.numpy() > 0

    def difference(above):
        total, weights = np.zeros(6), 0.0
        for g in range(23):
            good, bad = z[(groups == g) & above], z[(groups == g) & ~above]
            if len(good) and len(bad):
                weight = len(good) * len(bad) / (len(good) + len(bad))
                total, weights = total + weight * (good.mean(0) - bad.mean(0)), weights + weight
        return total / weights

    np.testing.assert_allclose(scores.score(evidence, "contrastive"), difference(above), atol=1e-9)
    null = scores.permuted(evidence, "contrastive", slice(None), 0)
    for order, found in zip(orders_of(evidence, groups, blocks_of(groups, 6)), null.T):
        np.testing.assert_allclose(found, difference(above[order]), atol=1e-9)
    assert torch.equal(scores.score(evidence, "point_biserial"), scores.score(evidence, "pearson"))
    assert torch.equal(*(inference.significance({0: evidence}, name)[0].p for name in ("contrastive", "pearson")))


def test_bootstrap_replicates_within_prompts_are_correlations_of_the_prompts_that_were_drawn():
    z, y, groups = clustered_data([4] * 12 + [3] * 5, labels="real")
    blocks = blocks_of(groups, 6)
    evidence = stream(z, y, groups, blocks, within=True)
    w = np.empty((len(y), 25))
    for number, at in enumerate(blocks):
        w[at] = evidence._bootstrap_weights(len(at), number, of_prompts.numbered(groups[at], len(at))[0])
    a, b = two_pass(z, groups), two_pass(y[:, None], groups)
    for replicate, found in zip(w.T, inference.bootstrap_correlations(evidence).T):
        root = np.sqrt(replicate)[:, None]
        np.testing.assert_allclose(found, correlate(root * a, root * b)[:, 0], atol=1e-9)


def test_the_state_is_saved_and_loaded_with_its_prompts(tmp_path):
    z, y, groups = clustered_data([4] * 12)
    blocks = blocks_of(groups, 6)
    evidence = stream(z, y, groups, blocks[:1], within=True)
    evidence.save(tmp_path / "e.safetensors")
    loaded = Evidence.load(tmp_path / "e.safetensors")
    assert loaded.within and loaded.groups == set(range(6)) and loaded.fixed == 0
    for name in Evidence.STATE:
        assert torch.equal(getattr(loaded, name), getattr(evidence, name)), name
    with pytest.raises(CorrSteerError, match=r"groups must keep .* but prompts \[3\] are in two; make blocks of whole"):
        loaded.update(z[blocks[1]], y[blocks[1]], 1, groups=[*groups[blocks[1]][:-1], 3])
    loaded.update(z[blocks[1]], y[blocks[1]], 1, groups=groups[blocks[1]])
    whole = stream(z, y, groups, blocks, within=True)
    torch.testing.assert_close(scores.correlation(loaded), scores.correlation(whole))


def test_prompts_that_are_split_and_what_is_not_defined_within_prompts_are_refused():
    z, y, groups = clustered_data([4] * 12, labels="real")
    one, other = (stream(z, y, groups, [np.arange(8), at], [k]) for k, at in enumerate((None, np.arange(4, 8))))
    with pytest.raises(CorrSteerError, match=r"other must keep each prompt's samples in one block, but prompts \[1\]"):
        one.merge(other)
    with pytest.raises(CorrSteerError, match="groups must hold a number for each of the 48 samples, got 3"):
        Evidence(6).update(z, y, 0, groups=[1, 2, 3])
    with pytest.raises(CorrSteerError, match="groups must be a sequence of whole numbers"):
        Evidence(6).update(z, y, 0, groups=["a"] * 48)
    within = Evidence(6, permutations=20, within=True)
    with pytest.raises(CorrSteerError, match="groups must be given with within=True, got None; say which prompt"):
        within.update(z, y, 0)
    with pytest.raises(CorrSteerError, match="scores must be among pearson, .* with within=True.*got squared_ratio"):
        Evidence(6, scores=["squared_ratio"], within=True)
    with pytest.raises(CorrSteerError, match="within must be True or False, got 1"):
        Evidence(6, within=1)
    within.update(z, y, 0, groups=groups)
    with pytest.raises(CorrSteerError, match="score 'squared_ratio' is not defined for samples that are centred"):
        scores.score(within, "squared_ratio")
    with pytest.raises(CorrSteerError, match="score 'contrastive' within prompts needs rewards of two values"):
        scores.score(within, "contrastive")
    assert scores.testable(within, "pearson") and not scores.testable(within, "contrastive")
    plain = Evidence(6, permutations=20)
    plain.update(z, y, 0, groups=groups)
    with pytest.raises(CorrSteerError, match="other must have within=True, got False"):
        within.merge(plain)
    with pytest.raises(CorrSteerError, match="must be of the same samples and permutations"):
        inference.significance({0: within, 1: plain})


@everywhere()
@pytest.mark.parametrize("within", (False, True))
def test_every_backends_evidence_of_prompts_is_that_of_the_reference(place, within):
    z, y, groups = clustered_data([4] * 12 + [2] * 5, labels="real")
    given, expected = (Evidence(6, within=within, device=device, **SETTINGS) for device in (place.device, "cpu"))
    given.update(z.to(place.device), y.to(place.device), 0, groups=groups, backend=place.backend)
    expected.update(z, y, 0, groups=torch.from_numpy(groups), backend="reference")
    for name in Evidence.STATE:
        torch.testing.assert_close(
            getattr(given, name).cpu(), getattr(expected, name), rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


# Intervals from the activations themselves


def test_with_one_sample_a_prompt_the_cluster_interval_is_the_delta_interval():
    rng = np.random.default_rng(0)
    z = torch.from_numpy((rng.random((300, 20)) < rng.uniform(0.01, 0.8, 20)) * rng.exponential(size=(300, 20)))
    z[:, 3] = 0
    y = (z[:, 0] + torch.from_numpy(rng.standard_normal(300)) > 1).double()
    z[:, 4] = y * 2 + 1
    evidence = Evidence(20)
    evidence.update(z.float(), y, 0)
    expected = inference.delta_interval(evidence, 0.9)
    found = inference.cluster_interval(z.float(), y, torch.randperm(300), 0.9)
    for ends, known in zip(found, expected):
        torch.testing.assert_close(ends, known, rtol=0, atol=1e-7, equal_nan=True)
    assert found[0].isnan().nonzero().tolist() == [[3]] and float(found[0][4]) > 0.999


@pytest.mark.parametrize("within", (False, True))
def test_a_cluster_interval_is_formed_from_prompts_sums_of_influence(within):
    z, y, groups = clustered_data([6] * 40, labels="real")
    low, high = inference.cluster_interval(z, y, groups, within=within)
    a, b = ((two_pass(t, groups) if within else t - t.mean(0)) for t in (z.double().numpy(), y[:, None].numpy()))
    a, b = a / np.sqrt((a**2).mean(0)), b / np.sqrt((b**2).mean(0))
    r = (a * b).mean(0)
    influence = a * b - r / 2 * (a**2 + b**2)
    total, aa, bb = (
        np.stack([values[groups == g].sum(0) for g in range(40)]) for values in (influence, a**2, b**2)
    )  # fmt: skip
    leverage = (aa if within else aa + 6) / len(y)
    error = np.sqrt((total**2 * (1 + 2 * leverage)).sum(0)) / len(y) / (1 - r**2)
    skew = (total**3).sum(0) / (total**2).sum(0) ** 1.5
    carry = [len(y) ** 2 / (t**2).sum(0) for t in (aa, bb)]
    quantile = stats.t.isf(0.025, np.minimum(*carry))
    assert (carry[0] * carry[1] / 40 > 2).sum() >= 5
    there = carry[0] * carry[1] / 40 > 2

    def unskewed(q):
        return 3 / skew * (np.cbrt(1 + skew * (q - skew / 6)) - 1)

    for end, q in ((low, quantile), (high, -quantile)):
        np.testing.assert_allclose(end[there], np.tanh(np.arctanh(r) - error * unskewed(q))[there], atol=1e-9)
    swapped = np.random.default_rng(0).permutation(len(y))
    for end, other in zip(
        (low, high), inference.cluster_interval(z[swapped], y[swapped], groups[swapped], within=within)
    ):
        torch.testing.assert_close(end, other)


@pytest.mark.parametrize("within", (False, True))
def test_intervals_of_clustered_samples_hold_the_truth_as_often_as_they_say(within):
    """Features and rewards go with the prompt alone, so that r is known: 0 within prompts."""
    rng, hits = np.random.default_rng(5), {"cluster": [], "bootstrap": [], "delta": []}
    for run in range(12):
        kind = rng.choice([-1.0, 1.0], (80, 1))
        own = np.where(rng.random((80, 40)) < 0.7, kind, rng.choice([-1.0, 1.0], (80, 40)))  # E own * kind = 0.7
        kind, own = kind.repeat(6)[:, None], own.repeat(6, 0)
        z = (rng.random((480, 40)) < 0.3 * (1 + 0.9 * own)) * (1 + 0.3 * rng.exponential(size=(480, 40)))
        y = (rng.random(480) < 0.5 * (1 + 0.9 * kind[:, 0])).astype(float)
        covariance, z_var = 0.3 * 0.9 * 1.3 * 0.5 * 0.9 * 0.7, 0.3 * (1 + 0.6 + 0.18) - (0.3 * 1.3) ** 2
        truth = 0.0 if within else covariance / np.sqrt(z_var) / 0.5
        z, y, groups = torch.from_numpy(z).float(), torch.from_numpy(y), np.repeat(np.arange(80), 6)
        evidence = Evidence(40, bootstrap=200, seed=run, within=within)
        evidence.update(z, y, 0, groups=groups)
        naive = Evidence(40)
        naive.update(z, y, 0)
        found = {
            "cluster": inference.cluster_interval(z, y, groups, within=within),
            "bootstrap": inference.interval(evidence, "bootstrap"),
            "delta": inference.interval(naive),
        }
        for method, (low, high) in found.items():
            hits[method] += ((low <= truth) & (truth <= high)).tolist()
    assert 0.91 < np.mean(hits["cluster"]) < 0.985 and 0.91 < np.mean(hits["bootstrap"]) < 0.985
    assert within or np.mean(hits["delta"]) < 0.9


def test_where_there_is_no_cluster_interval_it_is_nan_and_bad_shapes_are_named():
    z, y, groups = clustered_data([4] * 12)
    for changed in ({"groups": groups // 4}, {"y": torch.ones(48)}):
        given = {"z": z, "y": y, "groups": groups, **changed}
        assert all(bool(end.isnan().all()) for end in inference.cluster_interval(**given)), changed
    alone = inference.cluster_interval(z, y, range(48), within=True)
    assert bool(alone[0].isnan().all())
    with pytest.raises(CorrSteerError, match=r"z must be \[n, k\] and y \[n\], got \[48, 6\] and \[47\]"):
        inference.cluster_interval(z, y[1:], groups)
    with pytest.raises(CorrSteerError, match="level must be between 0 and 1, got 95"):
        inference.cluster_interval(z, y, groups, 95)


# What is promised


def test_features_and_rewards_that_go_with_the_prompt_alone_are_significant_only_to_permuted_single_samples():
    found = {"samples": 0, "prompts": 0, "within": 0}
    for run in range(25):
        rng = np.random.default_rng(run)
        of_prompt = np.repeat(rng.standard_normal((40, 21)), 8, axis=0)
        z, y = (
            np.exp(of_prompt[:, 1:] + 0.5 * rng.standard_normal((320, 20))),
            of_prompt[:, 0] + rng.standard_normal(320),
        )
        groups = np.repeat(np.arange(40), 8)
        for name, of in (("samples", None), ("prompts", groups), ("within", groups)):
            evidence = Evidence(20, permutations=99, seed=run, within=name == "within")
            evidence.update(torch.from_numpy(z).float(), torch.from_numpy(y), 0, groups=of)
            found[name] += bool((inference.significance({0: evidence})[0].p_adjusted <= 0.05).any())
    assert found["samples"] >= 20 and found["prompts"] <= 4 and found["within"] <= 4


# Blocks


def test_blocks_of_single_samples_are_slices_of_them_shuffled():
    lengths = [random.Random(0).randrange(50) for _ in range(100)]
    order = list(range(100))
    random.Random(7).shuffle(order)
    slices = {k: order[k * 32 : k * 32 + 32] for k in range(4)}
    for groups in (None, range(500, 600)):
        blocks = shuffled_blocks(lengths, 32, 7, groups)
        assert blocks == slices
        first = next(iter(blocks))
        assert max(lengths[i] for i in blocks[first]) == max(lengths)
        assert [k for k in blocks if k != first] == [k for k in range(4) if k != first]


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 8), min_size=1, max_size=40), seed=st.integers(0, 9))
def test_blocks_hold_whole_prompts_and_are_filled_with_what_comes_next(sizes, seed):
    groups = prompts_of(sizes, seed)
    blocks = shuffled_blocks([5] * len(groups), 10, seed, groups)
    assert sorted(i for block in blocks.values() for i in block) == list(range(len(groups)))
    held = [{groups[i] for i in block} for block in blocks.values()]
    assert sum(map(len, held)) == len(sizes) and all(len(block) <= 10 for block in blocks.values())
    for number in range(len(blocks) - 1):  # the next block's first prompt had no room
        assert len(blocks[number]) + sizes[groups[blocks[number + 1][0]]] > 10
    for block in blocks.values():
        for g in {groups[i] for i in block}:
            at = [i for i in block if groups[i] == g]
            assert at == sorted(at)


def test_a_prompt_with_more_samples_than_a_block_may_have_is_refused():
    with pytest.raises(CorrSteerError, match="block_size must be at least 5, as a prompt has 5 samples .*, got 4"):
        shuffled_blocks([1] * 7, 4, 0, [0, 0, 1, 1, 1, 1, 1])
    assert shuffled_blocks([], 4, 0) == {}
