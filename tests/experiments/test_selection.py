"""select and evaluate: strategies, directions, coefficients, and what is said when nothing can be selected."""

import dataclasses
import math

import pytest
import tiny_pipeline
import torch
from scipy.stats import binomtest

from corrsteer import (
    CorrSteerError,
    Evidence,
    Moments,
    Run,
    Steering,
    collect,
    evaluate,
    inference,
    scores,
    select,
    update_moments,
)
from corrsteer.lm.decoding import Decoding
from corrsteer.lm.hook_points import HookPoint
from corrsteer.ops.moments import COEFFICIENTS
from corrsteer.ops.rows import SparseRows
from corrsteer.rollouts.grading import grade
from corrsteer.stats import stored
from corrsteer.stats.evidence import SCORES

DECODING = Decoding(max_new_tokens=3)


def made_run(layers=(0, 1, 2), n=200, d=12, seed=0, constant=None, effect=1.0, rows=False, **evidence):
    """A run over invented activations in which feature L of layer L follows the reward, and 11 - L opposes it.

    It has evidence if it is given settings for it; from rows of activations where it has `rows`.
    """
    g = torch.Generator().manual_seed(seed)
    y = (torch.rand(n, generator=g) < 0.5).float() if constant is None else torch.full((n,), constant)
    encoders = tiny_pipeline.encoders(layers, d_sae=d)
    moments, kept = {}, {}
    for layer in layers:
        z = torch.rand(n, d, generator=g) * (torch.rand(n, d, generator=g) < 0.6)
        z[:, layer] += effect * y * (2 - 0.5 * layer)
        z[:, d - 1 - layer] += effect * (1 - y) * 0.8
        moments[layer] = {}
        for pool, factor in (("max", 1.0), ("mean", 0.5)):
            moments[layer][pool] = Moments(d)
            update_moments(factor * z, y, moments[layer][pool])
            if evidence:
                kept.setdefault(layer, {})[pool] = Evidence(d, **evidence)
                kept[layer][pool].update(factor * z, y, 0)
            if rows:
                blocks = [(0, SparseRows.from_dense(factor * z), y)]
                kept[layer][pool] = stored.statistics(blocks, d, **evidence)[1]
    return Run(
        moments,
        {layer: HookPoint(layer) for layer in layers},
        {layer: e.decoder for layer, e in encoders.items()},
        y.double(),
        pool="max",
        coefficient_pool="max",
        evidence=kept,
    )


def chosen(steering):
    return [(f.layer, f.index) for f in steering.features]


def test_single_takes_the_best_feature_of_all_layers_and_all_the_best_of_each_but_layer_0():
    run = made_run()
    assert chosen(select(run, "all")) == [(1, 1), (2, 2)]
    assert chosen(select(run, "single")) == [(1, 1)]
    assert chosen(select(run, "all", layers=[0, 2])) == [(0, 0), (2, 2)]


def test_negative_selects_the_most_negative_correlation_and_steers_against_it():
    steering = select(made_run(), "all", direction="negative")
    assert chosen(steering) == [(1, 10), (2, 9)]
    assert all(f.statistics.correlation < 0 and f.coefficient < 0 for f in steering.features)


def test_both_selects_by_the_size_of_the_correlation():
    run = made_run()
    rows = select(run, "all", direction="both", top_k=12).table[1]
    assert [abs(f.statistics.correlation) for f in rows] == sorted(
        (abs(f.statistics.correlation) for f in rows), reverse=True
    )
    assert {f.statistics.correlation > 0 for f in rows} == {True, False}
    assert all(math.copysign(1, f.coefficient) == math.copysign(1, f.statistics.correlation) for f in rows)


@pytest.mark.parametrize("kind", ("mean_positive", "mean_positive_active", "contrastive"))
def test_coefficients_come_from_their_own_pooling_and_correlations_from_theirs(kind):
    run = made_run()
    run.coefficient_pool = "mean"
    for f in select(run, "all", coefficient=kind).features:
        assert f.coefficient == pytest.approx(float(run.moments[f.layer]["mean"].coefficient(kind)[0, f.index]))
        assert f.statistics.correlation == float(run.correlation(f.layer)[f.index])


def test_the_table_gives_each_layers_best_features_with_their_frequencies():
    run = made_run()
    table = select(run, "single", top_k=4).table
    assert list(table) == [0, 1, 2]
    for layer, rows in table.items():
        r = run.correlation(layer)
        assert [f.index for f in rows] == r.topk(4).indices[r.topk(4).values > 0].tolist()
        moments = run.moments[layer]["max"]
        for f in rows:
            assert f.statistics.frequency == float(moments.frequency()[f.index])
            assert (f.statistics.frequency_positive, f.statistics.frequency_negative) == tuple(
                moments.group_frequency()[:, 0, f.index].tolist()
            )


def test_the_table_gives_intervals_p_values_and_standard_errors():
    run = made_run(permutations=99, bootstrap=100)
    run.coefficient_pool = "mean"
    tested = run.significance()
    for method in inference.METHODS:
        for layer, rows in select(run, "all", interval=method).table.items():
            low, high = inference.interval(run.evidence[layer]["max"], method)
            for f in rows:
                assert f.statistics.low == pytest.approx(float(low[f.index])) and f.statistics.high == pytest.approx(
                    float(high[f.index])
                )
                p = tuple(float(getattr(tested[layer], n)[f.index]) for n in ("p", "p_layer", "p_adjusted", "q"))
                assert (f.statistics.p_value, f.statistics.p_layer, f.statistics.p_adjusted, f.statistics.q_value) == p
                error = inference.coefficient_error(
                    run.evidence[layer]["mean"], run.moments[layer]["mean"], "mean_positive"
                )
                assert (
                    f.statistics.coefficient_error == pytest.approx(float(error[f.index]))
                    and f.statistics.score is None
                )
                for kind, (value, spread) in f.statistics.coefficients.items():
                    assert value == float(run.moments[layer]["mean"].coefficient(kind)[0, f.index]) and spread > 0
                assert list(f.statistics.coefficients) == list(COEFFICIENTS)
    assert all(
        f.statistics.p_value is f.statistics.low is f.statistics.coefficient_error is f.statistics.coefficients is None
        for f in select(made_run(), "all").features
    )


def test_alpha_keeps_what_survives_and_by_default_nothing_is_dropped_but_said():
    run = made_run(permutations=199)
    assert chosen(select(run, "all", alpha=0.05)) == chosen(select(run, "all")) == [(1, 1), (2, 2)]
    assert select(run, "all").notes == []
    run = made_run(permutations=199, effect=0.0)
    everything = select(run, "all")
    assert len(everything.features) == 2 and all(f.by_chance for f in everything.features)
    assert "2 of 2 selected features chance alone could explain (adjusted p > 0.05): layer 1" in everything.notes[0]
    nothing = select(run, "all", alpha=0.05)
    assert nothing.features == [] and nothing.table == everything.table
    assert "no feature survives alpha=0.05 (maxT): among 36 features of 3 layers, over 200 samples" in nothing.notes[0]
    assert nothing.provenance["selection"]["alpha"] == 0.05


CORRECTED = {"maxT": "p_adjusted", "layer": "p_layer", "bh": "q_value"}


@pytest.mark.parametrize("correction", CORRECTED)
def test_alpha_is_compared_with_the_p_value_of_the_correction_asked_for(correction):
    run = made_run(permutations=399, effect=0.15)
    best = select(run, "all").features
    values = {name: [getattr(f.statistics, name) for f in best] for name in CORRECTED.values()}
    assert len({tuple(v) for v in values.values()}) == 3, "they must differ for this to mean anything"
    for alpha in (*values["p_adjusted"], *values["p_layer"], *values["q_value"]):
        kept = select(run, "all", alpha=alpha, correction=correction).features
        assert kept == [f for f in best if getattr(f.statistics, CORRECTED[correction]) <= alpha]


def test_alpha_keeps_the_best_of_what_survives_even_if_something_else_ranks_higher():
    """By `contrastive` a feature of large activations ranks first, and is noise; p-values do not mind its size."""
    run = made_run(permutations=199, effect=0.6)
    for layer in (1, 2):
        g = torch.Generator().manual_seed(layer)
        y, z = run.rewards, torch.rand(200, 12, generator=g)
        z[:, 5] *= 1000
        z[:, 7] += 0.5 * y
        run.moments[layer], run.evidence[layer] = {"max": Moments(12)}, {"max": Evidence(12, permutations=199)}
        update_moments(z, y, run.moments[layer]["max"])
        run.evidence[layer]["max"].update(z, y, 0)
    run.moments.pop(0), run.evidence.pop(0)
    direction = {"score": "contrastive", "direction": "both"}
    assert chosen(select(run, "all", **direction)) == [(1, 5), (2, 5)]
    assert chosen(select(run, "all", alpha=0.05, **direction)) == [(1, 7), (2, 7)]


def test_an_alpha_that_no_p_value_can_reach_is_refused_with_the_permutations_it_takes():
    run = made_run(permutations=19)
    assert select(run, "all", alpha=0.05).features
    with pytest.raises(
        CorrSteerError, match="alpha must be at least 0.05, .* of 19 permutations, got 0.001; collect with 999"
    ):
        select(run, "all", alpha=0.001)
    assert select(run, "all", alpha=0.01, correction="bh").notes is not None


def test_the_reason_that_nothing_is_selected_comes_first_whatever_else_is_noted():
    run = made_run(permutations=199, effect=0.0)
    run.notes.append("stopped after 200 of 300 samples")
    steering = select(run, "all", alpha=0.05)
    assert steering.notes[0].startswith("no feature survives alpha=0.05") and steering.notes[1] == run.notes[0]
    for layer in run.moments:
        run.moments[layer] = {"max": Moments(12)}
        update_moments(torch.rand(50, 12), -(torch.arange(50) % 2).float(), run.moments[layer]["max"])
    steering = select(run, "all")
    assert steering.features == [] and "no reward was above 0" in steering.notes[0]


def test_scores_that_compare_with_rewards_of_0_say_so_where_there_are_none():
    run = made_run(layers=(1,), permutations=19)
    z = torch.rand(50, 12)
    run.moments[1], run.evidence[1] = {"max": Moments(12)}, {"max": Evidence(12)}
    update_moments(z, 1 + z[:, 3], run.moments[1]["max"])
    run.evidence[1]["max"].update(z, 1 + z[:, 3], 0)
    assert "every reward was above 0, so the score 'contrastive'" in select(run, "all", score="contrastive").notes[0]


def test_the_note_on_chance_is_of_what_pruning_kept(steered_world, monkeypatch):
    model, tokenizer, steering, _ = steered_world
    run = made_run(layers=(1, 2), permutations=199, effect=0.0)
    monkeypatch.setattr("corrsteer.experiments.selection.decoder_rows", lambda *_: steering.directions)
    run.points = {layer: HookPoint(3) for layer in run.points}
    pruned = select(
        run, "pruned", model=model, tokenizer=tokenizer, validation=tiny_pipeline.task(24, seed=5), decoding=DECODING,
        scale=200.0, progress=False,
    )  # fmt: skip
    assert len(pruned.features) == 1 and "1 of 1 selected features chance alone could explain" in pruned.notes[-1]


@pytest.mark.parametrize("score", SCORES[1:])
def test_other_scores_rank_the_same_way_with_their_own_p_values(score):
    run = made_run(permutations=49, rows=True)
    for direction, sign in (("positive", 1), ("negative", -1)):
        steering = select(run, "all", score=score, direction=direction)
        for f in steering.features:
            evidence = run.evidence[f.layer]["max"]
            values = scores.score(evidence, score)
            assert f.index == int((sign * values).argmax()) and f.statistics.score == float(values[f.index])
            assert f.statistics.correlation == float(run.correlation(f.layer)[f.index]) and sign * f.coefficient > 0
            assert f.statistics.p_value == float(run.significance(score)[f.layer].p[f.index])
            assert math.copysign(1, f.coefficient) == math.copysign(1, f.statistics.score)
    best = select(run, "single", score=score).features[0]
    assert best.statistics.score == max(f.statistics.score for f in select(run, "all", score=score).features)


def test_p_values_are_computed_once_for_a_score():
    run = made_run(permutations=19, rows=True)
    first = run.significance()
    assert run.significance("auroc") is not first and run.significance() is first
    with pytest.raises(CorrSteerError, match="this run holds no evidence to test features by; collect again"):
        made_run().significance()


def test_a_run_without_samples_selects_nothing_and_says_why():
    run = made_run(permutations=19)
    for layer in run.moments:
        run.moments[layer], run.evidence[layer] = {"max": Moments(12)}, {"max": Evidence(12, permutations=19)}
    for alpha in (None, 0.05):
        steering = select(run, "all", alpha=alpha)
        assert steering.features == [] and steering.notes == ["no sample was collected"]


def test_directions_are_the_decoder_rows_of_the_selected_features():
    run = made_run()
    steering = select(run, "all")
    expected = torch.cat(
        [tiny_pipeline.encoders((f.layer,), d_sae=12)[f.layer].decoder_rows([f.index]) for f in steering.features]
    )
    assert torch.equal(steering.directions, expected)
    other = tiny_pipeline.encoders((1, 2), d_sae=12, seed=50)
    assert not torch.equal(select(run, "all", encoders=other).directions, expected)


def test_a_constant_reward_gives_a_steering_without_features_that_says_why(tmp_path):
    run = collect(
        tiny_pipeline.model(), tiny_pipeline.tokenizer(), tiny_pipeline.encoders(),
        tiny_pipeline.task(8, grader=lambda *_: 0.5),
        decoding=DECODING, progress=False,
    )  # fmt: skip
    for strategy in ("single", "all"):
        steering = select(run, strategy)
        assert steering.features == [] and "every one of the 8 rewards was 0.5" in steering.notes[0]
    steering.save(tmp_path / "s")
    assert Steering.load(tmp_path / "s").notes == steering.notes
    with steering.apply(tiny_pipeline.model()):
        pass


def test_no_feature_in_the_asked_direction_is_said_in_the_notes():
    run = made_run(layers=(0,))
    steering = select(run, "all")
    assert steering.features == [] and "layer 0 is left out unless it is named in layers=[0]" in steering.notes[0]
    run.moments[0]["max"].cross.abs_().neg_()
    steering = select(run, "all", layers=[0])
    assert steering.features == [] and "no feature of layers [0] has a positive correlation" in steering.notes[0]


def test_rewards_that_are_never_positive_select_nothing_and_say_why():
    run = made_run()
    for layer in run.moments:
        z = torch.rand(50, 12, generator=torch.Generator().manual_seed(layer))
        run.moments[layer] = {"max": Moments(12)}
        update_moments(z, -(z[:, 3] < 0.5).float(), run.moments[layer]["max"])
    steering = select(run, "all")
    assert steering.features == [] and "no reward was above 0" in steering.notes[0]


def test_rewards_that_are_always_positive_leave_contrastive_nothing_to_subtract():
    run = made_run()
    for layer in run.moments:
        z = torch.rand(50, 12, generator=torch.Generator().manual_seed(layer))
        run.moments[layer] = {"max": Moments(12)}
        update_moments(z, 1 + z[:, 3], run.moments[layer]["max"])
    assert "nothing to subtract" in select(run, "all", coefficient="contrastive").notes[0]
    assert select(run, "all").notes == []


def test_a_decoder_that_is_gone_is_named_with_what_to_do(tmp_path):
    made_run().save(tmp_path)
    with pytest.raises(CorrSteerError, match="Give the encoders to select"):
        select(Run.load(tmp_path), "all")
    assert chosen(select(Run.load(tmp_path), "all", encoders=tiny_pipeline.encoders((1, 2), d_sae=12))) == [
        (1, 1),
        (2, 2),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ({"strategy": "best"}, "strategy must be one of single, all, pruned, search, got 'best'"),
        ({"score": "kendall"}, "score must be one of pearson, point_biserial, .*, got 'kendall'"),
        ({"score": "auroc"}, "score 'auroc' and interval 'delta' need evidence, which this run does not hold"),
        ({"alpha": 0.05}, "alpha needs p-values, but the run has no permutations of the score 'pearson'; collect with"),
        ({"interval": "fisher"}, "score 'pearson' and interval 'fisher' need evidence"),
        ({"alpha": 5}, "alpha must be between 0 and 1, got 5"),
        ({"correction": "holm"}, "correction must be one of maxT, layer, bh, got 'holm'"),
        ({"interval": "exact"}, "interval must be one of delta, fisher, bootstrap, got 'exact'"),
        ({"coefficient": "one"}, "coefficient must be one of"),
        ({"direction": "up"}, "direction must be one of"),
        ({"layers": [7]}, r"layers must be among those collected, \[0, 1, 2\], got \[7\]"),
        ({"top_k": 0}, "top_k must be a whole number of at least 1, got 0"),
        (
            {"encoders": tiny_pipeline.encoders((1,), d_sae=12), "layers": [0, 1, 2]},
            r"encoders must hold layers \[0, 2\], of which features were selected, got \[1\]",
        ),
        ({"strategy": "pruned"}, "give model, tokenizer and validation"),
    ),
)
def test_a_bad_choice_is_named(arguments, message):
    with pytest.raises(CorrSteerError, match=message):
        select(made_run(), **arguments)


@pytest.fixture(scope="module")
def steered_world():
    """A steering of two features: one writes digits_up's even digits, the other a letter."""
    model, tokenizer = tiny_pipeline.model(), tiny_pipeline.tokenizer()
    run = made_run(layers=(1, 2))
    steering = select(run, "all")
    unembed = model.lm_head.weight.detach()
    helps, hurts = (unembed[tokenizer.convert_tokens_to_ids(c)] for c in ("4", "A"))
    steering.directions = torch.stack([hurts, helps])
    steering.features = [
        dataclasses.replace(f, layer=3, hook_point="blocks.3.hook_resid_post") for f in steering.features
    ]
    return model, tokenizer, steering, run


def test_pruned_keeps_exactly_what_beats_the_unsteered_score_when_steered_alone(steered_world, monkeypatch):
    model, tokenizer, steering, run = steered_world
    monkeypatch.setattr("corrsteer.experiments.selection.decoder_rows", lambda *_: steering.directions)
    validation = tiny_pipeline.task(24, seed=5)
    run.points = {layer: HookPoint(3) for layer in run.points}
    pruned = select(
        run, "pruned", model=model, tokenizer=tokenizer, validation=validation, decoding=DECODING, scale=200.0,
        progress=False,
    )  # fmt: skip
    recorded = pruned.provenance["selection"]
    unsteered = grade(model, tokenizer, validation, DECODING, progress=False).score
    assert recorded["unsteered_score"] == unsteered
    alone = []
    for feature, direction in zip(select(run, "all").features, steering.directions):
        with Steering([feature], direction[None]).apply(model, scale=200.0):
            alone.append(grade(model, tokenizer, validation, DECODING, progress=False).score)
    assert [entry["score"] for entry in recorded["score_alone"]] == alone
    assert alone[0] < unsteered < alone[1], "one must hurt and one help for this to mean anything"
    assert chosen(pruned) == [(2, 2)] and torch.equal(pruned.directions, steering.directions[1:])


def test_evaluate_counts_what_steering_changed(steered_world):
    model, tokenizer, steering, _ = steered_world
    task = tiny_pipeline.task(30, seed=6)
    helper = Steering(steering.features[1:], steering.directions[1:])
    result = evaluate(model, tokenizer, task, helper, scale=200.0, decoding=DECODING, progress=False)
    before = [e["reward_before"] for e in result.examples]
    after = [e["reward_after"] for e in result.examples]
    assert result.n == 30 and result.unsteered == sum(before) / 30 and result.steered == sum(after) / 30
    assert result.steered > result.unsteered
    assert result.improved == sum(a > b for a, b in zip(after, before))
    assert result.worsened == sum(a < b for a, b in zip(after, before))
    assert result.changed_equal == sum(
        e["before"] != e["after"] and e["reward_before"] == e["reward_after"] for e in result.examples
    )
    assert result.side_effect_ratio == result.worsened / (result.improved + result.worsened)
    assert result.p_value == pytest.approx(binomtest(result.improved, result.improved + result.worsened).pvalue)


def test_evaluating_no_steering_changes_nothing(steered_world):
    model, tokenizer, _, _ = steered_world
    result = evaluate(model, tokenizer, tiny_pipeline.task(10), None, decoding=DECODING, progress=False)
    assert (result.improved, result.worsened, result.changed_equal) == (0, 0, 0)
    assert result.side_effect_ratio is None and result.p_value == 1.0 and result.unsteered == result.steered
