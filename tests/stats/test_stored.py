"""Statistics from stored rows: those of streaming, and exact scores of ranks and bins."""

import numpy as np
import pytest
import torch
from places import Place, at
from scipy import stats
from sklearn.metrics import mutual_info_score, roc_auc_score

from corrsteer import CorrSteerError, Evidence, Moments, inference, scores, update_moments
from corrsteer.ops.rows import SparseRows
from corrsteer.stats import stored
from corrsteer.stats.evidence import FROM_ROWS, SCORES

BACKENDS = ("reference", "native")
STREAMED = tuple(name for name in SCORES if name not in FROM_ROWS)


def data(n=230, d=37, labels="binary", seed=0, signed=False, n_labels=1):
    """Sparse activations with many ties, a feature that is never active and one that always is; and rewards."""
    rng = np.random.default_rng(seed)
    active = rng.random((n, d)) < np.linspace(0.01, 0.95, d)
    size = rng.exponential(size=(n, d))
    size[:, ::2] = np.ceil(4 * size[:, ::2]) / 4
    z = active * size * (rng.choice([-1, 1], (n, d)) if signed else 1)
    z[:, 3], z[:, 4] = 0, 1.5
    y = z[:, -1:] + rng.standard_normal((n, n_labels))
    y = {"binary": (y > 0.5).astype(float), "real": y, "ties": np.round(y)}[labels]
    return torch.from_numpy(z).float(), torch.from_numpy(y)


def blocks_of(z, y, size=60, order=(2, 0, 3, 1)):
    """Blocks by number in some order, as (number, z, y)."""
    parts = {k: slice(at, at + size) for k, at in enumerate(range(0, len(z), size))}
    return [(k, z[parts[k]], y[parts[k]]) for k in order]


def streamed(blocks, d, n_labels=1, **settings):
    evidence, moments = Evidence(d, n_labels, **settings), Moments(d, n_labels)
    for number, z, y in blocks:
        evidence.update(z, y, number)
        fresh = Moments(d, n_labels)
        update_moments(z, y, fresh)
        fresh.merge(moments)
        moments = fresh
    return moments, evidence


def from_rows(blocks, d, n_labels=1, **settings):
    rows = [(number, SparseRows.from_dense(z), y) for number, z, y in blocks]
    return stored.statistics(rows, d, n_labels, **settings)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("labels", ("binary", "real", "ties"))
def test_p_values_of_several_layers_are_those_of_streaming(labels, backend):
    y = data(labels=labels)[1]
    layers = {layer: data(labels=labels, seed=layer, signed=layer == 2)[0] for layer in (0, 1, 2)}
    kept, rows = {}, {}
    for layer, z in layers.items():
        blocks = blocks_of(z, y)
        kept[layer] = streamed(blocks, 37, permutations=99, bootstrap=30, scores=STREAMED, seed=5)[1]
        rows[layer] = from_rows(blocks, 37, permutations=99, bootstrap=30, seed=5, backend=backend)[1]
    for name in STREAMED:
        one, other = inference.significance(rows, name), inference.significance(kept, name)
        for layer in layers:
            for p in ("p", "p_layer", "p_adjusted", "q"):
                assert torch.equal(getattr(one[layer], p), getattr(other[layer], p)), (name, layer, p)
    for layer in layers:
        for method in inference.METHODS:
            for one, other in zip(inference.interval(rows[layer], method), inference.interval(kept[layer], method)):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("place", [at(Place("reference", "cuda")), at(Place("triton", "cuda"))])
def test_a_gpu_gives_the_same_p_values(place):
    z, y = data(labels="ties")
    kept = from_rows(blocks_of(z, y), 37, permutations=99)[1]
    evidence = from_rows(blocks_of(z, y), 37, permutations=99, device=place.device, backend=place.backend)[1]
    for name in SCORES:
        one, other = (inference.significance({0: e}, name)[0] for e in (evidence, kept))
        assert torch.equal(one.p, other.p) and torch.equal(one.p_adjusted, other.p_adjusted), name


def test_moments_and_joint_moments_are_those_of_streaming_to_the_bit():
    z, y = data(labels="real", n_labels=2)
    (moments, evidence), (kept, other) = (make(blocks_of(z, y), 37, 2) for make in (from_rows, streamed))
    for name in Moments.STATE:
        assert torch.equal(getattr(moments, name), getattr(kept, name)), name
    for name in Evidence.STATE:
        assert torch.equal(getattr(evidence, name), getattr(other, name)), name
    assert evidence.blocks == other.blocks == {0, 1, 2, 3}


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_resampled_column_is_that_of_streaming_for_any_features_and_label(backend, monkeypatch):
    monkeypatch.setattr(stored, "PART_BYTES", 100 * 19 * 8)  # two parts of two blocks and more
    z, y = data(labels="real", n_labels=2)
    settings = {"permutations": 19, "bootstrap": 23, "seed": 3}
    kept = streamed(blocks_of(z, y), 37, 2, scores=STREAMED, **settings)[1]
    evidence = from_rows(blocks_of(z, y), 37, 2, backend=backend, **settings)[1]
    assert (
        evidence.permutations == 19
        and evidence.bootstrap == 23
        and evidence.n_columns == kept.n_columns - 2 * (3 * 19) - 4 * 23
    )
    some = torch.tensor([36, 2, 2, 17])
    for features in (slice(None), slice(5, 9), some):
        for name in ("permuted", "permuted_positive", "permuted_positive2", "bootstrap", "bootstrap_u", "bootstrap2"):
            for label in (0, 1):
                got, expected = (e.columns(name, features, label) for e in (evidence, kept))
                torch.testing.assert_close(got, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))
    torch.testing.assert_close(evidence.bootstrap_labels, kept.bootstrap_labels)


@pytest.mark.parametrize("within", (False, True))
def test_resampled_columns_of_prompts_are_those_of_streaming_for_any_features(within):
    z, y = data(labels="real", n_labels=2)
    kept, blocks = Evidence(37, 2, permutations=19, bootstrap=23, within=within), []
    for number, part, rewards in blocks_of(z, y):
        prompts = torch.arange(len(part)) // 5 + 100 * number
        kept.update(part, rewards, number, groups=prompts)
        blocks.append((number, SparseRows.from_dense(part), rewards, prompts))
    evidence = stored.statistics(blocks, 37, 2, permutations=19, bootstrap=23, within=within)[1]
    for features in (slice(None), slice(5, 9), torch.tensor([36, 2, 2, 17])):
        for name in ("permuted", "bootstrap", "bootstrap_u", "bootstrap2"):
            got, expected = (e.columns(name, features, 1) for e in (evidence, kept))
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.parametrize("signed", (False, True), ids=("unsigned", "signed"))
@pytest.mark.parametrize("labels", ("binary", "real", "ties"))
def test_spearman_is_scipys_with_ties_of_activations_and_rewards(labels, signed):
    z, y = data(labels=labels, signed=signed)
    evidence = from_rows(blocks_of(z, y), 37)[1]
    expected = [stats.spearmanr(column, y[:, 0])[0] if len(set(column)) > 1 else 0 for column in z.double().numpy().T]
    np.testing.assert_allclose(scores.score(evidence, "spearman"), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("signed", (False, True), ids=("unsigned", "signed"))
def test_auroc_is_scikit_learns(signed):
    z, y = data(labels="real", signed=signed)
    evidence = from_rows(blocks_of(z, y), 37)[1]
    expected = [roc_auc_score(y[:, 0] > 0, column) for column in z.numpy().T]
    np.testing.assert_allclose(scores.auroc(evidence), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(scores.score(evidence, "auroc"), 2 * scores.auroc(evidence) - 1, rtol=0, atol=1e-12)


def bin_of(column, bins=32):
    """The bin of each activation: four to an octave, by magnitude from the largest down, apart by sign."""
    bits = np.abs(column).astype(np.float32).view(np.int32) >> 21
    place = np.maximum(bits - bits.max() + bins - 1, 0)
    return np.where(column == 0, -1, place + bins * (column < 0))


@pytest.mark.parametrize("signed", (False, True), ids=("unsigned", "signed"))
def test_mutual_information_is_scikit_learns_of_logarithmic_bins_with_the_sign_of_r(signed):
    z, y = data(labels="real", signed=signed)
    evidence = from_rows(blocks_of(z, y), 37)[1]
    expected = np.array([mutual_info_score(y[:, 0] > 0, bin_of(column)) for column in z.numpy().T])
    expected *= scores.correlation(evidence).sign().numpy()
    np.testing.assert_allclose(scores.score(evidence, "mutual_information"), expected, rtol=0, atol=1e-12)


def test_what_is_smaller_than_the_window_of_bins_is_counted_in_the_lowest():
    z = torch.tensor([[1000.0], [1.0], [1e-3], [1e-6], [0.0], [-1e-6], [-1e3]])
    y = torch.arange(7, dtype=torch.float64)[:, None]
    evidence = from_rows([(0, z, y)], 1)[1]
    owner, total, positive = evidence.rows.bins(evidence, torch.tensor([0]), 0, False)
    assert owner.tolist() == [0] * 4 and total.tolist() == [3, 1, 1, 1] and positive[:, 0].tolist() == [3, 0, 1, 1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("labels", ("binary", "ties"))
@pytest.mark.parametrize("name", SCORES)
def test_every_scores_permutations_are_that_score_of_permuted_rewards(name, labels, backend):
    z, y = data(n=120, d=9, labels=labels, signed=True)
    blocks = blocks_of(z, y, 60, (1, 0))
    evidence = from_rows(blocks, 9, permutations=19, backend=backend)[1]
    permuted = scores.permuted(evidence, name, torch.arange(9), 0)
    orders = {number: evidence._permutations(60, number) for number in (0, 1)}
    for place in range(19):
        again = [(number, z, y[orders[number][place]]) for number, z, y in blocks]
        expected = scores.score(from_rows(again, 9)[1], name)
        torch.testing.assert_close(permuted[:, place].abs(), expected.abs(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SCORES)
def test_a_feature_that_never_varies_and_one_that_is_not_finite_score_0(name):
    z, y = data()
    z[7, 5], z[8, 6] = torch.nan, torch.inf
    evidence = from_rows(blocks_of(z, y), 37, permutations=19)[1]
    value, p = scores.score(evidence, name), inference.significance({0: evidence}, name)[0].p
    assert value[[3, 4, 5, 6]].tolist() == [0] * 4 and p[[3, 4, 5, 6]].tolist() == [1] * 4
    assert float(value.abs().max()) > 0 and float(p.min()) < 1 and bool(value.isfinite().all())


def test_rewards_of_one_group_have_no_score_of_groups():
    z, _ = data()
    evidence = from_rows(blocks_of(z, torch.ones(230, 1, dtype=torch.float64)), 37, permutations=19)[1]
    for name in FROM_ROWS:
        assert not bool(scores.score(evidence, name).any()), name
        assert bool((inference.significance({0: evidence}, name)[0].p == 1).all()), name


@pytest.mark.parametrize("name", SCORES)
def test_without_samples_every_score_is_0(name):
    for blocks in ([], [(0, SparseRows.from_dense(torch.zeros(0, 5)), torch.zeros(0))]):
        evidence = stored.statistics(blocks, 5, permutations=19)[1]
        assert evidence.n == 0 and not bool(scores.score(evidence, name).any())
        assert bool((inference.significance({0: evidence}, name)[0].p == 1).all())


def test_a_feature_that_is_always_the_same_has_no_rank_correlation_however_many_samples():
    z, y = torch.full((40000, 2), 1.5), torch.arange(40000, dtype=torch.float64)
    z[0, 1] = 2
    evidence = stored.statistics([(0, SparseRows.from_dense(z), y)], 2)[1]
    expected = stats.spearmanr(z[:, 1], y)[0]
    assert scores.score(evidence, "spearman").tolist() == [0, pytest.approx(expected, abs=1e-12)]


def test_evidence_of_rows_does_not_change_with_the_evidence_that_it_was_made_of():
    z, y = data()
    plain = Evidence(37)
    plain.update(z, y, 0)
    evidence = stored.resampled(plain, [(0, SparseRows.from_dense(z), y)], permutations=19)
    before = inference.significance({0: evidence})[0].p
    plain.update(z, 1 - y, 1)
    assert evidence.n == 230 and torch.equal(inference.significance({0: evidence})[0].p, before)


def test_the_smallest_and_largest_activations_have_ranks():
    column = torch.tensor([-3e38, -1e-45, 0, 0, 1e-45, 1.5, 1.5, 3e38])
    rows = SparseRows.from_dense(column[:, None])
    kept = column[column != 0]
    found = stored.ranks(kept, torch.tensor([0, len(kept)]), len(column))
    expected = stats.rankdata(column.double())
    np.testing.assert_array_equal(found, (expected - expected[2])[column.numpy() != 0])
    assert rows.n == 8


def test_evidence_of_rows_is_written_without_them_and_can_have_them_again(tmp_path):
    z, y = data()
    rows = [(number, SparseRows.from_dense(z), y) for number, z, y in blocks_of(z, y)]
    evidence = stored.statistics(rows, 37, permutations=99, bootstrap=30)[1]
    evidence.save(tmp_path / "e")
    loaded = Evidence.load(tmp_path / "e")
    assert loaded.permutations == loaded.bootstrap == 0 and not scores.testable(loaded, "pearson")
    assert loaded.nbytes < 8 * 37 * 24 + 1000
    again = stored.resampled(loaded, rows, permutations=99, bootstrap=30)
    assert loaded.rows is None
    for name in ("pearson", "auroc"):
        one, other = (inference.significance({0: e}, name)[0].p_adjusted for e in (again, evidence))
        assert torch.equal(one, other)
    for one, other in zip(*(inference.bootstrap_interval(e) for e in (again, evidence))):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


def sound():
    z, y = data(n=60)
    return [(0, SparseRows.from_dense(z), y)]


def of_other_rewards():
    z, y = data(n=60)
    evidence = Evidence(37)
    evidence.update(z, y, 0)
    return stored.resampled(evidence, [(0, sound()[0][1], torch.ones(60))])


REFUSED = {
    "rows of other features": (lambda: stored.statistics(sound(), 38), "block 0 has rows .60, 37."),
    "rewards of another number": (
        lambda: stored.statistics([(0, sound()[0][1], torch.ones(3))], 37), r"y \[n, n_labels=1\], but block 0",
    ),
    "dense rows": (lambda: stored.statistics([(0, data()[0], data()[1])], 37), "rows must be a SparseRows"),
    "a block twice": (lambda: stored.statistics(sound() * 2, 37), "block must be a number .* not given before, got 0"),
    "blocks of other evidence": (
        lambda: stored.resampled(Evidence(37), sound()), r"blocks must be those of the evidence, \[\] with 0 samples",
    ),
    "other rewards": (lambda: of_other_rewards(), "blocks must have the rewards of the evidence, of which"),
    "evidence with permutations": (
        lambda: stored.resampled(Evidence(37, permutations=19), sound()), "evidence must be without permutations",
    ),
    "more samples": (
        lambda: stored.statistics(sound(), 37)[1].update(*data(), 4), "must be without rows to take in more samples",
    ),
    "a merge": (
        lambda: Evidence(37).merge(stored.statistics(sound(), 37)[1]), "must be without rows to take in more samples",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused_by_name(name):
    act, message = REFUSED[name]
    with pytest.raises(CorrSteerError, match=message):
        act()
