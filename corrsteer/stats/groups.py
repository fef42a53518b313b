"""Groups of samples: the completions of one prompt, which are not exchangeable with those of another.

Features and rewards both go with the prompt, whether or not they have anything to do with each other. To permute single
samples as if they were independent finds significance everywhere. Two ways of permuting are valid (Winkler et al.,
"Multi-level block permutation", 2015):

- *whole prompts*: prompts of as many samples change places as they are, with all their labels (`whole_orders`);
- *within prompts*: each prompt's labels change places among its own samples (`within_orders`). With rewards and
  activations centred within prompts, what is tested is what tells good from bad completions of the same prompt.

Groups are numbers, one a sample of a block. Here they count from 0 in the order in which prompts come, see `numbered`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from corrsteer.arguments import wholes
from corrsteer.errors import CorrSteerError

Numbered = tuple[int, ...]  # groups as `numbered` gives them


def numbered(groups: Sequence[Any] | Tensor | np.ndarray | None, n: int) -> tuple[Numbered, list[int]]:
    """Groups of n samples, as numbers from 0 in the order in which they come, and what each group was called.

    Without groups every sample is a group of its own, and has no name.

    Raises
    ------
    CorrSteerError : unless there is a whole number for each sample.
    """
    if groups is None:
        return tuple(range(n)), []
    called = wholes("groups", groups.tolist() if isinstance(groups, (Tensor, np.ndarray)) else groups, empty=True)
    if len(called) != n:
        raise CorrSteerError(f"groups must hold a number for each of the {n} samples, got {len(called)}")
    number = {name: i for i, name in enumerate(dict.fromkeys(called))}
    return tuple(number[name] for name in called), list(number)


@functools.lru_cache(maxsize=2)
def of_each_size(groups: Numbered) -> tuple[np.ndarray, ...]:
    """The samples of groups, `[K, size]` int64 for the K groups of each size, the smallest first."""
    members: dict[int, list[int]] = {}
    for sample, group in enumerate(groups):
        members.setdefault(group, []).append(sample)
    sizes: dict[int, list[list[int]]] = {}
    for samples in members.values():
        sizes.setdefault(len(samples), []).append(samples)
    return tuple(np.array(sizes[size], dtype=np.int64) for size in sorted(sizes))


def whole_orders(rng: np.random.Generator, permutations: int, groups: Numbered) -> np.ndarray:
    """`[P, n]` int64: in each row, whose label each sample gets where groups of one size change places.

    Samples of a group keep their order among themselves. A group of a size that no other has stays where it is.
    """
    orders = np.empty((permutations, len(groups)), dtype=np.int64)
    for members in of_each_size(groups):
        rows = np.tile(np.arange(len(members), dtype=np.int64), (permutations, 1))
        orders[:, members] = members[rng.permuted(rows, axis=1)]
    return orders


def within_orders(rng: np.random.Generator, permutations: int, groups: Numbered) -> np.ndarray:
    """`[P, n]` int64: the same where samples change places with those of their own group."""
    orders = np.empty((permutations, len(groups)), dtype=np.int64)
    for members in of_each_size(groups):
        groups_of_size, size = members.shape
        rows = np.tile(np.arange(size, dtype=np.int64), (permutations * groups_of_size, 1))
        places = rng.permuted(rows, axis=1).reshape(permutations, groups_of_size, size)
        orders[:, members] = np.take_along_axis(np.broadcast_to(members, places.shape), places, axis=2)
    return orders


def fixed(groups: Numbered, within: bool) -> int:
    """Samples that no permutation moves."""
    if within:
        return sum(members.size for members in of_each_size(groups) if members.shape[1] == 1)
    return sum(members.size for members in of_each_size(groups) if len(members) == 1)


def centred(y: Tensor, groups: Numbered) -> Tensor:
    """`y: [n, R]` float64 less its mean in each group; exactly 0 where a group's are all equal."""
    out = y.clone()
    for members in of_each_size(groups):
        index = torch.from_numpy(members)
        of_groups = y[index]  # [K, size, R]
        apart = of_groups - of_groups[:, :1]
        out[index] = apart - apart.mean(1, keepdim=True)
    return out


def informative(y: Tensor, groups: Numbered) -> Tensor:
    """`[R]` float64: of each column of `y: [n, R]`, groups in which it varies."""
    varies = [(y[torch.from_numpy(members)] != y[torch.from_numpy(members[:, :1])]).any(1).sum(0)
              for members in of_each_size(groups)]  # fmt: skip
    return torch.stack(varies).sum(0).double()


def squares_within(pooled: Tensor, groups: Numbered) -> Tensor:
    """Σ (z - z̄_g)² over each group's samples, `[G, D]` float64, of `pooled: [n, D]` of any float dtype, on its device.

    The mean is taken first, and in float64: Σ z² - (Σ z)²/n_g would be rounding where a feature hardly varies in a
    prompt.
    """
    out = torch.zeros(max(groups, default=-1) + 1, pooled.shape[1], dtype=torch.float64, device=pooled.device)
    number = np.asarray(groups, dtype=np.int64)
    for members in of_each_size(groups):
        z = pooled[torch.from_numpy(members).to(pooled.device)].double()  # [K, size, D]
        out[torch.from_numpy(number[members[:, 0]]).to(pooled.device)] = (z - z.mean(1, keepdim=True)).square().sum(1)
    return out
