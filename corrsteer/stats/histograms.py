"""`Histograms`: streaming counts of each feature's pooled activations by size and reward.

Bins are logarithmic, four to an octave, and the same whatever the data: a bin is the leading bits of the float32
number. Each feature keeps a window of them, from its largest activation down; what is smaller than the window falls
into its lowest bin. What is 0 is not counted, as it is what is left of all samples. So a histogram adapts to its
feature's range, and the result does not depend on the order in which samples came or were merged (as in Masson, Rim &
Lee, "DDSketch: a fast and fully-mergeable quantile sketch with relative-error guarantees", 2019, which collapses the
lowest bins too).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from corrsteer import ops
from corrsteer.errors import CorrSteerError
from corrsteer.types import Device

MANTISSA = 23  # bits of a float32
SUB = 2  # of them that count: 2^SUB bins an octave, each at most 25 % wide


class Histograms:
    """Counts `[bins, d_sae, 1 + columns]` float64 of samples, and of each column's weight, in each bin of a feature.

    Bin b begins at `edges()[b]`; the lowest begins at 0, which it does not hold.

    Attributes
    ----------
    top : `[d_sae]` int32, the number of the bin of the largest activation; 0 where a feature was never active.
    counts : see above.
    """

    def __init__(self, d_sae: int, bins: int, columns: int, device: Device = "cpu"):
        with torch.inference_mode(False):
            self.top: Tensor = torch.zeros(d_sae, dtype=torch.int32, device=device)
            self.counts: Tensor = torch.zeros(bins, d_sae, 1 + columns, dtype=torch.float64, device=device)

    @property
    def nbytes(self) -> int:
        return self.top.nbytes + self.counts.nbytes

    def check(self, pooled: Tensor) -> None:
        """Raise for activations that cannot be counted."""
        if bool((pooled < 0).any()):
            raise CorrSteerError(
                "pooled must not be negative for scores that are read from histograms (mutual_information, auroc, "
                "spearman); SAEs with signed activations have only the other scores"
            )

    @torch.no_grad()
    def update(self, pooled: Tensor, columns: Tensor, *, backend: str | None = None) -> None:
        """Count `pooled: [N, d_sae]`, which `check` has let through, with weights `columns: [N, columns]` float64."""
        bins = len(self.counts)
        number = (pooled.float().contiguous().view(torch.int32) >> (MANTISSA - SUB)).clamp(min=1)
        number = torch.where(pooled > 0, number, 0)
        self._raise_to(torch.maximum(self.top, number.amax(0)))
        place = torch.where(pooled > 0, (number - self.top + bins - 1).clamp(min=0), -1)
        weights = torch.cat([torch.ones_like(columns[:, :1]), columns], 1)
        for at in range(bins):
            here = place == at
            if bool(here.any()):
                ops.update_sums(here.float(), weights, self.counts[at], backend=backend)

    def _raise_to(self, top: Tensor) -> None:
        """Move the windows up; what falls out below goes into the lowest bin."""
        moved = torch.where(self.top > 0, top - self.top, 0)
        for by in moved.unique().tolist():
            if by > 0:
                features = (moved == by).nonzero()[:, 0]
                before = self.counts[:, features]
                after = torch.zeros_like(before)
                by = min(by, len(before) - 1)
                after[: len(before) - by] = before[by:]
                after[0] = before[: by + 1].sum(0)
                self.counts[:, features] = after
        self.top = top

    @torch.no_grad()
    def merge(self, other: Histograms) -> None:
        """Add the counts of other samples."""
        theirs = copy.copy(other)
        theirs.top, theirs.counts = other.top.to(self.top.device), other.counts.to(self.counts.device, copy=True)
        top = torch.maximum(self.top, theirs.top)
        self._raise_to(top)
        theirs._raise_to(top)
        self.counts += theirs.counts

    def edges(self) -> Tensor:
        """`[bins + 1, d_sae]` float32, rising: where each bin begins, and where the last one ends."""
        below = torch.arange(len(self.counts) - 1, -2, -1, dtype=torch.int32, device=self.top.device)[:, None]
        edges = ((self.top[None] - below).clamp(min=0) << (MANTISSA - SUB)).view(torch.float32).clone()
        edges[0] = 0
        return edges
