"""Permutation tests: which features' scores chance explains, alone, in their layer, and among all layers.

Notation: P permutations, F features of all layers together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from corrsteer.errors import CorrSteerError
from corrsteer.stats import scores
from corrsteer.stats.evidence import Evidence

FEATURES_AT_A_TIME = 4096  # whose permutations are looked at together, 32 MB an array of 1000
LEVELS = 1 << 16  # of a score, to which the pooled null is rounded (up)


@dataclass(frozen=True)
class Significance:
    """P-values of one layer's features, `[D]` float64 each.

    Attributes
    ----------
    p : of each feature's own permutations: how often |score| was as large or larger.
    p_layer : family-wise over the layer's features, for a selection that takes the best of each layer.
    p_adjusted : family-wise over all features of all layers. Never below `p_layer`, nor that below `p`.
    q : Benjamini & Hochberg's, over all features of all layers.
    """

    p: Tensor
    p_layer: Tensor
    p_adjusted: Tensor
    q: Tensor


def significance(evidences: Mapping[int, Evidence], name: str = "pearson", label: int = 0) -> dict[int, Significance]:
    """Permutation tests of every feature's score, of all layers together.

    - `p` = (1 + #{|score_π| >= |score|}) / (P + 1) (Phipson & Smyth, "Permutation p-values should never be zero",
      2010): exact where samples of a block are exchangeable, whatever their distribution. What is tested is that the
      feature and the reward are independent, not only uncorrelated. Where prompts have several samples, it is exact
      where prompts of as many samples are exchangeable; of evidence `within` prompts, where a prompt's samples are.
    - Family-wise: the null of the *largest* |score|, with step-down, where the feature of rank k meets only those of
      ranks k and below (Westfall & Young 1993, algorithm 4.1, maxT). Features that go together cost no power.
    - False discoveries: q-values of Benjamini & Hochberg ("Controlling the false discovery rate", 1995), of p-values
      from the permutations of all features pooled (Tusher, Tibshirani & Chu, "Significance analysis of microarrays
      applied to the ionizing radiation response", 2001), as P + 1 is too few to tell p-values of one feature in a
      million apart. Scores are rounded to 1/65536 of the largest, in the direction of larger p-values.

    Parameters
    ----------
    evidences : layer -> evidence, all of the same blocks and permutations.

    Returns
    -------
    layer -> `Significance`.

    Raises
    ------
    CorrSteerError : where the score's permutations were not kept.
    """
    _check(evidences, name, label)
    if name == "contrastive":  # of which the test is the same
        name = "point_biserial"
    family = _Family(evidences, name, label)
    observed, P = family.observed, family.permutations
    top = max(float(observed.max()), 1e-300)
    tie = scores.TIE * top
    everyone, layers = StepDownMaxT(P), [StepDownMaxT(P) for _ in evidences]
    pooled = PooledNull(top)
    as_large = torch.zeros(
        3, len(observed), dtype=torch.float64, device="cpu"
    )  # permutations: own, of the layer, of all
    for here, null in family.ascending():
        bound = observed[here][:, None] - tie
        as_large[0, here] = (null >= bound).sum(1).double()
        for number, of_layer in enumerate(layers):
            mine = family.home[here] == number
            as_large[1, here[mine]] = of_layer.count(null[mine], bound[mine])
        as_large[2, here] = everyone.count(null, bound)
        pooled.add(null)
    p, p_layer, p_adjusted = (1 + as_large) / (P + 1)
    downwards = family.order.flip(0)
    _never_falling(p_adjusted, downwards)
    for number in range(len(layers)):
        _never_falling(p_layer, downwards[family.home[downwards] == number])
    q = benjamini_hochberg(pooled.p((observed - tie).clamp(min=0)))
    parts = zip(*(values.split(family.sizes) for values in (p, p_layer, p_adjusted, q)))
    return {layer: Significance(*part) for layer, part in zip(evidences, parts)}


class StepDownMaxT:
    """Westfall & Young's step-down maxT of one family, whose features come in ascending order of their scores.

    A feature is compared with the largest score, in each permutation, of itself and of those below it.
    """

    def __init__(self, permutations: int):
        self._largest = np.zeros(permutations)

    def count(self, null: Tensor, bound: Tensor) -> Tensor:
        """Permutations in which that largest reaches `bound: [features, 1]`; `null: [features, P]` are their scores."""
        reaching = np.empty(len(null))
        for number, (scores_of, least) in enumerate(zip(null.numpy(), bound.numpy())):  # a tenth of cummax's time
            np.maximum(self._largest, scores_of, out=self._largest)
            reaching[number] = np.count_nonzero(self._largest >= least)
        return torch.from_numpy(reaching)


class PooledNull:
    """The permuted scores of all features together, as a histogram of `LEVELS` levels up to the largest score."""

    def __init__(self, top: float):
        self._scale = LEVELS / top
        self._counts = torch.zeros(LEVELS + 1, dtype=torch.float64, device="cpu")

    def add(self, null: Tensor) -> None:
        """Take in permuted scores of any shape, each rounded up."""
        levels = (null * self._scale).clamp(max=LEVELS).ceil().int()
        self._counts += torch.bincount(levels.flatten(), minlength=LEVELS + 1)

    def p(self, score: Tensor) -> Tensor:
        """The share of them that reach each score, itself counted in."""
        reaching = self._counts.flip(0).cumsum(0).flip(0)
        return (1 + reaching[(score * self._scale).floor().long()]) / (1 + self._counts.sum())


class _Family:
    """The features of all layers, in one row.

    Attributes
    ----------
    observed : `[F]` float64, |score| of each.
    home : `[F]`, the number of its layer.
    order : `[F]`, features in ascending order of |score|.
    sizes : features of each layer.
    """

    def __init__(self, evidences: Mapping[int, Evidence], name: str, label: int):
        self._evidences, self._name, self._label = list(evidences.values()), name, label
        observed = [scores.score(evidence, name, slice(None), label).abs().cpu() for evidence in self._evidences]
        self.sizes = [len(values) for values in observed]
        self.observed = torch.cat(observed)
        sizes = torch.tensor(self.sizes, dtype=torch.int64, device="cpu")
        layers = torch.arange(len(sizes), dtype=torch.int64, device="cpu")
        self.home = layers.repeat_interleave(sizes)
        self.order = self.observed.argsort(stable=True)
        self.permutations = self._evidences[0].permutations
        everyone = torch.arange(len(self.observed), dtype=torch.int64, device="cpu")
        self._index = everyone - (sizes.cumsum(0) - sizes)[self.home]

    def ascending(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Some features at a time, in `order`: which they are, and |score| of every permutation, `[features, P]`."""
        for here in self.order.split(FEATURES_AT_A_TIME):
            null = torch.empty(len(here), self.permutations, dtype=torch.float64, device="cpu")
            for number, evidence in enumerate(self._evidences):
                mine = self.home[here] == number
                if bool(mine.any()):
                    features = self._index[here[mine]].to(evidence.device)
                    permuted = scores.permuted(evidence, self._name, features, self._label)
                    null[mine] = permuted.abs().nan_to_num().cpu()
            yield here, null


def _check(evidences: Mapping[int, Evidence], name: str, label: int) -> None:
    """Raise unless these evidences can be tested together."""
    if not evidences:
        raise CorrSteerError("evidences must hold at least one layer, got none")
    first = next(iter(evidences.values()))
    for layer, evidence in evidences.items():
        scores.check(evidence, name, label)
        if not scores.testable(evidence, name, label):
            raise CorrSteerError(
                f"score {name!r} of layer {layer} has no permutations to be tested by; collect with permutations=1000 "
                f"and scores=[..., {name!r}]"
            )
        if _samples(evidence, label) != _samples(first, label):
            raise CorrSteerError(
                f"evidences must be of the same samples and permutations, but layer {layer} has {evidence!r} of seed "
                f"{evidence.seed}, and another {first!r} of seed {first.seed}"
            )


def _never_falling(p: Tensor, downwards: Tensor) -> None:
    """Make step-down p-values monotone in place: from the largest score down they never fall."""
    p[downwards] = p[downwards].cummax(0).values


def _samples(evidence: Evidence, label: int) -> tuple[object, ...]:
    """What evidences of the same samples and permutations have in common."""
    rewards = (float(t[label]) for t in (evidence.labels[:, 0], evidence.n_positive, evidence.low, evidence.high))
    prompts = (evidence.within, int(evidence.n_groups), evidence.fixed)
    return (evidence.permutations, evidence.seed, evidence.blocks, *prompts, *rewards)


def benjamini_hochberg(p: Tensor) -> Tensor:
    """Adjusted p-values: the false discovery rate at which each would be let pass (Benjamini & Hochberg 1995)."""
    falling = p.argsort(descending=True, stable=True)
    m = len(p)
    scaled = p[falling] * m / torch.arange(m, 0, -1, dtype=p.dtype, device=p.device)
    out = torch.empty_like(p)
    out[falling] = scaled.cummin(0).values.clamp(max=1)
    return out
