"""How a sample's tokens become one row: the poolings that a run holds, and what makes them of a batch's residuals."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from corrsteer import ops
from corrsteer.ops import RunningPool
from corrsteer.sae.encoder import SparseEncoder
from corrsteer.types import Device

LAST_PROMPT = "last_prompt"
POOLINGS = ("max", "mean", LAST_PROMPT)  # of activations
RESIDUAL_POOLINGS = ("mean", LAST_PROMPT)  # of the residuals themselves


def empty_rows(
    n: int, encoder: SparseEncoder, pools: Collection[str], device: Device
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Room for pooled activations `[n, d_sae]` and pooled residuals `[n, d_in]` of n samples, float32, by pooling."""
    activations = {pool: torch.empty(n, encoder.d_sae, dtype=torch.float32, device=device) for pool in pools}
    residuals = {pool: torch.empty(n, encoder.d_in, dtype=torch.float32, device=device) for pool in RESIDUAL_POOLINGS}
    return activations, residuals


def row_bytes(n: int, encoders: Collection[SparseEncoder], pools: Collection[str]) -> int:
    """Memory of these, of all encoders."""
    made = [rows for encoder in encoders for rows in empty_rows(n, encoder, pools, "meta")]
    return sum(rows.nbytes for by_pool in made for rows in by_pool.values())


class BatchPool:
    """Pools the captured residuals of a batch at one layer, which come at once or in parts.

    Parameters
    ----------
    encoder : of the layer.
    n : N, samples of the batch.
    pools : which of `POOLINGS` of the activations are wanted.
    starts_at_last_prompt : whether the first token that is kept of each sample is the last of its prompt.
    """

    def __init__(
        self,
        encoder: SparseEncoder,
        n: int,
        pools: Collection[str],
        backend: str | None = None,
        *,
        starts_at_last_prompt: bool = False,
    ):
        self._encoder, self._n, self._backend = encoder, n, backend
        self._pools = tuple(pools)
        self._starts_at_last_prompt = starts_at_last_prompt
        self._over_steps = tuple(pool for pool in self._pools if pool != LAST_PROMPT)
        self._running: RunningPool | None = None
        self._sums: Tensor  # [N, d_in] float32, of the residuals so far
        self._tokens: Tensor | None = None  # [N] int64, how many these are; None before the first

    def add(self, x: Tensor, cu_seqlens: Tensor) -> None:
        """Take in a part of the kept steps that had to leave the buffer: `x [T, d_in]`, `cu_seqlens [N + 1]`."""
        self._add_residuals(x, cu_seqlens)
        if self._over_steps:
            self._running = self._running or RunningPool(self._encoder, self._n, self._backend)
            self._running.add(x, cu_seqlens)

    def finish(self, x: Tensor, cu_seqlens: Tensor, last_prompt: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Take in the rest of the kept steps, and the residuals of last prompt tokens, `[N, d_in]`.

        Returns
        -------
        Pooled activations `[N, d_sae]` and pooled residuals `[N, d_in]`, float32, by pooling.
        """
        if self._running is not None:
            self.add(x, cu_seqlens)
            pooled = {pool: self._running.result(pool) for pool in self._over_steps}
        else:
            self._add_residuals(x, cu_seqlens)
            pooled = self._pooled(x, cu_seqlens)
        if LAST_PROMPT in self._pools and LAST_PROMPT not in pooled:
            each = torch.arange(self._n + 1, dtype=torch.int32, device=x.device)
            pooled[LAST_PROMPT] = self._encode(last_prompt, each, "mean")["mean"]
        assert self._tokens is not None, "there are the rest, if none before"
        residuals = {"mean": self._sums / self._tokens[:, None], LAST_PROMPT: last_prompt.float()}
        return pooled, residuals

    def _pooled(self, x: Tensor, cu_seqlens: Tensor) -> dict[str, Tensor]:
        """Activations pooled over kept steps, all of which are here."""
        if not self._over_steps:
            return {}
        if len(x) == self._n:  # one token each, which is the last of its prompt: all poolings are the same
            return dict.fromkeys(self._pools, next(iter(self._encode(x, cu_seqlens, self._over_steps[0]).values())))
        pool = self._over_steps[0] if len(self._over_steps) == 1 else "both"
        if LAST_PROMPT in self._pools and self._starts_at_last_prompt:
            return self._with_first(x, cu_seqlens, pool)
        return self._encode(x, cu_seqlens, pool)

    def _with_first(self, x: Tensor, cu_seqlens: Tensor, pool: str) -> dict[str, Tensor]:
        """The same, and the first token of each sample alone, which is not encoded twice for that."""
        parts = torch.empty(2 * self._n + 1, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
        parts[0::2], parts[1::2] = cu_seqlens, cu_seqlens[:-1] + 1
        pooled: dict[str, Tensor] = {}
        tokens = cu_seqlens.diff()[:, None].float()
        for name, of_parts in self._encode(x, parts, pool).items():
            first, rest = of_parts[0::2], of_parts[1::2]
            pooled[LAST_PROMPT] = first
            if name == "max":  # of no tokens it is 0, which is no maximum where activations may be negative
                pooled[name] = torch.where(tokens > 1, torch.maximum(first, rest), first)
            else:
                pooled[name] = first + (rest - first) * ((tokens - 1) / tokens)
        return pooled

    def _encode(self, x: Tensor, cu_seqlens: Tensor, pool: str) -> dict[str, Tensor]:
        out = ops.encode_pool(x, cu_seqlens, self._encoder, pool, backend=self._backend)
        return dict(zip(("mean", "max"), out)) if isinstance(out, tuple) else {pool: out}

    def _add_residuals(self, x: Tensor, cu_seqlens: Tensor) -> None:
        tokens = cu_seqlens.diff().long()
        # segment_reduce rather than index_add_, which on a GPU adds in any order
        sums = torch.segment_reduce(x.float(), "sum", lengths=tokens, axis=0, initial=0, unsafe=True)
        if self._tokens is None:
            self._sums, self._tokens = sums, tokens
        else:
            self._sums, self._tokens = self._sums + sums, self._tokens + tokens
