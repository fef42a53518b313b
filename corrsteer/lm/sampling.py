"""Sampling in which what a sample draws depends on the seed, its prompt and the step alone.

Not on who shares its batch, on the order of batches, or on the device: so runs that are compared are paired, and a run
can be resumed or spread. A token is drawn by the Gumbel-max trick: it is the one with the largest logit plus noise of
its own, which is a hash of seed, sample, step and token. Where two models agree on what is likely, they draw the same
(Maddison, Tarlow and Minka, A* Sampling, 2014; on the coupling, Daliri, Musco and Suresh, 2024, arXiv:2408.07978).
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from corrsteer.lm.decoding import Decoding

MASK = 0xFFFFFFFF


def sample_keys(prompts: Sequence[list[int]]) -> list[int]:
    """What tells samples apart: a hash of each prompt's token ids and of how many with the same came before.

    So of several samples of all prompts, one round of them after the other, the first round's keys are those of the
    prompts alone, and another round changes none before it.
    """
    seen: Counter[bytes] = Counter()
    keys = []
    for prompt in prompts:
        ids = struct.pack(f"<{len(prompt)}q", *prompt)
        keys.append(_hash(ids, struct.pack("<q", seen[ids])))
        seen[ids] += 1
    return keys


class Sampler:
    """A logits processor after which the largest score is a sampled token's.

    Parameters
    ----------
    decoding : temperature, nucleus and seed.
    keys : of the rows' samples, see `sample_keys`.
    width : tokens of a row before the first that is generated.
    """

    def __init__(self, decoding: Decoding, keys: Sequence[int], width: int):
        from transformers import TopPLogitsWarper

        self._decoding, self._keys, self._width = decoding, keys, width
        self._nucleus: Any = TopPLogitsWarper(decoding.top_p) if decoding.top_p < 1 else None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`[B, vocabulary]` float32 scores, from logits."""
        scores = scores.float() / self._decoding.temperature
        if self._nucleus is not None:
            scores = self._nucleus(input_ids, scores)
        step = input_ids.shape[1] - self._width
        seeds = [_hash(struct.pack("<QQQ", self._decoding.seed, key, step)) for key in self._keys]
        return scores + gumbel(seeds, scores.shape[1], scores.device)


def gumbel(seeds: Sequence[int], n: int, device: torch.device) -> Tensor:
    """Standard Gumbel noise of 64-bit seeds, `[len(seeds), n]` float32: the same on every device up to rounding."""
    halves = torch.tensor([[s & MASK, s >> 32] for s in seeds], dtype=torch.int64, device=device).int()
    x = _mixed(torch.arange(n, dtype=torch.int32, device=device) ^ 0x2545F491)
    x = _mixed(_mixed(x ^ halves[:, :1]) + halves[:, 1:])
    uniform = ((x & 0x7FFFFFFF).float() * 2.0**-31).clamp_(2.0**-32, 1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))


def _mixed(x: Tensor) -> Tensor:
    """Wellons' `lowbias32` integer hash (nullprogram.com, Prospecting for hash functions, 2018) of int32s."""
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * (0x846CA68B - (1 << 32))
    return x ^ (x >> 16 & 0xFFFF)


def _hash(*parts: bytes) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest(), "little")
