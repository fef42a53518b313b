"""Baselines: the steerings that another is compared with, made of the same run."""

import pytest
import tiny_pipeline
import torch

from corrsteer import CorrSteerError, HookPoint, Moments, Run, Steering, collect, select, update_moments
from corrsteer.experiments.baselines import baselines
from corrsteer.experiments.seen_samples import SELECTED, overlap_notes
from corrsteer.lm.decoding import Decoding
from corrsteer.ops.rows import SparseRows
from corrsteer.stats import stored
from corrsteer.stats.evidence import SCORES

Y = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
D, D_IN = 6, 4
MEANS = {0: [9.0, 0, 0, 0], 1: [1.0, 2, 0, -2], 2: [0.0, -3, 4, 0]}  # layer -> what good samples' residuals have more
DECODERS = {layer: tiny_pipeline.encoders((layer,), d_sae=D, d_in=D_IN)[layer].decoder for layer in MEANS}
# Feature 0 correlates best, 1 ranks samples best but for its outlier, 4 is never active, 5 in one good sample alone.
Z = torch.tensor([
    [3.0, 2.0, 1.0, 1.0, 0.0, 0.5],
    [3.0, 2.1, 0.0, 1.0, 0.0, 0.0],
    [3.0, 2.2, 1.0, 1.0, 0.0, 0.0],
    [1.0, 9.0, 0.0, 0.0, 0.0, 0.0],
    [1.1, 1.9, 1.0, 1.0, 0.0, 0.0],
    [0.0, 1.8, 0.0, 0.0, 0.0, 0.0],
    [0.0, 1.7, 1.0, 1.0, 0.0, 0.0],
    [0.0, 1.6, 0.0, 0.0, 0.0, 0.0],
])  # fmt: skip
RANDOM = ("random feature 1", "random feature 2", "random feature 3")


def moments_of(rows, y=Y):
    moments = Moments(rows.shape[1])
    update_moments(rows, y, moments)
    return moments


def residuals_of(layer):
    """Class means differ by exactly what MEANS says for `mean`, and by twice as much at the last prompt token."""
    noise = torch.tensor([1.0, -1, 1, -1, 1, -1, 1, -1])[:, None] * torch.tensor([0.25, 0.5, 0.75, 1.0])
    return 5 + noise + Y[:, None] * torch.tensor(MEANS[layer])


def made_run(layers=(0, 1, 2), rows=True, **changed):
    z = {0: Z, 1: Z, 2: 0.5 * Z.flip(1)}
    settings = {
        "moments": {layer: {"max": moments_of(z[layer])} for layer in layers},
        "points": {layer: HookPoint(layer) for layer in layers},
        "decoders": {layer: DECODERS[layer] for layer in layers},
        "rewards": Y.double(),
        "pool": "max",
        "coefficient_pool": "max",
        "evidence": {},
        "residuals": {
            layer: {"mean": moments_of(h), "last_prompt": moments_of(h + Y[:, None] * torch.tensor(MEANS[layer]))}
            for layer in layers
            for h in [residuals_of(layer)]
        },
        "provenance": {"model": "tiny", "samples": {"task": "t", "prompts": []}},
    } | changed
    for layer in layers if "evidence" not in changed else ():
        evidence = stored.statistics([(0, SparseRows.from_dense(z[layer]), Y)], D)[1]
        evidence.rows = evidence.rows if rows else None
        settings["evidence"][layer] = {"max": evidence}
    return Run(**settings)


def vector_of(steering):
    (vector,) = steering.vectors().values()
    return vector


def test_a_difference_of_means_is_made_of_every_layer_but_0_and_every_pooling_of_residuals():
    run = made_run()
    found = baselines(run, select(run, "single"))["difference of means"]
    expected = [(layer, pool) for layer in (1, 2) for pool in ("mean", "last_prompt")]
    assert [(b.provenance["selection"]["layer"], b.provenance["selection"]["pool"]) for b in found] == expected
    for steering, (layer, pool) in zip(found, expected):
        (feature,) = steering.features
        assert (feature.hook_point, feature.coefficient, feature.layer) == (str(HookPoint(layer)), 1.0, None)
        more = torch.tensor(MEANS[layer]) * (1 if pool == "mean" else 2)
        torch.testing.assert_close(vector_of(steering), more, rtol=0, atol=1e-6)
        assert steering.notes == [f"the difference of class means of layer {layer}'s residuals, pooled by {pool}"]


def test_the_residual_dimension_is_the_one_that_correlates_best_times_the_difference_of_its_class_means():
    run = made_run()
    (best,) = baselines(run, select(run, "single"))["residual dimension"]
    r = {(layer, i): float(run.residuals[layer]["mean"].correlation()[0, i]) for layer in (1, 2) for i in range(D_IN)}
    assert max(r, key=lambda at: abs(r[at])) == (2, 1) and r[2, 1] < 0
    assert vector_of(best).tolist() == pytest.approx([0, -3, 0, 0]) and str(*best.vectors()) == str(HookPoint(2))
    assert best.features[0].coefficient == pytest.approx(-3)
    assert best.notes == [f"dimension 1 of layer 2's residuals, r = {r[2, 1]:.3f}"]


@pytest.mark.parametrize(("strategy", "scale"), [("single", 1.0), ("all", 1.0), ("all", -2.5)])
def test_a_random_feature_is_another_of_the_same_layer_and_adds_a_vector_of_equal_norm(strategy, scale):
    run, drawn = made_run(evidence={}), set()
    steering = select(run, strategy, scale=scale)
    theirs = {(f.layer, f.index) for f in steering.features}
    for seed in range(40):
        (random,) = baselines(run, steering, seed=seed)["random feature 1"]
        assert [f.layer for f in random.features] == [f.layer for f in steering.features]
        for (point, vector), expected in zip(random.vectors().items(), steering.vectors().values()):
            assert float(vector.norm()) == pytest.approx(abs(scale) * float(expected.norm()), rel=1e-5), point
        for feature, direction in zip(random.features, random.directions):
            assert torch.equal(direction, DECODERS[feature.layer].rows([feature.index])[0])
            assert feature.coefficient > 0
        drawn |= {(f.layer, f.index) for f in random.features}
    found = baselines(run, steering, seed=39, draws=4)
    (again,), *others = (found[f"random feature {draw}"] for draw in (1, 2, 3, 4))
    assert again.features == random.features
    assert len({(f.layer, f.index) for (one,) in [[again], *others] for f in one.features}) == 4 * len(random.features)
    active = {1: {0, 1, 2, 3, 5}, 2: {5, 4, 3, 2, 0}}  # the one that is not active in any sample is never drawn
    assert drawn == {(f.layer, i) for f in steering.features for i in active[f.layer]} - theirs


def test_features_that_rank_best_by_another_score_are_each_there_once():
    run = made_run(layers=(1,))
    best = {score: select(run, "single", score=score) for score in SCORES}
    assert {score: steering.features[0].index for score, steering in best.items()} == {
        "pearson": 0, "point_biserial": 0, "contrastive": 0, "squared_ratio": 5, "mutual_information": 1, "auroc": 1,
        "spearman": 1,
    }  # fmt: skip
    found = {name: steering for name, steering in baselines(run, best["pearson"]).items() if name.startswith("best by")}
    assert list(found) == ["best by squared_ratio", "best by mutual_information"]
    for name, (steering,) in found.items():
        same = best[name.removeprefix("best by ")]
        assert steering.features == same.features and torch.equal(steering.directions, same.directions)


@pytest.mark.parametrize(
    ("changed", "left"),
    [
        ({"residuals": {}}, {*RANDOM, "best by squared_ratio", "best by mutual_information"}),
        ({"evidence": {}}, {"difference of means", *RANDOM, "residual dimension"}),
        ({"rows": False}, {"difference of means", *RANDOM, "best by squared_ratio",
                                    "residual dimension"}),
        ({"layers": (0,)}, set()),
    ],
    ids=["no residuals", "no evidence", "no rows", "layer 0 alone"],
)  # fmt: skip
def test_a_baseline_that_cannot_be_had_is_left_out(changed, left):
    run = made_run(**changed)
    assert set(baselines(run, select(run, "single"))) == left


@pytest.mark.parametrize("y", (torch.ones(8), torch.zeros(8), 1 + torch.arange(8.0)))
def test_without_samples_of_both_kinds_there_are_no_class_means(y):
    run = made_run(
        (1,), evidence={}, moments={1: {"max": moments_of(Z, y)}}, rewards=y.double(),
        residuals={1: {"mean": moments_of(residuals_of(1), y), "last_prompt": moments_of(residuals_of(1), y)}},
    )  # fmt: skip
    steering = Steering.from_vectors({"blocks.1.hook_resid_post": torch.ones(D_IN)})
    assert set(baselines(run, steering)) == set(RANDOM)


def test_a_steering_of_nothing_or_elsewhere_has_no_random_feature_to_compare_with():
    run = made_run()
    for vectors in ({"model.layers.1": torch.ones(D_IN)}, {str(HookPoint(1)): torch.zeros(D_IN)}):
        assert RANDOM[0] not in baselines(run, Steering.from_vectors(vectors))
    nothing = Steering([], torch.zeros(0, 0))
    assert RANDOM[0] not in baselines(run, nothing) and baselines(run, nothing)["difference of means"]


def test_baselines_have_the_positions_of_the_steering_and_no_scale():
    run = made_run()
    found = baselines(run, select(run, "all", positions="all", scale=3.0))
    assert {(b.positions, b.scale) for candidates in found.values() for b in candidates} == {("all", 1.0)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"run": None}, "run must be a Run"),
        ({"steering": None}, "steering must be a Steering"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"encoders": {}}, "encoders must hold layers"),
    ],
)
def test_what_baselines_cannot_be_made_of_is_refused(arguments, message):
    run = made_run()
    arguments = {"run": run, "steering": select(run, "single")} | arguments
    with pytest.raises(CorrSteerError, match=message):
        baselines(arguments.pop("run"), arguments.pop("steering"), **arguments)


def test_baselines_of_a_collected_run_fit_its_model_and_say_which_samples_they_have_seen(tmp_path):
    model, task = tiny_pipeline.model(), tiny_pipeline.task()
    run = collect(
        model, tiny_pipeline.tokenizer(), tiny_pipeline.encoders(), task, scores=("pearson", "squared_ratio"),
        permutations=0, decoding=Decoding(max_new_tokens=3), progress=False,
    )  # fmt: skip
    run.save(tmp_path / "run")
    steering = select(run, "all")
    found = baselines(run, steering)
    assert {"difference of means", *RANDOM, "residual dimension"} <= set(found)
    loaded = baselines(Run.load(tmp_path / "run"), steering, encoders=tiny_pipeline.encoders())
    for name, candidates in found.items():
        for candidate, same in zip(candidates, loaded[name], strict=True):
            candidate.check(model)
            assert candidate.features == same.features and torch.equal(candidate.directions, same.directions)
            assert candidate.provenance[SELECTED] == steering.provenance[SELECTED]
            assert "40 of the 40 samples" in overlap_notes(task, candidate.provenance)[0]
            candidate.save(tmp_path / "s")
            assert Steering.load(tmp_path / "s").features == candidate.features
