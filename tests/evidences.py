"""Evidence of made-up sparse features, for tests of what it says."""

import numpy as np
import torch

from corrsteer import Evidence, Moments, update_moments


def made(n=300, d=25, seed=0, labels="binary", effect=0.5, **settings):
    """Evidence of sparse features, the first of which goes with the reward, in blocks of 100; and what it is of."""
    rng = np.random.default_rng(seed)
    active = rng.random((n, d)) < rng.uniform(0.05, 0.8, d)
    z = (active * rng.exponential(size=(n, d))).astype(np.float32)
    y = effect * z[:, 0] + rng.standard_normal(n)
    if labels == "binary":
        y = (y > 0.3).astype(float)
    evidence, moments = Evidence(d, **settings), Moments(d)
    for block, at in enumerate(range(0, n, 100)):
        evidence.update(torch.from_numpy(z[at : at + 100]), torch.from_numpy(y[at : at + 100]), block)
        update_moments(torch.from_numpy(z[at : at + 100]), torch.from_numpy(y[at : at + 100]), moments)
    return evidence, moments, z.astype(float), y


def orders(evidence, n):
    """`[P, n]`: whose label each sample gets in each permutation."""
    blocks = range(0, n, 100)
    return np.concatenate([evidence._permutations(min(100, n - at), k).numpy() + at for k, at in enumerate(blocks)], 1)
