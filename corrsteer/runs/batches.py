"""One batch of a collection: its completions are had and graded, encoded and pooled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from corrsteer.errors import CorrSteerError
from corrsteer.lm.hook_points import HookPoint
from corrsteer.rollouts.rollout import Rollout
from corrsteer.runs.options import Options
from corrsteer.runs.pooling import BatchPool
from corrsteer.runs.samples import Samples
from corrsteer.sae.encoder import SparseEncoder

Pooled = dict[int, dict[str, Tensor]]  # layer -> pooling -> a row a sample, float32


@dataclass(frozen=True)
class Batch:
    """What is known of some samples.

    Attributes
    ----------
    pooled, residuals : `[B, d_sae]` activations and `[B, d_in]` residuals.
    rollouts : graded.
    """

    pooled: Pooled
    residuals: Pooled
    rollouts: list[Rollout]


@dataclass(frozen=True)
class BatchReader:
    """Has the completions of samples, and what the model had in mind.

    Attributes
    ----------
    points, devices : of each encoder's layer.
    """

    samples: Samples
    encoders: Mapping[int, SparseEncoder]
    points: Mapping[int, HookPoint]
    devices: Mapping[int, torch.device]
    options: Options

    def read(self, which: Sequence[int]) -> Batch:
        """A batch of samples, by their numbers.

        Raises
        ------
        CorrSteerError : for activations that are NaN or infinite, and for what a grader raises.
        """
        pools = {
            layer: BatchPool(
                encoder, len(which), self.options.pools, self.options.backend,
                starts_at_last_prompt=self.options.positions == "generated",
            )  # fmt: skip
            for layer, encoder in self.encoders.items()
        }
        rollouts, residuals = self.samples.source.read(
            which, lambda layer, x, cu_seqlens: pools[layer].add(*self._checked(layer, x, cu_seqlens, which))
        )
        rewards = self.samples.grade(rollouts, which)
        found = Batch({}, {}, [replace(rollout, rewards=dict(given)) for rollout, given in zip(rollouts, rewards)])
        for layer, pool in pools.items():
            x, cu_seqlens = self._checked(layer, *residuals.packed(layer), which)
            last_prompt = residuals.last_prompt(layer).to(x.device)  # it is among the tokens that were checked
            found.pooled[layer], found.residuals[layer] = pool.finish(x, cu_seqlens, last_prompt)
        return found

    def _checked(self, layer: int, x: Tensor, cu_seqlens: Tensor, which: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Captured tokens on the device of the layer's encoder, after a look for NaN."""
        x, cu_seqlens = x.to(self.devices[layer]), cu_seqlens.to(self.devices[layer])
        finite = torch.isfinite(x).all(dim=1)
        if not bool(finite.all()):
            at = int((~finite).nonzero()[0])
            sample = which[int(torch.searchsorted(cu_seqlens, at, right=True)) - 1]
            raise CorrSteerError(
                f"the model's activations at {self.points[layer]} are NaN or infinite for "
                f"{self.samples.origin(sample)}; load the model in bfloat16 or float32, or take the example out"
            )
        return x, cu_seqlens
