"""Every backend against float64 truth, and what every operation does with bad arguments.

`oracle.py` says what truth is, and how far from it a backend may be. The cases here are small enough for Triton's
interpreter, whose blocks are of 64 features and 16 tokens, two tiles of which make a group: a sample's tokens may lie
in several tiles or groups, or share them with other samples. `test_kernels.py` has what is only true of kernels.
"""

import itertools

import numpy as np
import pytest
import torch
from memory import fenced
from oracle import (
    assert_as_close_as_eager,
    assert_moments,
    assert_same_state,
    assert_summed,
    decided,
    dense_bounds,
    eager_pool,
    pooled_bounds,
    tolerance_of_moments,
    true_moments,
)
from places import CUDA, NATIVE, PLACES, POOLING, REFERENCE, Place, at, everywhere, for_each
from problems import ACTIVATIONS, BF16, F16, F32, Case, cu, make, make_encoder, pooled, updated

from corrsteer import (
    CorrSteerError,
    Moments,
    SparseEncoder,
    encode,
    encode_pool,
    encode_update,
    steer_add,
    update_moments,
    update_sums,
)  # fmt: skip
from corrsteer.ops import RunningPool

ON_CPU = REFERENCE[0]
SEGMENTS = {
    "one token each": (1,) * 9,
    "one sample": (31,),
    "ragged": (3, 1, 7, 2, 13, 5),
    "prime": (17, 19, 23),
    "empty at the edges": (0, 4, 0, 6, 0),
    "empty in the middle": (5, 0, 0, 8),
    "all empty": (0, 0),
    "no samples": (),
    "one over many groups": (130,),
    "whole tiles of one token each": (1,) * 16 + (20,) + (1,) * 45 + (3,),
    "one token each after a long one": (40,) + (1,) * 56,
    "ending where tiles and groups do": (16, 16, 32, 32, 16),
    "ending one token off": (15, 2, 15, 31, 2, 30),
    "empty where groups end": (32, 0, 0, 31, 1, 0, 32),
    "more samples than tokens": (1, 0, 0, 2, 0) * 14,
    "more samples than are planned at once": (1,) + (0,) * 1022 + (3, 0, 1, 1, 6),
    "more groups than are folded at once": (3, 550, 2, 1),
}

# Every activation with every segmentation and dtype: for eager torch, which is quick.
PRODUCT = {
    f"{activation}, {segments}, {precision}": Case(activation, precision, dtype, lengths, d_sae=67, seed=11)
    for activation, (segments, lengths), (precision, dtype) in itertools.product(
        ACTIVATIONS, SEGMENTS.items(), (("fp32", F32), ("fp16", F16), ("bf16", BF16))
    )
    if activation != "identity" or precision == "fp32"
}


def named(*cases: tuple) -> dict[str, Case]:
    """Cases under their descriptions; lengths are given by their names in SEGMENTS."""
    out = {}
    for activation, precision, dtype, segments, pool, d_in, d_sae, *norm in cases:
        x_dtype = str(dtype).removeprefix("torch.")
        name = " ".join([f"{activation} {precision} of {x_dtype} {pool} {d_in}x{d_sae}", *norm]) + f", {segments}"
        out[name] = Case(
            activation, precision, dtype, SEGMENTS[segments], pool, d_in, d_sae, norm[0] if norm else "none", seed=7
        )
    return out


# For every backend, the interpreted one too: each pair of activation and precision, of activation and input norm, of
# activation and a hard segmentation, and of sizes below, at and above those of blocks, with rows that a GPU's copy
# engine can read and rows that it cannot.
CHOSEN = named(
    ("relu", "fp32", F32, "one over many groups", "both", 19, 67),
    ("relu", "fp32_ieee", F32, "empty where groups end", "both", 19, 37),
    ("relu", "bf16", BF16, "whole tiles of one token each", "both", 24, 64),
    ("relu", "fp16", F16, "ending one token off", "mean", 24, 37),
    ("relu", "bf16x2", BF16, "ragged", "both", 40, 131),
    ("relu", "fp32", BF16, "empty in the middle", "max", 20, 3),
    ("relu", "fp32", F32, "ending one token off", "mean", 40, 37, "layer_norm"),
    ("relu", "bf16x2", BF16, "prime", "mean", 40, 37, "constant_norm_rescale"),
    ("relu", "fp32", F32, "all empty", "both", 19, 67),
    ("relu", "fp32", F32, "no samples", "both", 19, 67),
    ("jumprelu", "fp32", F32, "whole tiles of one token each", "both", 20, 67),
    ("jumprelu", "fp32_ieee", BF16, "ending where tiles and groups do", "mean", 19, 64),
    ("jumprelu", "bf16", BF16, "one over many groups", "both", 40, 37),
    ("jumprelu", "fp16", F16, "ending where tiles and groups do", "max", 19, 37),
    ("jumprelu", "bf16x2", BF16, "ending one token off", "max", 24, 37),
    ("jumprelu", "bf16x2", F16, "prime", "mean", 40, 67),
    ("jumprelu", "fp32", BF16, "one token each after a long one", "both", 24, 37),
    ("jumprelu", "bf16", BF16, "empty where groups end", "mean", 64, 67, "layer_norm"),
    ("jumprelu", "fp16", F16, "one token each", "mean", 19, 37, "constant_norm_rescale"),
    ("gated", "fp32", F32, "ending one token off", "both", 64, 37),
    ("gated", "fp32_ieee", F32, "one over many groups", "mean", 33, 67),
    ("gated", "bf16", BF16, "ragged", "both", 24, 67),
    ("gated", "fp16", F16, "whole tiles of one token each", "mean", 19, 37),
    ("gated", "bf16x2", F32, "one over many groups", "mean", 24, 67),
    ("gated", "bf16", F32, "ending where tiles and groups do", "mean", 19, 131),
    ("gated", "fp16", F16, "prime", "mean", 19, 37, "layer_norm"),
    ("gated", "bf16x2", BF16, "empty in the middle", "mean", 40, 37, "constant_norm_rescale"),
    ("topk", "fp32", F32, "ragged", "both", 19, 67),
    ("topk", "fp32_ieee", F32, "empty at the edges", "both", 19, 37),
    ("topk", "bf16", BF16, "one token each", "both", 24, 131),
    ("topk", "fp16", F16, "empty in the middle", "both", 24, 64),
    ("topk", "bf16x2", BF16, "ending one token off", "mean", 40, 67),
    ("topk", "fp32", F32, "ragged", "max", 19, 67, "layer_norm"),
    ("topk", "bf16", F16, "all empty", "both", 19, 37),
    ("abstopk", "fp32", F32, "ending one token off", "both", 20, 67),
    ("abstopk", "fp32_ieee", F32, "one sample", "both", 19, 37),
    ("abstopk", "bf16", BF16, "whole tiles of one token each", "max", 24, 67),
    ("abstopk", "fp16", F16, "empty at the edges", "both", 19, 131),
    ("abstopk", "bf16x2", BF16, "prime", "max", 24, 37),
    ("abstopk", "fp16", BF16, "ragged", "both", 24, 67, "constant_norm_rescale"),
    ("topk", "fp32", F32, "no samples", "both", 19, 37),
    ("relu", "fp32", F32, "more samples than tokens", "both", 19, 37),
    ("gated", "fp32", F32, "more samples than are planned at once", "mean", 19, 37),
    ("jumprelu", "fp32", F32, "more groups than are folded at once", "mean", 19, 37),
    ("relu", "fp32", F32, "ragged", "mean", 1100, 37, "layer_norm"),
    ("relu", "bf16", BF16, "ragged", "mean", 1100, 37, "constant_norm_rescale"),
)
TINY = {
    "one dimension, one feature": Case("jumprelu", lengths=(1, 2), d_in=1, d_sae=1),
    "one of few features": Case("topk", lengths=(3, 4), d_in=3, d_sae=5, k=1),
    "all features": Case("topk", lengths=(3, 4), d_in=3, d_sae=37, k=37),
    "all features, signed": Case("abstopk", lengths=(3, 4), d_in=3, d_sae=37, k=37),
    "more features than are cleared at once": Case("topk", lengths=(3, 2), d_sae=1100, k=33),
    "as many features as blocks of them": Case("topk", "bf16", BF16, (3, 4), d_in=24, d_sae=67, k=16),
    "a token of one dimension alone": Case("gated", lengths=(1,), d_in=1, d_sae=65),
}
# Around the edges of panels, for whatever has some: one feature or token more or less, and few of either.
EDGES = {
    f"{activation} {precision} {d_in}x{d_sae}, {sum(lengths)} tokens in {len(lengths)} samples": Case(
        activation, precision, F16 if precision == "fp16" else BF16, lengths, "both", d_in, d_sae, norm, seed=5
    )
    for activation, precision, d_in, d_sae, lengths, norm in (
        ("relu", "bf16", 24, 64, (64,), "none"),
        ("gated", "fp16", 19, 65, (63, 1, 1), "none"),
        ("jumprelu", "bf16x2", 40, 63, (1,) * 65, "none"),
        ("jumprelu", "bf16", 33, 129, (0, 128, 0, 3, 0), "constant_norm_rescale"),
        ("relu", "bf16", 8, 200, (200, 3), "none"),
        ("relu", "bf16", 1, 1, (1,), "none"),
        ("gated", "bf16x2", 7, 128, (5, 0, 4), "none"),
        ("jumprelu", "bf16", 24, 67, (70, 9), "layer_norm"),
    )
}


# encode and encode_pool

NOT_SIGNED = ("relu", "jumprelu", "gated", "topk")


def assert_pooled(problem, place):
    """`encode_pool` there is as right as eager torch."""
    got = pooled(problem, place)
    eager = (None,) * len(got)
    if place.backend != "reference":
        eager = pooled(problem, Place("reference", place.device))
    for how, mine, theirs in zip(problem.case.pools, got, eager):
        assert mine.dtype == F32 and mine.is_contiguous()
        assert_as_close_as_eager(mine, *pooled_bounds(problem, how), theirs, of=f"the {how}")
    return got


@pytest.mark.usefixtures("poisoned")
@for_each(CHOSEN | TINY | EDGES, places=POOLING)
def test_encode_pool_is_as_close_to_the_truth_as_eager_torch(place, case):
    assert_pooled(make(case, place.device), place)


@for_each(PRODUCT, places=REFERENCE)
def test_eager_encode_pool_is_right_for_every_activation_segmentation_and_dtype(place, case):
    problem = make(case, place.device)
    both = assert_pooled(problem, place)
    for how, expected in zip(("mean", "max"), both):
        (alone,) = pooled(problem, place, how)
        assert torch.equal(alone, expected)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("place", "seed"), [at(p, n, id=str(n)) for p in POOLING for n in range(8 if p.backend == "triton" else 60)]
)
def test_encode_pool_is_right_for_sizes_and_lengths_drawn_at_random(place, seed):
    g = torch.Generator().manual_seed(seed)

    def draw(*choices):
        return choices[int(torch.randint(len(choices), (), generator=g))]

    lengths = draw(
        torch.randint(0, 9, (12,), generator=g), torch.randint(0, 50, (3,), generator=g), torch.ones(41).long()
    )
    forms = ("fp32", F32), ("fp32_ieee", F32), ("bf16", BF16), ("fp16", F16), ("bf16x2", BF16), ("bf16x2", F32)
    case = Case(
        draw(*(a for a in ACTIVATIONS[:-1] if place.does("encode_pool", F32, a))),
        *draw(*(form for form in forms if place.does("encode_pool", form[1], "relu", form[0]))),
        tuple(lengths.tolist()),
        draw("mean", "max"),
        d_in=draw(1, 2, 7, 16, 31, 37, 48, 67),
        d_sae=draw(1, 13, 41, 64, 97, 128, 129),
        norm=draw("none", "none", "constant_norm_rescale"),
        k=draw(1, 3, 13),
        seed=seed,
    )
    assert_pooled(make(case, place.device), place)


LAYOUTS = {
    "columns of a wider one": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "transposed": lambda x: x.T.contiguous().T,
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "at an odd address": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x),
    "the same row each time": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize(
    ("place", "layout", "activation"),
    [
        at(place, layout, activation, id=f"{layout}, {activation}")
        for place in POOLING
        for activation in ("relu", "topk")
        if place.does("encode_pool", BF16, activation, "bf16")
        for layout in LAYOUTS
    ],
)
def test_x_may_lie_in_memory_in_any_way(place, layout, activation):
    problem = make(Case(activation, "bf16", BF16, (9, 2, 20), "mean", d_in=24), place.device)
    laid = problem.but(x=LAYOUTS[layout](problem.x))
    packed = problem.but(x=laid.x.contiguous())
    assert torch.equal(pooled(laid, place)[0], pooled(packed, place)[0])
    assert_pooled(laid, place)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("place", "activation"),
    [at(p, a, id=a) for p in POOLING for a in ACTIVATIONS if p.does("encode_pool", F32, a)],
)
def test_a_maximum_over_negative_activations_is_negative_only_where_activations_can_be(place, activation):
    problem = make(Case(activation, *place.operands, lengths=(2, 4, 40), pool="max"), place.device)
    problem.x.copy_(-problem.x.abs() - 0.1)
    (got,) = assert_pooled(problem, place)
    assert bool((got < 0).any()) == (activation in ("identity", "abstopk"))
    z = encode(problem.x, problem.encoder, backend=place.backend)
    torch.testing.assert_close(got, eager_pool(z, problem.case.lengths, "max"), rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("place", "activation"), [at(p, a, id=a) for p in POOLING for a in NOT_SIGNED if p.does("encode_pool", F32, a)]
)
def test_where_nothing_is_active_every_activation_and_every_sum_of_them_is_exactly_0(place, activation):
    problem = make(Case(activation, *place.operands, lengths=(1, 40, 0, 1, 1, 1)), place.device)
    problem.encoder.bias.fill_(-1000)
    y = torch.tensor([1.0, 0.0, 1.0, 2.0, -1.0, 0.0], device=place.device)
    assert not encode(problem.x, problem.encoder, backend=place.backend).any()
    assert not any(part.any() for part in pooled(problem, place))
    for moments in updated(problem, y, place):
        assert moments.n == 6 and moments.y_m2 > 0
        for name in ("z_mean", "z_m2", "cross", "n_active", "group_sum", "group_active_sum", "group_active_count"):
            assert not getattr(moments, name).any(), name


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("place", "activation"),
    [at(p, a, id=a) for p in POOLING for a in ACTIVATIONS if p.does("encode_pool", F32, a)],
)
def test_sums_of_huge_activations_stay_right_as_long_as_they_are_finite(place, activation):
    problem = make(Case(activation, *place.operands, lengths=(70, 1, 9)), place.device)
    problem.x.mul_(1e30)
    got = assert_pooled(problem, place)
    assert max(float(part.abs().max()) for part in got) > 1e29


@pytest.mark.usefixtures("poisoned")
@for_each(
    {
        f"{activation} {precision} {x}": Case(activation, precision, x, (3, 40, 1), d_in=65, norm="layer_norm")
        for activation, precision, x in (
            ("relu", "fp32", F32), ("jumprelu", "fp32", BF16), ("topk", "fp32", F32), ("gated", "bf16x2", F32),
            ("relu", "bf16", BF16), ("jumprelu", "fp16", F16), ("abstopk", "bf16", BF16), ("relu", "bf16x2", BF16),
            ("relu", "bf16", F32), ("relu", "fp32_ieee", F32),
        )
    }
)  # fmt: skip
@pytest.mark.parametrize("mean", (1.0, 30.0, -1000.0, 30000.0))
def test_layer_norm_survives_tokens_whose_mean_is_many_standard_deviations_from_0(place, case, mean):
    if place.backend == "reference" and abs(mean) > 30:
        return  # it is eager torch, whose float32 mean is off by its last bit, and so is what it is subtracted from
    problem = make(case, place.device)
    problem.x.copy_(problem.x + mean)
    problem.x[1::2, 3] = 0.0  # one dimension apart from all others, as language models have them
    got, eager = pooled(problem, place), pooled(problem, Place("reference", place.device))
    for how, mine, theirs in zip(case.pools, got, eager):
        allowance = None if place.backend == "reference" else theirs
        assert_as_close_as_eager(mine, *pooled_bounds(problem, how), allowance, of=f"the {how}")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("place", "activation"),
    [at(p, a, id=a) for p in POOLING for a in ACTIVATIONS if p.does("encode_pool", F32, a)],
)
@pytest.mark.parametrize("lengths", ((3, 1, 7, 30, 2), (1,) * 33), ids=("ragged", "one token each"))
def test_a_nan_in_x_is_in_its_own_samples_results_and_in_no_others(place, activation, lengths):
    problem = make(Case(activation, *place.operands, lengths=lengths), place.device)
    sample, token = 3, sum(lengths[:3])
    clean = pooled(problem, place)
    problem.x[token, 5] = torch.nan
    for mine, before in zip(pooled(problem, place), clean):
        others = torch.arange(len(lengths), device=mine.device) != sample
        assert torch.equal(mine[others], before[others])
        lost = mine[sample].isnan()
        if activation == "identity":
            assert lost[5] and lost.sum() == 1
        elif "topk" in activation:  # which k of a token's features, all of them NaN, are kept is anybody's choice
            assert 1 <= int(lost.sum()) <= problem.encoder.k
        else:
            assert bool(lost.all())
    dense = encode(problem.x, problem.encoder, backend=place.backend)
    assert bool(dense[token].isnan().any()) and not bool(dense[torch.arange(len(dense)) != token].isnan().any())


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("place", "activation"), [at(p, a, id=a) for p in POOLING for a in ("relu", "jumprelu", "gated")]
)
def test_a_feature_that_is_nan_leaves_the_other_features_and_their_moments_as_they_are(place, activation):
    problem = make(Case(activation, *place.operands, lengths=(3, 1, 7, 30, 2)), place.device)
    y = torch.tensor([1.0, 0.0, 1.0, 2.0, -1.0], device=place.device)
    clean, clean_moments = pooled(problem, place), updated(problem, y, place)
    bias = problem.encoder.magnitude_bias if activation == "gated" else problem.encoder.bias
    bias[5] = torch.nan
    others = torch.arange(37, device=place.device) != 5
    for mine, before in zip(pooled(problem, place), clean):
        assert bool(mine[:, 5].isnan().all()) and torch.equal(mine[:, others], before[:, others])
    for mine, before in zip(updated(problem, y, place), clean_moments):
        for name in ("z_mean", "z_m2", "cross", "group_sum", "group_active_sum"):
            assert bool(getattr(mine, name)[..., 5].isnan().all()), name
            assert torch.equal(getattr(mine, name)[..., others], getattr(before, name)[..., others]), name


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("place", "activation"), [at(p, a, id=a) for p in POOLING for a in ("relu", "jumprelu", "gated")]
)
def test_a_nan_in_x_is_in_every_moment_that_depends_on_it(place, activation):
    problem = make(Case(activation, *place.operands, lengths=(3, 1, 7, 30, 2)), place.device)
    y = torch.tensor([1.0, 0.0, 1.0, 2.0, -1.0], device=place.device)
    problem.x[20, 3] = torch.nan
    for mine in updated(problem, y, place):
        for name in ("z_mean", "z_m2", "cross", "group_sum", "group_active_sum"):
            assert bool(getattr(mine, name)[..., 0, :].isnan().all() if name.startswith("group") else
                        getattr(mine, name).isnan().all()), name  # fmt: skip
        for name in ("count", "y_mean", "y_m2", "n_positive", "n_active", "group_active_count"):
            assert bool(getattr(mine, name).isfinite().all()), name


ENCODE = {
    f"{case.activation} {case.precision} of {str(case.dtype).removeprefix('torch.')} {case.norm}": case
    for case in (
        Case("relu", "fp32", F32, (33,), d_in=19, d_sae=131),
        Case("relu", "bf16x2", BF16, (16,), d_in=40, d_sae=64, norm="layer_norm"),
        Case("jumprelu", "bf16", BF16, (17,), d_in=24, d_sae=67),
        Case("jumprelu", "fp32_ieee", F32, (5,), d_in=19, d_sae=67, norm="constant_norm_rescale"),
        Case("gated", "fp16", F16, (40,), d_in=24, d_sae=67),
        Case("gated", "fp32", BF16, (1,), d_in=64, d_sae=128, norm="layer_norm"),
        Case("topk", "fp32", F32, (40,), d_in=19, d_sae=67),
        Case("topk", "bf16", BF16, (17,), d_in=24, d_sae=131, k=13),
        Case("topk", "bf16x2", F16, (3,), d_in=24, d_sae=37, k=1),
        Case("abstopk", "fp32", F32, (40,), d_in=20, d_sae=67),
        Case("abstopk", "fp16", F16, (17,), d_in=24, d_sae=131, k=13),
        Case("abstopk", "bf16", BF16, (7,), d_in=24, d_sae=67, norm="layer_norm"),
        Case("identity", lengths=(7,)),
    )
}


@pytest.mark.usefixtures("poisoned")
@for_each(ENCODE, "encode")
def test_dense_activations_are_as_close_to_the_truth_as_eager_torch(place, case):
    problem = make(case, place.device)
    x = problem.x[:, None].expand(-1, 2, -1)  # [..., d_in] of any leading dimensions
    got = encode(x, problem.encoder, backend=place.backend)
    assert got.dtype == F32 and got.shape == (len(problem.x), 2, problem.encoder.d_sae)
    assert torch.equal(got[:, 0], got[:, 1])
    eager = None if place.backend == "reference" else encode(problem.x, problem.encoder, backend="reference")
    assert_as_close_as_eager(got[:, 1], *dense_bounds(problem.x, problem.exact), eager)
    if "topk" in case.activation:
        assert bool(((got != 0).sum(-1) <= problem.encoder.k).all())


@pytest.mark.usefixtures("poisoned")
@everywhere()
@pytest.mark.parametrize("activation", ("topk", "abstopk"))
@pytest.mark.parametrize(("d_sae", "k"), ((67, 16), (67, 5), (131, 13)), ids=str)
def test_of_activations_that_are_all_0_any_k_are_kept_and_none_that_does_not_exist(place, activation, d_sae, k):
    problem = make(Case(activation, lengths=(3, 1, 2), d_sae=d_sae, k=k), place.device)
    problem.encoder.bias.zero_()
    problem.x[:4] = 0
    problem.exact.bias.zero_()
    assert_pooled(problem, place)
    assert not encode(problem.x[:4], problem.encoder, backend=place.backend).any()


@everywhere()
@pytest.mark.parametrize("activation", ("gated", "topk"))
def test_no_tokens_have_no_activations(place, activation):
    problem = make(Case(activation, lengths=()), place.device)
    assert encode(problem.x, problem.encoder, backend=place.backend).shape == (0, 37)


@everywhere(POOLING)
@pytest.mark.parametrize(("precision", "dtype"), (("fp32", F32), ("bf16", BF16)), ids=("fp32", "bf16"))
def test_an_activation_exactly_at_its_threshold_or_gate_is_off(place, precision, dtype):
    """Small whole numbers, whose sums are exact in every precision."""
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0], [-1.0, -1.0]], dtype=dtype, device=place.device)
    form = {"weight": torch.ones(5, 2), "bias": torch.tensor([0.0, 0.0, 1.0, -3.0, -2.0])}
    p = [[3, 3, 4, 0, 1], [2, 2, 3, -1, 0], [-2, -2, -1, -5, -4]]
    forms = {
        "relu": ({}, [[max(v, 0) for v in row] for row in p]),
        "jumprelu": (
            {"threshold": torch.tensor([3.0, 2.5, -2.0, -1.0, 0.0])},
            [[0, 3, 4, 0, 1], [0, 0, 3, 0, 0], [0, 0, 0, 0, 0]],
        ),
        "gated": (
            {"magnitude_scale": torch.full((5,), 2.0), "magnitude_bias": torch.tensor([0.0, -6.0, -4.0, 0.0, 1.0])},
            [[6, 0, 2, 0, 7], [4, 0, 0, 0, 0], [0, 0, 0, 0, 0]],
        ),
    }
    for activation, (more, expected) in forms.items():
        encoder = SparseEncoder(2, 5, activation, **form, **more).to(place.device, precision=precision)
        z = encode(x, encoder, backend=place.backend)
        assert z.tolist() == expected, activation
        maximum = encode_pool(x, cu([2, 1], place.device), encoder, "max", backend=place.backend)
        assert maximum.tolist() == [[max(v) for v in zip(*expected[:2])], expected[2]], activation


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("place", "activation"), [at(p, a, id=a) for p in PLACES for a in ("topk", "abstopk")])
def test_of_equal_activations_any_k_are_kept_and_exactly_k(place, activation):
    encoder = make_encoder(activation, d_sae=67, device=place.device)
    encoder.weight[:] = encoder.weight[0]
    encoder.bias.fill_(9)
    z = encode(torch.ones(20, 19, device=place.device), encoder, backend=place.backend)
    assert bool(((z != 0).sum(1) == encoder.k).all()) and len(z[z != 0].unique()) == 1


def test_encode_never_returns_its_argument():
    x = torch.randn(4, 19)
    assert encode(x, make_encoder("identity")).data_ptr() != x.data_ptr()


# update_moments and encode_update


def rewards(n, labels=1, dtype=F32, seed=5, device="cpu"):
    """`[n, labels]` rewards of a dtype, of which every other column has a mean far from 0."""
    y = torch.randn(n, labels, generator=torch.Generator().manual_seed(seed)) * 2
    y[:, 1::2] += 100
    return (y > 0).to(device) if dtype == torch.bool else y.to(device, dtype)


def earlier(case, labels, seed=9):
    """Pooled activations and rewards of samples that were seen before, for each pooling another number of them."""
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, case.d_sae, generator=g).double().relu(), torch.randn(n, labels, generator=g).double())
        for n in (9, 4)[: len(case.pools)]
    ]


UPDATES = {
    f"{case.activation} {case.precision} {case.pool}, {segments}, {labels} of {str(dtype).removeprefix('torch.')}": (
        case.but(lengths=SEGMENTS[segments], seed=21),
        labels,
        dtype,
    )
    for case, segments, labels, dtype in (
        (Case("relu", pool="mean", d_sae=67), "one over many groups", 1, torch.float64),
        (Case("relu", "bf16", BF16, d_in=24), "one token each after a long one", 1, torch.int64),
        (Case("relu", "fp16", F16, pool="max", norm="layer_norm"), "ragged", 1, F32),
        (Case("relu"), "all empty", 1, F32),
        (Case("relu", pool="mean"), "no samples", 1, F32),
        (Case("jumprelu", "bf16", BF16, pool="max", d_in=24), "whole tiles of one token each", 1, torch.bool),
        (Case("jumprelu", d_sae=67), "empty where groups end", 1, F32),
        (Case("relu", pool="mean", d_sae=67), "ending one token off", 1, F32),
        (Case("relu", pool="mean"), "more samples than tokens", 1, F32),
        (Case("gated", "fp16", F16, pool="mean"), "empty where groups end", 1, F32),
        (Case("jumprelu", "bf16x2", BF16, pool="mean", d_in=24), "whole tiles of one token each", 1, F32),
        (Case("jumprelu", "bf16", BF16, pool="mean", d_in=24), "ragged", 1, F32),
        (Case("jumprelu", "fp32_ieee", pool="mean"), "prime", 1, BF16),
        (Case("gated", "bf16x2", BF16, d_in=40), "ending one token off", 1, F32),
        (Case("gated", "fp16", F16, pool="max"), "ending where tiles and groups do", 1, torch.uint8),
        (Case("gated", norm="constant_norm_rescale", pool="mean"), "empty at the edges", 1, F32),
        (Case("topk", d_sae=67), "ragged", 1, F32),
        (Case("topk", "bf16", BF16, pool="mean", d_in=24), "ending one token off", 3, F32),
        (Case("abstopk", pool="max"), "whole tiles of one token each", 1, torch.float64),
        (Case("relu", pool="mean"), "more samples than are planned at once", 1, F32),
        (Case("jumprelu", d_in=8, d_sae=5), "more groups than are folded at once", 1, F32),
        (Case("relu"), "more samples than tokens", 3, F32),
        (Case("topk", pool="max"), "more samples than tokens", 1, F32),
        (Case("relu"), "empty in the middle", 3, F32),
        (Case("jumprelu", "bf16x2", BF16, pool="mean"), "one token each after a long one", 2, torch.int32),
        (Case("gated", pool="mean"), "whole tiles of one token each", 5, torch.bool),
        (Case("identity"), "ragged", 2, F32),
    )
}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("place", "update"),
    [
        at(place, update, id=name)
        for place in POOLING
        for name, update in UPDATES.items()
        if place.does("encode_update", update[0].dtype, update[0].activation, update[0].precision)
        or not place.does("steer_add")
    ],
)
@pytest.mark.parametrize("history", (False, True), ids=("the first batch", "a later batch"))
def test_encode_update_leaves_the_moments_of_all_samples_so_far(place, update, history):
    case, labels, dtype = update
    if history and place[:2] == ("triton", "cpu") and case.pool != "both":
        pytest.skip("interpreted for pairs alone, to save time")
    problem = make(case.but(d_sae=case.d_in if case.activation == "identity" else case.d_sae), place.device)
    y = rewards(len(case.lengths), labels, dtype, device=place.device)
    before = earlier(problem.case, labels)[: len(case.pools)] if history else []
    before = [(z.to(place.device), of.to(place.device)) for z, of in before]
    got = updated(problem, y, place, tuple(true_moments(*b) for b in before))
    clear = decided(problem)
    assert clear.float().mean() > 0.9
    for at_, (how, mine) in enumerate(zip(case.pools, got)):
        z, all_y = pooled_bounds(problem, how)[0], y.double().view(-1, labels)
        if before:
            z, all_y = torch.cat([before[at_][0], z]), torch.cat([before[at_][1], all_y])
        truth = true_moments(z, all_y)
        assert_moments(mine, truth, features=clear, tolerance=tolerance_of_moments(case))


@pytest.mark.usefixtures("poisoned")
@everywhere(POOLING)
@pytest.mark.parametrize("sign", (1, -1), ids=("succeed", "fail"))
def test_where_all_samples_succeed_or_all_fail_the_other_groups_sums_are_exactly_0(place, sign):
    problem = make(Case("jumprelu", *place.operands, lengths=(40, 1, 2, 1, 0, 5)), place.device)
    y = sign * torch.arange(1.0, 7.0, device=place.device)
    for moments in updated(problem, y, place):
        empty, full = (1, 0) if sign > 0 else (0, 1)
        assert int(moments.n_positive) == (6 if sign > 0 else 0)
        for name in ("group_sum", "group_active_sum", "group_active_count"):
            assert not getattr(moments, name)[empty].any() and bool(getattr(moments, name)[full].any()), name
        assert torch.equal(moments.group_active_count[full, 0], moments.n_active)


@everywhere()
def test_a_reward_of_exactly_0_counts_as_not_positive(place):
    problem = make(Case("relu", lengths=(2, 3, 1)), place.device)
    for moments in updated(problem, torch.tensor([0.0, -0.0, 1e-30], device=place.device), place):
        assert int(moments.n_positive) == 1
        last = encode(problem.x[-1:], problem.encoder, backend=place.backend)[0]
        torch.testing.assert_close(moments.group_sum[0, 0], last.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("poisoned")
@everywhere()
@pytest.mark.parametrize("pool", ("mean", "max"))
def test_moments_of_activations_far_from_0_keep_their_small_differences(place, pool):
    problem = make(Case("relu", lengths=(1,) * 20 + (3, 40, 2, 7, 5), pool=pool), place.device)
    problem.encoder.bias.add_(30)
    problem.exact.bias.add_(30)
    y = rewards(25, device=place.device)
    (got,) = updated(problem, y, place)
    (eager,) = updated(problem, y, Place("reference", place.device))
    truth = true_moments(pooled_bounds(problem, pool)[0], y)
    assert float((truth.z_mean / (truth.z_m2 / 25).sqrt()).min()) > 10
    assert_moments(got, truth, eager)
    torch.testing.assert_close(got.correlation(), truth.correlation(), rtol=0, atol=1e-4)


SPLITS = {
    f"{case.activation} {case.pool}, {labels} labels": (case, labels)
    for case, labels in (
        (Case("relu", pool="both"), 1),
        (Case("jumprelu", pool="max"), 1),
        (Case("gated", "bf16", BF16, pool="mean", d_in=24), 1),
        (Case("topk", pool="both"), 1),
        (Case("relu", pool="max"), 3),
        (Case("jumprelu", pool="both"), 3),
        (Case("gated", pool="mean"), 3),
        (Case("topk", "bf16", BF16, pool="mean"), 3),
        (Case("abstopk", pool="max"), 3),
    )
}


def part_of(problem, y, members):
    """The problem of some of its samples, in their order, and their rewards."""
    sample = torch.arange(len(y)).repeat_interleave(torch.tensor(problem.case.lengths))
    lengths = tuple(n for n, member in zip(problem.case.lengths, members) if member)
    device = problem.x.device
    x = problem.x[members[sample].to(device)]
    return problem.but(case=problem.case.but(lengths=lengths), x=x, cu=cu(lengths, device)), y[members.to(device)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("place", "case", "labels"), [
        at(p, *split, id=name)
        for p in POOLING
        for name, split in SPLITS.items()
        if not p.way or p.does("encode_update", split[0].dtype, split[0].activation, split[0].precision)
    ],
)
def test_encode_update_over_any_split_of_the_samples_merged_equals_one_call(place, case, labels):
    lengths = (3, 1, 7, 40, 2, 0, 13, 5, 1, 1)
    problem = make(case.but(lengths=lengths, seed=3), place.device)
    y, clear = rewards(len(lengths), labels, device=place.device), decided(problem)
    assert clear.float().mean() > 0.9
    whole = updated(problem, y, place)
    g = torch.Generator().manual_seed(4)
    parts = [torch.arange(10) >= at_ for at_ in (range(11) if place.backend == "reference" else (4,))]
    parts += [torch.randint(0, 3, (10,), generator=g) for _ in range(10 if place.backend == "reference" else 1)]
    for part in parts:
        merged, streamed = [Moments(problem.encoder.d_sae, labels, place.device) for _ in case.pools], ()
        for number in range(3):
            some, some_y = part_of(problem, y, part == number)
            one = updated(some, some_y, place)
            streamed = updated(some, some_y, place, streamed)
            for state, more in zip(merged, one):
                state.merge(more)
        for state, expected in zip((*merged, *streamed), whole * 2):
            # float32 products of other shapes round otherwise; the merge itself is exact to float64
            assert_moments(state, expected, features=clear, tolerance=tolerance_of_moments(case))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("place", "n", "labels", "dtype"),
    [
        at(place, *sizes, id=f"{sizes[0]} samples, {sizes[1]} labels of {sizes[2]}".replace("torch.", ""))
        for place in PLACES
        for sizes in (
            (1, 1, F32), (7, 5, torch.float64), (33, 33, F32), (70, 1, torch.bool), (37, 5, torch.int64),
            (32, 33, BF16), (64, 1, F16), (3, 65, torch.uint8),
        )
    ],
)  # fmt: skip
def test_update_moments_leaves_the_moments_of_all_samples_so_far(place, n, labels, dtype):
    g = torch.Generator().manual_seed(n)
    z = torch.randn(n, 67, generator=g) + torch.linspace(-3, 3, 67)
    z[:, ::5] = 0
    y, before = rewards(n, labels, dtype), earlier(Case(d_sae=67), labels)[0]
    first = true_moments(z, y)
    both = true_moments(torch.cat([before[0], z]), torch.cat([before[1], y.double()]))
    z, y = z.to(place.device), y.to(place.device)
    for z_laid, y_laid in (
        (fenced(z), fenced(y)),
        (z.T.contiguous().T, y.T.contiguous().T),
        (torch.cat([z, z], 1)[:, 67:], torch.cat([y, y], 1)[:, labels:]),
        (z.repeat_interleave(2, 0)[::2], y.repeat_interleave(2, 0)[::2]),
    ):
        got = Moments(67, labels, place.device)
        update_moments(z_laid, y_laid, got, backend=place.backend)
        assert_moments(got.to("cpu"), first)
    got = true_moments(*before).to(place.device)
    update_moments(z, y, got, backend=place.backend)
    assert_moments(got.to("cpu"), both)
    unchanged = got.to(place.device)
    update_moments(z[:0], y[:0], got, backend=place.backend)
    assert_same_state(got, unchanged)


@everywhere()
@pytest.mark.parametrize("value", (0.157, 0.622))
def test_a_reward_that_is_always_the_same_varies_in_no_number_of_samples(place, value):
    got = Moments(3, device=place.device)
    for n in (512, 300, 411):
        z = torch.rand(n, 3, generator=torch.Generator().manual_seed(n))
        y = torch.full((n,), value, dtype=torch.float64)
        update_moments(z.to(place.device), y.to(place.device), got, backend=place.backend)
    assert not got.label_varies().any() and not got.correlation().any()


@everywhere()
@pytest.mark.parametrize("dtype", (F16, BF16), ids=str)
def test_update_moments_takes_pooled_activations_of_half_precision(place, dtype):
    z, y = torch.randn(40, 67, generator=torch.Generator().manual_seed(0)).to(dtype), rewards(40, 2)
    got = Moments(67, 2, place.device)
    update_moments(z.to(place.device), y.to(place.device), got, backend=place.backend)
    assert_moments(got.to("cpu"), true_moments(z, y))


@everywhere()
def test_a_nan_in_one_pooled_activation_is_in_its_own_features_moments_alone(place):
    z, y = torch.randn(40, 67, generator=torch.Generator().manual_seed(0)), rewards(40, 2)
    clean, got = Moments(67, 2, place.device), Moments(67, 2, place.device)
    update_moments(z.to(place.device), y.to(place.device), clean, backend=place.backend)
    z[7, 5] = torch.nan
    update_moments(z.to(place.device), y.to(place.device), got, backend=place.backend)
    others = torch.arange(67, device=place.device) != 5
    for name in ("z_mean", "z_m2", "cross", "group_sum", "group_active_sum"):
        assert bool(getattr(got, name)[..., 5].isnan().any()), name
        assert torch.equal(getattr(got, name)[..., others], getattr(clean, name)[..., others]), name


# update_sums

SUMS = {
    f"{n} x {d} of {str(dtype).removeprefix('torch.')}, {active:.0%} active, columns {powers}": (
        n, d, dtype, active, powers
    )
    for n, d, dtype, active, powers in (
        (0, 37, F32, 1, (5,)),
        (1, 1, F32, 1, (1,)),
        (1, 67, F16, 0.5, (3, 0, 2)),
        (5, 37, BF16, 1, (70,)),
        (5, 67, F32, 0, (2, 1)),
        (5, 131, F32, 0.5, ()),
        (300, 1, BF16, 0.5, (1, 2, 3, 1, 2, 4)),
        (300, 67, F32, 0.02, (130,)),
        (300, 67, F32, 1, (0, 0, 0, 0, 0, 5)),
        (300, 37, F16, 0.02, (5, 70)),
        (130, 131, F32, 0.5, (9, 8, 8, 16, 17, 7)),
        (1, 37, F32, 1, (257,)),
        (150, 67, F32, 0.02, (300,)),
        (129, 65, BF16, 1, (257, 0, 3)),
    )
}  # fmt: skip


def some_sums(n, d, dtype, active, powers, device="cpu"):
    """Pooled activations of both signs, some of them 0, weights, and sums that are not 0 before."""
    g = torch.Generator().manual_seed(n + d)
    z = torch.randn(n, d, generator=g) * (torch.rand(n, d, generator=g) < active)
    weights, sums = (torch.randn(rows, sum(powers), generator=g, dtype=torch.float64) for rows in (n, d))
    return z.to(device, dtype), weights.to(device), sums.to(device)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("place", "given"), [at(p, given, id=name) for p in PLACES for name, given in SUMS.items()])
def test_update_sums_adds_weighted_powers_to_what_was_there_wherever_it_lies(place, given):
    *_, powers = given
    z, weights, sums = some_sums(*given, device=place.device)
    for lay in (
        fenced,
        lambda t: t.T.contiguous().T,
        lambda t: torch.cat([t, t], 1)[:, t.shape[1] :],
        lambda t: t.repeat_interleave(2, 0)[::2],
    ):
        got = lay(sums.clone())
        update_sums(lay(z), lay(weights), got, powers, backend=place.backend)
        assert_summed(got, z, weights, sums, powers, place)


@everywhere()
@pytest.mark.parametrize("powers", ((70,), (3, 0, 2), (257, 1)), ids=str)
def test_update_sums_of_a_part_of_a_tensor_leaves_the_rest_of_it_as_it_is(place, powers):
    z, weights, _ = some_sums(5, 37, F32, 0.5, powers, place.device)
    wide = torch.full((2 * 37, sum(powers) + 9), 7.0, dtype=torch.float64, device=place.device)
    part = wide[::2, 4:-5]
    update_sums(z, weights, part, powers, backend=place.backend)
    assert_summed(part, z, weights, torch.full_like(part, 7.0), powers, place)
    part.fill_(7.0)
    assert bool((wide == 7).all())


@everywhere()
def test_update_sums_takes_every_column_to_the_first_power_where_nothing_is_said(place):
    z, weights, sums = some_sums(5, 37, F32, 0.5, (4,), place.device)
    got = sums.clone()
    update_sums(z, weights, got, backend=place.backend)
    assert_summed(got, z, weights, sums, (4,), place)


@everywhere()
def test_update_sums_of_batches_add_up_to_those_of_all_samples(place):
    powers = (4, 3, 2)
    z, weights, sums = some_sums(70, 37, F32, 0.5, powers, place.device)
    got = sums.clone()
    for first, last in ((0, 1), (1, 1), (1, 40), (40, 70)):
        update_sums(z[first:last], weights[first:last], got, powers, backend=place.backend)
    assert_summed(got, z, weights, sums, powers, place)


@everywhere()
@pytest.mark.parametrize("size", (1e30, 1e-30), ids=str)
def test_no_power_of_a_huge_or_a_tiny_activation_is_lost(place, size):
    powers = (1, 1, 1, 1, 1, 1)
    z, weights, sums = some_sums(5, 37, F32, 1, powers, place.device)
    got = torch.zeros_like(sums)
    update_sums(z * size, weights, got, powers, backend=place.backend)
    assert_summed(got, z * size, weights, torch.zeros_like(sums), powers, place)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # by Triton's interpreter
@everywhere()
@pytest.mark.parametrize("powers", ((5, 70), (260,)), ids=str)
@pytest.mark.parametrize("value", (torch.nan, torch.inf), ids=str)
def test_what_is_not_finite_in_one_pooled_activation_is_in_its_own_features_sums_alone(place, powers, value):
    z, weights, clean = some_sums(40, 67, F32, 0.5, powers, place.device)
    got = clean.clone()
    update_sums(z, weights, clean, powers, backend=place.backend)
    z[7, 5] = value
    weights[7, 3] = 0
    update_sums(z, weights, got, powers, backend=place.backend)
    others = torch.arange(67, device=place.device) != 5
    assert not bool(got[5].isfinite().any())
    got[others, 3] = clean[others, 3]  # whose weight is another now
    assert torch.equal(got[others], clean[others])


@everywhere()
def test_autograd_is_told_that_update_sums_has_changed_the_sums(place):
    z, weights, sums = some_sums(5, 37, F32, 1, (4,), place.device)
    leaf = torch.ones_like(sums, requires_grad=True)
    product = (leaf * sums).sum()  # whose gradient needs the sums
    update_sums(z, weights, sums, backend=place.backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


# steer_add


def assert_steered(place, h, vectors, rows, positions=None):
    """`steer_add` there does what the loop below does, bit for bit, in place."""
    expected = h.clone()
    for b, s in itertools.product(range(h.shape[0]), range(h.shape[1])):
        if rows[b] >= 0 and (positions is None or positions[b, s]):
            expected[b, s] = (h[b, s].float() + vectors[rows[b]]).to(h.dtype)
    here = h.to(place.device, copy=True)
    moved = [None if t is None else t.to(place.device) for t in (vectors, rows, positions)]
    assert steer_add(here, *moved, backend=place.backend) is here
    assert torch.equal(here.cpu(), expected)
    return expected


@everywhere(PLACES + CUDA)
@pytest.mark.parametrize("dtype", (F32, F16, BF16), ids=str)
def test_steer_add_adds_each_rows_vector_at_its_positions_and_touches_nothing_else(place, dtype):
    g = torch.Generator().manual_seed(0)
    h = torch.randn(4, 5, 9, generator=g).to(dtype)
    vectors, rows = torch.randn(2, 9, generator=g), torch.tensor([1, -1, 0, 1], dtype=torch.int32)
    positions = torch.rand(4, 5, generator=g) > 0.5
    steered = assert_steered(place, h, vectors, rows, positions)
    everywhere_steered = assert_steered(place, h, vectors, rows)
    assert not torch.equal(steered, h) and not torch.equal(steered, everywhere_steered)
    decode = assert_steered(place, h[:, :1], vectors, rows)
    assert torch.equal(decode[1], h[1, :1]) and not torch.equal(decode[0], h[0, :1])
    assert torch.equal(assert_steered(place, h, vectors, torch.full((4,), -1, dtype=torch.int32)), h)
    assert torch.equal(assert_steered(place, h, vectors, rows, torch.zeros(4, 5, dtype=torch.bool)), h)
    assert assert_steered(place, h[:, :0], vectors, rows).shape == (4, 0, 9)
    assert assert_steered(place, h[:0], vectors, rows[:0]).shape == (0, 5, 9)


@everywhere(PLACES + CUDA)
@pytest.mark.parametrize("dtype", (F32, F16, BF16), ids=str)
def test_steer_add_rounds_its_sum_once_for_residuals_of_any_size(place, dtype):
    g = torch.Generator().manual_seed(1)
    h = (torch.randn(2, 1, 2500, generator=g) * torch.logspace(-4, 4, 2500)).to(dtype)
    vectors = torch.randn(3, 2500, generator=g) * torch.logspace(4, -4, 2500)
    assert_steered(place, h, vectors, torch.tensor([2, 0], dtype=torch.int32))


@everywhere(PLACES + CUDA)
def test_autograd_is_told_that_steer_add_has_changed_the_residual(place):
    h = torch.zeros(1, 1, 3, device=place.device)
    leaf = torch.ones(3, device=place.device, requires_grad=True)
    product = (leaf * h).sum()  # whose gradient needs h
    steer_add(h, torch.ones(1, 3, device=h.device), torch.zeros(1, dtype=torch.int32, device=h.device),
              backend=place.backend)  # fmt: skip
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@everywhere(PLACES + CUDA)
def test_steer_add_without_any_vector_leaves_every_row_as_it_is(place):
    h = torch.randn(2, 3, 4, dtype=torch.float32, device="cpu").to(place.device)
    none = torch.zeros(0, 4, dtype=torch.float32, device=h.device)
    rows = torch.full((2,), -1, dtype=torch.int32, device=h.device)
    before = h.clone()
    assert steer_add(h, none, rows, backend=place.backend) is h and torch.equal(h, before)


@everywhere(PLACES + CUDA)
def test_steer_add_without_positions_steers_all_of_a_non_contiguous_residual(place):
    h = torch.zeros(6, 3, 2, device=place.device).permute(2, 1, 0)
    vectors, rows = torch.ones(1, 6, device=place.device), torch.zeros(2, dtype=torch.int32, device=place.device)
    steer_add(h, vectors, rows, backend=place.backend)
    assert bool((h == 1).all())


@everywhere(PLACES + CUDA)
def test_steer_add_reads_and_writes_tensors_of_any_strides_and_nothing_between_them(place):
    g = torch.Generator().manual_seed(2)
    wide = torch.randn(4, 10, 18, generator=g)
    h = wide.to(place.device)[:, ::2, 9:]
    around = h.as_strided((4, 10, 18), (180, 18, 1), 0)
    vectors = torch.randn(9, 3, generator=g).T
    rows = torch.tensor([2, 0, -1, 0, 0, 0, 1, 0], dtype=torch.int32)
    positions = (torch.rand(5, 4, generator=g) > 0.4).T
    expected = wide.clone()
    expected[:, ::2, 9:] = assert_steered(ON_CPU, wide[:, ::2, 9:].clone(), vectors, rows[::2], positions)
    there = vectors.to(place.device), rows.to(place.device)[::2], positions.to(place.device)
    steer_add(h, *there, backend=place.backend)
    assert torch.equal(around.cpu(), expected)


# The same bits again, under torch.compile, and beside autograd


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("place", "activation"),
    [at(p, a, id=a) for p in POOLING for a in ("relu", "gated", "abstopk") if p.does("encode_pool", BF16, a)],
)
def test_the_same_inputs_give_the_same_bits_again_and_are_left_as_they_were(place, activation):
    pool = "mean" if activation == "gated" else "both"
    problem = make(Case(activation, "bf16", BF16, (1, 40, 3, 1, 20), pool, d_in=24), place.device)
    y = rewards(5, 2, device=place.device)
    inputs = [problem.x, problem.cu, y, problem.encoder.weight, problem.encoder.bias]
    copies = [t.clone() for t in inputs]
    z, again = (encode(problem.x, problem.encoder, backend=place.backend) for _ in range(2))
    assert torch.equal(z, again)
    for one, other in zip(pooled(problem, place), pooled(problem, place)):
        assert torch.equal(one, other)
    for labels in (1, 2):
        for one, other in zip(*(updated(problem, y[:, :labels], place) for _ in range(2))):
            assert_same_state(one, other)
    powers = (257, 3, 2)
    given = [fenced(t) for t in some_sums(40, 37, F32, 0.5, powers, place.device)]
    inputs, copies = [*inputs, *given[:2]], [*copies, *(t.clone() for t in given[:2])]
    one, other = given[2].clone(), given[2].clone()
    for into in (one, other):
        update_sums(*given[:2], into, powers, backend=place.backend)
    assert torch.equal(one, other)
    assert all(torch.equal(t, copy) for t, copy in zip(inputs, copies))


@everywhere(POOLING)
def test_every_operation_compiles_without_a_graph_break_and_gives_the_same_result(place):
    encoder = make_encoder("jumprelu", d_sae=37, precision=place.operands[0], device=place.device)
    g = torch.Generator().manual_seed(6)
    x, lengths = torch.randn(12, 19, generator=g).to(place.device, place.operands[1]), cu([5, 0, 7], place.device)
    y, backend = torch.tensor([1.0, 0.0, 1.0], device=place.device), place.backend
    vectors, rows = torch.ones(1, 19, device=x.device), torch.tensor([0, -1], dtype=torch.int32, device=x.device)

    weights = torch.randn(3, 4, generator=g, dtype=torch.float64).to(place.device)

    def everything(x, lengths, y, moments, pair, sums):
        mean, maximum = encode_pool(x, lengths, encoder, "both", backend=backend)
        encode_update(x, lengths, y, encoder, moments, "mean", backend=backend)
        encode_update(x, lengths, y, encoder, pair, "both", backend=backend)
        update_moments(mean, y, moments, backend=backend)
        update_sums(mean, weights, sums[:, :4], (3, 1), backend=backend)
        update_sums(mean, weights, sums[:, 1:], backend=backend)
        h = torch.zeros(2, 3, 19, device=x.device)
        steer_add(h, vectors, rows, backend=backend)
        alone = encode_pool(x, lengths, encoder, "max", backend=backend)
        return encode(x, encoder, backend=backend), mean, maximum, alone, h

    def states():
        return [Moments(37, device=place.device) for _ in range(3)]

    (first, *pair), (compiled_first, *compiled_pair) = states(), states()
    sums, compiled_sums = (torch.ones(37, 5, dtype=torch.float64, device=place.device) for _ in range(2))
    eager = everything(x, lengths, y, first, tuple(pair), sums)
    run = torch.compile(everything, fullgraph=True, backend="aot_eager")
    compiled = run(x, lengths, y, compiled_first, tuple(compiled_pair), compiled_sums)
    for a, b in zip((*eager, sums), (*compiled, compiled_sums)):
        assert torch.equal(a, b)
    for a, b in zip((first, *pair), (compiled_first, *compiled_pair)):
        assert_same_state(a, b)
    assert first.n == 6


@everywhere((ON_CPU, NATIVE[0]))
def test_update_sums_compiles_once_for_any_number_of_samples_and_columns(place):
    def add(*arguments):
        update_sums(*arguments, backend=place.backend)

    torch._dynamo.reset()
    add = torch.compile(add, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n, columns in ((5, 3), (7, 4), (9, 6)):
            z, weights, sums = some_sums(n, 11, F32, 1, (columns,))
            got = sums.clone()
            add(z, weights, got)
            assert_summed(got, z, weights, sums, (columns,), place)


@everywhere((ON_CPU, NATIVE[0], Place("triton", "cpu")))
def test_operators_pass_torchs_own_checks_of_their_schema_and_fake_implementation(place):
    from corrsteer.ops.flat import flatten_encoder

    encoder, backend = make_encoder("gated"), place.backend
    checks = ("test_schema", "test_faketensor")
    x, lengths, y = torch.randn(5, 19), cu([2, 3]), torch.ones(2, 1)
    operators = torch.ops.corrsteer
    h, rows = torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int32)
    weights = torch.ones(2, 3, dtype=torch.float64)
    for operator, arguments in (
        (operators.encode, (x, *flatten_encoder(encoder))),
        (operators.encode_pool, (x, lengths, *flatten_encoder(encoder), "both")),
        (operators.update_moments, (torch.ones(2, 67), y, Moments(67).state())),
        (operators.update_sums, (torch.ones(2, 67), weights, torch.zeros(67, 3).double(), [1, 2])),
        (operators.encode_update, (x, lengths, y, *flatten_encoder(encoder), Moments(67).state(), "max")),
        (operators.steer_add, (h, torch.ones(1, 4), rows, None)),
    ):
        torch.library.opcheck(operator.default, (*arguments, backend), test_utils=checks)


@everywhere(POOLING)
def test_no_operation_records_a_gradient_or_listens_to_autocast(place):
    precision, dtype = place.operands
    encoder = make_encoder("relu", precision=precision, device=place.device)
    moments = Moments(67, device=place.device)
    x = torch.randn(5, 19, generator=torch.Generator().manual_seed(0)).to(place.device, dtype).requires_grad_()
    lengths, y = cu([2, 3], place.device), torch.ones(2, device=place.device)
    encode_update(x, lengths, y, encoder, moments, backend=place.backend)
    expected = encode(x, encoder, backend=place.backend)
    pooled_before = encode_pool(x, lengths, encoder, backend=place.backend)
    assert not any(tensor.requires_grad for tensor in (*moments.state(), expected, pooled_before))
    one, other = (torch.zeros(19, 3, dtype=torch.float64, device=place.device) for _ in range(2))
    weights = torch.ones(5, 3, dtype=torch.float64, device=place.device, requires_grad=True)
    update_sums(x, weights, one, (1, 2), backend=place.backend)
    assert not one.requires_grad
    with torch.autocast(place.device, torch.bfloat16):
        assert torch.equal(encode(x, encoder, backend=place.backend), expected)
        assert torch.equal(encode_pool(x, lengths, encoder, backend=place.backend), pooled_before)
        update_sums(x, weights, other, (1, 2), backend=place.backend)
        assert torch.equal(one, other)


def test_moments_made_in_inference_mode_can_be_updated_outside_of_it():
    with torch.inference_mode():
        moments = Moments(3)
    update_moments(torch.ones(2, 3), torch.ones(2), moments)
    assert moments.n == 2


SUMMED = torch.ones(5, 3, dtype=torch.float64), torch.zeros(19, 3, dtype=torch.float64)  # weights and sums
BAD_CALLS = {
    "x of another width": (lambda e, x, c: encode(x[:, :5], e), "x must have d_in=19"),
    "x of integers": (lambda e, x, c: encode(x.long(), e), "x must be float32"),
    "x not packed": (lambda e, x, c: encode_pool(x[None], c, e), r"x must be \[T, d_in=19\]"),
    "x elsewhere": (lambda e, x, c: encode(x.to("meta"), e), "x must be on cpu, got meta"),
    "int64 cu_seqlens": (lambda e, x, c: encode_pool(x, c.long(), e), "cu_seqlens must be .* int32"),
    "cu_seqlens that overrun": (lambda e, x, c: encode_pool(x[:4], c, e), r"end at T=4, got \[0, 2, 5\]"),
    "cu_seqlens that decrease": (
        lambda e, x, c: encode_pool(x, torch.tensor([0, 4, 2, 5], dtype=torch.int32), e),
        "never decrease",
    ),
    "cu_seqlens that start late": (
        lambda e, x, c: encode_pool(x, torch.tensor([1, 5], dtype=torch.int32), e),
        "must start at 0",
    ),
    "no cu_seqlens": (lambda e, x, c: encode_pool(x, c[:0], e), "cu_seqlens must be"),
    "unknown pool": (lambda e, x, c: encode_pool(x, c, e, "sum"), "pool must be one of mean, max, both, got 'sum'"),
    "y of another length": (lambda e, x, c: encode_update(x, c, torch.ones(3), e, Moments(67)), r"y must be \[N=2"),
    "a reward that is NaN": (
        lambda e, x, c: encode_update(x, c, torch.tensor([1.0, torch.nan]), e, Moments(67)),
        "y must be finite",
    ),
    "moments of another SAE": (lambda e, x, c: encode_update(x, c, torch.ones(2), e, Moments(5)), "encoder's d_sae=67"),
    "one moments for both": (
        lambda e, x, c: encode_update(x, c, torch.ones(2), e, Moments(67), "both"),
        "moments must be a pair of Moments .of the means, of the maxima. for pool='both', got Moments",
    ),
    "half a pair of moments": (
        lambda e, x, c: encode_update(x, c, torch.ones(2), e, (Moments(67),), "both"),
        "moments must be a pair of Moments .* for pool='both', got a tuple of 1",
    ),
    "a pair that lacks one": (
        lambda e, x, c: encode_update(x, c, torch.ones(2), e, (Moments(67), None), "both"),
        "moments must be a pair of Moments .* for pool='both', got a tuple of 2",
    ),
    "no moments for both": (
        lambda e, x, c: encode_update(x, c, torch.ones(2), e, None, "both"),
        "moments must be a pair of Moments .* for pool='both', got None",
    ),
    "a pair of moments for one pooling": (
        lambda e, x, c: encode_update(x, c, torch.ones(2), e, (Moments(67), Moments(67)), "mean"),
        "moments must be one Moments for pool='mean', got a tuple of 2",
    ),
    "the same moments for both": (
        lambda e, x, c: encode_update(x, c, torch.ones(2), e, (m := Moments(67), m), "both"),
        "moments must be two for pool='both', got the same twice",
    ),
    "pooled of another width": (
        lambda e, x, c: update_moments(torch.ones(2, 3), torch.ones(2), Moments(67)),
        "pooled must be",
    ),
    "pooled of integers": (lambda e, x, c: update_sums(x.long(), *SUMMED), r"pooled must be \[N, D\] float32, .*int64"),
    "pooled of one dimension": (lambda e, x, c: update_sums(x[0], *SUMMED), r"pooled must be \[N, D\] .* got \[19\]"),
    "weights of other samples": (lambda e, x, c: update_sums(x[:4], *SUMMED), r"weights must be \[N=4, C\] float64"),
    "weights of float32": (
        lambda e, x, c: update_sums(x, SUMMED[0].float(), SUMMED[1]),
        r"weights must be \[N=5, C\] float64, got \[5, 3\] torch.float32",
    ),
    "weights of one dimension": (
        lambda e, x, c: update_sums(x, SUMMED[0][:, 0], SUMMED[1]),
        r"weights must be \[N=5, C\] float64, got \[5\]",
    ),
    "a weight that is NaN": (
        lambda e, x, c: update_sums(x, SUMMED[0] * torch.nan, SUMMED[1]),
        "weights must be finite",
    ),
    "sums of other features": (
        lambda e, x, c: update_sums(x[:, :4], *SUMMED),
        r"sums must be \[D=4, C=3\] float64, got \[19, 3\]",
    ),
    "sums of other columns": (
        lambda e, x, c: update_sums(x, SUMMED[0][:, :2], SUMMED[1]),
        r"sums must be \[D=19, C=2\] float64, got \[19, 3\]",
    ),
    "sums of float32": (
        lambda e, x, c: update_sums(x, SUMMED[0], SUMMED[1].float()),
        r"sums must be \[D=19, C=3\] float64, got .* torch.float32",
    ),
    "sums elsewhere": (
        lambda e, x, c: update_sums(x, SUMMED[0], SUMMED[1].to("meta")),
        "sums must be on cpu, got meta",
    ),
    "powers of fewer columns": (
        lambda e, x, c: update_sums(x, *SUMMED, (1, 1)),
        r"powers must be column counts that add up to C=3, got \[1, 1\]",
    ),
    "a negative number of columns": (
        lambda e, x, c: update_sums(x, *SUMMED, (4, -1)),
        r"powers must be column counts that add up to C=3, got \[4, -1\]",
    ),
    "a residual without rows": (
        lambda e, x, c: steer_add(x, torch.ones(1, 19), c),
        r"h must be \[B, S, d\]",
    ),
    "vectors of another width": (
        lambda e, x, c: steer_add(x[None], torch.ones(1, 4), torch.zeros(1, dtype=torch.int32)),
        "another width",
    ),
    "a row without its vector": (
        lambda e, x, c: steer_add(x[None], torch.ones(1, 19), torch.ones(1, dtype=torch.int32)),
        r"lie in -1..0",
    ),
    "int64 rows": (lambda e, x, c: steer_add(x[None], torch.ones(1, 19), torch.zeros(1).long()), "int32"),
    "activations of integers": (
        lambda e, x, c: update_moments(torch.ones(2, 67).long(), torch.ones(2), Moments(67)),
        r"pooled must be \[N, d_sae=67\] float32, float16 or bfloat16, got \[2, 67\] torch.int64",
    ),
    "complex rewards": (
        lambda e, x, c: update_moments(torch.ones(2, 67), torch.ones(2).cfloat(), Moments(67)),
        r"y must be \[N=2, n_labels=1\] of real numbers, got \[2, 1\] torch.complex64",
    ),
    "a residual of integers": (
        lambda e, x, c: steer_add(x[None].long(), torch.ones(1, 19), torch.zeros(1, dtype=torch.int32)),
        r"h must be \[B, S, d\] float32, float16 or bfloat16, got \[1, 5, 19\] torch.int64",
    ),
    "vectors of integers": (
        lambda e, x, c: steer_add(x[None], torch.ones(1, 19).long(), torch.zeros(1, dtype=torch.int32)),
        "vectors must be float32, got torch.int64",
    ),
    "another backend than there is": (
        lambda e, x, c: encode(x, e, backend=["native"]),
        "backend must be the name of a backend, got list",
    ),
    "positions of another shape": (
        lambda e, x, c: steer_add(
            x[None], torch.ones(1, 19), torch.zeros(1, dtype=torch.int32), torch.ones(1, 2, dtype=torch.bool)
        ),
        "positions must be",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_bad_argument_is_named_with_what_it_was_and_must_be(name):
    call, message = BAD_CALLS[name]
    with pytest.raises(CorrSteerError, match=message):
        call(make_encoder("relu"), torch.zeros(5, 19), cu([2, 3]))


def well_called():
    """Every operation and constructor of the room, and arguments that suit it."""
    encoder, x, lengths, y = make_encoder("relu"), torch.zeros(5, 19), cu([2, 3]), torch.ones(2)
    encoding = {"x": x, "cu_seqlens": lengths, "encoder": encoder}
    form = {"weight": torch.ones(7, 19), "bias": torch.ones(7), "threshold": torch.ones(7)}
    steered = {"h": x[None], "vectors": torch.ones(1, 19), "row_vector": torch.zeros(1, dtype=torch.int32)}
    return {
        "encode": (encode, {"x": x, "encoder": encoder}),
        "encode_pool": (encode_pool, encoding | {"pool": "mean"}),
        "update_moments": (update_moments, {"pooled": torch.ones(2, 67), "y": y, "moments": Moments(67)}),
        "update_sums": (update_sums, {"pooled": x, "weights": SUMMED[0], "sums": SUMMED[1].clone(), "powers": (3,)}),
        "encode_update": (encode_update, encoding | {"y": y, "moments": Moments(67), "pool": "mean"}),
        "steer_add": (steer_add, steered | {"positions": torch.ones(1, 5, dtype=torch.bool)}),
        "Moments": (Moments, {"d_sae": 3, "n_labels": 1}),
        "Moments.merge": (Moments(3).merge, {"other": Moments(3)}),
        "RunningPool": (RunningPool, {"encoder": encoder, "n": 2}),
        "RunningPool.add": (RunningPool(encoder, 2).add, {"x": x, "cu_seqlens": lengths}),
        "RunningPool.result": (RunningPool(encoder, 2).result, {"pool": "max"}),
        "SparseEncoder": (
            SparseEncoder,
            {"d_in": 19, "d_sae": 7, "activation": "jumprelu", "input_norm": "none"} | form,
        ),
        "SparseEncoder, topk": (
            SparseEncoder,
            {"d_in": 19, "d_sae": 7, "activation": "topk", "k": 3, "weight": form["weight"], "bias": form["bias"]},
        ),
        "SparseEncoder.from_sae_lens": (SparseEncoder.from_sae_lens, {"sae": None}),
    }


WRONG = {
    "None": None, "a number": 2.5, "a negative number": -1, "a word": "gpt2", "a list": [1.0, 2.0], "a dictionary": {},
    "an array": np.ones((5, 19), np.float32), "another object": object(), "a tensor of no dimension": torch.tensor(2.5),
    "a tensor of four": torch.ones(3, 3, 3, 3), "a longer tensor": torch.ones(8), "integers": torch.ones(9, 19).long(),
}  # fmt: skip
LEFT_OUT = {("update_sums", "powers"), ("steer_add", "positions")}  # where None stands for the default


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(
    ("called", "name"), [(call, name) for call in well_called() for name in well_called()[call][1]]
)
def test_an_argument_of_another_type_or_shape_is_refused_by_its_name(called, name, wrong):
    if wrong == "None" and (called, name) in LEFT_OUT:
        return
    call, arguments = well_called()[called]
    with pytest.raises(CorrSteerError, match=name):
        call(**arguments | {name: WRONG[wrong]})
