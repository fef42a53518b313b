"""Search: what is tried, what it costs, what is found, and that nothing it was chosen by confirms it."""

import dataclasses
import re

import pytest

from corrsteer import CorrSteerError, Decoding, SearchOptions, Steering, collect, demo, evaluate, run_trials, select
from corrsteer.experiments.search import UNSTEERED
from corrsteer.tasks import Task

DECODING = Decoding(max_new_tokens=4)


@pytest.fixture(scope="module")
def world():
    model, tokenizer, encoders = demo.load()
    train, validation, test = demo.tasks()
    run = collect(
        model, tokenizer, encoders, train.take(600), decoding=DECODING, permutations=19, progress=False
    )  # fmt: skip
    return run, {"model": model, "tokenizer": tokenizer}, validation, test


def searched(world, validation=None, **options):
    run, of_model, everything, _ = world
    names = {field.name for field in dataclasses.fields(SearchOptions)}
    of_search = {name: options.pop(name) for name in list(options) if name in names}
    return select(
        run, "search", **of_model, validation=validation or everything, decoding=DECODING, progress=False,
        options=SearchOptions(**of_search), **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def found(world):
    return searched(world)


def test_search_finds_a_steering_that_is_better_than_that_of_the_best_correlation(world, found, tmp_path):
    run, of_model, _, test = world
    found.save(tmp_path / "s")
    loaded = Steering.load(tmp_path / "s")
    assert (loaded.scale, loaded.positions) == (found.scale, found.positions) and loaded.scale != 1
    single = select(run, "single", coefficient="mean_positive_active")
    scores = {
        name: result.steered
        for name, result in evaluate(
            **of_model, task=test, steering={"single": single, "search": loaded}, decoding=DECODING, progress=False
        ).items()
    }
    assert scores["search"] > scores["single"] + 0.05
    confirmed = found.provenance["search"]["confirmation"]
    assert confirmed["confirmed"] and confirmed["n"] == 150 and confirmed["p_value"] < 1e-9
    assert found.notes[0].startswith("confirmed: on 150 validation samples that the search had not seen, 0.9")


def test_its_own_scale_and_positions_are_what_a_steering_is_applied_with(world, found):
    _, of_model, validation, _ = world
    few, settings = validation.take(40), {"decoding": DECODING, "progress": False}
    own = evaluate(**of_model, task=few, steering=found, **settings)
    said = evaluate(**of_model, task=few, steering=found, scale=found.scale, positions=found.positions, **settings)
    other = evaluate(**of_model, task=few, steering=found, scale=0.1, **settings)
    assert own.examples == said.examples != other.examples


def test_completions_are_counted_and_fewer_than_of_a_grid_and_none_of_the_race_is_of_a_sample_that_confirms(
    world, monkeypatch
):
    asked = []

    def spy(model, tokenizer, task, trials, *arguments, **options):
        asked.append(({example.prompt for example in task.examples}, len(trials), list(trials)))
        return run_trials(model, tokenizer, task, trials, *arguments, **options)

    monkeypatch.setattr("corrsteer.experiments.search.run_trials", spy)
    steering = searched(world)
    record = steering.provenance["search"]
    assert record["completions"] == sum(len(prompts) * trials for prompts, trials, _ in asked)
    assert record["completions"] < record["grid"]["completions"] / 2
    *race, (confirming, n, trials) = asked
    assert n == 2 and trials[0] is UNSTEERED and trials[1].steering.features == steering.features
    seen = set().union(*(prompts for prompts, _, _ in race))
    assert not seen & confirming
    assert seen | confirming == {example.prompt for example in world[2].examples}
    scales = record["grid"]["scales"]
    joined = record["trials"] - len({id(trial) for _, _, trials in race for trial in trials if trial.steers})
    assert joined == 0, "every trial that is counted was run"
    entered = record["rounds"][-1]["entered"]
    assert record["grid"]["completions"] == 150 * (record["candidates"] * len(scales) + 1 + record["trials"] - entered)


def test_the_curve_of_a_finalist_is_of_graded_completions(world, found):
    """The whole race is done again by hand for the finalist that won."""
    _, of_model, validation, _ = world
    racing, _, _ = validation.split(0.5, 0.5, 0, seed=0)
    best = found.provenance["search"]["finalists"][0]
    (feature,) = found.features
    assert best["feature"] == {"layer": feature.layer, "index": feature.index, "coefficient": feature.coefficient}
    assert max(best["curve"], key=lambda point: point["score"])["scale"] == found.scale
    for point in best["curve"]:
        result = evaluate(
            **of_model, task=racing.take(point["n"]), steering=found, scale=point["scale"], decoding=DECODING,
            progress=False,
        )  # fmt: skip
        assert result.steered == pytest.approx(point["score"])
        assert (point["left"] is None) == (point["n"] == 150) or point["left"]


def test_the_same_seed_gives_the_same_search(world, found):
    again, other = searched(world), searched(world, seed=1)
    assert again.provenance == found.provenance and again.features == found.features and again.notes == found.notes
    assert other.provenance["search"]["rounds"] != found.provenance["search"]["rounds"]


def test_a_budget_of_completions_holds(world, found):
    budget = found.provenance["search"]["completions"] // 2
    limited = searched(world, completions=budget)
    record = limited.provenance["search"]
    assert record["completions"] <= budget < found.provenance["search"]["completions"]
    assert record["confirmation"]["confirmed"]
    assert any(note.startswith("the budget ended the race for") for note in limited.notes)
    assert record["completions"] > 0.6 * budget, "what was kept to try features together was used"
    with pytest.raises(CorrSteerError, match=r"completions must be at least \d+, for \d+ trials of 16 samples"):
        searched(world, completions=1000)


def test_a_budget_of_time_ends_the_race_early(world, found):
    limited = searched(world, minutes=1e-4)
    assert limited.provenance["search"]["completions"] < found.provenance["search"]["completions"]
    assert limited.provenance["search"]["confirmation"]["n"] == 150


def test_a_budget_that_leaves_nothing_to_try_features_together_is_enough_for_one(world):
    with pytest.raises(CorrSteerError, match="lower candidates or confirm") as refused:
        searched(world, completions=1)
    least = int(re.search(r"at least (\d+)", str(refused.value))[1])
    steering = searched(world, completions=least)
    assert steering.provenance["search"]["completions"] == least and len(steering.features) == 1
    assert len(set(steering.notes)) == len(steering.notes)


def test_both_signs_are_candidates_and_the_positive_alone_if_asked(world):
    both, positive = searched(world, candidates=1), searched(world, candidates=1, direction="positive")
    assert both.provenance["search"]["candidates"] > positive.provenance["search"]["candidates"] >= 3


def test_a_negative_candidate_that_is_never_active_with_a_positive_reward_has_a_strength(world):
    from test_selection import made_run

    from corrsteer.experiments.ranking import Ranking

    run = made_run(layers=(1,), permutations=19)
    moments = run.moments[1][run.coefficient_pool]
    moments.group_active_sum[0, 0], moments.group_active_count[0, 0] = 0, 0
    ranking = Ranking(run, coefficient="mean_positive_active")
    feature = ranking.top(1, "negative", 1)[0]
    assert feature.coefficient == 0
    mean = moments.group_active_sum[1, 0, feature.index] / moments.group_active_count[1, 0, feature.index]
    assert ranking.with_strength(feature).coefficient == pytest.approx(-float(mean))


def test_all_positions_are_tried_as_well_if_asked(world):
    steering = searched(world, positions=("generated", "all", "generated"), candidates=1)
    kinds = {one["positions"] for one in steering.provenance["search"]["finalists"]}
    assert kinds <= {"generated", "all"} and steering.positions in kinds


def test_where_no_trial_is_better_the_result_says_so_in_words(world):
    """Every completion is right, so none is better."""
    everything = world[2].graded_by(lambda completion, example: 1.0)
    steering = searched(world, everything)
    assert steering.features == []
    assert steering.notes[0] == "no trial did better than no steering on 150 validation samples (1.0000)"
    assert steering.provenance["search"]["confirmation"] is None


def test_rewards_that_are_no_shares_are_searched_too(world):
    """The sum of the digits that are written, far from 0 and 1; a race's span is that of the rewards."""

    def digits(completion, example):
        return float(sum(int(character) for character in completion if character.isdigit()))

    sized = world[2].graded_by(digits)
    steering = searched(world, sized, candidates=1)
    confirmation = steering.provenance["search"]["confirmation"]
    assert confirmation["difference"] == pytest.approx(confirmation["steered"] - confirmation["unsteered"])
    assert confirmation["low"] < confirmation["difference"] < confirmation["high"]


def test_many_small_losses_for_a_few_large_wins_are_no_confirmation():
    """The mean rises, by chance, and most samples fall."""
    from corrsteer.stats.paired import paired_p_value

    before, after = [0.0] * 60, [-0.1] * 57 + [10.0] * 3
    assert sum(after) > 0 and paired_p_value(before, after) > 0.05


def test_repeated_prompts_are_noted(world):
    rows = [{"prompt": e.prompt, "answer": e.answer} for e in world[2].take(60).examples for _ in range(2)]
    steering = searched(world, Task.from_rows(rows, grader="exact", name="twice"), candidates=1)
    assert any(note.startswith("60 of the 120 samples repeat a prompt") for note in steering.notes)


def test_a_curve_that_ends_where_it_is_best_is_noted(world):
    """A scale so far off that the grid's end comes before the best."""
    steering = searched(world, scale=2.0**-9, candidates=1, direction="positive")
    scales = steering.provenance["search"]["grid"]["scales"]
    assert max(scales) <= 0.5 and min(scales) >= 2.0**-15
    assert steering.scale == 0.5
    assert any("so a better one may lie beyond it; search again with scale=0.5" in note for note in steering.notes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 0.05}, None),
        ({"score": "auroc"}, "score must be one that every pooling has to search"),
        ({"validation": Task.from_rows([{"prompt": str(n), "answer": "1"} for n in range(20)])}, "at least 16 samples"),
        ({"positions": ()}, "positions must be one of generated, all, prompt, or more to search"),
        ({"positions": ("some",)}, "positions must be one of"),
        ({"scale": 0.0}, "scale must not be 0 to search"),
        ({"confirm": 1.5}, "confirm must"),
        ({"candidates": 0}, "candidates must"),
        ({"minutes": 0}, "minutes must be above 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_makes_no_sense_is_refused(world, arguments, message):
    if message is None:
        run, of_model, validation, _ = world
        with pytest.raises(CorrSteerError, match="alpha must be left out to search"):
            select(run, "search", alpha=0.05, **of_model, validation=validation)
        return
    with pytest.raises(CorrSteerError, match=message):
        searched(world, **arguments)


def test_options_of_the_search_are_refused_with_other_strategies_and_the_model_is_asked_for(world):
    run, of_model, validation, _ = world
    with pytest.raises(CorrSteerError, match="options are of strategy 'search'"):
        select(run, "all", options=SearchOptions())
    with pytest.raises(CorrSteerError, match="strategy 'search' steers the model: give model"):
        select(run, "search", validation=validation)
    with pytest.raises(CorrSteerError, match="or more to search"):
        select(run, "pruned", **of_model, validation=validation, positions=("generated", "all"))
