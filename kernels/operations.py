"""The operations of `corrsteer.reference`, launched as Triton kernels: arguments in, kernels and their buffers out."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from corrsteer.kernels import boundaries, launch, topk
from corrsteer.kernels.encode import encode_kernel
from corrsteer.kernels.encode_pool import encode_pool_kernel
from corrsteer.kernels.partials import CUT, PARTIALS
from corrsteer.kernels.plan import Plan, plan
from corrsteer.kernels.steer_add import steer_add
from corrsteer.kernels.token_norm import token_norm
from corrsteer.kernels.update_moments import update_moments
from corrsteer.kernels.update_sums import update_sums

__all__ = ["encode", "encode_pool", "encode_update", "steer_add", "update_moments", "update_sums"]

ROWS_BYTES = 64 << 20  # of pooled rows at a time, where they must exist: below it chunks cost more than they save
SHORT = 16  # mean tokens a sample below which the sums of many samples are worth a product


def dot_kind(x: Tensor, encoder) -> str:
    """How `product` multiplies; operands that differ in type are widened, so that none of them is rounded."""
    if encoder.precision == "fp32_ieee":
        return "ieee"
    if encoder.weight_low is not None:
        return "bf16x2" if x.dtype == torch.bfloat16 else "tf32x3"
    return "native" if x.dtype == encoder.weight.dtype and x.dtype != torch.float32 else "tf32x3"


def operands(x: Tensor, encoder, config: dict[str, int]) -> dict:
    """x and the weights as the kernels take them: tensor descriptors where the copy engine can read the rows."""
    x = x if x.stride(-1) == 1 and x.stride(0) == x.shape[1] else x.contiguous()
    tensors = {"x": (x, config["BT"]), "weight": (encoder.weight, config["BF"])}
    if encoder.weight_low is not None:
        tensors["weight_low"] = (encoder.weight_low, config["BF"])
    described = config["descriptors"] and all(
        t.data_ptr() % 16 == 0 and t.shape[1] * t.element_size() % 16 == 0 for t, _ in tensors.values()
    )
    if described:
        given = {
            # strides by hand, as those of a single row may be anything
            n: TensorDescriptor(t, list(t.shape), [t.shape[1], 1], [rows, config["BK"]])
            for n, (t, rows) in tensors.items()
        }
    else:
        given = {n: t for n, (t, _) in tensors.items()}
    scale = mean = None
    if encoder.input_norm != "none":
        scale, mean = token_norm(x, encoder.input_norm)
    return {"weight_low": None, **given, "scale": scale, "mean": mean} | {
        name: getattr(encoder, name)
        for name in ("bias", "threshold", "magnitude_scale", "magnitude_bias", "weight_sum")
    } | {"ACTIVATION": encoder.activation, "DOT": dot_kind(x, encoder), "DESCRIPTORS": bool(described)}  # fmt: skip


def _run(x, cu, encoder, pools, planned: Plan, pooled: Tensor | None) -> tuple:
    """Launch the main kernel; the partial results that `boundaries` goes on with."""
    T, N, d_sae = len(x), len(cu) - 1, encoder.d_sae
    # with normalisation the loop does it, which needs fewer registers
    singles = T < 2 * N and encoder.input_norm == "none"
    short = pooled is None and pools == ("mean",) and T < SHORT * N
    forms = {"both": len(pools) == 2, "normalised": encoder.input_norm != "none", "singles": singles, "short": short}
    variants = tuple(name for name, applies in forms.items() if applies)
    config = launch.config(x.device, "encode_pool", dot_kind(x, encoder), T, variants)
    tiles, blocks = triton.cdiv(T, config["BT"]), triton.cdiv(d_sae, config["BF"])
    walk = launch.tiles_per_group(tiles, blocks, config["walk"], launch.multiprocessors(x.device)) if T else 1
    groups, group_tokens = triton.cdiv(tiles, walk), walk * config["BT"]
    kept = CUT.value if pooled is not None else len(PARTIALS)
    partials = torch.empty(groups, len(pools), kept, d_sae, dtype=torch.float32, device=x.device)
    finished = torch.empty(groups, 2, dtype=torch.float32, device=x.device)
    if T:
        into = {} if pooled is None else dict(zip(pools, pooled))
        encode_pool_kernel[(blocks * groups,)](
            **operands(x, encoder, config),
            cu=cu, sample=planned.sample, labels=planned.labels,
            pooled_mean=into.get("mean"), pooled_max=into.get("max"), partials=partials, finished=finished,
            T=T, N=N, d_in=encoder.d_in, d_sae=d_sae, group_tokens=group_tokens, n_groups=groups,
            MEAN="mean" in pools, MAX="max" in pools, MOMENTS=pooled is None, SINGLES=singles,
            PIECES=config.get("PIECES", 0),
            BF=config["BF"], BT=config["BT"], BK=config["BK"], SUB=config["SUB"], COLUMNS=config["COLUMNS"],
            SUPER=config["SUPER"],
            num_warps=config["num_warps"], num_stages=config["num_stages"],
        )  # fmt: skip
    return partials, finished, dict(T=T, N=N, d_sae=d_sae, group_tokens=group_tokens, n_groups=groups)


def encode_pool(x: Tensor, cu_seqlens: Tensor, encoder, pools: tuple[str, ...]) -> Tensor:
    """`corrsteer.reference.encode_pool`: `[len(pools), N, d_sae]` float32."""
    cu_seqlens = cu_seqlens.contiguous()
    N, d_sae = len(cu_seqlens) - 1, encoder.d_sae
    pooled = torch.empty(len(pools), N, d_sae, dtype=torch.float32, device=x.device)
    if N == 0:
        return pooled
    if "topk" in encoder.activation:
        return _pool_sparse(*_top(x, encoder), cu_seqlens, 0, N, encoder, pools)
    planned = plan(x, cu_seqlens)
    partials, _, sizes = _run(x, cu_seqlens, encoder, pools, planned, pooled)
    for at, pool in enumerate(pools):
        boundaries.complete_kernel[(triton.cdiv(max(N, sizes["n_groups"]), 16), triton.cdiv(d_sae, 128))](
            partials[:, at], pooled[at], planned.sample, planned.labels, cu_seqlens, **sizes,
            stride=partials.stride(0), MAX=pool == "max", BF=128, BG=16,
        )  # fmt: skip
    return pooled


def encode_update(x: Tensor, cu_seqlens: Tensor, y: Tensor, encoder, moments: tuple, pools: tuple[str, ...]) -> None:
    """`corrsteer.reference.encode_update`; with one label and no top k, without the pooled matrix either."""
    if len(cu_seqlens) == 1:
        return
    cu_seqlens = cu_seqlens.contiguous()
    if "topk" in encoder.activation or y.shape[1] > 1:
        return _encode_update_by_rows(x, cu_seqlens, y, encoder, moments, pools)
    planned = plan(x, cu_seqlens, y, moments)
    partials, finished, sizes = _run(x, cu_seqlens, encoder, pools, planned, None)
    for at, (pool, state) in enumerate(zip(pools, moments)):
        boundaries.fold_kernel[(triton.cdiv(encoder.d_sae, 64),)](
            partials[:, at], finished, planned.sample, planned.labels, cu_seqlens, planned.before[2 * at :],
            planned.batch, state.z_mean, state.z_m2, state.cross, state.n_active, state.group_sum,
            state.group_active_sum, state.group_active_count, **sizes,
            stride=partials.stride(0), MAX=pool == "max", BF=64, BG=16,
        )  # fmt: skip


def _encode_update_by_rows(x, cu_seqlens, y, encoder, moments, pools) -> None:
    """Pooled rows first, then their moments; so many samples at a time that the rows stay small beside dense ones."""
    N = len(cu_seqlens) - 1
    rows = max(64, len(x) // 64, ROWS_BYTES // (4 * encoder.d_sae))
    sparse = _top(x, encoder) if "topk" in encoder.activation else None
    for first in range(0, N, rows):
        last = min(first + rows, N)
        if sparse:
            pooled = _pool_sparse(*sparse, cu_seqlens, first, last, encoder, pools)
        else:
            pooled = encode_pool(x, cu_seqlens[first : last + 1], encoder, pools)
        for of_pool, state in zip(pooled, moments):
            update_moments(of_pool, y[first:last], state)


def encode(x: Tensor, encoder) -> Tensor:
    """`corrsteer.reference.encode`: `[T, d_sae]` float32."""
    T, d_sae = len(x), encoder.d_sae
    if "topk" in encoder.activation:
        values, features = _top(x, encoder)
        return torch.zeros(T, d_sae, dtype=torch.float32, device=x.device).scatter_(1, features.long(), values)
    out = torch.empty(T, d_sae, dtype=torch.float32, device=x.device)
    if T:
        c = launch.config(x.device, "encode", dot_kind(x, encoder), T)
        encode_kernel[(triton.cdiv(T, c["BT"]) * triton.cdiv(d_sae, c["BF"]),)](
            **operands(x, encoder, c), out=out, T=T, d_in=encoder.d_in, d_sae=d_sae,
            BF=c["BF"], BT=c["BT"], BK=c["BK"], SUB=c["SUB"], SUPER=c["SUPER"],
            num_warps=c["num_warps"], num_stages=c["num_stages"],
        )  # fmt: skip
    return out


def _top(x: Tensor, encoder) -> tuple[Tensor, Tensor]:
    """The k largest activations of each token and their features, `[T, k]` float32 and int32."""
    T, k, d_sae = len(x), encoder.k, encoder.d_sae
    group = topk.block_size(d_sae, k)
    groups = d_sae // group
    values = torch.empty(T, k, dtype=torch.float32, device=x.device)
    features = torch.empty(T, k, dtype=torch.int32, device=x.device)
    absolute = encoder.activation == "abstopk"
    for first in range(0, T, topk.CHUNK):
        part = x[first : first + topk.CHUNK]
        c = launch.config(x.device, "encode", dot_kind(x, encoder), len(part))
        given = operands(part, encoder, c)
        for unused in ("threshold", "magnitude_scale", "magnitude_bias", "ACTIVATION"):
            del given[unused]
        given |= {name: c[name] for name in ("BF", "BT", "BK", "SUB", "SUPER", "num_warps", "num_stages")}
        given |= dict(T=len(part), k=min(k, groups), d_in=encoder.d_in, d_sae=d_sae, ABSOLUTE=absolute, GROUP=group)
        grid = (triton.cdiv(len(part), c["BT"]) * triton.cdiv(d_sae, c["BF"]),)
        maxima = torch.empty(len(part), groups, dtype=torch.float32, device=x.device)
        topk.topk_kernel[grid](**given, slots=None, out=maxima)
        blocks, slots = topk.chosen(maxima, k)
        candidates = torch.empty(len(part), blocks.shape[1] * group, dtype=torch.float32, device=x.device)
        topk.topk_kernel[grid](**given, slots=slots, out=candidates)
        at = (candidates.abs() if absolute else candidates).topk(k, dim=1).indices
        top = candidates.gather(1, at)
        values[first : first + len(part)] = top if absolute else top.relu_()
        features[first : first + len(part)] = blocks.gather(1, at // group) * group + at % group
    return values, features


def _pool_sparse(values, features, cu_seqlens, first, last, encoder, pools) -> Tensor:
    """Pooled rows `[len(pools), last - first, d_sae]` of samples `first` to `last`."""
    pooled = torch.empty(len(pools), last - first, encoder.d_sae, dtype=torch.float32, device=values.device)
    for of_pool, pool in zip(pooled, pools):
        topk.pool_sparse_kernel[(last - first,)](
            values, features, cu_seqlens, of_pool, first, len(values), encoder.k, encoder.d_sae,
            MAX=pool == "max", SIGNED=pool == "max" and encoder.activation == "abstopk",
            K=triton.next_power_of_2(encoder.k), BF=1024,
        )  # fmt: skip
    return pooled
