"""Tensors as arguments: what is none, or does not hold its numbers one after the other, is refused by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from corrsteer.arguments import check_type
from corrsteer.errors import CorrSteerError
from corrsteer.types import Device

LARGEST = 2**31 - 1  # of a size, such as a number of features


class NoMemory(CorrSteerError):
    """There is no memory for something."""


def check_tensor(name: str, value: Any) -> None:
    """Raise unless an argument is a dense tensor."""
    if getattr(value, "layout", None) is not torch.strided:  # alone, as an operation may be called at every step
        check_type(name, value, Tensor, "a tensor", "use torch.as_tensor")
        raise CorrSteerError(f"{name} must be dense, got a tensor of layout {value.layout}; use .to_dense()")


def check_holds(name: str, value: Any) -> None:
    """Raise unless an argument is a dense tensor that holds numbers, which those of the meta device do not."""
    check_tensor(name, value)
    if value.is_meta:
        raise CorrSteerError(f"{name} must hold numbers, got a tensor on the meta device; use one of another")


def zeros(what: str, shape: Sequence[int], device: Device) -> Tensor:
    """`shape` float64, all 0.

    Raises
    ------
    NoMemory : where there is none for it.
    """
    try:
        return torch.zeros(tuple(shape), dtype=torch.float64, device=device)
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is one of the former
        size = 8 * math.prod(shape) / 2**30
        raise NoMemory(
            f"there is no memory for {what}, of which {list(shape)} take {size:.3g} GiB ({type(error).__name__}); take "
            f"fewer"
        ) from error
