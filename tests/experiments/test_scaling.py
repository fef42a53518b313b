"""calibrate_scale: the curve that is kept, and the scale that is taken from it."""

import pytest
import tiny_pipeline
import torch
from test_selection import DECODING, made_run

from corrsteer import CorrSteerError, Decoding, Steering, calibrate_scale, demo, evaluate, run_trials, select
from corrsteer.experiments.scaling import calibrate_best
from corrsteer.steering.features import Feature


@pytest.fixture(scope="module")
def world():
    """A model, and a steering that writes an even digit, which is the reward."""
    model, tokenizer = tiny_pipeline.model(), tiny_pipeline.tokenizer()
    steering = select(made_run(layers=(1, 2), permutations=19), "single")
    steering.directions = model.lm_head.weight.detach()[tokenizer.convert_tokens_to_ids("4")][None].clone()
    return model, tokenizer, steering


def test_the_steering_keeps_the_best_scale_and_the_whole_curve(world, tmp_path):
    model, tokenizer, steering = world
    validation = tiny_pipeline.task(24, seed=5)
    settings = {"decoding": DECODING, "progress": False}
    scaled = calibrate_scale(model, tokenizer, steering, validation, scales=(200, -200, 20), **settings)
    found = scaled.provenance["calibration"]
    assert [point["scale"] for point in found["curve"]] == [0, 20, 200, -200]
    for point in found["curve"][1:]:
        result = evaluate(model, tokenizer, validation, steering, scale=point["scale"], **settings)
        assert (point["score"], point["improved"], point["worsened"]) == (
            result.steered, result.improved, result.worsened,
        )  # fmt: skip
        n = len(validation)
        assert point["error"] == pytest.approx((point["score"] * (1 - point["score"]) / (n - 1)) ** 0.5)  # 0 or 1
    assert found["curve"][0]["score"] == result.unsteered
    best = max(found["curve"][1:], key=lambda p: p["score"])
    assert best["score"] > result.unsteered and found["scale"] == best["scale"]
    assert (scaled.scale, scaled.positions) == (best["scale"], "generated")
    assert scaled.features == steering.features and steering.scale == 1, "coefficients are as they were"
    assert found["validation"] == {"task": validation.name, "n": 24, "positions": "generated"}
    once = evaluate(model, tokenizer, validation, scaled, **settings)
    assert once.steered == best["score"], "what is written is what was measured"
    scaled.save(tmp_path / "s")
    loaded = Steering.load(tmp_path / "s")
    assert loaded.provenance["calibration"] == found and loaded.scale == best["scale"]


@pytest.mark.parametrize("strength", [0.1, 1.0, 50.0])
def test_scales_are_tried_further_at_the_better_end_until_the_curve_turns(strength):
    """A feature that helps at some strength and breaks the output at four times that: too weak, right, too strong."""
    model, tokenizer, encoders = demo.load()
    feature = Feature("blocks.1.hook_resid_post", 2.4 * strength, 1, 5)
    steering, (_, validation, _) = Steering([feature], encoders[1].decoder.rows([5])), demo.tasks()
    settings = {"decoding": Decoding(max_new_tokens=4), "progress": False}
    found = calibrate_scale(model, tokenizer, steering, validation.take(60), **settings).provenance["calibration"]
    scores = {point["scale"]: point["score"] for point in found["curve"][1:]}
    scales = list(scores)
    assert all(b == 2 * a for a, b in zip(scales, scales[1:])), "a geometric grid without gaps"
    assert scales[0] < found["scale"] < scales[-1]
    assert 1 < found["scale"] * strength < 4 and scores[found["scale"]] > 0.9 > 2 * found["curve"][0]["score"] - 0.05


def test_nothing_is_tried_past_the_scale_at_which_every_sample_is_right(world):
    model, tokenizer, steering = world
    validation, settings = tiny_pipeline.task(24, seed=5), {"decoding": DECODING, "progress": False}
    scaled = calibrate_scale(model, tokenizer, steering, validation, **settings)
    curve = scaled.provenance["calibration"]["curve"]
    assert [point["scale"] for point in curve] == [0, 0.25, 0.5, 1, 2, 4, 8]
    assert scaled.scale == 8 and curve[-1]["score"] == 1


def test_a_steering_that_is_calibrated_again_is_tried_at_the_same_scales(world):
    model, tokenizer, steering = world
    settings = {"scales": (2.0, 200.0), "decoding": DECODING, "progress": False}
    once = calibrate_scale(model, tokenizer, steering, tiny_pipeline.task(12), **settings)
    twice = calibrate_scale(model, tokenizer, once, tiny_pipeline.task(12), **settings)
    assert twice.provenance["calibration"] == once.provenance["calibration"] and twice.scale == once.scale


def test_samples_are_steered_at_the_positions_asked_for(world, monkeypatch):
    model, tokenizer, steering = world
    asked = []

    def spy(model, tokenizer, task, trials, *arguments, **options):
        asked.extend(trial.positions for trial in trials if trial.steers)
        return run_trials(model, tokenizer, task, trials, *arguments, **options)

    monkeypatch.setattr("corrsteer.experiments.scaling.run_trials", spy)
    settings = {"scales": (2.0,), "decoding": DECODING, "progress": False, "positions": "prompt"}
    scaled = calibrate_scale(model, tokenizer, steering, tiny_pipeline.task(4), **settings)
    assert scaled.positions == "prompt"
    assert asked == ["prompt"] == [scaled.provenance["calibration"]["validation"]["positions"]]


def test_the_best_of_several_candidates_is_each_at_its_best_scale(world):
    model, tokenizer, steering = world
    validation, settings = tiny_pipeline.task(24, seed=5), {"decoding": DECODING, "progress": False}
    harmful = Steering(steering.features, -steering.directions)
    best = calibrate_best(model, tokenizer, {"both": [harmful, steering], "harmful": [harmful]}, validation, **settings)
    alone = calibrate_scale(model, tokenizer, steering, validation, **settings)
    assert torch.equal(best["both"].directions, steering.directions) and best["both"].scale == alone.scale == 8
    record = best["both"].provenance["calibration"]
    assert record["curve"] == alone.provenance["calibration"]["curve"] and record["candidates"] == 2
    assert best["harmful"].provenance["calibration"]["candidates"] == 1
    curve = best["harmful"].provenance["calibration"]["curve"]
    assert best["harmful"].scale == max(curve[1:], key=lambda point: point["score"])["scale"] != 1, "not left at 1"
    assert best["harmful"].provenance["calibration"]["scale"] == best["harmful"].scale
    assert not any("stays at" in note for note in best["harmful"].notes)


def test_a_single_sample_has_no_standard_error(world):
    model, tokenizer, steering = world
    scaled = calibrate_scale(
        model, tokenizer, steering, tiny_pipeline.task(1), scales=(1,), decoding=DECODING, progress=False
    )
    assert scaled.provenance["calibration"]["curve"][1]["error"] is None


def test_of_equal_scores_the_smallest_scale_is_taken(world):
    model, tokenizer, steering = world
    scaled = calibrate_scale(
        model, tokenizer, steering, tiny_pipeline.task(12), scales=(1e-6, 1e-5), decoding=DECODING, progress=False
    )
    assert scaled.provenance["calibration"]["scale"] == 1e-6


def test_where_every_scale_does_worse_the_scale_stays_and_a_note_says_so(world):
    model, tokenizer, steering = world
    spoiled = Steering(steering.features, -steering.directions, scale=3.0)
    scaled = calibrate_scale(
        model, tokenizer, spoiled, tiny_pipeline.task(24), scales=(500,), decoding=DECODING, progress=False
    )
    assert scaled.scale == 3
    assert "did as well as unsteered on validation" in scaled.notes[-1]


def test_scales_and_steerings_that_make_no_sense_are_refused(world):
    model, tokenizer, steering = world
    refused = {
        (): "scales must hold at least one number",
        (0.0,): "scales must not be 0",
        (1, float("nan")): r"scales must be a sequence of finite numbers, got \(1, nan\)",
    }
    for scales, message in refused.items():
        with pytest.raises(CorrSteerError, match=message):
            calibrate_scale(model, tokenizer, steering, tiny_pipeline.task(4), scales=scales)
    empty = Steering([], steering.directions[:0], notes=["nothing was selected"])
    with pytest.raises(CorrSteerError, match="steering has no features to scale: nothing was selected"):
        calibrate_scale(model, tokenizer, empty, tiny_pipeline.task(4))
