"""Which prompts go into a batch together."""

import random

import pytest

from corrsteer import Decoding
from corrsteer.lm.batches import common_prefix, plan_batches

RNG = random.Random(0)


def words(n):
    """Random tokens."""
    return [RNG.randrange(1000) for _ in range(n)]


def test_batches_are_sorted_by_length_and_keep_the_token_budget():
    prompts = [words(n) for n in [3, 50, 7, 7, 49, 1, 20] * 5]
    decoding = Decoding(max_new_tokens=10, batch_tokens=130, batch_size=6)
    batches = plan_batches(prompts, decoding, share=True)
    assert sorted(i for batch in batches for i in batch) == list(range(len(prompts)))
    longest = [max(len(prompts[i]) for i in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)
    for batch, width in zip(batches, longest):
        assert len(batch) <= 6 and (len(batch) * (width + 10) <= 130 or len(batch) == 1)
    assert [len(b) for b in plan_batches([words(1000)], decoding, share=True)] == [1]


def test_prompts_that_begin_alike_go_together_where_that_costs_less():
    kinds = [words(200) for _ in range(4)]
    prompts = [kinds[i % 4] + words(1 + i % 9) for i in range(64)]
    batches = plan_batches(prompts, Decoding(max_new_tokens=1), share=True)
    assert len(batches) == 4
    assert all(len({i % 4 for i in batch}) == 1 for batch in batches)
    alone = plan_batches(prompts, Decoding(max_new_tokens=1), share=False)
    assert [len(batch) for batch in alone] == [64], "without sharing there is nothing to part them for"


def test_prompts_are_not_parted_where_more_batches_cost_more_than_they_save():
    kinds = [words(20) for _ in range(8)]
    prompts = [kinds[i % 8] + words(60) for i in range(16)]
    assert len(plan_batches(prompts, Decoding(max_new_tokens=100), share=True)) == 1


@pytest.mark.parametrize(
    ("prompts", "shared"),
    [([[1, 2, 3, 4], [1, 2, 9]], 2), ([[1, 2], [1, 2]], 1), ([[1, 2], [1, 2, 3, 4]], 2), ([[5], [6]], 0), ([[5]], 0)],
)
def test_a_common_prefix_leaves_the_longest_prompts_last_token_to_read(prompts, shared):
    assert common_prefix(prompts) == shared
