"""Moments: streaming equals batch, to the last bit on disk and to 1e-9 in arithmetic."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corrsteer import CorrSteerError, Moments, update_moments
from corrsteer.ops.moments import COEFFICIENTS


def two_pass(z, y):
    """Pearson's r in float64 with both passes over all data: `[R, D]`."""
    z, y = z.double(), y.double()
    z, y = z - z.mean(0), y - y.mean(0)
    return (y.T @ z) / (y.square().sum(0)[:, None] * z.square().sum(0)).sqrt()


def sparse_data(n=503, d=23, labels=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, d, generator=g).relu() * (torch.rand(n, d, generator=g) < torch.linspace(0.02, 1, d))
    y = torch.randn(n, labels, generator=g) + z[:, :labels]
    y[:, 0] = (y[:, 0] > 0).float()
    return z, y


def stream(z, y, sizes):
    moments = Moments(z.shape[1], y.shape[1])
    for zs, ys in zip(z.split(sizes), y.split(sizes)):
        update_moments(zs, ys, moments)
    return moments


def splits_of(n):
    return ([n], [1] * n, [100] * (n // 100) + [n % 100], [n - 1, 1])


def test_correlation_is_right_to_1e_9_for_any_batches_and_several_labels():
    z, y = sparse_data()
    for sizes in splits_of(len(z)):
        torch.testing.assert_close(stream(z, y, sizes).correlation(), two_pass(z, y), rtol=0, atol=1e-9)


def test_correlation_is_right_to_1e_9_where_the_mean_is_a_million_standard_deviations():
    g = torch.Generator().manual_seed(1)
    z = torch.randn(4001, 7, generator=g, dtype=torch.float64) + 1e6
    y = z[:, :1] - 1e6 + torch.randn(4001, 1, generator=g, dtype=torch.float64)
    assert two_pass(z, y)[0, 0] > 0.5
    for sizes in ([4001], [1] * 4001, [64] * 62 + [33]):
        torch.testing.assert_close(stream(z, y, sizes).correlation(), two_pass(z, y), rtol=0, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_partition_merged_in_any_order_gives_the_same_state(data):
    z, y = sparse_data(n=60, d=5, labels=2, seed=data.draw(st.integers(0, 1000)))
    part = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=60, max_size=60)))
    order = data.draw(st.permutations(range(4)))
    merged = Moments(5, 2)
    for at in order:
        group = Moments(5, 2)
        update_moments(z[part == at], y[part == at], group)
        merged.merge(group)
    for a, b in zip(merged.state(), stream(z, y, [60]).state()):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_merging_is_associative():
    z, y = sparse_data(n=90)
    a, b, c = (stream(z[i : i + 30], y[i : i + 30], [30]) for i in (0, 30, 60))
    left, right = a.to("cpu"), b.to("cpu")
    left.merge(b)
    left.merge(c)
    right.merge(c)
    a.merge(right)
    for s, t in zip(left.state(), a.state()):
        torch.testing.assert_close(s, t, rtol=1e-9, atol=1e-9)


def test_save_and_load_give_the_state_back_bit_for_bit(tmp_path):
    moments = stream(*sparse_data(), [503])
    moments.save(tmp_path / "m.safetensors")
    loaded = Moments.load(tmp_path / "m.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(moments.state(), loaded.state()))
    assert (loaded.d_sae, loaded.n_labels, loaded.n) == (23, 3, 503)


def test_coefficients_and_frequencies_are_the_means_they_are_named_after():
    z, y = sparse_data(labels=2)
    z[:, 0] -= 0.2  # signed activations, as abstopk and identity have
    moments = stream(z, y, [200, 303])
    for label in range(2):
        positive = y[:, label] > 0
        active = z > 0
        expected = {
            "mean_positive": z[positive].double().mean(0),
            "mean_positive_active": (z * active)[positive].double().sum(0) / active[positive].sum(0).clamp(min=1),
            "contrastive": z[positive].double().mean(0) - z[~positive].double().mean(0),
        }
        assert set(expected) == set(COEFFICIENTS)
        for kind, value in expected.items():
            torch.testing.assert_close(moments.coefficient(kind)[label], value, rtol=1e-9, atol=1e-12)
        for group, members in enumerate((positive, ~positive)):
            share = active[members].double().mean(0)
            torch.testing.assert_close(moments.group_frequency()[group, label], share, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(moments.frequency(), active.double().mean(0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("constant", (0.0, 1.0, 0.1, 1e6 + 0.1))
def test_a_constant_feature_and_a_constant_reward_correlate_with_nothing(constant):
    z, y = sparse_data(n=300, labels=1)
    z[:, 4] = constant
    moments = stream(z, y, [7] * 42 + [6])
    assert moments.correlation()[0, 4] == 0
    assert moments.correlation()[0, 5] != 0
    flat = stream(z, torch.full_like(y, constant), [7] * 42 + [6])
    assert not bool(flat.label_varies().any()) and bool((flat.correlation() == 0).all())


def test_a_feature_that_differs_by_one_bit_in_one_sample_still_correlates():
    z = torch.full((200, 1), 1000.0)
    z[17] = torch.nextafter(z[17], torch.tensor(2000.0))
    y = torch.zeros(200, 1)
    y[17] = 1
    torch.testing.assert_close(stream(z, y, [50] * 4).correlation(), torch.ones(1, 1).double(), rtol=0, atol=1e-6)


def test_empty_groups_and_empty_updates_give_zeros_and_not_nan():
    moments = Moments(3)
    update_moments(torch.zeros(0, 3), torch.zeros(0), moments)
    moments.merge(Moments(3))
    for value in (
        moments.correlation(),
        moments.frequency(),
        moments.group_frequency(),
        moments.coefficient("contrastive"),
    ):
        assert bool((value == 0).all())
    update_moments(torch.ones(2, 3), torch.ones(2), moments)  # nobody failed
    assert bool((moments.coefficient("contrastive") == 1).all())


def test_mistakes_are_named(tmp_path):
    moments = Moments(3, 2)
    with pytest.raises(CorrSteerError, match="other must have d_sae=3 and n_labels=2, got d_sae=3 and n_labels=1"):
        moments.merge(Moments(3, 1))
    with pytest.raises(CorrSteerError, match="coefficient must be one of mean_positive, .* got 'median'"):
        moments.coefficient("median")
    with pytest.raises(CorrSteerError, match="d_sae must be a whole number from 1 to 2147483647, got 0"):
        Moments(0)
    with pytest.raises(CorrSteerError, match="there is no moments file"):
        Moments.load(tmp_path / "nothing")
    moments.save(tmp_path / "m")
    (tmp_path / "cut").write_bytes((tmp_path / "m").read_bytes()[:-8])
    with pytest.raises(CorrSteerError, match="is damaged"):
        Moments.load(tmp_path / "cut")
