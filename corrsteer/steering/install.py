"""Vectors that hooks add which stay on a model, compiled or not.

They are tensors that stay where they are and are changed in place, which compiled code and CUDA graphs read anew.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from corrsteer.errors import CorrSteerError
from corrsteer.lm import hook_points
from corrsteer.lm.hook_points import HookPoint
from corrsteer.lm.traced_passes import TracedPasses, fixed


class InstalledVectors:
    """A vector `[d]` at each of some hook points, added in every pass until it is removed; 0 until it is set.

    Parameters
    ----------
    points : where.
    positions : which tokens it is added to, as for `Steering.apply`.
    """

    def __init__(self, model: nn.Module, points: Iterable[HookPoint], positions: str):
        d = hook_points.width(model)
        self._vectors: dict[HookPoint, Tensor] = {}
        with torch.inference_mode(False):  # they are written outside of it, too
            for point in points:
                hook_points.check_point(model, point)
                zeros = torch.zeros(d, dtype=torch.float32, device=hook_points.device_of(model, point))
                self._vectors[point] = fixed(zeros)
        functions = {point: functools.partial(_add, vector) for point, vector in self._vectors.items()}
        self._passes = TracedPasses(model, functions, positions)

    def set(self, vectors: Mapping[HookPoint, Tensor]) -> None:
        """Add these from now on, `[d]` float32, and nothing at the other hook points."""
        missing = [str(point) for point in vectors if point not in self._vectors]
        if missing:
            raise CorrSteerError(
                f"steering must have vectors where hooks were installed, at {', '.join(map(str, self._vectors))}, got "
                f"one for {', '.join(missing)}; name it in the points of install"
            )
        with torch.no_grad():
            for point, held in self._vectors.items():
                if point in vectors:
                    held.copy_(vectors[point])
                else:
                    held.zero_()

    def remove(self) -> None:
        """Take the hooks off. Where a compiled graph keeps them, they add nothing."""
        self.set({})
        self._passes.remove()


def _add(vector: Tensor, h: Tensor, where: Tensor | None) -> Tensor:
    """`h + vector`, rounded once; where `where` says so."""
    steered = (h.float() + vector.to(h.device)).to(h.dtype)  # the residual's, as an offloaded layer's own is `meta`
    return steered if where is None else torch.where(where[..., None], steered, h)
