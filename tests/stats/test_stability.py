"""Snapshots: what was in front when, and when to stop."""

import torch

from corrsteer import Evidence
from corrsteer.stats.stability import Leader, Snapshot, settled_at, snapshot, stable


def taken(n, *leaders):
    """A snapshot of one layer per (feature, low) with a runner-up whose interval ends at 0.2."""
    return Snapshot(
        n, {layer: (Leader(f, 0.5, low, 0.9), Leader(99, 0.1, 0.0, 0.2)) for layer, (f, low) in enumerate(leaders)}
    )


def test_a_snapshot_holds_each_layers_two_highest_correlations_with_their_intervals():
    g = torch.Generator().manual_seed(0)
    y = (torch.rand(200, generator=g) < 0.5).double()
    z = torch.rand(200, 6, generator=g)
    z[:, 4] += 2 * y
    z[:, 1] += 0.5 * y
    evidence = Evidence(6)
    evidence.update(z, y, 0)
    seen = snapshot({3: evidence, 5: evidence})
    assert seen.n == 200 and list(seen.leaders) == [3, 5]
    assert [leader.feature for leader in seen.leaders[3]] == [4, 1]
    assert all(one.low < one.r < one.high for one in seen.leaders[3])


def test_a_layer_has_settled_when_its_final_feature_came_to_the_front_for_good():
    history = [
        taken(10, (1, 0), (7, 0)),
        taken(20, (2, 0), (7, 0)),
        taken(30, (1, 0), (7, 0)),
        taken(40, (1, 0), (8, 0)),
    ]
    assert settled_at(history) == {0: 30, 1: 40}
    assert settled_at(history[:1]) == {0: 10, 1: 10}


def test_stable_asks_for_patience_and_for_intervals_that_are_apart():
    apart, close = taken(10, (1, 0.3)), taken(10, (1, 0.1))
    assert stable([apart] * 4, 3, [0]) and not stable([apart] * 3, 3, [0])
    assert not stable([apart] * 3 + [close], 3, [0])
    assert stable([close] * 3 + [apart], 3, [0]), "only the last intervals must be apart"
    assert not stable([taken(5, (2, 0.3)), taken(6, (1, 0.3)), apart, apart], 3, [0])
    assert not stable([taken(10, (1, None))] * 4, 3, [0])
    two = [taken(10, (1, 0.3), (2, 0.1))] * 4
    assert stable(two, 3, [0]) and not stable(two, 3, [0, 1]), "of the layers that are asked about"
    alone = Snapshot(10, {0: (Leader(1, 0.5, 0.1, 0.9),)})
    assert stable([alone] * 2, 1, [0]), "a layer of one feature has no other to be apart from"


def test_a_feature_without_an_interval_has_none_in_its_snapshot():
    evidence = Evidence(1)
    evidence.update(torch.rand(3, 1), torch.tensor([0.0, 1, 1]), 0)
    assert snapshot({0: evidence}).leaders[0][0].low is None
    assert settled_at([]) == {}
