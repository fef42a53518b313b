"""encode_pool and the heart of encode_update: product, activation, pooling and moments in one kernel.

A program owns a block of features and a chunk of neighbouring tokens. It goes through the chunk's tiles in order and
carries the pooled value of the sample that is still open from tile to tile, so that a dense activation lives only in
registers. A finished sample is written to `[N, d_sae]`, or taken into the chunk's moments at once.

Chunks are cut by tokens alone, so that all of them do the same work whatever the samples' lengths, and no length need
be known to launch. A sample that is split by a cut is left to `combine_chunks`: each chunk carries its part out to the
next, until the one in which it ends.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from corrsteer.kernels import launch
from corrsteer.kernels.combine_chunks import combine_pooled
from corrsteer.kernels.matmul import (
    activate,
    activation_arguments,
    dot_kind,
    grouped_order,
    matmul_arguments,
    matmul_tile,
    normalise,
)
from corrsteer.kernels.moments import COUNT, MEAN_REWARD, Moments
from corrsteer.kernels.panels import for_each_panel, load_tile
from corrsteer.kernels.partials import N_CARRIES, N_ROWS, Partials, store_partials
from corrsteer.kernels.plan import Plan, plan
from corrsteer.kernels.pool_sparse import pool_sparse
from corrsteer.kernels.segment_reduce import (
    NEVER,
    Batch,
    Pool,
    Rows,
    State,
    segment_reduce_loop,
    segment_reduce_matmul,
    segment_reduce_single,
)
from corrsteer.kernels.topk import top_activations

SHORT = 16  # mean tokens a sample below which the sums of many samples are worth a product


# Sizes that change from batch to batch; each special value of one would be compiled for again.
@triton.jit(do_not_specialize=["T", "N", "chunk_tokens", "n_chunks", "first_block", "first_chunk"])
def encode_pool_kernel(
    x, weight, weight_low, bias, threshold, magnitude_scale, magnitude_bias, weight_sum, scale, mean, shift,
    cu, segment_ids, sample_stats, pooled_mean, pooled_max, partials, finished,
    product, product_stride, first_block, first_chunk,
    T, N, d_in, d_sae, chunk_tokens, n_chunks,
    ACTIVATION: tl.constexpr, DOT: tl.constexpr, DESCRIPTORS: tl.constexpr,
    MEAN: tl.constexpr, MAX: tl.constexpr, MOMENTS: tl.constexpr, SINGLES: tl.constexpr, BF16_SPLITS: tl.constexpr,
    BF: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, SUBTILE: tl.constexpr, WIDE_SUBTILE: tl.constexpr,
    GROUP_SIZE: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """One feature block and one chunk of tokens; see the top of the file, and Partials for what is left in memory.

    pooled_mean, pooled_max : `[N, d_sae]` float32, where not MOMENTS.
    product : a panel, from `first_block` and `first_chunk` on, to read tiles from (see panels.py); None to multiply
        them here. Its tokens are `product_stride` apart.
    SINGLES : look out for tiles in which every token is a sample; without it they are right too, but slower.
    BF16_SPLITS : where not 0, the mean's moments by `segment_reduce_matmul` with so many; for MEAN and MOMENTS alone.
    SUBTILE, WIDE_SUBTILE : columns at a time, for `segment_reduce_loop` and for the other two.
    FLATTEN : tiles and steps along d_in are one loop to the compiler, so that the next tile's first steps are fetched
        while this one is pooled. Without effect where the product is no single loop (a panel, `shift`).
    """
    if product is None:
        block, chunk = grouped_order(tl.program_id(0), tl.cdiv(d_sae, BF), n_chunks, GROUP_SIZE)
    else:
        block, chunk = first_block + tl.program_id(0), first_chunk + tl.program_id(1)
    f0 = block * BF
    f = f0 + tl.arange(0, BF)
    chunk_start = tl.minimum(tl.maximum(tl.load(cu), 0), T) + chunk * chunk_tokens
    stop = tl.minimum(tl.load(cu + N), T)
    chunk_stop = tl.minimum(chunk_start + chunk_tokens, stop)
    n_rows: tl.constexpr = N_ROWS if MOMENTS else N_CARRIES
    partials += chunk.to(tl.int64) * ((MEAN + MAX) * n_rows) * d_sae

    zero = tl.zeros((BF,), tl.float32)  # [BF]
    pool = Pool(Moments(zero, zero, zero, zero, zero, zero, zero), zero, zero)
    j = tl.load(segment_ids + chunk_start, mask=chunk_start < stop, other=0)
    start, end = tl.load(cu + j), tl.load(cu + j + 1)
    state = State(pool, pool, tl.zeros((), tl.int32), tl.zeros((), tl.float32), j, start, end)
    batch = Batch(cu, segment_ids, sample_stats, N, chunk_start, stop)
    rows = Rows(pooled_mean, pooled_max, f, d_sae)

    tile = 0
    for t0 in tl.range(chunk_start, chunk_stop, BT, flatten=FLATTEN):
        if product is None:
            acc = matmul_tile(x, weight, weight_low, shift, f0, t0, T, d_sae, d_in, BF, BT, BK, DOT, DESCRIPTORS)
        else:
            row = tl.program_id(1) * chunk_tokens + t0 - chunk_start  # inside of the panel, whatever cu may hold
            acc = load_tile(product, product_stride, tl.program_id(0) * BF, row, T - t0, BF, BT)
        if FLATTEN:  # the same number, of `tile`, for the sake of which see below
            t0 = chunk_start + tile * BT
        t = t0 + tl.arange(0, BT)
        acc = normalise(acc, f, t, T, d_sae, scale, mean, weight_sum)
        z = activate(acc, f, d_sae, bias, threshold, magnitude_scale, magnitude_bias, ACTIVATION)
        singles = False
        if SINGLES:
            b_j = tl.load(segment_ids + t, mask=t < stop, other=0)  # [BT]
            single = (t < stop) & (tl.load(cu + b_j) == t) & (tl.load(cu + b_j + 1) == t + 1)
            singles = tl.min(single.to(tl.int32), 0) == 1
        if singles:
            state = segment_reduce_single(z, t0, state, batch, rows, WIDE_SUBTILE, MEAN, MAX, MOMENTS)
            next_j = tl.load(segment_ids + t0 + BT - 1) + 1
            next_end = tl.load(cu + next_j + 1, mask=next_j < N, other=NEVER)
            state = State(state.mean, state.max, state.n, state.y_mean, next_j, t0 + BT, next_end)
        elif BF16_SPLITS > 0:
            state = segment_reduce_matmul(z, t0, state, batch, WIDE_SUBTILE, BF16_SPLITS)
        else:
            state = segment_reduce_loop(z, t0, state, batch, rows, SUBTILE, MEAN, MAX, MOMENTS)
        tile += 1  # as Triton 3.6 cannot flatten a loop whose body ends in another or in a condition

    if MEAN:
        store_partials(partials, f, d_sae, state.mean, MOMENTS)
    if MAX:
        store_partials(partials + MEAN * n_rows * d_sae, f, d_sae, state.max, MOMENTS)
    if MOMENTS and block == 0:
        tl.store(finished + 2 * chunk + COUNT, state.n.to(tl.float32))
        tl.store(finished + 2 * chunk + MEAN_REWARD, state.y_mean)


def pool_chunks(
    x: Tensor, cu: Tensor, encoder, pools: tuple[str, ...], planned: Plan, pooled=None, whole: bool = True
) -> Partials:
    """Launch `encode_pool_kernel`; without `pooled: [len(pools), N, d_sae]` for moments.

    whole : whether the samples are all of x; if not, panels would multiply tokens that nobody asks for.
    """
    T, N, d_sae = len(x), len(cu) - 1, encoder.d_sae
    moments, normalised = pooled is None, encoder.input_norm != "none"
    singles = T < 2 * N and not normalised  # with normalisation the loop does it, which needs fewer registers
    short = moments and pools == ("mean",) and T < SHORT * N
    forms = {"both": len(pools) == 2, "normalised": normalised, "singles": singles, "short": short}
    variants = tuple(name for name, applies in forms.items() if applies)
    # layer_norm shifts tokens before the product, for which the library would need a shifted copy of x
    panels = whole and encoder.input_norm != "layer_norm"
    config = launch.config(x.device, "encode_pool", dot_kind(x, encoder), T, variants, panels)
    panels &= config.get("way") == "panels"
    BF, BT, most = config["BF"], config["BT"], config["max_tiles_per_chunk"]
    tiles, blocks = triton.cdiv(T, BT), triton.cdiv(d_sae, BF)
    panel_tiles = min(tiles, triton.cdiv(config["panel_tokens"], BT)) if panels else tiles
    panel_blocks = min(blocks, triton.cdiv(config["panel_features"], BF)) if panels else blocks
    # what reads a panel are many small programs, for which there are no waves to fill
    programs = 1 if panels else launch.multiprocessors(x.device)
    per_chunk = launch.tiles_per_chunk(panel_tiles, panel_blocks, most, programs) if T else 1
    n_chunks, chunk_tokens = triton.cdiv(tiles, per_chunk), per_chunk * BT
    n_rows = N_ROWS.value if moments else N_CARRIES.value
    rows = torch.empty(n_chunks, len(pools), n_rows, d_sae, dtype=torch.float32, device=x.device)
    finished = torch.empty(n_chunks, 2, dtype=torch.float32, device=x.device)
    if T:
        into = {} if moments else dict(zip(pools, pooled))
        arguments = dict(
            **matmul_arguments(x, encoder, config), **activation_arguments(encoder),
            cu=cu, segment_ids=planned.segment_ids, sample_stats=planned.sample_stats,
            pooled_mean=into.get("mean"), pooled_max=into.get("max"), partials=rows, finished=finished,
            product=None, product_stride=None, first_block=None, first_chunk=None,
            N=N, chunk_tokens=chunk_tokens, n_chunks=n_chunks,
            MEAN="mean" in pools, MAX="max" in pools, MOMENTS=moments, SINGLES=singles,
            BF16_SPLITS=config.get("BF16_SPLITS", 0), WIDE_SUBTILE=config["WIDE_SUBTILE"],
            FLATTEN=bool(config.get("flatten")) and not panels,
        )  # fmt: skip
        if panels:
            pool_panels(x, encoder, arguments, panel_blocks, triton.cdiv(panel_tiles, per_chunk))
        else:
            encode_pool_kernel[(blocks * n_chunks,)](**arguments)
    return Partials(rows, finished, chunk_tokens)


def pool_panels(x: Tensor, encoder, arguments: dict, panel_blocks: int, panel_chunks: int) -> None:
    """Launch `encode_pool_kernel` for each panel of `panel_blocks` feature blocks and `panel_chunks` chunks."""
    arguments |= dict(x=None, weight=None, weight_low=None)
    BF, chunk_tokens = arguments["BF"], arguments["chunk_tokens"]
    blocks, n_chunks = triton.cdiv(encoder.d_sae, BF), arguments["n_chunks"]

    def pool_panel(product: Tensor, f0: int, t0: int) -> None:
        arguments.update(product=product, product_stride=product.stride(0))
        arguments.update(first_block=f0 // BF, first_chunk=t0 // chunk_tokens)
        grid = min(panel_blocks, blocks - f0 // BF), min(panel_chunks, n_chunks - t0 // chunk_tokens)
        encode_pool_kernel[grid](**arguments)

    for_each_panel(x, encoder, panel_blocks * BF, panel_chunks * chunk_tokens, pool_panel)


def encode_pool(x: Tensor, cu_seqlens: Tensor, encoder, pools: tuple[str, ...], whole: bool = True) -> Tensor:
    """`corrsteer.ops.reference.encode_pool`: `[len(pools), N, d_sae]` float32; of some samples of x, not `whole`."""
    cu_seqlens = cu_seqlens.contiguous()
    N, d_sae = len(cu_seqlens) - 1, encoder.d_sae
    pooled = torch.empty(len(pools), N, d_sae, dtype=torch.float32, device=x.device)
    if N == 0:
        return pooled
    if "topk" in encoder.activation:
        return pool_sparse(*top_activations(x, encoder), cu_seqlens, 0, N, encoder, pools)
    planned = plan(x, cu_seqlens)
    partials = pool_chunks(x, cu_seqlens, encoder, pools, planned, pooled, whole)
    combine_pooled(partials, cu_seqlens, len(x), pools, planned, pooled)
    return pooled
