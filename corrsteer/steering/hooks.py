"""The hooks that add steering vectors to a model's residual stream."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from corrsteer import ops
from corrsteer.errors import CorrSteerError
from corrsteer.lm.hook_points import HookPoint
from corrsteer.lm.passes import follow
from corrsteer.lm.token_positions import Pass


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
        passes = stack.enter_context(follow(model, steers=True))
        for point, table in vectors.items():
            add = _Add(table, rows, positions, copies=point == HookPoint(0, "resid_pre"))
            stack.enter_context(passes.attached(point, add))
        yield


class _Add:
    """What is called at one hook point; `copies` where the residual is not this model's to write to."""

    def __init__(self, vectors: Tensor, rows: Tensor | None, positions: str, copies: bool):
        self._vectors, self._rows, self._positions, self._copies = vectors, rows, positions, copies
        self._every_row = torch.zeros(0, dtype=torch.int32, device="cpu")

    def __call__(self, h: Tensor, reading: Pass) -> Tensor:
        where = reading.select(h, self._positions)
        if self._vectors.device != h.device:  # the residual's, since an offloaded layer's own is `meta` between passes
            self._vectors = self._vectors.to(h.device)
            self._rows = None if self._rows is None else self._rows.to(h.device)
        rows = self._rows
        if rows is None:
            rows = self._every_row
            if len(rows) != len(h) or rows.device != h.device:
                self._every_row = rows = torch.zeros(len(h), dtype=torch.int32, device=h.device)
        elif len(rows) != len(h):
            raise CorrSteerError(f"rows must have one entry per row of the batch ({len(h)}), got {len(rows)}")
        # The first layer's input may be the caller's own inputs_embeds.
        return ops.steer_add(h.clone() if self._copies else h, self._vectors, rows, where)
