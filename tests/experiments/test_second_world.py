"""The second world is as it says: what correlates best does not steer, and what steers hardly correlates."""

import pytest
import second_world
import torch
from scipy.stats import norm

from corrsteer import SearchOptions, Steering, Trial, collect, evaluate, run_trials, select
from corrsteer.experiments.trials import UNSTEERED
from corrsteer.lm.generation import tokenize
from corrsteer.ops import reference
from corrsteer.rollouts.grading import grade

SETTINGS = {"decoding": second_world.DECODING, "progress": False}


@pytest.fixture(scope="module", params=(0, 1, 2))
def world(request):
    return second_world.build(request.param)


@pytest.fixture(scope="module")
def run(world):
    return collect(world.model, world.tokenizer, world.encoders, world.train, permutations=0, **SETTINGS)


def at_the_last_prompt_token(world):
    """Activations `[N, d_sae]` of layer 1 at the last token of each training prompt, and the rewards."""
    rows = []
    for prompt in tokenize(world.model, world.tokenizer, world.train, second_world.DECODING):
        with torch.inference_mode():
            hidden = world.model(torch.tensor([prompt]), output_hidden_states=True).hidden_states
        rows.append(hidden[2][0, -1])  # what layer 1 gives: the embedding comes first
    rewards = grade(world.model, world.tokenizer, world.train, **SETTINGS).rewards
    return reference.encode(torch.stack(rows), world.encoders[1]), torch.tensor(rewards)


def along(world, run, layer=1, **strengths):
    """A steering along features by name, each by its mean of the rewarded samples times a strength."""
    encoder, means = world.encoders[layer], run.moments[layer]["max"].coefficient("mean_positive")[0]
    features = {world.features[layer][name.replace("_", " ")]: by for name, by in strengths.items()}
    parts = torch.tensor([by * float(means[at]) for at, by in features.items()])
    return Steering.from_vectors({f"blocks.{layer}.hook_resid_post": parts @ encoder.decoder.rows(list(features))})


def scores(world, steerings, task=None, scale=1.0):
    trials = [Trial(steering, scale=scale) for steering in steerings]
    task = task or world.validation
    return [g.score for g in run_trials(world.model, world.tokenizer, task, trials, **SETTINGS)]


def test_samples_are_hundreds_of_distinct_prompts_and_answers_come_before_the_stop_token(world):
    parts = (world.train, world.validation, world.test)
    assert [len(part) for part in parts] == [600, 400, 400]
    assert len({example.prompt for part in parts for example in part.examples}) == 1400
    graded = grade(world.model, world.tokenizer, world.test, **SETTINGS)
    assert set(graded.completions) == {"right .", "wrong ."}
    assert 0.35 < graded.score < 0.45


def test_the_same_seed_gives_the_same_world():
    built = second_world.build(0)
    again = second_world.build.__wrapped__(0)
    assert built is not again and built.features == again.features
    assert all(torch.equal(a, b) for a, b in zip(built.model.state_dict().values(), again.model.state_dict().values()))
    assert [e.prompt for e in built.test.examples] == [e.prompt for e in again.test.examples]
    assert all(torch.equal(built.encoders[at].weight, again.encoders[at].weight) for at in second_world.LAYERS)


def test_what_reads_the_answer_correlates_best_and_care_at_the_last_prompt_token_alone(world, run):
    for layer in second_world.LAYERS:
        r = run.correlation(layer)
        assert int(r.argmax()) == world.features[layer]["wrote right"] and r.max() > 0.9
        assert abs(float(r[world.features[layer]["care"]])) < 0.12
    z, y = at_the_last_prompt_token(world)
    named = world.features[1]
    r = {name: float(torch.corrcoef(torch.stack([z[:, named[name]], y]))[0, 1]) for name in ("care", "haste")}
    assert 0.05 < r["care"] < 0.25
    assert -0.3 < r["haste"] < -0.05
    assert (z[:, named["wrote right"]] > 0).float().mean() < 0.05, "nothing is written yet"


def test_adding_care_raises_the_score_until_it_is_too_much_and_adding_what_reads_the_answer_lowers_it(world, run):
    by = (0, 0.25, 0.5, 1, 2, 4, 6)
    care = scores(world, [along(world, run, care=scale) for scale in by])
    assert care[0] < 0.45 and care[-1] < 0.05
    assert care[:-1] == sorted(care[:-1]) and care[-2] > care[3] + 0.2, "the best scale is far from 1"
    wrote = scores(world, [along(world, run, wrote_right=scale) for scale in by])
    assert wrote[0] == care[0] and wrote == sorted(wrote, reverse=True) and max(wrote[3:]) < 0.02
    assert scores(world, [along(world, run, layer=2, care=4)]) == care[:1], "layer 2 has decided"


def test_care_and_less_haste_are_better_together_than_each_alone(world, run):
    alone = [along(world, run, care=by) for by in (1, 2, 3, 4, 5)]
    alone += [along(world, run, haste=-by) for by in (0.25, 0.5, 1, 2, 3, 4)]
    (pair,) = scores(world, [along(world, run, care=4, haste=-2)])
    assert pair > max(scores(world, alone)) + 0.08


def test_the_strategies_that_trust_correlation_do_not_raise_the_score(world, run):
    (unsteered,) = [g.score for g in run_trials(world.model, world.tokenizer, world.test, [UNSTEERED], **SETTINGS)]
    for strategy in ("single", "all"):
        steering = select(run, strategy)
        for scale in (0.25, 0.5, 1, 2, 4):
            assert scores(world, [steering], world.test, scale)[0] <= unsteered + 0.01
        assert scores(world, [steering], world.test) < [unsteered - 0.3]
    pruned = select(
        run, "pruned", model=world.model, tokenizer=world.tokenizer, validation=world.validation, **SETTINGS
    )
    assert pruned.features == []


def test_search_finds_what_steers_and_the_race_drops_what_correlates(world, run):
    of_model = {"model": world.model, "tokenizer": world.tokenizer}
    found = select(run, "search", **of_model, validation=world.validation, **SETTINGS)
    names = {index: name for name, index in world.features[1].items()}
    assert {feature.layer for feature in found.features} == {1}
    assert [names[feature.index] for feature in found.features] in (["care"], ["care", "haste"])
    assert found.features[0].coefficient > 0 and found.features[0].statistics.pool == "last_prompt"
    assert found.scale >= 2 and found.provenance["search"]["confirmation"]["confirmed"]
    record = found.provenance["search"]
    assert record["completions"] < record["grid"]["completions"] / 2
    result = evaluate(**of_model, task=world.test, steering=found, **SETTINGS)
    assert result.steered > result.unsteered + 0.25
    best_correlated = {"layer": 1, "index": world.features[1]["wrote right"]}
    assert all(best_correlated.items() - one["feature"].items() for one in record["finalists"])


def test_a_feature_is_joined_for_what_chance_would_not_give_and_the_winner_keeps_its_curve(world, run):
    of_model = {"model": world.model, "tokenizer": world.tokenizer}
    found = select(run, "search", **of_model, validation=world.validation, **SETTINGS)
    record = found.provenance["search"]
    for step in record["joined"]:
        assert step["kept"] == (step["gain"] > norm.isf(0.05 / step["trials"]) * step["error"])
    finalists = [(one["feature"]["layer"], one["feature"]["index"]) for one in record["finalists"]]
    assert (found.features[0].layer, found.features[0].index) == finalists[0]


@pytest.mark.parametrize("seed", [0, 2])
def test_search_joins_a_second_feature_that_helps_and_is_subtracted(seed):
    world = second_world.build(seed)
    run = collect(world.model, world.tokenizer, world.encoders, world.train, permutations=0, **SETTINGS)
    of_model = {"model": world.model, "tokenizer": world.tokenizer, "validation": world.validation}
    found = select(run, "search", **of_model, **SETTINGS)
    care, haste = found.features
    named = world.features[1]
    assert (care.index, haste.index) == (named["care"], named["haste"]) and haste.coefficient < 0 < care.coefficient
    (step,) = [step for step in found.provenance["search"]["joined"] if step["kept"]]
    assert step["gain"] > step["error"] > 0 and step["feature"]["index"] == named["haste"]
    one = select(run, "search", **of_model, options=SearchOptions(most_features=1), **SETTINGS)
    assert [feature.index for feature in one.features] == [named["care"]]
    positive = select(run, "search", **of_model, direction="positive", **SETTINGS)
    assert all(feature.coefficient > 0 for feature in positive.features)


def test_where_rewards_mean_nothing_nothing_is_confirmed_in_nineteen_of_twenty_seeds():
    """Each completion has a coin of its own, so that the race has something to choose by."""
    world, confirmed, raced, gained = second_world.build(0), 0, [], []
    for coin in range(20):
        train, validation = second_world.null(coin, n_validation=128)
        run = collect(world.model, world.tokenizer, world.encoders, train.take(300), permutations=0, **SETTINGS)
        found = select(
            run, "search", model=world.model, tokenizer=world.tokenizer, validation=validation,
            options=SearchOptions(candidates=1, seed=coin), **SETTINGS,
        )  # fmt: skip
        confirmation = found.provenance["search"]["confirmation"]
        if confirmation is not None:
            confirmed += confirmation["confirmed"]
            raced.append(found.provenance["search"]["rounds"][-1]["leader"] - found.provenance["search"]["unsteered"])
            gained.append(confirmation["difference"])
            assert found.notes[0].startswith("confirmed: " if confirmation["confirmed"] else "not confirmed: ")
    assert confirmed <= 1
    assert len(raced) > 10, "chance gives the race a winner"
    assert sum(raced) / len(raced) > 0.045 > abs(sum(gained) / len(gained)), "which other samples do not confirm"


def test_a_reward_that_means_nothing_is_a_coin_that_changes_with_the_completion(world, run):
    train, validation = second_world.null(3, seed=world.seed, n_validation=400)
    assert [e.prompt for e in train.examples] == [e.prompt for e in world.train.examples]
    answers = ("right .", "wrong .", ". eh", "eh")
    coins = torch.tensor([[validation.reward(a, e) for a in answers] for e in validation.examples])
    assert coins.unique().tolist() == [0, 1]
    assert ((coins.mean(0) - 0.5).abs() < 0.1).all(), "4 standard errors"
    assert (torch.corrcoef(coins.T) - torch.eye(4)).abs().max() < 0.2
    (other, _) = second_world.null(4, seed=world.seed)
    assert [train.reward("eh", e) for e in train.examples] != [other.reward("eh", e) for e in train.examples]
    assert [train.reward("eh", e) for e in train.examples] == [train.reward("eh", e) for e in train.examples]
