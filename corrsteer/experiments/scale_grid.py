"""Scales to try: a geometric grid that grows at whichever end is best, until the curve of scores turns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

RATIO = 2.0
LEAST, MOST = 2.0**-6, 2.0**8  # times the middle of the first scales: past it a coefficient is of no use as a unit


def next_scale(
    scores: Mapping[float, float], unsteered: float, highest: float = math.inf, middle: float = 1.0
) -> float | None:
    """The scale to try next; None where the best of those tried lies between others, or nothing is to be gained.

    A curve that is as good as no steering, or better, is followed upwards as long as its largest scale is as good as
    any (a plateau, or scales too small to do anything, are not the turn), and downwards as long as its smallest is
    better than all others. A curve that is worse may be too strong, and is followed downwards as long as its smallest
    scale is as good as any. Where every sample has the highest reward, nothing is better.

    Parameters
    ----------
    scores : mean reward by scale; scales of one sign, none of them 0.
    unsteered : mean reward without steering, of the same samples.
    highest : the highest reward that there can be.
    middle : of the scales that were tried first.
    """
    scales = sorted(scores, key=abs)
    smallest, largest = scales[0], scales[-1]
    best, helps = max(scores.values()), max(scores.values()) >= unsteered
    alone = list(scores.values()).count(best) == 1
    if best >= highest:
        return None
    if scores[smallest] == best and (alone and best > unsteered or not helps):
        grown = smallest / RATIO
    elif scores[largest] == best and (alone or helps):
        grown = largest * RATIO
    else:
        return None
    return grown if LEAST <= abs(grown / middle) <= MOST else None


def highest_reward(rewards: Iterable[float]) -> float:
    """The highest that a reward can be, as those seen tell: 1 for shares and for right or wrong, else no bound."""
    return 1.0 if all(0 <= reward <= 1 for reward in rewards) else math.inf


def at_an_end(scale: float, tried: Iterable[float]) -> bool:
    """Whether a scale is the smallest or the largest of those tried, so that the curve has not turned there."""
    sizes = [abs(one) for one in tried]
    return abs(scale) in (min(sizes), max(sizes))
