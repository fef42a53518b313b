"""Other rewards and other samples of a run: what is said of them is said of these, and not of those before."""

import dataclasses

import pytest
import tiny_pipeline
import torch

from corrsteer import CorrSteerError, Run, collect, select
from corrsteer.lm.decoding import Decoding
from corrsteer.runs.peaks import extremes, with_peaks
from corrsteer.runs.regrade import regrade
from corrsteer.tasks.identity import count_seen

NEVER_VARIES = "every one of the 40 rewards was 1"


def always(completion, example):
    return 1.0


def both(completion, example):
    return {"even": tiny_pipeline.digits_up(completion, example), "length": float(len(completion))}


def gather(grader, **settings):
    settings = {"decoding": Decoding(4, batch_size=16), "permutations": 19, "block_size": 16} | settings
    world = tiny_pipeline.model(), tiny_pipeline.tokenizer(), tiny_pipeline.encoders()
    return collect(*world, tiny_pipeline.task(grader=grader), progress=False, **settings)


@pytest.fixture(scope="module")
def run():
    return gather(tiny_pipeline.digits_up)


@pytest.fixture(scope="module")
def two():
    return gather(both)


def rewarded(rollouts, reward):
    return [dataclasses.replace(one, rewards={"x": reward(i)}) for i, one in enumerate(rollouts)]


def test_notes_are_of_the_rewards_that_are_looked_at(run):
    flat = gather(always)
    assert NEVER_VARIES in flat.notes[0]
    again = regrade(flat, tiny_pipeline.digits_up)
    assert again.notes == [] and flat.notes != [] and select(again).features
    constant = regrade(run, always)
    assert NEVER_VARIES in constant.notes[0] and NEVER_VARIES in select(constant).notes[0] and run.notes == []
    noted = dataclasses.replace(run, notes=["of the collection"])
    assert regrade(noted, always).notes[0] == "of the collection"


def test_notes_of_several_samples_a_prompt_go_with_how_they_are_compared():
    options = {"samples_per_prompt": 3, "decoding": Decoding(4, temperature=1.5), "block_size": 60}
    run = gather(tiny_pipeline.digits_up, **options)
    within = run.statistics(within_prompt=True)
    assert not any("rewards differ within" in note for note in run.notes)
    assert [note for note in within.notes if "rewards differ within" in note] == within.notes
    assert within.statistics(within_prompt=False).notes == run.notes


def test_provenance_names_the_grader_of_the_rewards(run):
    assert run.provenance["task"]["grader"].endswith("digits_up")
    assert regrade(run, {"right": "exact"}).provenance["task"]["grader"] == "right=exact"
    of_file = regrade(run, rollouts=rewarded(run.rollouts, float))
    assert of_file.provenance["task"]["grader"] == "none" and run.provenance["task"]["grader"].endswith("digits_up")


def test_a_sample_without_one_of_the_rewards_is_left_out_of_all(run, tmp_path):
    b = torch.arange(40, dtype=torch.float64)
    b[:7] = torch.nan
    both = run.statistics(rewards={"a": run.rewards, "b": b})
    assert both.n == 33 == int(both.rewards.isfinite().sum()) == int(both.other_rewards["b"].isfinite().sum())
    part = run.statistics(samples=range(7, 40))
    for a, b in zip(select(both).features, select(part).features):
        assert (a.index, a.statistics.low, a.statistics.high) == (b.index, b.statistics.low, b.statistics.high)
    assert both.rollouts[:7] == [None] * 7 and both.rollouts[7].rewards == {"a": float(run.rewards[7]), "b": 7.0}
    both.save(tmp_path)
    loaded = Run.load(tmp_path)
    assert loaded.n == 33 and list(loaded.rollouts) == both.rollouts


def test_a_part_of_the_samples_is_what_features_were_selected_on(run):
    part = run.statistics(samples=range(10))
    prompts = [rollout.prompt for rollout in run.rollouts]
    assert part.provenance["samples"]["n"] == 10
    assert count_seen(prompts[:10], [part.provenance["samples"]]) == 10
    assert count_seen(set(prompts) - set(prompts[:10]), [part.provenance["samples"]]) == 0
    assert run.provenance["samples"]["n"] == 40


def test_rollouts_hold_the_reward_that_is_looked_at_first(two, tmp_path):
    two.save(tmp_path)
    for run in (two, Run.load(tmp_path)):
        of_length = run.statistics("length")
        assert list(of_length.rollouts[0].rewards) == ["length", "even"]
        assert list(run.rollouts[0].rewards) == ["even", "length"]
    assert list(regrade(two, both, reward="length").rollouts[0].rewards) == ["length", "even"]


def test_what_cannot_be_looked_at_is_named(run):
    for asked, message in (
        ({"samples": [40]}, r"samples must lie in 0\.\.39, got 40"),
        ({"samples": [-1]}, "samples must be a sequence of whole numbers of at least 0"),
        ({"permutations": 5}, "permutations must be 0 or at least 19"),
        ({"bootstrap": -1}, "bootstrap must be a whole number of at least 0"),
        ({"within_prompt": 1}, "within_prompt must be True or False, got 1"),
    ):
        with pytest.raises(CorrSteerError, match=message):
            run.statistics(**asked)


def test_rollouts_that_are_not_the_runs_or_hold_no_rewards_are_refused(run):
    one = run.rollouts[0]
    for rollouts, message in (
        ([], "rollouts must be one or more"),
        ([None], r"rollouts\[0\] must be a Rollout, got None"),
        ([one, one], "is there twice"),
        ([dataclasses.replace(one, id="another")], "it has none of id 'another'"),
        ([dataclasses.replace(one, rewards={})], "rollouts must hold rewards, but"),
    ):
        with pytest.raises(CorrSteerError, match=message):
            regrade(run, rollouts=rollouts)
    part = regrade(run, rollouts=rewarded(run.rollouts[:10], float))
    assert part.n == 10 and regrade(part, tiny_pipeline.digits_up).n == 10


def test_extremes_are_among_the_samples_that_are_looked_at(run):
    part = run.statistics(samples=range(5))
    of_file = regrade(run, rollouts=rewarded(run.rollouts[:5], float))
    for asked in (part, of_file):
        highest, lowest = extremes(asked, 1, 3, k=3)
        assert sorted(one.sample for one in highest + lowest) == [0, 1, 2, 3, 4]


def test_of_the_last_prompt_token_the_peak_is_there():
    run = gather(tiny_pipeline.digits_up, pool="last_prompt")
    model, tokenizer, encoder = tiny_pipeline.model(), tiny_pipeline.tokenizer(), tiny_pipeline.encoders()[1]
    feature = int(run.moments[1]["last_prompt"].frequency().argmax())
    found = with_peaks(run, model, tokenizer, encoder, 1, feature, extremes(run, 1, feature, k=4)[0])
    for one in found:
        assert one.activation > 0 and one.peak.activation == pytest.approx(one.activation, rel=1e-4)
        assert one.peak.token == "=" and one.peak.after == tokenizer.decode(list(one.rollout.completion_ids))


def test_a_run_equals_itself_alone(run):
    same = dataclasses.replace(run, rewards=run.rewards.clone())
    assert run == run and run != same and {run: 1}[run] == 1
    assert run.activations != same.statistics().activations
