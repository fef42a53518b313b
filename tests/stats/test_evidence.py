"""Evidence: streaming equals batch, permutations included, for any order of blocks, any merge and any origin."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from places import everywhere
from safetensors.torch import save_file

from corrsteer import CorrSteerError, Evidence, inference, scores
from corrsteer.stats.evidence import ORDER, STREAMED

SETTINGS = {"permutations": 19, "bootstrap": 11, "scores": STREAMED, "seed": 5}


def sparse_data(n=90, d=7, labels=2, seed=0, offset=0.0):
    """Pooled activations of different sparsity, and rewards: the first binary, the others real."""
    rng = np.random.default_rng(seed)
    active = rng.random((n, d)) < np.linspace(0.05, 0.9, d)
    z = (active * rng.exponential(size=(n, d))).astype(np.float32)
    y = rng.standard_normal((n, labels)) + z[:, :labels]
    y[:, 0] = y[:, 0] > 0.5
    return torch.from_numpy(z), torch.from_numpy(y + offset)


def blocks_of(n, sizes):
    """Slices of `sizes`, over and over, up to n."""
    at, out = 0, []
    while at < n:
        size = sizes[len(out) % len(sizes)]
        out.append(slice(at, min(at + size, n)))
        at += size
    return out


def stream(z, y, blocks, numbers=None, **changes):
    evidence = Evidence(z.shape[1], y.shape[1], **SETTINGS | changes)
    for number in range(len(blocks)) if numbers is None else numbers:
        evidence.update(z[blocks[number]], y[blocks[number]], number)
    return evidence


def batch(z, y, blocks, origin, like):
    """The same sums by their definition, over all samples at once, from what each sample was permuted to."""
    z, y, u = z.double().numpy(), y.numpy(), y.numpy() - origin.numpy()
    permuted = np.concatenate(
        [like._permutations(b.stop - b.start, k).numpy() + b.start for k, b in enumerate(blocks)], axis=1
    )
    w = np.concatenate([like._bootstrap_weights(b.stop - b.start, k).numpy() for k, b in enumerate(blocks)])
    found = {}
    for label in range(y.shape[1]):
        above = (y[:, label] > 0).astype(float)
        for p in range(1, ORDER + 1):
            for q in range(ORDER + 1 - p):
                found[f"z{p}u{q}", label] = (z**p).T @ (u[:, label] ** q)[:, None]
        found |= {
            ("positive", label): z.T @ above[:, None],
            ("positive2", label): (z**2).T @ above[:, None],
            ("permuted", label): z.T @ u[:, label][permuted].T,
            ("permuted_positive", label): z.T @ above[permuted].T,
            ("permuted_positive2", label): (z**2).T @ above[permuted].T,
            ("bootstrap", label): z.T @ w,
            ("bootstrap_u", label): z.T @ (w * u[:, label, None]),
            ("bootstrap2", label): (z**2).T @ w,
        }
    return found


def assert_same(one, other, tolerance=1e-9):
    for name in Evidence.STATE:
        a, b = getattr(one, name), getattr(other, name)
        scale = (b.abs().amax(0) if name in ("sums", "resampled") else b.abs().max()).clamp(min=1)
        assert float(((a - b).abs() / scale).nan_to_num().max()) <= tolerance, name
    assert one.blocks == other.blocks and one.n == other.n


@pytest.mark.parametrize("sizes", ([90], [1], [30], [17, 4]), ids=str)
@pytest.mark.parametrize("offset", (0.0, 1000.0))
def test_streamed_sums_are_those_of_all_samples_at_once(sizes, offset):
    z, y = sparse_data(offset=offset)
    blocks = blocks_of(len(z), sizes)
    evidence = stream(z, y, blocks)
    for (name, label), expected in batch(z, y, blocks, evidence.origin, evidence).items():
        got = evidence.columns(name, label=label).numpy()
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9 * max(1, np.abs(expected).max()), err_msg=name)
    u = y - evidence.origin
    for q in range(ORDER + 1):
        torch.testing.assert_close(evidence.labels[:, q], (u**q).sum(0), rtol=1e-9, atol=1e-9)
    assert torch.equal(evidence.n_positive, (y > 0).double().sum(0))
    assert torch.equal(evidence.low, y.amin(0)) and torch.equal(evidence.high, y.amax(0))


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_order_of_blocks_and_any_merge_give_the_same_statistics(data):
    z, y = sparse_data(seed=data.draw(st.integers(0, 50)), offset=data.draw(st.sampled_from((0.0, -3.0, 50.0))))
    blocks = blocks_of(len(z), data.draw(st.sampled_from(([30], [11], [40, 3]))))
    order = data.draw(st.permutations(range(len(blocks))))
    process = data.draw(st.lists(st.integers(0, 2), min_size=len(blocks), max_size=len(blocks)))
    parts = [stream(z, y, blocks, [k for k in order if process[k] == p]) for p in range(3)]
    merged = Evidence(z.shape[1], y.shape[1], **SETTINGS)
    for p in data.draw(st.permutations(range(3))):
        merged.merge(parts[p])
    whole = stream(z, y, blocks)
    assert_same(merged, with_origin(whole, merged.origin))  # a state's origin is that of the block that came first
    for score in ("pearson", "squared_ratio"):
        one, other = (scores.score(e, score) for e in (merged, whole))
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
    one, other = (inference.significance({0: e})[0].p_adjusted for e in (merged, whole))
    assert torch.equal(one, other)


def with_origin(evidence, origin):
    """The same evidence with rewards measured from another origin."""
    other = Evidence(evidence.d_sae, evidence.n_labels, **SETTINGS)
    other.origin.copy_(origin)
    other.blocks = {-1}
    other.merge(evidence)
    other.blocks -= {-1}
    return other


def test_a_samples_permutation_depends_on_the_seed_and_its_block_alone():
    one, other = (Evidence(3, permutations=50, seed=seed) for seed in (0, 1))
    assert torch.equal(one._permutations(20, 4), Evidence(9, permutations=50)._permutations(20, 4))
    assert not torch.equal(one._permutations(20, 4), one._permutations(20, 5))
    assert not torch.equal(one._permutations(20, 4), other._permutations(20, 4))
    assert torch.equal(one._permutations(20, 4).sort(1).values, torch.arange(20).expand(50, 20))


def test_permutations_are_uniform():
    places = Evidence(1, permutations=24000)._permutations(4, 0)
    counts = torch.unique(places, dim=0, return_counts=True)[1]
    assert len(counts) == 24 and float(((counts - 1000.0) ** 2 / 1000).sum()) < 50  # chi-squared, 23 degrees of freedom


def test_bootstrap_weights_are_poisson_of_mean_1():
    w = Evidence(1, bootstrap=500)._bootstrap_weights(400, 0)
    assert w.mean() == pytest.approx(1, abs=0.01) and w.var() == pytest.approx(1, abs=0.02)


@everywhere()
def test_every_backend_leaves_the_same_sums(place):
    z, y = sparse_data(n=70, d=37)
    device = torch.device(place.device)
    evidence, truth = (Evidence(37, 2, **SETTINGS, device=d) for d in (device, "cpu"))
    evidence.update(z.to(device), y.to(device), 3, backend=place.backend)
    truth.update(z, y, 3, backend="reference")
    for name in ("sums", "resampled"):
        got, expected = getattr(evidence, name).cpu(), getattr(truth, name)
        scale = expected.abs().amax(0).clamp(min=1e-300)
        assert float(((got - expected).abs() / scale).max()) <= 1e-12, name


@pytest.mark.parametrize("scores", (("pearson",), ("pearson", "contrastive"), STREAMED), ids=len)
def test_memory_is_what_the_formula_says(scores):
    d, P, B = 100, 40, 30
    evidence = Evidence(d, permutations=P, bootstrap=B, scores=scores)
    columns = 21 + 2 + P * (1 + ("contrastive" in scores) + ("squared_ratio" in scores)) + 3 * B
    assert evidence.n_columns == columns
    assert evidence.nbytes == pytest.approx(8 * d * columns, rel=0.01)
    assert Evidence(d, permutations=P, bootstrap=B, scores=scores, device="meta").nbytes == evidence.nbytes


def test_only_rewards_of_one_value_above_0_and_one_not_are_two_valued():
    z = torch.rand(40, 3)
    for values, expected in (
        ([0, 3e-5, 1], False),
        ([-1, 1, 1e9], False),
        ([0, 1], True),
        ([-2, 5], True),
        ([1, 2], False),
        ([0, 0.5, 1], False),
        ([0, 1, 1.0001], False),
    ):
        y = torch.tensor([values[i % len(values)] for i in range(40)], dtype=torch.float64)
        one, other = Evidence(3), Evidence(3)
        one.update(z[:15], y[:15], 0)
        other.update(z[15:], y[15:], 1)
        one.merge(other)
        assert one.two_valued() == expected, values


def test_saved_evidence_is_the_same_to_the_last_bit_when_loaded(tmp_path):
    z, y = sparse_data()
    evidence = stream(z, y, blocks_of(90, [40]))
    evidence.save(tmp_path / "e")
    loaded = Evidence.load(tmp_path / "e")
    assert_same(loaded, evidence, 0)
    loaded.update(z[:5], y[:5], 9)
    assert loaded.n == 95


def test_files_that_are_no_evidence_are_refused(tmp_path):
    with pytest.raises(CorrSteerError, match="there is no evidence file"):
        Evidence.load(tmp_path / "e")
    evidence = Evidence(3)
    evidence.sums = torch.zeros(4, 23, dtype=torch.float64)
    evidence.save(tmp_path / "e")
    with pytest.raises(CorrSteerError, match="is damaged .sums has another shape"):
        Evidence.load(tmp_path / "e")
    save_file({"sums": torch.zeros(1)}, tmp_path / "other", metadata={"format": "corrsteer.moments/1"})
    with pytest.raises(CorrSteerError, match=r"other is not an evidence file of this version .corrsteer.evidence/3"):
        Evidence.load(tmp_path / "other")
    (tmp_path / "e").write_bytes((tmp_path / "e").read_bytes()[:-4])
    with pytest.raises(CorrSteerError, match="is damaged"):
        Evidence.load(tmp_path / "e")


Z, Y = torch.rand(4, 3), torch.tensor([0.0, 1, 0, 1])
REFUSED = {
    "no features": (lambda: Evidence(0), "d_sae must be a whole number from 1 to 2147483647, got 0"),
    "a negative number of permutations": (
        lambda: Evidence(3, permutations=-1),
        "permutations must be a whole number from 0 to 2147483647, got -1",
    ),
    "an unknown score": (lambda: Evidence(3, scores=("kendall",)), "scores must be among pearson, .*got 'kendall'"),
    "activations of another SAE": (lambda: Evidence(4).update(Z, Y, 0), r"pooled must be \[N, d_sae=4\]"),
    "rewards of another number": (lambda: Evidence(3).update(Z, Y[:3], 0), r"got \[4, 3\] and \[3, 1\]"),
    "rewards that are not finite": (lambda: Evidence(3).update(Z, Y / 0, 0), "y must be finite"),
    "a block seen before": (lambda: twice(Evidence(3)), "block must be a number .* not given before, got 0"),
    "evidence of the same block": (lambda: with_block().merge(with_block()), r"blocks \[0\] are in both"),
    "evidence of another seed": (lambda: with_block().merge(Evidence(3, seed=1)), "other must have seed=0, got 1"),
    "a score that needs every sample": (
        lambda: Evidence(3, scores=("pearson", "auroc")),
        "scores must be among pearson, point_biserial, contrastive, squared_ratio where .* got auroc; keep activations",
    ),
}


def twice(evidence):
    evidence.update(Z, Y, 0)
    evidence.update(Z, Y, 0)


def with_block():
    evidence = Evidence(3)
    evidence.update(Z, Y, 0)
    return evidence


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused_by_name(name):
    act, message = REFUSED[name]
    with pytest.raises(CorrSteerError, match=message):
        act()


SOUND = {"d_sae": 3, "n_labels": 1, "permutations": 0, "bootstrap": 0, "scores": ("pearson",), "seed": 0}


@pytest.mark.parametrize(
    "wrong", (None, 2.5, "kendall", {1: 2}, [1.0], object(), torch.ones(3, 3, 3)), ids=lambda w: type(w).__name__
)
@pytest.mark.parametrize("name", (*SOUND, "pooled", "y", "block", "other"))
def test_an_argument_of_another_type_is_refused_by_its_name(name, wrong):
    block = {"pooled": Z, "y": Y, "block": 0}
    with pytest.raises(CorrSteerError, match=name):
        if name in SOUND:
            Evidence(**SOUND | {name: wrong})
        elif name == "other":
            Evidence(3).merge(wrong)
        else:
            Evidence(3).update(**block | {name: wrong})


def test_a_refused_block_leaves_the_evidence_as_it_was():
    evidence = Evidence(3)
    evidence.update(Z, Y, 0)
    before = evidence.sums.clone()
    with pytest.raises(CorrSteerError):
        evidence.update(Z, Y / 0, 1)
    assert torch.equal(evidence.sums, before) and evidence.blocks == {0} and evidence.n == 4
