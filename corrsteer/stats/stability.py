"""Snapshots of a collection: whether more samples would change what is selected."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from corrsteer.arguments import whole
from corrsteer.stats import inference, scores
from corrsteer.stats.evidence import Evidence


@dataclass(frozen=True)
class Leader:
    """A feature of a snapshot: its number, r, and the ends of the delta interval, None where there is none."""

    feature: int
    r: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Snapshot:
    """The two features of each layer with the highest r after `n` samples, best first: layer -> leaders."""

    n: int
    leaders: dict[int, tuple[Leader, ...]]


def snapshot(evidences: Mapping[int, Evidence]) -> Snapshot:
    """What is in front now."""
    best = {layer: scores.correlation(e).topk(min(2, e.d_sae)) for layer, e in evidences.items()}
    # intervals of all layers at once, as each is many small sums
    first = next(iter(evidences.values()))
    of_best = first.of_features([(evidences[layer], top.indices) for layer, top in best.items()])
    low, high = (ends.cpu().split([len(top.indices) for top in best.values()])
                 for ends in inference.delta_interval(of_best))  # fmt: skip
    leaders = {}
    for (layer, top), least, most in zip(best.items(), low, high):
        rows = zip(top.indices.tolist(), top.values.tolist(), least.tolist(), most.tolist())
        leaders[layer] = tuple(Leader(i, r, _known(a), _known(b)) for i, r, a, b in rows)
    return Snapshot(first.n, leaders)


def settled_at(snapshots: Sequence[Snapshot]) -> dict[int, int]:
    """Layer -> samples after which its best feature was the final one, and stayed it; empty without snapshots."""
    settled: dict[int, int] = {}
    if not snapshots:
        return settled
    for layer, (final, *_) in snapshots[-1].leaders.items():
        since = len(snapshots) - 1
        while since and snapshots[since - 1].leaders[layer][0].feature == final.feature:
            since -= 1
        settled[layer] = snapshots[since].n
    return settled


def stable(snapshots: Sequence[Snapshot], patience: int, layers: Collection[int]) -> bool:
    """Whether in the last `patience` + 1 snapshots no best feature of these layers changed, and in the last one each
    best feature's interval lies above the next one's."""
    patience = whole("patience", patience, 1)
    if len(snapshots) <= patience:
        return False
    first, last = snapshots[-1 - patience], snapshots[-1]
    settled = settled_at(snapshots)
    if any(settled[layer] > first.n for layer in layers):
        return False
    return all(_apart(*last.leaders[layer]) for layer in layers)


def _apart(best: Leader, next_best: Leader | None = None) -> bool:
    if next_best is None:
        return True
    return best.low is not None and next_best.high is not None and best.low > next_best.high


def _known(value: float) -> float | None:
    """A number as JSON can have it."""
    return None if math.isnan(value) else value
