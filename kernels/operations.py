"""The operations of `corrsteer.reference`, launched as Triton kernels: arguments in, kernels and their buffers out."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from corrsteer.kernels import boundaries, launch
from corrsteer.kernels.encode_pool import CUT, PARTIALS, encode_pool_kernel
from corrsteer.kernels.plan import Plan, plan
from corrsteer.kernels.token_norm import token_norm

FEW_FROM = 12  # mean tokens a sample from which looping over samples beats the segmented scan, by counting instructions


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
        given = {n: TensorDescriptor.from_tensor(t, [rows, config["BK"]]) for n, (t, rows) in tensors.items()}
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
    config = launch.config(x.device, "encode_pool", dot_kind(x, encoder), T)
    tiles, blocks = triton.cdiv(T, config["BT"]), triton.cdiv(d_sae, config["BF"])
    walk = launch.tiles_per_group(tiles, blocks, config["walk"], launch.multiprocessors(x.device)) if T else 1
    groups, group_tokens = triton.cdiv(tiles, walk), walk * config["BT"]
    kept = CUT.value if pooled is not None else len(PARTIALS)
    partials = torch.empty(groups, len(pools), kept, d_sae, dtype=torch.float32, device=x.device)
    finished = torch.empty(groups, dtype=torch.float32, device=x.device)
    if T:
        into = {} if pooled is None else dict(zip(pools, pooled))
        encode_pool_kernel[(blocks * groups,)](
            **operands(x, encoder, config),
            cu=cu, sample=planned.sample, labels=planned.labels,
            pooled_mean=into.get("mean"), pooled_max=into.get("max"), partials=partials, finished=finished,
            T=T, N=N, d_in=encoder.d_in, d_sae=d_sae, group_tokens=group_tokens, n_groups=groups,
            MEAN="mean" in pools, MAX="max" in pools, MOMENTS=pooled is None, FEW=T >= FEW_FROM * N,
            BF=config["BF"], BT=config["BT"], BK=config["BK"], SUB=config["SUB"], SUPER=config["SUPER"],
            num_warps=config["num_warps"], num_stages=config["num_stages"],
        )  # fmt: skip
    return partials, finished, dict(T=T, N=N, d_sae=d_sae, group_tokens=group_tokens, n_groups=groups)


def encode_pool(x: Tensor, cu_seqlens: Tensor, encoder, pools: tuple[str, ...]) -> Tensor:
    """`corrsteer.reference.encode_pool`: `[len(pools), N, d_sae]` float32."""
    N, d_sae = len(cu_seqlens) - 1, encoder.d_sae
    pooled = torch.empty(len(pools), N, d_sae, dtype=torch.float32, device=x.device)
    if N == 0:
        return pooled
    planned = plan(x, cu_seqlens)
    partials, _, sizes = _run(x, cu_seqlens, encoder, pools, planned, pooled)
    for at, pool in enumerate(pools):
        boundaries.complete_kernel[(triton.cdiv(d_sae, 128), triton.cdiv(max(N, sizes["n_groups"]), 16))](
            partials[:, at], pooled[at], planned.sample, planned.labels, cu_seqlens, **sizes,
            stride=partials.stride(0), MAX=pool == "max", BF=128, BG=16,
        )  # fmt: skip
    return pooled


def encode_update(x: Tensor, cu_seqlens: Tensor, y: Tensor, encoder, moments: tuple, pools: tuple[str, ...]) -> None:
    """`corrsteer.reference.encode_update`, without the pooled matrix where there is one label."""
    if len(cu_seqlens) == 1:
        return
    planned = plan(x, cu_seqlens, y, moments)
    partials, finished, sizes = _run(x, cu_seqlens, encoder, pools, planned, None)
    for at, (pool, state) in enumerate(zip(pools, moments)):
        boundaries.fold_kernel[(triton.cdiv(encoder.d_sae, 64),)](
            partials[:, at], finished, planned.sample, planned.labels, cu_seqlens, planned.before[2 * at :],
            planned.batch, state.z_mean, state.z_m2, state.cross, state.n_active, state.group_sum,
            state.group_active_sum, state.group_active_count, **sizes,
            stride=partials.stride(0), MAX=pool == "max", BF=64, BG=16,
        )  # fmt: skip
