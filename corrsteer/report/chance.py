"""How large a correlation chance alone gives among a run's features."""

from __future__ import annotations

import math

import torch
from scipy.stats import norm

from corrsteer.runs.run import Run
from corrsteer.stats import scores
from corrsteer.steering.features import CHANCE

AT_A_TIME = 4096  # features whose permutations are looked at together


def largest_by_chance(run: Run) -> tuple[float, str]:
    """The |r| that the largest of all features reaches with a chance of 5 %, and how that is known.

    From permutations, it is that quantile of the largest |r| of each, over all layers. Without them, or with too few
    for the quantile, that of as many independent normal correlations (Šidák 1967), which is too large where features go
    together, and too small where activations are rare and large.
    """
    if run.testable() and run.permutations >= math.ceil(1 / CHANCE) - 1:
        largest = torch.zeros(run.permutations, dtype=torch.float64, device="cpu")
        for pools in run.evidence.values():
            evidence = pools[run.pool]
            every = torch.arange(evidence.d_sae, dtype=torch.int64, device=evidence.device)
            for features in every.split(AT_A_TIME):
                null = scores.permuted(evidence, "pearson", features, 0).abs().nan_to_num()
                largest = torch.maximum(largest, null.amax(0).cpu())
            if evidence.rows is not None:
                evidence.rows.forget()
        # (1 + permutations that reach it) / (P + 1) is at most 5 % above the k-th largest
        k = math.floor(CHANCE * (run.permutations + 1))
        return float(largest.topk(k).values[-1]), f"{run.permutations} permutations"
    alone = 1 - (1 - CHANCE) ** (1 / max(run.n_features, 1))
    return min(float(norm.isf(alone / 2)) / math.sqrt(max(run.n, 1)), 1.0), "a normal approximation"
