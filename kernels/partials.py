"""What a chunk of tokens leaves in memory for each pooling and feature: rows of `[d_sae]` float32.

CARRY_IN is its part of the sample that an earlier chunk began and that ends here, CARRY_OUT its part of the sample that
is open at its end. Where moments are wanted, the fields of Moments follow.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

CARRY_IN, CARRY_OUT = tl.constexpr(0), tl.constexpr(1)
MEAN, M2, CROSS, SUM_POSITIVE, SUM_OTHER, ACTIVE_POSITIVE, ACTIVE_OTHER = (tl.constexpr(row) for row in range(2, 9))
N_CARRIES, N_ROWS = tl.constexpr(2), tl.constexpr(9)


class Partials(NamedTuple):
    """Of all chunks."""

    rows: Tensor  # [n_chunks, pools, N_CARRIES or N_ROWS, d_sae] float32
    finished: Tensor  # [n_chunks, 2] float32, how many samples began and ended in a chunk, and their mean reward
    chunk_tokens: int


@triton.jit
def store_partials(partials, f, d_sae, pool, MOMENTS: tl.constexpr):
    """The rows of `pool`, a Pool of `segment_reduce`."""
    m_f = f < d_sae
    tl.store(partials + CARRY_IN * d_sae + f, pool.carry_in, mask=m_f)
    tl.store(partials + CARRY_OUT * d_sae + f, pool.open, mask=m_f)
    if MOMENTS:
        for field in tl.static_range(len(pool.moments)):
            tl.store(partials + (MEAN + field) * d_sae + f, pool.moments[field], mask=m_f)


@triton.jit
def load_partial(partials, ROW: tl.constexpr, d_sae, mask):
    """A row of each of the pointers `partials`, as float64."""
    return tl.load(partials + ROW * d_sae, mask=mask, other=0.0).to(tl.float64)
