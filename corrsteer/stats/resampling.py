"""How the samples of a block are resampled: in which orders their rewards are permuted, and how often a bootstrap
replicate has each.

It depends on the seed, the block's number and the samples' places in it alone. The last block's are kept, as the
evidence of every layer asks for the same: once for the pooling that is tested, once for the others.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from corrsteer.stats.groups import Numbered, whole_orders, within_orders


@functools.lru_cache(maxsize=2)
def label_orders(seed: int, block: int, permutations: int, groups: Numbered, within: bool) -> Tensor:
    """`[P, n]` int64: in each permutation, which sample's label each sample of a block gets."""
    rng = np.random.default_rng([seed, block, 0])
    return torch.from_numpy((within_orders if within else whole_orders)(rng, permutations, groups))


def permuted_labels(values: Tensor, orders: Tensor) -> Tensor:
    """`[n, R · P]`: each column of `values: [n, R]` in every one of `orders: [P, n]`."""
    return torch.cat([values[:, r][orders].T for r in range(values.shape[1])], 1)


@functools.lru_cache(maxsize=2)
def poisson_weights(seed: int, block: int, bootstrap: int, groups: Numbered) -> Tensor:
    """`[n, B]` float64: how often each replicate has each sample of a block, all of a prompt alike."""
    rng = np.random.default_rng([seed, block, 1])
    of_prompts = rng.poisson(1.0, (max(groups, default=-1) + 1, bootstrap)).astype(np.float64)
    return torch.from_numpy(of_prompts[np.asarray(groups, dtype=np.int64)])
