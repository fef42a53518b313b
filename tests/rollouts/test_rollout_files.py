"""Rollouts go through their file unchanged, and a file that is wrong says where."""

import json

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from corrsteer.rollouts.rollout import Rollout, RolloutError
from corrsteer.rollouts.rollout_file import read_rollouts, write_rollouts

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
SOME = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=10)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
OBJECT = st.dictionaries(SOME.filter(lambda name: name not in ("reward", "rewards")), JSON, max_size=3)
IDS = st.lists(st.integers(0, 2**40), max_size=5).map(tuple)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
NAMES = ("correct", "länge")
ROLLOUTS = st.builds(
    Rollout,
    id=SOME,
    prompt=SOME | st.lists(st.fixed_dictionaries({"role": TEXT, "content": JSON}), min_size=1, max_size=3).map(tuple),
    prompt_ids=st.none() | IDS.filter(bool),
    completion=TEXT,
    completion_ids=st.none() | IDS,
    finish=st.sampled_from(["stop", "length", None]),
    rewards=st.tuples(FINITE, FINITE).map(lambda rewards: dict(zip(NAMES, rewards))),
    sample=st.integers(0, 99),
    answer=st.none() | TEXT | st.lists(TEXT, min_size=1, max_size=3).map(tuple),
    model=st.none() | SOME,
    engine=st.none() | SOME,
    decoding=st.none() | OBJECT,
    meta=OBJECT,
)


def rollout(**changes):
    given = {"id": "a", "prompt": "1+1=", "prompt_ids": (5, 6), "completion": "2", "completion_ids": (7,)}
    return Rollout(**given | changes)


def lines(path, *rows):
    path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows))
    return path


GOOD = {"id": "a", "prompt": "p", "completion": "c"}


# A failing case is shown as it was found: to make it smaller takes minutes.
@settings(max_examples=60, deadline=None, phases=[Phase.generate])
@given(st.lists(ROLLOUTS, unique_by=lambda rollout: rollout.id, min_size=1, max_size=4))
def test_rollouts_of_any_text_come_back_as_they_were(tmp_path_factory, rollouts):
    path = tmp_path_factory.mktemp("rollouts") / "rollouts.jsonl"
    write_rollouts(path, rollouts)
    again = read_rollouts(path)
    assert again == rollouts
    assert [list(each.rewards) for each in again] == [list(each.rewards) for each in rollouts]


@pytest.mark.parametrize(
    "text", ["\u2028 and \u2029", "a\nb\r\nc", "\U0001f469\u200d\U0001f680", "\x85\x00\ufeff", '"\\']
)
def test_a_rollout_is_one_line_whatever_it_holds(tmp_path, text):
    one = rollout(prompt=text, completion=text, meta={text: text})
    assert len(one.to_line().splitlines()) == 1
    write_rollouts(tmp_path / "r.jsonl", [one, rollout(id="b")])
    assert read_rollouts(tmp_path / "r.jsonl")[0] == one


@pytest.mark.parametrize("field", ["id", "prompt", "completion", "answer", "meta", "rewards"])
def test_half_a_surrogate_pair_is_refused(field):
    bad = "a\ud83d"
    value = {"meta": {"x": bad}, "rewards": {bad: 1.0}}.get(field, bad)
    with pytest.raises(RolloutError, match="half of a surrogate pair"):
        rollout(**{field: value})


def test_rewards_may_be_tensors_numbers_and_token_ids_tensors():
    made = rollout(prompt_ids=torch.tensor([1, 2]), completion_ids=[3], rewards={"a": 1})
    assert made.prompt_ids == (1, 2) and made.completion_ids == (3,) and type(made.rewards["a"]) is float


def test_a_file_from_outside_keeps_its_own_columns_in_meta(tmp_path):
    path = lines(
        tmp_path / "r.jsonl",
        b'\xef\xbb\xbf{"prompt": "p", "completion": "c", "reward": 1, "subject": "law", "answer": 3}',
        b"",
        {"prompt": "p", "completion": "d", "reward": 0.5, "meta": {"n": 1}, "level": [2], "answer": ["x", 4]},
        {"prompt_ids": [1, 2], "completion_ids": [], "reward": 0, "finish": None},
    )
    first, second, third = read_rollouts(path)
    assert (first.id, second.id, third.id) == ("1", "3", "4"), "without ids, those are the lines'"
    assert (first.sample, second.sample, third.sample) == (0, 1, 0), "two of the same prompt"
    assert first.meta == {"subject": "law"} and second.meta == {"n": 1, "level": [2]}
    assert first.rewards == {"reward": 1.0} and first.answer == "3" and second.answer == ("x", "4")
    assert third.prompt is None and third.completion is None and third.completion_ids == ()
    assert second.source == second.where == "r.jsonl:3"


def test_a_file_that_ends_without_a_newline_is_read_where_its_last_line_is_whole(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(GOOD))
    assert [each.id for each in read_rollouts(path)] == ["a"]


BAD = {
    "cut off": (b'{"id": "b", "prompt": "p", "comp', "not JSON.*"),
    "not an object": ([1], "must be an object with named fields, got list"),
    "not UTF-8": (b'{"id": "\xff"}', "not UTF-8: byte 0xff"),
    "an id that was there": (GOOD, "id 'a' is there twice"),
    "no id where others have one": ({"prompt": "p", "completion": "c"}, "id is missing"),
    "an id that is no text": (GOOD | {"id": [1]}, "id must be text that is not empty"),
    "no prompt": ({"id": "b", "completion": "c"}, "there must be a prompt"),
    "an empty prompt": (GOOD | {"id": "b", "prompt": ""}, "prompt must be text that is not empty"),
    "messages without a role": (GOOD | {"id": "b", "prompt": [{"content": "x"}]}, "must have a role and a content"),
    "no messages": (GOOD | {"id": "b", "prompt": []}, "prompt must be text, or a list of chat messages"),
    "no completion": ({"id": "b", "prompt": "p"}, "there must be a completion"),
    "a completion that is no text": (GOOD | {"id": "b", "completion": 4}, "completion must be text, got 4"),
    "a negative token": (GOOD | {"id": "b", "prompt_ids": [1, -2]}, "prompt_ids must be whole.*got -2 at position 1"),
    "a token that is not whole": (GOOD | {"id": "b", "completion_ids": [1.5]}, "whole numbers .*got 1.5 at position 0"),
    "a token that is a truth": (GOOD | {"id": "b", "completion_ids": [True]}, "whole numbers .*got True"),
    "prompt ids that are none": (GOOD | {"id": "b", "prompt_ids": []}, "token ids, at least one"),
    "a finish of its own": (GOOD | {"id": "b", "finish": "eos"}, "finish must be 'stop', 'length' or None, got 'eos'"),
    "a sample below 0": (GOOD | {"id": "b", "sample": -1}, "sample must be a whole number"),
    "a reward that is NaN": (b'{"id": "b", "prompt": "p", "completion": "c", "reward": NaN}', "finite number, got nan"),
    "an infinite reward": (b'{"id": "b", "prompt": "p", "completion": "c", "reward": 1e999}', "finite number, got inf"),
    "a reward that is text": (GOOD | {"id": "b", "reward": "1"}, "reward 'reward' must be a finite number, got '1'"),
    "a reward that is a truth": (GOOD | {"id": "b", "rewards": {"x": True}}, "reward 'x' must be a finite number"),
    "both reward and rewards": (GOOD | {"id": "b", "reward": 1, "rewards": {"x": 1}}, "must not both be there"),
    "other rewards than before": (GOOD | {"id": "b", "rewards": {"x": 1}}, "the same rewards, got x after none"),
    "meta that is no object": (GOOD | {"id": "b", "meta": 3}, "meta must be an object"),
    "a field twice": (GOOD | {"id": "b", "meta": {"x": 1}, "x": 2}, "'x' must not be both in meta and beside it"),
    "an answer that is an object": (GOOD | {"id": "b", "answer": {}}, "answer must be text, or a list"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_line_that_is_no_rollout_is_reported_with_file_and_line(tmp_path, what):
    row, message = BAD[what]
    with pytest.raises(RolloutError, match=rf"^r.jsonl:3: .*{message}") as caught:
        read_rollouts(lines(tmp_path / "r.jsonl", GOOD, b"", row))
    assert "\n" not in str(caught.value)


def test_further_bad_lines_are_counted(tmp_path):
    with pytest.raises(RolloutError, match=r"^r.jsonl:2: .* \(and 2 more bad\)$"):
        read_rollouts(lines(tmp_path / "r.jsonl", GOOD, b"x", b"y", GOOD))


def test_a_line_that_was_cut_off_is_said_to_be(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(GOOD) + '\n{"id": "b", "prom')
    with pytest.raises(RolloutError, match="r.jsonl:2: not JSON: .*the file may have been cut off here"):
        read_rollouts(path)


def test_a_file_that_is_not_there_or_empty_is_reported(tmp_path):
    with pytest.raises(RolloutError, match="cannot read .*none.jsonl: No such file"):
        read_rollouts(tmp_path / "none.jsonl")
    with pytest.raises(RolloutError, match="r.jsonl has no rollouts"):
        read_rollouts(lines(tmp_path / "r.jsonl"))


def test_rewards_of_every_line_come_in_the_order_of_the_first(tmp_path):
    rows = [GOOD | {"rewards": {"x": 1, "y": 2}}, GOOD | {"id": "b", "rewards": {"y": 3, "x": 4}}]
    first, second = read_rollouts(lines(tmp_path / "r.jsonl", *rows))
    assert list(first.rewards) == list(second.rewards) == ["x", "y"] and second.rewards == {"x": 4, "y": 3}
