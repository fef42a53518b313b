"""The other way to accumulator tiles: products of the vendor's library, a panel at a time, in buffers that stay in L2.

A panel is some features by some tokens of `W x`. While one is multiplied, on one stream, the kernel that goes on from
the panel before runs on the other, each of which has a buffer of its own.

The buffers are float32, which `torch.mm` writes from 16-bit operands: rounded to 16 bits, the product would be further
off than the kernels may be. Tokens lie on their rows, so that neighbouring threads read neighbouring features, and
pooling runs inside a thread.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from corrsteer.kernels.matmul import packed_rows


@triton.jit
def load_tile(product, stride, f0, t0, tokens, BF: tl.constexpr, BT: tl.constexpr):
    """`[BF, BT]` float32 of a panel, from its feature f0 and token t0 on; zeros beyond `tokens` of them."""
    o_f, o_t = f0 + tl.arange(0, BF), tl.arange(0, BT)
    p_acc = product + (t0 + o_t).to(tl.int64)[None, :] * stride + o_f[:, None]
    return tl.load(p_acc, mask=(o_t < tokens)[None, :], other=0.0)


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The second stream of a device: always the same, as cuBLAS keeps a workspace for each stream it has run on."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def fork(device: torch.device) -> Iterator[tuple[torch.cuda.Stream | None, ...]]:
    """Two streams that begin after all that the current one has been given, and that it then waits for.

    So whoever calls sees one stream, captured graphs have both, and memory that is allocated before and freed after
    is nobody else's in between.
    """
    if device.type != "cuda":
        yield None, None
        return
    current, side = torch.cuda.current_stream(device), side_stream(device)
    side.wait_stream(current)
    try:
        yield current, side
    finally:
        current.wait_stream(side)


def multiply(x: Tensor, weight: Tensor, weight_low: Tensor | None, out: Tensor) -> None:
    """`x Wᵀ`, of 16-bit operands, into float32 `out`; bf16x2's two products are added up in it."""
    more = {"out_dtype": torch.float32}
    if x.device.type == "cpu":  # where torch has no such product
        weight, x, more = weight.float(), x.float(), {}
        weight_low = None if weight_low is None else weight_low.float()
    torch.mm(x, weight.T, out=out, **more)
    if weight_low is not None:
        torch.addmm(out, x, weight_low.T, out=out, **more)


def for_each_panel(x: Tensor, encoder, features: int, tokens: int, go_on: Callable[[Tensor, int, int], None]) -> None:
    """Multiply `x: [T, d_in]` in panels, and `go_on(product, f0, t0)` on the stream of each.

    `product: [tokens, features]` begins at feature f0 and token t0; its memory means nothing beyond the last of either.
    """
    x = packed_rows(x)
    buffers = [torch.empty(tokens, features, dtype=torch.float32, device=x.device) for _ in range(2)]
    turns = 0
    with fork(x.device) as streams:
        for t0 in range(0, len(x), tokens):
            some_x = x[t0 : t0 + tokens]
            for f0 in range(0, encoder.d_sae, features):
                panel = slice(f0, f0 + features)
                weight, low = encoder.weight[panel], encoder.weight_low
                product = buffers[turns % 2]
                with torch.cuda.stream(streams[turns % 2]):
                    multiply(some_x, weight, None if low is None else low[panel], product[: len(some_x), : len(weight)])
                    go_on(product, f0, t0)
                turns += 1
