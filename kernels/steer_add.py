"""steer_add: a row's vector added to the residual stream where it is to be steered, in place."""

import triton
import triton.language as tl
from torch import Tensor

from corrsteer.kernels.matmul import INTERPRETING

BLOCK = 1024


@triton.jit
def steer_add_kernel(
    h, h_b, h_s, h_d, vectors, vectors_v, vectors_d, row_vector, row_stride, positions, positions_b, positions_s,
    S, V, d, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row, one position, BLOCK dimensions; the sum is formed in float32 and rounded once."""
    b, s = tl.program_id(0) // S, tl.program_id(0) % S
    which = tl.load(row_vector + b * row_stride)
    steered = (which >= 0) & (which < V)
    if positions is not None:
        steered = steered & (tl.load(positions + b.to(tl.int64) * positions_b + s.to(tl.int64) * positions_s) != 0)
    if steered:
        o_d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        m_d = o_d < d
        p_h = h + b.to(tl.int64) * h_b + s.to(tl.int64) * h_s + o_d.to(tl.int64) * h_d
        vector = tl.load(vectors + which.to(tl.int64) * vectors_v + o_d * vectors_d, mask=m_d, other=0.0)
        total = tl.load(p_h, mask=m_d, other=0.0).to(tl.float32) + vector.to(tl.float32)
        if INTERPRETING and h.dtype.element_ty == tl.bfloat16:  # the interpreter cuts bits off where a GPU rounds
            bits = total.to(tl.int32, bitcast=True)
            total = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
        tl.store(p_h, total.to(h.dtype.element_ty), mask=m_d)


def steer_add(h: Tensor, vectors: Tensor, row_vector: Tensor, positions: Tensor | None) -> None:
    """`corrsteer.ops.reference.steer_add`, in place on `h: [B, S, d]` of any strides."""
    B, S, d = h.shape
    if h.numel() == 0:
        return
    strides = (0, 0) if positions is None else positions.stride()
    steer_add_kernel[(B * S, triton.cdiv(d, BLOCK))](
        h, *h.stride(), vectors, *vectors.stride(), row_vector, row_vector.stride(0), positions, *strides,
        S, len(vectors), d, BLOCK=BLOCK,
    )  # fmt: skip
