"""Vectors that hooks add which stay on a model, compiled or not.

They are tensors that stay where they are and are changed in place, which compiled code and CUDA graphs read anew.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from corrsteer.errors import CorrSteerError
from corrsteer.lm import hook_points
from corrsteer.lm.hook_points import HookPoint
from corrsteer.lm.traced_passes import TracedPasses, fixed

Vectors = Mapping[HookPoint, Tensor]  # hook point -> [d] float32

_installed: weakref.WeakKeyDictionary[nn.Module, list[InstalledVectors]] = weakref.WeakKeyDictionary()


class InstalledVectors:
    """A vector `[d]` at each of some hook points, added in every pass until it is removed; 0 until it is set.

    Parameters
    ----------
    points : where.
    positions : which tokens it is added to, as for `Steering.apply`.
    """

    def __init__(self, model: nn.Module, points: Iterable[HookPoint], positions: str):
        self._held: dict[HookPoint, Tensor] = {}
        with torch.inference_mode(False):  # they are written outside of it, too
            for point in points:
                hook_points.check_point(model, point)
                hook_points.check_steers(point)
                d = hook_points.width(model, point)
                zeros = torch.zeros(d, dtype=torch.float32, device=hook_points.device_of(model, point))
                self._held[point] = fixed(zeros)
        functions = {point: functools.partial(_add, vector) for point, vector in self._held.items()}
        self._passes = TracedPasses(model, functions, positions)
        self.positions: str = positions
        self._set: Vectors = {}
        self._applied: list[Vectors] = []  # by contexts, and added to what is set
        self._listed = _installed.setdefault(model, [])
        self._listed.append(self)

    def set(self, vectors: Vectors) -> None:
        """Add these from now on, and nothing at the other hook points."""
        self._check(vectors)
        self._set = vectors
        self._write()

    @contextlib.contextmanager
    def applied(self, vectors: Vectors) -> Iterator[None]:
        """Add these as well for as long as the context lasts."""
        self._applied.append(vectors)
        self._write()
        try:
            yield
        finally:
            self._applied = [one for one in self._applied if one is not vectors]
            self._write()

    def remove(self) -> None:
        """Take the hooks off. Where a compiled graph keeps them, they add nothing."""
        self.set({})
        self._passes.remove()
        self._listed[:] = [one for one in self._listed if one is not self]

    def fits(self, vectors: Vectors, positions: str) -> bool:
        """Whether it can add these vectors at these positions."""
        return positions == self.positions and vectors.keys() <= self._held.keys()

    def _check(self, vectors: Vectors) -> None:
        missing = ", ".join(str(point) for point in vectors if point not in self._held)
        if missing:
            raise CorrSteerError(
                f"steering must have its vectors where hooks were installed, at {', '.join(map(str, self._held))}, got "
                f"one at {missing}; name that in the points of install"
            )

    def _write(self) -> None:
        with torch.no_grad():
            for point, held in self._held.items():
                parts = [vectors[point] for vectors in (self._set, *self._applied) if point in vectors]
                held.copy_(sum(parts, torch.zeros_like(held, device="cpu")))


def installed_on(model: nn.Module, vectors: Vectors, positions: str) -> InstalledVectors | None:
    """What was installed on a model before it was compiled and can add these vectors; None for one that runs hooks.

    Raises
    ------
    CorrSteerError : for a compiled model, if what was installed on it is elsewhere or for other positions.
    """
    listed = _installed.get(getattr(model, "_orig_mod", model))  # what torch.compile(model) is made of
    if not listed or not any(hook_points.is_compiled(module) for module in (model, *hook_points.owners(model))):
        return None
    found = next((one for one in listed if one.fits(vectors, positions)), None)
    if found is None:
        raise CorrSteerError(
            f"a compiled model is steered where hooks were installed before, for positions "
            f"{' or '.join(one.positions for one in listed)} and at their points, got {positions=} and "
            f"{', '.join(map(str, vectors))}; name these to install"
        )
    return found


def _add(vector: Tensor, h: Tensor, where: Tensor | None) -> Tensor:
    """`h + vector`, rounded once; where `where` says so."""
    steered = (h.float() + vector.to(h.device)).to(h.dtype)  # the residual's, as an offloaded layer's own is `meta`
    return steered if where is None else torch.where(where[..., None], steered, h)
