"""What an evaluation says of rewards made by hand."""

import json
import math

import pytest
import tiny_pipeline
import torch
from statsmodels.stats.multitest import multipletests

from corrsteer import Decoding, Steering, Task, evaluate
from corrsteer.files import to_json
from corrsteer.report.tables import evaluation_table
from corrsteer.rollouts.grading import Graded
from corrsteer.stats.paired import difference, mean

DECODING = Decoding(2)
NAMES = ("right_to_right", "right_to_wrong", "wrong_to_right", "wrong_to_wrong")


def task(n, categories=None):
    rows = [{"prompt": f"{at}", "answer": "1"} for at in range(n)]
    if categories is None:
        return Task.from_rows(rows)
    return Task.from_rows([row | {"subject": c} for row, c in zip(rows, categories)], category_field="subject")


def graded(task, rewards, completions=None, tokens=60, seconds=2.0):
    completions = completions or [f"{reward}" for reward in rewards]
    return Graded(list(completions), {"reward": list(rewards)}, task.identity, DECODING, tokens, seconds)


@pytest.fixture
def compare(monkeypatch):
    """Evaluate with these rewards: unsteered, and of each steering."""

    def run(task, before, *after):
        monkeypatch.setattr("corrsteer.experiments.evaluation.run_trials", lambda *_, **__: list(after))
        named = {f"s{number}": None for number in range(len(after))}
        return evaluate(None, None, task, named, decoding=DECODING, unsteered=before)

    return run


def of_transitions(right_right, right_wrong, wrong_right, wrong_wrong):
    """Rewards before and after."""
    pairs = [(1, 1)] * right_right + [(1, 0)] * right_wrong + [(0, 1)] * wrong_right + [(0, 0)] * wrong_wrong
    return [float(a) for a, _ in pairs], [float(b) for _, b in pairs]


@pytest.mark.parametrize(
    ("counts", "ratio"),
    (((5, 1, 3, 2), 0.25), ((0, 4, 0, 1), 1.0), ((2, 0, 7, 1), 0.0), ((3, 0, 0, 4), None)),
)
def test_transitions_and_side_effects_are_those_of_the_samples(compare, counts, ratio):
    before, after = of_transitions(*counts)
    one = task(len(before))
    result = compare(one, graded(one, before), graded(one, after))["s0"]
    assert tuple(result.transitions[name] for name in NAMES) == counts and list(result.transitions) == list(NAMES)
    assert (result.improved, result.worsened, result.side_effect_ratio) == (counts[2], counts[1], ratio)
    assert (result.unsteered, *result.unsteered_interval) == mean(before)
    assert (result.steered, *result.steered_interval) == mean(after)
    assert (result.difference, *result.difference_interval) == difference(before, after)


def test_right_is_a_reward_above_zero(compare):
    before, after = [0.5, -1.0, 0.25, 0.0, 2.0], [0.75, 0.5, 0.0, -2.0, 1.0]
    one = task(5)
    result = compare(one, graded(one, before), graded(one, after))["s0"]
    assert tuple(result.transitions.values()) == (2, 1, 1, 1)
    assert (result.improved, result.worsened) == (2, 3)
    assert result.difference == pytest.approx(-0.3) and result.difference_interval == difference(before, after)[1:]


def test_completions_that_changed_under_equal_reward_can_be_found(compare):
    one = task(4)
    before = graded(one, [1, 0, 0, 1], ["1", "2", "3", "1"])
    result = compare(one, before, graded(one, [1, 0, 1, 0], ["1.", "2", "1", "4"]))["s0"]
    assert [e["change"] for e in result.examples] == ["changed_equal", "none", "improved", "worsened"]
    assert result.changed_equal == 1


def test_holms_p_values_are_over_the_steerings_evaluated_together(compare):
    before, one = [0.0] * 20, task(20)
    after = [[1.0] * n + [0.0] * (20 - n) for n in (9, 6, 0)]
    results = compare(one, graded(one, before), *(graded(one, rewards) for rewards in after)).values()
    p = [result.p_value for result in results]
    assert p == pytest.approx([2 / 2**9, 2 / 2**6, 1])
    assert [result.p_holm for result in results] == pytest.approx(multipletests(p, method="holm")[1].tolist())
    (alone,) = compare(one, graded(one, before), graded(one, after[0])).values()
    assert alone.p_holm == alone.p_value


def test_each_category_has_its_own_difference(compare):
    before, after = [1.0, 0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 0.0, 0.0]
    one = task(5, ["law", "law", "art", "art", "law"])
    result = compare(one, graded(one, before), graded(one, after))["s0"]
    assert list(result.categories) == ["art", "law"]
    law, art = result.categories["law"], result.categories["art"]
    assert (law.n, law.unsteered, law.steered) == (3, pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert (art.n, art.unsteered, art.steered, art.difference) == (2, 0, 0.5, 0.5)
    assert art.difference_interval == difference([0, 0], [1, 0])[1:]
    assert [e["category"] for e in result.examples] == ["law", "law", "art", "art", "law"]
    plain = task(5)
    result = compare(plain, graded(plain, before), graded(plain, after))["s0"]
    assert result.categories == {} and "category" not in result.examples[0]


def test_samples_that_repeat_a_prompt_are_said_to_be_no_independent_ones(compare):
    twice = Task.from_rows([{"prompt": prompt, "answer": "1"} for prompt in ("1", "2", "1", "1")])
    (note,) = compare(twice, graded(twice, [0, 1, 0, 0]), graded(twice, [1, 1, 1, 1]))["s0"].notes
    assert note == (
        "2 of the 4 samples repeat a prompt, but intervals and p-values take samples to be independent and are too "
        "sure; give each prompt once"
    )
    once = task(4)
    assert compare(once, graded(once, [0, 1, 0, 0]), graded(once, [1, 1, 1, 1]))["s0"].notes == []


def test_speeds_are_tokens_by_seconds(compare):
    one = task(2)
    before, after = graded(one, [0, 1], tokens=60, seconds=2.0), graded(one, [0, 1], tokens=50, seconds=2.5)
    result = compare(one, before, after)["s0"]
    assert (result.unsteered_tokens_per_second, result.steered_tokens_per_second) == (30, 20)


def test_equal_graded_rewards_have_no_interval_and_can_be_written_as_json(compare):
    one = task(3)
    result = compare(one, graded(one, [0.5] * 3), graded(one, [0.5] * 3))["s0"]
    assert result.unsteered_interval is result.steered_interval is result.difference_interval is None
    assert result.difference == 0
    written = json.loads(to_json(result.to_dict()))
    assert written["difference_interval"] is None and written["transitions"]["right_to_right"] == 3
    assert "no interval" in evaluation_table({"s": result})


def test_the_table_has_a_row_a_steering_and_fits_a_terminal(compare):
    before, after = of_transitions(219, 3, 194, 84)
    one = task(500, ["odd", "even"] * 250)
    results = compare(one, graded(one, before), graded(one, after), graded(one, before))
    text = evaluation_table({"strong": results["s0"], "nothing": results["s1"]})
    assert max(map(len, text.splitlines())) <= 120
    unsteered, strong, nothing = (
        next(line for line in text.splitlines() if line.startswith(name)) for name in ("unsteered", "strong", "nothing")
    )
    assert unsteered.split()[:4] == ["unsteered", "0.444", "[0.401,", "0.488]"]
    assert strong.split()[1] == "0.826" and "+0.382 [" in strong and "0.015" in strong.split()
    assert strong.split()[-7:-3] == ["219", "3", "194", "84"]
    assert nothing.split()[-7:-3] == ["222", "0", "0", "278"] and "+0.000" in nothing
    assert text.count("even") == text.count("odd") == 2, "a table of categories each"
    assert "Holm p" in text and "Holm" not in evaluation_table({"s": results["s0"]})


def test_an_evaluation_of_a_model_has_all_of_it():
    model, tokenizer = tiny_pipeline.model(), tiny_pipeline.tokenizer()
    rows = [{"prompt": e.prompt, "answer": "1", "length": len(e.prompt)} for e in tiny_pipeline.task(12).examples]
    one = Task.from_rows(rows, grader=tiny_pipeline.digits_up, category_field="length")
    steering = Steering.from_vectors({"blocks.1.hook_resid_post": torch.full((128,), 3.0)})
    result = evaluate(model, tokenizer, one, steering, decoding=DECODING, progress=False)
    assert sum(category.n for category in result.categories.values()) == sum(result.transitions.values()) == 12
    assert 0 < result.unsteered_tokens_per_second < math.inf and result.p_holm == result.p_value
    assert result == evaluate(model, tokenizer, one, steering, decoding=DECODING, progress=False)
