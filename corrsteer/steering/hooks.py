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
    additions = [
        (point, _Addition(table, rows, positions, copies=point == HookPoint(0, "resid_pre") or point.kind == "z"))
        for point, table in vectors.items()
    ]
    with follow(model, steers=True) as passes, passes.attached(additions):
        yield


class _Addition:
    """What is called at one hook point; `copies` where the residual is not this model's to write to.

    In a decode step every token gets its row's vector, which is one addition in torch; a kernel of ours pays where
    tokens are to be chosen. The sum is the same: formed in float32, rounded once.
    """

    def __init__(self, vectors: Tensor, rows: Tensor | None, positions: str, copies: bool):
        self._vectors, self._rows, self._positions, self._copies = vectors, rows, positions, copies
        self._batch = None if rows is None else len(rows)
        self._decoding: Tensor | None = None  # what decode steps add, once there was one
        self._every_row = torch.zeros(0, dtype=torch.int32, device="cpu")

    def __call__(self, h: Tensor, reading: Pass) -> Tensor | None:
        if self._batch is not None and self._batch != reading.rows:
            raise CorrSteerError(f"rows must have one entry per row of the batch ({reading.rows}), got {self._batch}")
        if reading.decodes and self._positions == "prompt":
            return None
        if self._copies:  # the first layer's input may be the caller's own inputs_embeds, or attention keep its output
            h = h.clone()
        if reading.decodes:
            added = self._decoding
            if added is None or added.device != h.device:
                added = self._decoding = self._of_each_row(h.device)
            h.add_(added)
        else:
            self._add_to_some(h, reading.select(h, self._positions))
        return h if self._copies else None

    def _of_each_row(self, device: torch.device) -> Tensor:
        """What is added to each row, `[d]` where rows do not differ, else `[B, 1, d]`; -0.0 changes no bit of any."""
        vectors = self._vectors.to(device)
        if self._rows is None:
            return vectors[0]
        rows = self._rows.to(device)[:, None]
        return torch.where(rows < 0, -0.0, vectors[rows[:, 0].clamp(min=0)])[:, None]

    def _add_to_some(self, h: Tensor, where: Tensor | None) -> None:
        if self._vectors.device != h.device:  # the residual's, since an offloaded layer's own is `meta` between passes
            self._vectors = self._vectors.to(h.device)
            self._rows = None if self._rows is None else self._rows.to(h.device)
        rows = self._rows
        if rows is None:
            rows = self._every_row
            if len(rows) != len(h) or rows.device != h.device:
                self._every_row = rows = torch.zeros(len(h), dtype=torch.int32, device=h.device)
        ops.steer_add(h, self._vectors, rows, where)
