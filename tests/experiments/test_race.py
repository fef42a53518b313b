"""Races: which trials leave, when, and how often the wrong one does."""

import math
import random

import numpy as np
import pytest

from corrsteer.experiments.race import BETS, FIRST, Race, log_wealth
from corrsteer.experiments.trials import Trial


def world(scores, n, seed=0, unsteered=0.5):
    """Rewards 0 and 1 of trials by name, each of a mean of its own."""
    rng = random.Random(seed)
    means = {**scores, "unsteered": unsteered}
    drawn = {name: [float(rng.random() < mean) for _ in range(n)] for name, mean in means.items()}

    def run(trials, samples):
        run.completions += len(trials) * len(samples)
        return [drawn[trial.name][samples.start : samples.stop] for trial in trials]

    run.completions = 0
    return run, drawn


def raced(scores, n=512, alpha=0.05, seed=0, unsteered=0.5):
    run, drawn = world(scores, n, seed, unsteered)
    race = Race(run, n, len(scores), alpha)
    race.enter([Trial(name=name) for name in scores])
    for end in race.rounds():
        race.bring(end)
        race.drop()
    race.completions = run.completions
    return race, drawn


def test_wealth_is_the_mean_over_bets_of_what_each_made_of_one():
    differences = [0.5, -1.0, 0.0, 0.25]
    each = [math.prod(1 - bet * d / 2 for d in differences) for bet in BETS]
    assert log_wealth(differences, 2.0) == pytest.approx(math.log(np.mean(each)), abs=1e-12)
    assert log_wealth([], 1.0) == 0


def test_a_trial_that_does_harm_leaves_though_none_does_better_than_no_steering():
    race, _ = raced({"bad": 0.1})
    assert [(runner.left, runner.n <= 64) for runner in race.runners] == [("unsteered", True)]


def test_rounds_double_up_to_the_samples_there_are():
    assert Race(lambda *_: [], 100, 1, 0.05).rounds() == [FIRST, 32, 64, 100]
    assert Race(lambda *_: [], 5, 1, 0.05).rounds() == [5]


def test_what_is_plainly_worse_leaves_and_the_best_stays():
    race, drawn = raced({"bad": 0.1, "same": 0.5, "good": 0.9, "better": 0.95})
    left = {runner.trial.name: (runner.left, runner.n) for runner in race.runners}
    assert left["bad"][0] and left["bad"][1] <= 32
    assert left["same"][0] == "leader" and left["same"][1] <= 64
    assert left["better"] == (None, 512)
    assert race.leader.trial.name == "better"
    assert race.leader.rewards == drawn["better"]
    spent = sum(runner.n for runner in [race.unsteered, *race.runners])
    assert race.completions == spent < 5 * 512


@pytest.mark.parametrize("alpha", [0.05, 0.5])
def test_a_trial_that_none_is_better_than_leaves_no_more_often_than_alpha(alpha):
    """All are equal, which is where it is most likely; 200 races of 24, at every round of many."""
    wrong = {True: 0, False: 0}
    for seed in range(200):
        run, _ = world({f"trial {at}": 0.5 for at in range(24)}, 256, seed)
        for union in wrong:
            race = Race(run, 256, 24 if union else 0, alpha)
            race.enter([Trial(name=f"trial {at}") for at in range(24)])
            for end in race.rounds():
                race.bring(end)
                race.drop()
            wrong[union] += race.runners[0].left is not None
    assert wrong[True] / 200 <= alpha < wrong[False] / 200, "without the union it would"


def test_a_trial_whose_wins_are_rare_and_large_is_not_dropped_for_one_that_is_worse():
    """The range is known before: of rewards as they come, the wins would often not have been seen."""
    wrong = 0
    for seed in range(200):
        rng = random.Random(seed)
        rare = [float(rng.random() < 0.03) for _ in range(256)]
        race = Race(lambda trials, at, rare=rare: [
            rare[at.start : at.stop] if trial.name == "rare" else [0.01] * len(at) for trial in trials
        ], 256, 1, 0.05)  # fmt: skip
        race.enter([Trial(name="rare")])
        for end in race.rounds():
            race.bring(end)
            race.drop()
        wrong += race.runners[0].left is not None
    assert wrong / 200 <= 0.05


def test_a_single_terrible_reward_does_not_keep_the_others_from_leaving():
    scores = {"worse": 0.1, "terrible": 0.1, "good": 0.9}
    run, drawn = world(scores, 256)
    drawn["terrible"][3] = -1000.0
    race = Race(run, 256, 3, 0.05)
    race.enter([Trial(name=name) for name in scores])
    for end in race.rounds():
        race.bring(end)
        race.drop()
    assert [runner.trial.name for runner in race.running] == ["good"]


def test_who_enters_later_is_compared_on_the_same_samples():
    run, drawn = world({"early": 0.5, "late": 0.8}, 64)
    race = Race(run, 64, 2, 0.05)
    race.enter([Trial(name="early")])
    race.bring(32)
    (late,) = race.enter([Trial(name="late")])
    race.bring(32)
    assert late.rewards == drawn["late"][:32]
    assert late.over(race.runners[0]) == [a - b for a, b in zip(drawn["late"][:32], drawn["early"][:32])]
    assert run.completions == 3 * 32


def test_a_budget_keeps_the_best_that_it_can_pay_for_and_ends_the_race_where_it_can_pay_for_none():
    scores = {"a": 0.3, "b": 0.6, "c": 0.9}
    run, _ = world(scores, 64)
    race = Race(run, 64, 3, 0.05)
    race.enter([Trial(name=name) for name in scores])
    race.bring(16)
    assert race.cost(race.running, 32) == 4 * 16
    assert race.cut(3 * 16, 32)
    assert [(runner.trial.name, runner.left) for runner in race.runners] == [("a", "budget"), ("b", None), ("c", None)]
    assert not race.cut(16, 32)
    assert [runner.trial.name for runner in race.running] == ["b", "c"]


def test_unsteered_leads_where_nothing_is_better():
    run, _ = world({"bad": 0.0}, 16, unsteered=1.0)
    race = Race(run, 16, 1, 0.05)
    race.enter([Trial(name="bad")])
    race.bring(16)
    assert race.leader is race.unsteered
