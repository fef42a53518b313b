"""encode_update: the kernel of `encode_pool` with moments instead of rows, where it can do without them."""

from __future__ import annotations

from torch import Tensor

from corrsteer.kernels.combine_chunks import combine_moments
from corrsteer.kernels.encode_pool import encode_pool, pool_chunks
from corrsteer.kernels.plan import plan
from corrsteer.kernels.pool_sparse import pool_sparse
from corrsteer.kernels.topk import top_activations
from corrsteer.kernels.update_moments import update_moments

ROWS_BYTES = 64 << 20  # of pooled rows at a time, where they must exist: below it launches cost more than they save


def encode_update(x: Tensor, cu_seqlens: Tensor, y: Tensor, encoder, moments: tuple, pools: tuple[str, ...]) -> None:
    """`corrsteer.ops.reference.encode_update`; with one label and no top k, without the pooled matrix either."""
    if len(cu_seqlens) == 1:
        return
    cu_seqlens = cu_seqlens.contiguous()
    if "topk" in encoder.activation or y.shape[1] > 1:
        return update_by_rows(x, cu_seqlens, y, encoder, moments, pools)
    planned = plan(x, cu_seqlens, y, moments)
    partials = pool_chunks(x, cu_seqlens, encoder, pools, planned)
    combine_moments(partials, cu_seqlens, len(x), pools, planned, moments)


def update_by_rows(x, cu_seqlens, y, encoder, moments, pools) -> None:
    """Pooled rows first, then their moments; so many samples at a time that the rows stay small beside dense ones."""
    N = len(cu_seqlens) - 1
    rows = max(64, len(x) // 64, ROWS_BYTES // (4 * encoder.d_sae))
    sparse = top_activations(x, encoder) if "topk" in encoder.activation else None
    for first in range(0, N, rows):
        last = min(first + rows, N)
        if sparse:
            pooled = pool_sparse(*sparse, cu_seqlens, first, last, encoder, pools)
        else:
            pooled = encode_pool(x, cu_seqlens[first : last + 1], encoder, pools, whole=rows >= N)
        for of_pool, state in zip(pooled, moments):
            update_moments(of_pool, y[first:last], state)
