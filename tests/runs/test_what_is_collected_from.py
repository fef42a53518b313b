"""Tasks and rollouts that collect is given: what cannot be collected from is refused before a token is read."""

import dataclasses

import pytest
import tiny_pipeline
import torch

from corrsteer import CorrSteerError, collect
from corrsteer.lm.decoding import Decoding
from corrsteer.rollouts.regrading import task_of
from corrsteer.runs.collect import CollectionStopped

DECODING = Decoding(max_new_tokens=3, batch_size=16)


@pytest.fixture(scope="module")
def model():
    return tiny_pipeline.model()


def gather(model, task=None, **settings):
    settings = {"decoding": DECODING, "permutations": 0, "block_size": 16, "progress": False} | settings
    return collect(model, tiny_pipeline.tokenizer(), tiny_pipeline.encoders(), task, **settings)


@pytest.fixture(scope="module")
def rollouts(model):
    return list(gather(model, tiny_pipeline.task(24)).rollouts)


def refused(model, message, task=None, **settings):
    """Refused with a message, and not once something was collected."""
    with pytest.raises(CorrSteerError, match=message) as caught:
        gather(model, task, **settings)
    assert not isinstance(caught.value, CollectionStopped)


def test_a_task_without_a_grader_is_refused_before_anything_is_generated(model, monkeypatch):
    monkeypatch.setattr(model, "generate", lambda *a, **k: pytest.fail("generated"))
    refused(model, "task must have a grader.* got 'untrained' without", tiny_pipeline.task().graded_by(None))
    refused(model, "task must be a Task, got 'task.jsonl'", "task.jsonl")


def test_any_iterable_of_rollouts_is_collected_from(model, rollouts):
    assert gather(model, rollouts=(one for one in rollouts)).n == len(rollouts)
    refused(model, "rollouts must be a sequence of them, got 3", rollouts=3)
    refused(model, r"rollouts\[0\] must be a Rollout, got dict", rollouts=[{"id": "a"}])
    refused(model, r"rollouts\[2\] must be a Rollout, got None; leave out", rollouts=[*rollouts[:2], None])


def test_rollouts_that_no_file_could_hold_are_refused(model, rollouts):
    refused(model, "id 'untrained:1' is there twice", rollouts=[*rollouts, rollouts[0]])
    other = dataclasses.replace(rollouts[3], rewards={"style": 1.0})
    refused(model, "the same rewards, got style after reward", rollouts=[*rollouts[:3], other])


def test_rewards_are_told_apart_by_their_names_and_not_by_their_order(model, rollouts):
    two = [dataclasses.replace(one, rewards={"a": one.rewards["reward"], "b": float(i)})
           for i, one in enumerate(rollouts)]  # fmt: skip
    mixed = [dataclasses.replace(one, rewards=dict(reversed(one.rewards.items()))) if i % 2 else one
             for i, one in enumerate(two)]  # fmt: skip
    ordered, run = gather(model, rollouts=two), gather(model, rollouts=mixed)
    assert list(run.all_rewards()) == ["a", "b"]
    assert torch.equal(run.correlation(1), ordered.correlation(1)) and run.rewards.tolist() == ordered.rewards.tolist()


def test_a_task_in_another_order_than_the_rollouts_is_refused(model, rollouts):
    task = tiny_pipeline.task(24)
    assert gather(model, task, rollouts=rollouts).rewards.tolist() == [one.rewards["reward"] for one in rollouts]
    refused(model, "the prompt of untrained:1 is not that of", task, rollouts=rollouts[::-1])
    ids_alone = [dataclasses.replace(one, prompt=None) for one in rollouts]
    assert gather(model, task_of(ids_alone, tiny_pipeline.digits_up), rollouts=ids_alone).n == 24


def test_an_example_that_is_called_like_a_sample_of_another_is_refused_where_there_are_several(model):
    task = tiny_pipeline.task(4)
    first, second, *others = task.examples
    task = dataclasses.replace(task, examples=(first, dataclasses.replace(second, source="untrained:1#1"), *others))
    refused(model, "got 'untrained:1#1'", task, samples_per_prompt=2, decoding=Decoding(3, temperature=1.0))
    assert gather(model, task).n == 4


def test_a_run_of_rollouts_says_how_these_were_generated(model, rollouts):
    run = gather(model, rollouts=rollouts, decoding=Decoding(99))
    assert run.provenance["decoding"] == {"max_new_tokens": 3, "temperature": 0.0, "top_p": 1.0, "seed": 0}
    other = dataclasses.replace(rollouts[0], decoding={"max_new_tokens": 7})
    assert gather(model, rollouts=[other, *rollouts[1:]]).provenance["decoding"] is None
