"""Which samples make up a block: a random part of the data, that labels may be permuted within."""

from __future__ import annotations

import random
from collections.abc import Sequence

from corrsteer.arguments import whole
from corrsteer.errors import CorrSteerError
from corrsteer.stats.groups import numbered


def shuffled_blocks(
    lengths: Sequence[int], block_size: int, seed: int, groups: Sequence[int] | None = None
) -> dict[int, list[int]]:
    """Samples by the number of their block, in the order in which blocks are taken.

    Prompts are shuffled. A prompt's samples stay together, in their order, and a block is filled with whole prompts, up
    to `block_size` samples. The block of the longest prompt comes first, so that what is too large for the memory fails
    at once; it keeps its number.

    Parameters
    ----------
    lengths : `[n]`, tokens of each sample's prompt.
    block_size : samples of a block, at most.
    groups : `[n]`, which prompt each sample is of; by default each is of its own.

    Raises
    ------
    CorrSteerError : where a prompt has more samples than a block may have.
    """
    block_size, numbers = whole("block_size", block_size, 1), numbered(groups, len(lengths))[0]
    prompts: list[list[int]] = [[] for _ in range(max(numbers, default=-1) + 1)]
    for sample, prompt in enumerate(numbers):
        prompts[prompt].append(sample)
    largest = max(map(len, prompts), default=0)
    if largest > block_size:
        raise CorrSteerError(
            f"block_size must be at least {largest}, as a prompt has {largest} samples and they must be in one block, "
            f"got {block_size}"
        )
    random.Random(seed).shuffle(prompts)
    filled: list[list[int]] = []
    for samples in prompts:
        if not filled or len(filled[-1]) + len(samples) > block_size:
            filled.append([])
        filled[-1] += samples
    blocks = dict(enumerate(filled))
    if not blocks:
        return {}
    first = max(blocks, key=lambda number: max(lengths[i] for i in blocks[number]))
    return {first: blocks.pop(first), **blocks}
