"""Memory that shows what is not written, and what is written or read beside it."""

from __future__ import annotations

import contextlib
import os

import pytest
import torch
from torch import Tensor

# Elements on either side, so that the addresses stay multiples of what a GPU's copy engine wants; none where an address
# sanitizer watches, which knows where memory ends better than any margin.
MARGIN = 0 if "CORRSTEER_EXTENSIONS" in os.environ else 64
NO_INDEX = -7  # what integers are born with: wrong wherever it is used, and near enough not to end the process
_empty, _empty_like = torch.empty, torch.empty_like
_watched: list[tuple[Tensor, Tensor]] = []  # what has been born within `poison`, and the memory around it


def _poison_of(dtype: torch.dtype):
    if dtype.is_floating_point:
        return float("nan")
    return NO_INDEX if dtype.is_signed else True if dtype == torch.bool else 256 + NO_INDEX


def _born(shape, dtype, device) -> Tensor:
    count = torch.Size(shape).numel()
    around = _empty(count + 2 * MARGIN, dtype=dtype, device=device).fill_(_poison_of(dtype))
    inside = around[MARGIN : MARGIN + count].view(shape)
    _watched.append((inside, around))
    return inside


def fenced(tensor: Tensor) -> Tensor:
    """A copy with poison around it, which whoever reads beyond its ends will read."""
    return _born(tensor.shape, tensor.dtype, tensor.device).copy_(tensor)


@contextlib.contextmanager
def poison():
    """Within, `torch.empty` and `torch.empty_like` give poison between margins; at the end these must be untouched."""

    def empty(*size, dtype=None, device=None, **_):
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        return _born(shape, dtype or torch.get_default_dtype(), device or "cpu")

    def empty_like(tensor, *, dtype=None, device=None, **_):
        return _born(tensor.shape, dtype or tensor.dtype, device or tensor.device)

    _watched.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        patch.setattr(torch, "empty_like", empty_like)
        yield
    for inside, around in _watched:
        for margin in (around[:MARGIN], around[MARGIN + inside.numel() :]):
            intact = margin.isnan() if margin.dtype.is_floating_point else margin == _poison_of(margin.dtype)
            assert bool(intact.all()), f"memory beside a {list(inside.shape)} {inside.dtype} was written to"
    _watched.clear()
