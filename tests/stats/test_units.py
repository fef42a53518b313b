"""Units: what is said of features does not depend on the unit in which rewards or activations are measured."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from places import everywhere
from problems import F32, Case, make, updated

from corrsteer import CorrSteerError, Evidence, Moments, inference, scores, stability, update_moments
from corrsteer.stats.evidence import STREAMED

COEFFICIENTS = ("mean_positive", "mean_positive_active", "contrastive")
SETTINGS = {"permutations": 49, "bootstrap": 60, "scores": STREAMED, "seed": 3}
SIZES = (1e60, 1e-60, 1e140, 1e-140, 2.0**70, 2.0**-9, -1e60, 1e3)


def data(labels="binary", n=240, d=9, seed=0):
    """Pooled activations and rewards, the first feature of which goes with the reward."""
    rng = np.random.default_rng(seed)
    z = (rng.random((n, d)) < rng.uniform(0.2, 0.8, d)) * rng.exponential(size=(n, d))
    y = 0.7 * z[:, 0] + rng.standard_normal(n)
    return torch.from_numpy(z).float(), torch.from_numpy((y > 0.4).astype(float) if labels == "binary" else y)


def collected(z, y, blocks=4, merged=False, backend=None):
    """Evidence and moments of blocks of samples; `merged`, of one process a block."""
    parts = []
    for number, (some_z, some_y) in enumerate(zip(z.chunk(blocks), y.chunk(blocks))):
        if merged or not parts:
            parts.append((Evidence(z.shape[1], **SETTINGS), Moments(z.shape[1])))
        evidence, moments = parts[-1]
        evidence.update(some_z, some_y, number, backend=backend)
        update_moments(some_z, some_y, moments, backend=backend)
    for evidence, moments in parts[1:]:
        parts[0][0].merge(evidence)
        parts[0][1].merge(moments)
    return parts[0]


def said(evidence, moments):
    """Everything that is said of features and has no unit, by name."""
    found = {"r of the moments": moments.correlation()[0]}
    found |= {f"score {name}": scores.score(evidence, name) for name in STREAMED if name != "contrastive"}
    for method in inference.METHODS:
        found |= {f"{method} {end}": x for end, x in zip(("low", "high"), inference.interval(evidence, method))}
    for name in ("pearson", "point_biserial", "squared_ratio"):
        tested = inference.significance({0: evidence}, name)[0]
        found |= {f"{p} of {name}": getattr(tested, p) for p in ("p", "p_layer", "p_adjusted", "q")}
    (leaders,) = stability.snapshot({0: evidence}).leaders.values()
    found["leaders"] = torch.tensor([[x.feature, x.r, x.low, x.high] for x in leaders], dtype=torch.float64)
    return found


def assert_the_same(got, expected):
    for name, value in expected.items():
        if name.startswith("p") and "of the" not in name:
            assert torch.equal(got[name], value), name
        else:
            assert bool(value.isfinite().all()), name
            # q is of scores rounded to 1/65536 of the largest, which a last bit may move by one
            torch.testing.assert_close(
                got[name], value, rtol=1e-9, atol=2e-3 if name.startswith("q") else 1e-9, msg=name
            )


@pytest.mark.parametrize("labels", ("binary", "real"))
@pytest.mark.parametrize("merged", (False, True), ids=("in one process", "merged"))
@pytest.mark.parametrize("size", [size for size in SIZES if size > 0])
def test_rewards_of_any_size_give_the_same_correlations_tests_and_intervals(labels, merged, size):
    z, y = data(labels)
    expected, expected_moments = collected(z, y)
    evidence, moments = collected(z, size * y, merged=merged)
    assert_the_same(said(evidence, moments), said(expected, expected_moments))
    for kind in COEFFICIENTS:  # in the unit of activations
        torch.testing.assert_close(moments.coefficient(kind), expected_moments.coefficient(kind))
        errors = (
            inference.coefficient_error(e, m, kind) for e, m in ((evidence, moments), (expected, expected_moments))
        )
        torch.testing.assert_close(*errors)


@settings(max_examples=25, deadline=None)
@given(
    exponent=st.floats(-140, 140),
    offset=st.floats(-100, 100),
    blocks=st.sampled_from((1, 3, 7)),
    merged=st.booleans(),
)
def test_correlations_and_their_intervals_depend_on_neither_the_unit_nor_the_origin_of_rewards(
    exponent, offset, blocks, merged
):
    z, y = data("real")
    expected = said(*collected(z, y))
    got = said(*collected(z, 10**exponent * (y + offset), blocks, merged))
    for name in ("r of the moments", "score pearson", "delta low", "delta high", "leaders"):
        torch.testing.assert_close(got[name], expected[name], rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize("sizes", ((0.0, 1e60), (0.0, 1e-60), (1e-60, 1.0), (1.0, 1e60), (1e60, 1e-60)), ids=str)
@pytest.mark.parametrize("merged", (False, True), ids=("in one process", "merged"))
def test_blocks_whose_rewards_differ_in_size_are_weighed_as_they_are(sizes, merged):
    z, y = data("real", n=200)
    y = y * torch.tensor(sizes, dtype=torch.float64).repeat_interleave(100)
    evidence, moments = collected(z, y, blocks=2, merged=merged)
    alone, alone_moments = collected(z, y / max(sizes), blocks=1)
    for name in ("r of the moments", "score pearson", "delta low", "delta high", "fisher low"):
        torch.testing.assert_close(
            said_briefly(evidence, moments)[name], said_briefly(alone, alone_moments)[name], rtol=1e-9, atol=1e-9
        )


def said_briefly(evidence, moments):
    low, high = inference.delta_interval(evidence)
    return {
        "r of the moments": moments.correlation()[0], "score pearson": scores.correlation(evidence),
        "delta low": low, "delta high": high, "fisher low": inference.interval(evidence, "fisher")[0],
    }  # fmt: skip


@pytest.mark.parametrize("size", (2.0**100, 2.0**-100, 2.0**120, 2.0**-120))  # 1e30, 1e-30, and nearer to the ends
@pytest.mark.parametrize("labels", ("binary", "real"))
def test_activations_of_any_size_that_float32_has_give_the_same_statistics(labels, size):
    z, y = data(labels)
    assert_the_same(said(*collected(z * size, y)), said(*collected(z, y)))


@everywhere()
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("labels", (1, 2))
def test_every_backends_moments_take_rewards_of_any_size(place, labels, size):
    problem = make(Case("relu", "fp32", F32, (3, 1, 0, 7, 40, 2, 13, 5), d_sae=23), place.device)
    y = torch.randn(8, labels, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(place.device)
    for one, other in zip(updated(problem, y, place), updated(problem, size * y, place)):
        r = one.correlation() * (1 if size > 0 else -1)
        torch.testing.assert_close(other.correlation(), r, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(other.cross / size, one.cross, rtol=1e-5, atol=1e-6)


@everywhere()
@pytest.mark.parametrize("size", (2.0**100, 2.0**-100))
def test_every_backends_evidence_and_moments_take_activations_of_any_size(place, size):
    z, y = data("real")
    z, y = z.to(place.device), y.to(place.device)
    states = []
    for of in (z, z * size):
        evidence, moments = Evidence(9, permutations=300, device=place.device), Moments(9, device=place.device)
        evidence.update(of, 1e60 * y, 0, backend=place.backend)
        update_moments(of, 1e60 * y, moments, backend=place.backend)
        states.append((moments.correlation(), scores.permuted(evidence, "pearson", slice(None), 0)))
    for one, other in zip(*states):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("y", ([1e151, 0.0], [0.0, -1e151], [torch.inf, 0.0], [torch.nan, 0.0]), ids=str)
def test_rewards_whose_squares_overflow_are_refused(y):
    z, y = torch.ones(2, 3), torch.tensor(y, dtype=torch.float64)
    for update in (
        lambda: update_moments(z, y, Moments(3)),
        lambda: Evidence(3).update(z, y, 0),
    ):
        with pytest.raises(CorrSteerError, match="y must be finite and at most 1e150 in size"):
            update()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.int64, torch.bool), ids=str)
def test_rewards_may_have_any_dtype(dtype):
    z, y = data()
    expected, moments = Moments(9), Moments(9)
    update_moments(z, y, expected)
    update_moments(z, y.to(dtype), moments)
    assert all(torch.equal(a, b) for a, b in zip(moments.state(), expected.state()))
    if dtype.is_floating_point:
        with pytest.raises(CorrSteerError, match="y must be finite .*, got (inf|nan)"):
            update_moments(z, (y / 0).to(dtype), moments)


@everywhere()
@pytest.mark.parametrize("size", (2.0**50, 2.0**-50))  # Triton's kernel squares activations in float32
@pytest.mark.parametrize("pool", ("mean", "max"))
def test_moments_in_one_pass_take_activations_of_1e_minus_15_to_1e15(place, size, pool):
    problem = make(Case("relu", "fp32", F32, (3, 1, 0, 7, 40, 2, 13, 5), pool=pool, d_sae=23), place.device)
    encoder = problem.encoder
    scaled = dataclasses.replace(encoder, weight=encoder.weight * size, bias=encoder.bias * size)
    y = torch.randn(8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(place.device)
    (one,), (other,) = updated(problem, y, place), updated(problem.but(encoder=scaled), y, place)
    torch.testing.assert_close(other.correlation(), one.correlation(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(other.coefficient() / size, one.coefficient(), rtol=1e-5, atol=1e-6)
