"""Which prompts go into a batch together, and what they share.

What the prompts of a batch begin with is read once. So prompts are neighbours by what they begin with, then by length;
how finely they are told apart by their beginnings is what costs least, by counting tokens.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from corrsteer.lm.decoding import Decoding

PASS = 64  # what a pass of the model costs beside its tokens, in tokens

Prompts = Sequence[list[int]]


def common_prefix(prompts: Prompts) -> int:
    """How many tokens all of some prompts begin with, the last token of the longest left out, which is to be read."""
    return min(_common(prompts), max(map(len, prompts)) - 1)


def _common(prompts: Prompts) -> int:
    return len(os.path.commonprefix(prompts))


def worth_sharing(prefix: int, rows: int) -> bool:
    """Whether to read a prefix once costs less than to read it in every row."""
    return prefix * (rows - 1) > PASS


def plan_batches(prompts: Prompts, decoding: Decoding, *, share: bool) -> list[list[int]]:
    """Which prompts go together: indices, longest first, so that a batch too large for the memory fails at once.

    Parameters
    ----------
    prompts : token ids of each.
    share : whether what a batch's prompts begin with will be read once.
    """
    plans = [_plan(prompts, groups, decoding) for groups in groupings(prompts, share)]
    best = min(plans, key=lambda plan: sum(_cost([prompts[i] for i in batch], decoding, share) for batch in plan))
    return sorted(best, key=lambda batch: -len(prompts[batch[0]]))


def groupings(prompts: Prompts, share: bool) -> Iterable[list[list[int]]]:
    """Prompts in groups that begin with as many of the same tokens, for more and more of them."""
    yield [list(range(len(prompts)))]
    if not share:
        return
    order = sorted(range(len(prompts)), key=lambda i: prompts[i])
    same = [_common([prompts[a], prompts[b]]) for a, b in zip(order, order[1:])]
    least = 16
    while least <= max(same, default=0):
        groups = [order[:1]]
        for at, shared in zip(order[1:], same):
            if shared < least:
                groups.append([])
            groups[-1].append(at)
        yield groups
        least *= 2


def _plan(prompts: Prompts, groups: list[list[int]], decoding: Decoding) -> list[list[int]]:
    return [batch for group in groups for batch in _by_length(prompts, group, decoding)]


def _by_length(prompts: Prompts, group: list[int], decoding: Decoding) -> list[list[int]]:
    batches: list[list[int]] = []
    most = 0
    for index in sorted(group, key=lambda i: (-len(prompts[i]), i)):
        if not batches or len(batches[-1]) == most:
            batches.append([])
            most = decoding.rows(len(prompts[index]))
        batches[-1].append(index)
    return batches


def _cost(batch: Prompts, decoding: Decoding, share: bool) -> int:
    """What a batch costs, in tokens."""
    rows, width = len(batch), max(map(len, batch))
    prefix = common_prefix(batch) if share else 0
    if not worth_sharing(prefix, rows):
        prefix = 0
    read = PASS * (1 + bool(prefix)) + prefix + rows * (width - prefix)
    return read + (decoding.max_new_tokens - 1) * (PASS + rows)
