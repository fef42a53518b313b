"""`RunningPool`: the pooled activations of samples whose tokens arrive in parts."""

from __future__ import annotations

import torch
from torch import Tensor

from corrsteer.arguments import shown, whole
from corrsteer.errors import CorrSteerError
from corrsteer.ops import operations
from corrsteer.sae.encoder import SparseEncoder


class RunningPool:
    """Pools the parts of a capture that did not fit its buffer; the result is that of pooling everything at once.

    It holds one number per sample, feature and pooling, never activations of tokens.

    Parameters
    ----------
    encoder : of the hook point.
    n : N, number of samples.
    """

    def __init__(self, encoder: SparseEncoder, n: int, backend: str | None = None):
        operations.check_encoder(encoder)
        n = whole("n", n, 0)
        self._encoder, self._backend = encoder, backend
        self._tokens = torch.zeros(n, 1, dtype=torch.float32, device="cpu")
        self._mean = self._max = torch.zeros(n, encoder.d_sae, dtype=torch.float32, device="cpu")

    def add(self, x: Tensor, cu_seqlens: Tensor) -> None:
        """Fold in more tokens of the same N samples: `x [T, d_in]`, `cu_seqlens [N + 1]`."""
        mean, maximum = operations.encode_pool(x, cu_seqlens, self._encoder, "both", backend=self._backend)
        if len(mean) != len(self._tokens):
            raise CorrSteerError(f"cu_seqlens must be [N + 1 = {len(self._tokens) + 1}] int32, got [{len(cu_seqlens)}]")
        tokens = cu_seqlens.diff()[:, None].to(mean.dtype)
        before, self._mean, self._max = (t.to(x.device) for t in (self._tokens, self._mean, self._max))
        total = before + tokens
        self._tokens = total
        self._mean = self._mean + (mean - self._mean) * (tokens / total.clamp(min=1))
        # An empty part pools to 0, which is no maximum where activations may be negative.
        self._max = torch.where(
            tokens == 0, self._max, torch.where(before == 0, maximum, torch.maximum(self._max, maximum))
        )

    def result(self, pool: str) -> Tensor:
        """Pooled activations `[N, d_sae]` float32 for `mean` or `max`."""
        if not isinstance(pool, str) or pool not in ("mean", "max"):
            raise CorrSteerError(f"pool must be mean or max, got {shown(pool)}")
        return self._mean if pool == "mean" else self._max
