"""The hooks that add steering vectors to a model's residual stream."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from corrsteer import ops
from corrsteer.errors import CorrSteerError
from corrsteer.lm import hook_points
from corrsteer.lm.hook_points import HookPoint
from corrsteer.lm.token_positions import TokenPositions, track


@contextlib.contextmanager
def add_vectors(
    model: nn.Module, vectors: Mapping[HookPoint, Tensor], rows: Tensor | None, positions: str
) -> Iterator[None]:
    """Add vectors at hook points in every pass for as long as the context lasts.

    Parameters
    ----------
    vectors : hook point -> `[V, d]` float32.
    rows : `[B]` int32, which of the V each row of a batch gets, -1 for none; None gives every row the first.
    positions : which tokens are steered, as for `Steering.apply`.
    """
    with contextlib.ExitStack() as stack:
        tracker = stack.enter_context(track(model))
        for point, table in vectors.items():
            add = _Add(tracker, table, rows, positions)
            # The first layer's input may be the caller's own inputs_embeds.
            function = (lambda h, add=add: add(h.clone())) if point == HookPoint(0, "resid_pre") else add
            stack.callback(hook_points.attach(model, point, function).remove)
        yield


class _Add:
    """The hook of one hook point."""

    def __init__(self, tracker: TokenPositions, vectors: Tensor, rows: Tensor | None, positions: str):
        self._tracker, self._vectors, self._positions = tracker, vectors, positions
        self._rows, self._every_row = rows, torch.zeros(0, dtype=torch.int32)

    def __call__(self, h: Tensor) -> Tensor:
        if self._vectors.device != h.device:  # the residual's, since an offloaded layer's own is `meta` between passes
            self._vectors = self._vectors.to(h.device)
            self._rows = None if self._rows is None else self._rows.to(h.device)
        rows = self._rows
        if rows is None:
            if len(self._every_row) != len(h) or self._every_row.device != h.device:
                self._every_row = torch.zeros(len(h), dtype=torch.int32, device=h.device)
            rows = self._every_row
        elif len(rows) != len(h):
            raise CorrSteerError(f"rows must have one entry per row of the batch ({len(h)}), got {len(rows)}")
        where = self._tracker.select(h, self._positions)
        return ops.steer_add(h, self._vectors, rows, where)
