"""What tells the weights of a model or an SAE from others, at the cost of looking at a few of them."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

import torch
from torch import Tensor

VALUES = 64  # of each tensor


def fingerprint(tensors: Iterable[tuple[str, Tensor | None]]) -> str:
    """A hash of names, shapes, dtypes and some values of each, spread evenly."""
    digest = blake2b(digest_size=16)
    for name, tensor in tensors:
        if tensor is None:
            continue
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        if tensor.numel() and not tensor.is_meta:
            flat = tensor.detach().reshape(-1)
            some = flat[:: max(1, len(flat) // VALUES)][:VALUES]
            digest.update(some.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
