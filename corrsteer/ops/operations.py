"""The operations: one function each, which checks its arguments and picks a backend.

An eager call goes straight to the backend. Under `torch.compile` the same call becomes an operator of
`torch.library` (namespace `corrsteer`) with a fake implementation, so that graphs do not break. No operation is
differentiable.

Notation: T tokens, N samples, D features, R labels, C columns of sums, V steering vectors, B rows of S positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from corrsteer.arguments import check_type, shown
from corrsteer.errors import CorrSteerError
from corrsteer.ops import native_backend, registry
from corrsteer.ops.calls import Call
from corrsteer.ops.flat import flatten_encoder
from corrsteer.ops.moments import Moments
from corrsteer.sae.encoder import SparseEncoder
from corrsteer.tensors import check_holds, check_tensor

POOLS = {"mean": ("mean",), "max": ("max",), "both": ("mean", "max")}
READ_PACKED = ("native", "reference")  # backends that read an encoder whose weight is packed
LARGEST_REWARD = 1e150  # the square of a larger one, and so its variance, may be no float64
X_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@torch.no_grad()
def pack(encoder: SparseEncoder) -> SparseEncoder:
    """The encoder with its weight as the `native` backend reads it, and no other copy.

    That backend packs the weight of every encoder that it is given, and keeps both. Where the encoder that was given is
    let go, one of them is left. Results are equal to the bit. `encoder.unpacked()` gives the weight back; so does
    `encoder.to` of another device or precision. The `reference` backend unpacks it at every call.

    Parameters
    ----------
    encoder : on the CPU. It is left as it is; the identity, which has no weight, is given back.

    Raises
    ------
    CorrSteerError : where the native backend cannot run this encoder.
    """
    check_encoder(encoder)
    if encoder.device is None or encoder.packed_weight is not None:
        return encoder
    call = Call("encode", encoder.device, torch.float32, encoder.activation, encoder.precision)
    registry.choose(call, "native")
    return native_backend.pack(encoder)


@torch.no_grad()
def encode(x: Tensor, encoder: SparseEncoder, *, backend: str | None = None) -> Tensor:
    """Dense feature activations, for those who want them.

    Parameters
    ----------
    x : `[..., d_in]` residuals, float32, float16 or bfloat16; `[..., heads, d_head]` for an SAE trained on hook_z.
    encoder : on the same device.
    backend : a backend's name; by default the fastest that can.

    Returns
    -------
    `[..., d_sae]` float32.
    """
    x = _check_x(x, encoder)
    rows = x.reshape(-1, encoder.d_in)
    if torch.compiler.is_compiling():
        z = torch.ops.corrsteer.encode(rows, *flatten_encoder(encoder), backend)
    else:
        z = _chosen("encode", x, backend, encoder)(rows, encoder)
    return z.reshape(*x.shape[:-1], encoder.d_sae)


@overload
def encode_pool(
    x: Tensor, cu_seqlens: Tensor, encoder: SparseEncoder, pool: Literal["both"], *, backend: str | None = None
) -> tuple[Tensor, Tensor]: ...


@overload
def encode_pool(
    x: Tensor,
    cu_seqlens: Tensor,
    encoder: SparseEncoder,
    pool: Literal["mean", "max"] = "mean",
    *,
    backend: str | None = None,
) -> Tensor: ...


@overload
def encode_pool(
    x: Tensor, cu_seqlens: Tensor, encoder: SparseEncoder, pool: str, *, backend: str | None = None
) -> Tensor | tuple[Tensor, Tensor]: ...


@torch.no_grad()
def encode_pool(
    x: Tensor, cu_seqlens: Tensor, encoder: SparseEncoder, pool: str = "mean", *, backend: str | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Encode packed tokens and pool them per sample; the dense activations need not exist.

    Parameters
    ----------
    x : `[T, d_in]` residuals, sample after sample.
    cu_seqlens : `[N + 1]` int32, where each sample starts; from 0 to T. An empty sample pools to 0.
    pool : `mean`, `max` or `both`.

    Returns
    -------
    `[N, d_sae]` float32, or for `both` a pair (mean, max) of them.
    """
    x = _check_packed(x, cu_seqlens, encoder)
    pools = _check_pool(pool)
    if torch.compiler.is_compiling():
        out = torch.ops.corrsteer.encode_pool(x, cu_seqlens, *flatten_encoder(encoder), pool, backend)
    else:
        out = _chosen("encode_pool", x, backend, encoder)(x, cu_seqlens, encoder, pools)
    return (out[0], out[1]) if pool == "both" else out[0]


@torch.no_grad()
def update_moments(pooled: Tensor, y: Tensor, moments: Moments, *, backend: str | None = None) -> None:
    """Fold pooled activations `[N, d_sae]` and rewards `[N]` or `[N, R]` into `moments`, in place."""
    check_tensor("pooled", pooled)
    check_type("moments", moments, Moments, "a Moments")
    if pooled.dim() != 2 or pooled.shape[1] != moments.d_sae or pooled.dtype not in X_DTYPES:
        raise CorrSteerError(
            f"pooled must be [N, d_sae={moments.d_sae}] float32, float16 or bfloat16, "
            f"got {list(pooled.shape)} {pooled.dtype}"
        )
    _check_device("pooled", pooled, moments.device)
    y = _check_y(y, len(pooled), moments)
    if torch.compiler.is_compiling():
        torch.ops.corrsteer.update_moments(pooled, y, moments.state(), backend)
    else:
        _chosen("update_moments", pooled, backend)(pooled, y, moments)


@torch.no_grad()
def update_sums(
    pooled: Tensor, weights: Tensor, sums: Tensor, powers: Sequence[int] | None = None, *, backend: str | None = None
) -> None:
    """Add weighted power sums of pooled activations to `sums`, in place.

        sums[i, c] <- sums[i, c] + Σ_n weights[n, c] · pooled[n, i]^p

    Permuted labels, bootstrap weights and the moments of higher order are all columns of it. On a CPU, activations that
    are 0 cost no time.

    Parameters
    ----------
    pooled : `[N, D]` float32, float16 or bfloat16.
    weights : `[N, C]` float64, finite.
    sums : `[D, C]` float64, changed in place; its rows may lie apart.
    powers : how many columns, from the first on, take p = 1, how many p = 2, and so on; by default all take 1.
    backend : a backend's name; by default the fastest that can.
    """
    for name, tensor in (("pooled", pooled), ("weights", weights), ("sums", sums)):
        check_tensor(name, tensor)
    if pooled.dim() != 2 or pooled.dtype not in X_DTYPES:
        raise CorrSteerError(
            f"pooled must be [N, D] float32, float16 or bfloat16, got {list(pooled.shape)} {pooled.dtype}"
        )
    N, D = pooled.shape
    if weights.dim() != 2 or len(weights) != N or weights.dtype != torch.float64:
        raise CorrSteerError(f"weights must be [N={N}, C] float64, got {list(weights.shape)} {weights.dtype}")
    C = weights.shape[1]
    if sums.shape != (D, C) or sums.dtype != torch.float64:
        raise CorrSteerError(f"sums must be [D={D}, C={C}] float64, got {list(sums.shape)} {sums.dtype}")
    for name, tensor in (("weights", weights), ("sums", sums)):
        _check_device(name, tensor, pooled.device)
    powers = (C,) if powers is None else _check_powers(powers, C)
    if torch.compiler.is_compiling():
        torch.ops.corrsteer.update_sums(pooled, weights, sums, list(powers), backend)
        return
    # the sum first, which is quick, and finite unless a weight is not or is near the largest number there is
    if pooled.device.type == "cpu" and not bool(weights.sum().isfinite() or weights.isfinite().all()):
        raise CorrSteerError("weights must be finite, got NaN or infinite ones; leave those samples out")
    _chosen("update_sums", pooled, backend)(pooled, weights, sums, powers)
    if not sums.is_inference():  # kernels change it behind autograd's back
        torch.autograd.graph.increment_version(sums)


@torch.no_grad()
def encode_update(
    x: Tensor,
    cu_seqlens: Tensor,
    y: Tensor,
    encoder: SparseEncoder,
    moments: Moments | tuple[Moments, Moments],
    pool: str = "mean",
    *,
    backend: str | None = None,
) -> None:
    """`encode_pool` and `update_moments` in one pass; neither the dense nor the pooled matrix need exist.

    Parameters are theirs; for `pool="both"`, `moments` is a pair (of the means, of the maxima).
    """
    x = _check_packed(x, cu_seqlens, encoder)
    pools = _check_pool(pool)
    states = _check_states(moments, pool)
    for state in states:
        if state.d_sae != encoder.d_sae:
            raise CorrSteerError(f"moments must have the encoder's d_sae={encoder.d_sae}, got d_sae={state.d_sae}")
        _check_device("moments", state.z_mean, x.device)
        y = _check_y(y, len(cu_seqlens) - 1, state)
    if torch.compiler.is_compiling():
        flat = [tensor for state in states for tensor in state.state()]
        torch.ops.corrsteer.encode_update(x, cu_seqlens, y, *flatten_encoder(encoder), flat, pool, backend)
    else:
        _chosen("encode_update", x, backend, encoder)(x, cu_seqlens, y, encoder, states, pools)


@torch.no_grad()
def steer_add(
    h: Tensor, vectors: Tensor, row_vector: Tensor, positions: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """Add a steering vector to each row of the residual stream, in place.

    Parameters
    ----------
    h : `[B, S, d]` residuals, changed in place.
    vectors : `[V, d]` float32.
    row_vector : `[B]` int32, which vector each row gets; -1 leaves the row as it is.
    positions : `[B, S]` bool, which positions are steered; None for all.

    Returns
    -------
    `h` itself.
    """
    for name, tensor in (("h", h), ("vectors", vectors), ("row_vector", row_vector)):
        check_tensor(name, tensor)
    if h.dim() != 3 or not h.is_floating_point():
        raise CorrSteerError(f"h must be [B, S, d] float32, float16 or bfloat16, got {list(h.shape)} {h.dtype}")
    if not vectors.is_floating_point():
        raise CorrSteerError(f"vectors must be float32, got {vectors.dtype}")
    if vectors.dim() != 2 or vectors.shape[1] != h.shape[2]:
        raise CorrSteerError(
            f"vectors must be [V, d={h.shape[2]}] as h is {list(h.shape)}, got {list(vectors.shape)}; "
            f"the steering belongs to a model of another width"
        )
    if row_vector.shape != h.shape[:1] or row_vector.dtype != torch.int32:
        raise CorrSteerError(f"row_vector must be [B={len(h)}] int32, got {list(row_vector.shape)} {row_vector.dtype}")
    if positions is not None:
        check_tensor("positions", positions)
        if positions.shape != h.shape[:2] or positions.dtype != torch.bool:
            raise CorrSteerError(
                f"positions must be [B, S]={list(h.shape[:2])} bool, got {list(positions.shape)} {positions.dtype}"
            )
    for name, tensor in (("vectors", vectors), ("row_vector", row_vector), ("positions", positions)):
        if tensor is not None:
            _check_device(name, tensor, h.device)
    if torch.compiler.is_compiling():
        torch.ops.corrsteer.steer_add(h, vectors, row_vector, positions, backend)
        return h
    if h.device.type == "cpu" and len(h) and not -1 <= int(row_vector.min()) <= int(row_vector.max()) < len(vectors):
        raise CorrSteerError(f"row_vector must lie in -1..{len(vectors) - 1}, got {row_vector.tolist()}")
    if not len(vectors):  # of which each row gets none
        return h
    _chosen("steer_add", h, backend)(h, vectors, row_vector, positions)
    if not h.is_inference():  # kernels change it behind autograd's back
        torch.autograd.graph.increment_version(h)
    return h


def _chosen(operation: str, on: Tensor, name: str | None, encoder: SparseEncoder | None = None) -> Callable[..., Any]:
    encoding = () if encoder is None else (encoder.activation, encoder.precision)
    call = Call(operation, on.device, on.dtype, *encoding)
    backend = registry.choose(call, name)
    if encoder is not None and encoder.packed_weight is not None and backend.name not in READ_PACKED:
        raise CorrSteerError(f"encoder is packed, which backend {backend.name!r} cannot read; use encoder.unpacked()")
    return backend.operations[operation]


# An operation may be called at every step of a decoder: a check of a type is one isinstance, a tenth of a microsecond.


def check_encoder(encoder: SparseEncoder) -> None:
    """Raise unless it is one."""
    fix = "make one with SparseEncoder.from_sae_lens, from_pretrained or load"
    check_type("encoder", encoder, SparseEncoder, "a SparseEncoder", fix)


def _check_x(x: Tensor, encoder: SparseEncoder) -> Tensor:
    check_tensor("x", x)
    check_encoder(encoder)
    if encoder.metadata.get("reshape_activations") == "hook_z" and x.shape[-1] != encoder.d_in and x.dim() > 1:
        x = x.flatten(-2)
    if x.dim() == 0 or x.shape[-1] != encoder.d_in:
        raise CorrSteerError(
            f"x must have d_in={encoder.d_in} as its last dimension, got {list(x.shape)}; "
            f"the SAE belongs to another model or hook point"
        )
    if x.dtype not in X_DTYPES:
        raise CorrSteerError(f"x must be float32, float16 or bfloat16, got {x.dtype}")
    if encoder.device is not None:
        _check_device("x", x, encoder.device)
    if x.device.type == "meta":  # no more is read of it where it is not
        check_holds("x", x)
    return x


def _check_packed(x: Tensor, cu_seqlens: Tensor, encoder: SparseEncoder) -> Tensor:
    x = _check_x(x, encoder)
    if x.dim() != 2:
        raise CorrSteerError(f"x must be [T, d_in={encoder.d_in}], packed sample after sample, got {list(x.shape)}")
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1 or cu_seqlens.dtype != torch.int32:
        raise CorrSteerError(
            f"cu_seqlens must be [N + 1] int32, got {list(cu_seqlens.shape)} {cu_seqlens.dtype}; "
            f"use cumsum(lengths, 0, dtype=torch.int32) with a 0 before it"
        )
    _check_device("cu_seqlens", cu_seqlens, x.device)
    # Reading values from a GPU would stall it at every call, and cannot be traced: there backends must bound them.
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != len(x) or bool((cu_seqlens.diff() < 0).any()):
            raise CorrSteerError(
                f"cu_seqlens must start at 0, never decrease and end at T={len(x)}, got {_abbreviate(cu_seqlens)}"
            )
    return x


def _check_pool(pool: str) -> tuple[str, ...]:
    if not isinstance(pool, str) or pool not in POOLS:
        raise CorrSteerError(f"pool must be one of {', '.join(POOLS)}, got {shown(pool)}")
    return POOLS[pool]


def _check_states(moments: Moments | tuple[Moments, Moments], pool: str) -> tuple[Moments, ...]:
    """The moments of each pooling."""
    if pool != "both" and isinstance(moments, Moments):
        return (moments,)
    parts = moments if isinstance(moments, (tuple, list)) else ()
    pair = tuple(state for state in parts if isinstance(state, Moments))
    if pool == "both" and len(pair) == len(parts) == 2:
        if pair[0] is pair[1]:
            raise CorrSteerError("moments must be two for pool='both', got the same twice; make one for each pooling")
        return pair
    must_be = "a pair of Moments (of the means, of the maxima)" if pool == "both" else "one Moments"
    got = f"a {shown(moments)} of {len(parts)}" if isinstance(moments, (tuple, list)) else shown(moments)
    raise CorrSteerError(f"moments must be {must_be} for pool={pool!r}, got {got}")


def _check_powers(powers: Sequence[int], C: int) -> tuple[int, ...]:
    counts = tuple(powers) if isinstance(powers, Sequence) else ()
    if not all(isinstance(columns, int) and columns >= 0 for columns in counts) or sum(counts) != C:
        raise CorrSteerError(
            f"powers must be column counts that add up to C={C}, got {list(counts) if counts else shown(powers)}"
        )
    return counts


def _check_y(y: Tensor, n: int, moments: Moments) -> Tensor:
    check_tensor("y", y)
    if y.dim() == 1:
        y = y[:, None]
    if y.shape != (n, moments.n_labels) or y.is_complex():
        raise CorrSteerError(
            f"y must be [N={n}, n_labels={moments.n_labels}] of real numbers, got {list(y.shape)} {y.dtype}"
        )
    _check_device("y", y, moments.device)
    if y.device.type == "cpu" and not torch.compiler.is_compiling():
        check_rewards(y)
    return y


def check_rewards(y: Tensor) -> None:
    """Raise for rewards that are not finite, or whose squares would not be."""
    size = y.double().abs()
    if not bool((size <= LARGEST_REWARD).all()):
        got = float(size.max())
        raise CorrSteerError(f"y must be finite and at most 1e150 in size, got {got:g}; leave those samples out")


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise CorrSteerError(f"{name} must be on {device}, got {tensor.device}; move it with .to({str(device)!r})")


def _abbreviate(values: Tensor) -> str:
    numbers = [str(v) for v in values.tolist()]
    return f"[{', '.join(numbers if len(numbers) < 8 else numbers[:3] + ['...'] + numbers[-3:])}]"
