"""Rewards by name, and graders that take a batch."""

import functools
import pickle
from dataclasses import replace

import numpy
import pytest
import torch

from corrsteer.tasks import Task, TaskError, batched

ROWS = [{"prompt": f"p{n}", "answer": str(n)} for n in range(4)]
WRITTEN = ["0", "one", "2", "three"]


def length(completion, example):
    return len(completion)


def both(completion, example):
    return {"right": completion == example.answer, "length": len(completion)}


@batched
def lengths(completions, examples):
    return [len(completion) for completion in completions]


@batched
def several(completions, examples):
    return [both(*pair) for pair in zip(completions, examples)]


def grade(grader, completions=WRITTEN, **options):
    task = Task.from_rows(ROWS, grader, name="t", **options)
    return task.grade(completions, task.examples)


def test_one_grader_gives_a_reward_called_reward():
    assert grade("exact") == [{"reward": 1.0}, {"reward": 0.0}, {"reward": 1.0}, {"reward": 0.0}]
    assert Task.from_rows(ROWS, "exact").grader_name == "exact"


def test_a_mapping_that_a_lone_grader_returns_names_its_rewards():
    assert grade(both)[1] == {"right": 0.0, "length": 3.0}


def test_several_graders_give_rewards_by_name_in_their_order():
    task = Task.from_rows(ROWS, {"correct": "exact", "length": length, "more": both})
    assert [list(rewards) for rewards in task.grade(WRITTEN, task.examples)] == [
        ["correct", "length", "more.right", "more.length"]
    ] * 4
    assert task.rewards(WRITTEN, task.examples) == [1, 0, 1, 0] and task.reward("1", task.examples[1]) == 1
    assert task.grader_name == "correct=exact, length=test_grading:length, more=test_grading:both"
    assert task.identity.grader == task.grader_name and task.identity.reward is None


@pytest.mark.parametrize(
    "grader",
    [
        lengths,
        batched(lambda completions, examples: numpy.array([len(c) for c in completions])),
        batched(lambda completions, examples: torch.tensor([len(c) for c in completions])),
        batched(lambda completions, examples: (len(c) for c in completions)),
        functools.partial(batched(lambda unit, completions, examples: [unit * len(c) for c in completions]), 1),
        type("Model", (), {"__call__": batched(lambda self, completions, examples: list(map(len, completions)))})(),
    ],
)
def test_a_batched_grader_is_called_once_with_everything(grader):
    assert [rewards["reward"] for rewards in grade(grader)] == [1, 3, 1, 5]


def test_a_batched_grader_may_return_rewards_by_name():
    assert grade(several) == grade(both)


def test_a_batched_grader_sees_the_batch_that_it_is_given():
    seen = []

    @batched
    def watching(completions, examples):
        seen.append((list(completions), [example.answer for example in examples]))
        return [0.0] * len(completions)

    task = Task.from_rows(ROWS, watching)
    task.grade(WRITTEN[:2], task.examples[:2])
    task.grade([], [])
    assert seen == [(["0", "one"], ["0", "1"])]


@pytest.mark.parametrize(
    "grader, message",
    [
        (batched(lambda c, e: [1.0]), "t:1 and 3 more: .*a reward for each of its 4 completions, got 1"),
        (batched(lambda c, e: 1.0), "t:1 and 3 more: .*failed: TypeError"),
        (batched(lambda c, e: torch.tensor(1.0)), "must return a reward for each of its 4 completions, got 1.0"),
        (batched(lambda c, e: 1 / 0), "t:1 and 3 more: grader .* failed: ZeroDivisionError"),
        (batched(lambda c, e: [1.0, 1.0, float("nan"), 1.0]), "t:3: .*must return a finite number, got nan"),
        (batched(lambda c, e: [1.0, {"a": 1}, 1.0, 1.0]), "t:2: .*the same rewards .*got a after reward"),
        (lambda c, e: {"a": 1} if e.answer == "0" else {"b": 1}, "t:2: .*the same rewards .*got b after a"),
        (lambda c, e: {"a": 1} | ({"b": 1} if e.answer == "2" else {}), "t:3: .*got a, b after a"),
        (lambda c, e: {}, "t:1: .*at least one reward, got an empty mapping"),
        (lambda c, e: {1: 1.0}, "t:1: .*name its rewards by text that is not empty, got 1"),
        (lambda c, e: {"a": float("inf")}, "t:1: .*must return a finite number, got inf"),
        (lambda c, e: {"a": None}, "t:1: .*must return a finite number, got None"),
        (lambda c, e: torch.ones(2), "t:1: grader .* failed: RuntimeError"),
        (lambda c, e: 10**400, "t:1: grader .* failed: OverflowError"),
        (lambda c, e: 1 / 0 if e.answer == "3" else 1, "t:4: grader .* failed: ZeroDivisionError"),
        ({"a": length, "reward": lambda c, e: {"a": 1}}, "two graders give the reward 'a'"),
    ],
)
def test_what_a_grader_does_wrong_is_reported_with_the_example(grader, message):
    with pytest.raises(TaskError, match=message) as caught:
        grade(grader)
    assert "\n" not in str(caught.value)


def test_names_must_be_the_same_in_all_batches_and_parts_of_a_task():
    answers = iter([{"a": 1}, {"b": 1}])
    task = Task.from_rows(ROWS, lambda completion, example: next(answers))
    task.take(1).grade(["x"], task.examples[:1])
    with pytest.raises(TaskError, match="got b after a"):
        task.grade(["x"], task.examples[1:2])


def test_the_order_of_names_is_that_of_the_first_example():
    turned = iter([{"a": 1, "b": 2}, {"b": 3, "a": 4}])
    task = Task.from_rows(ROWS, lambda completion, example: next(turned))
    graded = task.grade(["x", "y"], task.examples[:2])
    assert [list(rewards.items()) for rewards in graded] == [[("a", 1), ("b", 2)], [("a", 4), ("b", 3)]]


def test_another_reward_can_be_put_first():
    task = Task.from_rows(ROWS, {"correct": "exact", "length": length})
    by_length = task.rewarded_by("length")
    assert by_length.rewards(WRITTEN, task.examples) == [1, 3, 1, 5]
    assert list(by_length.grade(WRITTEN, task.examples)[0]) == ["length", "correct"]
    assert by_length.identity.reward == "length" and task.identity.reward is None
    assert all(part.identity.reward == "length" for part in by_length.split())
    assert Task.from_rows(ROWS, both).rewarded_by("length").rewards(WRITTEN, task.examples) == [1, 3, 1, 5]


@pytest.mark.parametrize(
    "grader, name",
    [("exact", "length"), ({"correct": "exact", "length": length}, "other"), ({"l": length}, "lengths"), (None, "a")],
)
def test_a_reward_that_no_grader_can_give_is_refused_before_grading(grader, name):
    with pytest.raises(TaskError, match=f"reward must be one of those that the task's graders give, .*got '{name}'"):
        Task.from_rows(ROWS, grader).rewarded_by(name)


def test_a_reward_that_a_function_turns_out_not_to_give_is_refused():
    task = Task.from_rows(ROWS, both)
    with pytest.raises(TaskError, match="right, length, got 'beauty'"):
        task.rewarded_by("beauty").grade(WRITTEN, task.examples)
    with pytest.raises(TaskError, match="right, length, got 'beauty'"):  # which is known from then on
        task.rewarded_by("beauty")


def test_a_task_without_a_grader_has_no_rewards():
    task = Task.from_rows([{"prompt": "p"}], None)
    assert not task.grading and task.grader_name == "none" and task.examples[0].answer is None
    with pytest.raises(TaskError, match="has no grader.*grader="):
        task.grade(["x"], task.examples)


@pytest.mark.parametrize(
    "grader, message",
    [
        ({}, "at least one grader"),
        ({"": "exact"}, "name of a grader must be text"),
        ({1: "exact"}, "name of a grader must be text"),
        ({"a": 1}, "name or a callable"),
        ({"a": "fair"}, "must be one of"),
    ],
)
def test_graders_that_cannot_be_are_refused(grader, message):
    with pytest.raises(TaskError, match=message):
        Task.from_rows(ROWS, grader)


def test_an_answer_is_checked_for_every_grader():
    with pytest.raises(TaskError, match="needs a number in the answer"):
        Task.from_rows([{"prompt": "p", "answer": "x"}], {"a": "contains", "b": "number"})
    with pytest.raises(TaskError, match="grader number needs an answer"):
        Task.from_rows([{"prompt": "p", "answer": "1"}], {"a": length, "b": "number"}, answer_field=None)


def test_a_task_can_be_given_other_graders():
    task = Task.from_rows(ROWS, "exact").graded_by({"number": "number", "length": length})
    assert task.grade(["2."], task.examples[2:3]) == [{"number": 1.0, "length": 2.0}]
    with pytest.raises(TaskError, match="t:1: grader number needs a number"):
        Task.from_rows([{"prompt": "p", "answer": "x"}], "exact", name="t").graded_by("number")
    with pytest.raises(TaskError, match="t:1: no answer, and grader exact needs one"):
        Task.from_rows([{"prompt": "p"}], None, name="t").graded_by("exact")


def test_completions_must_be_as_many_as_examples():
    task = Task.from_rows(ROWS)
    with pytest.raises(TaskError, match="as many as examples, got 1 and 4"):
        task.grade(["x"], task.examples)


def test_a_task_with_several_graders_can_be_sent_to_a_process():
    task = Task.from_rows(ROWS, {"correct": "exact", "length": length}).rewarded_by("length")
    again = pickle.loads(pickle.dumps(task))
    assert again.grade(WRITTEN, again.examples) == task.grade(WRITTEN, task.examples)
    assert replace(again, name="x").identity.grader == task.identity.grader
