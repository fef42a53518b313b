"""The `native` backend: what the C++ kernels can run on a CPU, and the way to them.

The matrix product is our own. The best library at hand is oneDNN with weights packed for it beforehand, as
`torch.compile` uses it: at every size measured (`bench/results`) the whole operation takes about as long as that bare
product, or less.
"""

from __future__ import annotations

import functools
import os
import threading
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from corrsteer.errors import BackendUnavailable, CorrSteerError
from corrsteer.ops import extensions
from corrsteer.ops.calls import Call, Verdict
from corrsteer.ops.moments import Moments
from corrsteer.sae.encoder import SparseEncoder, required
from corrsteer.types import Device

_native, MISSING = extensions.load("_native")

INSTRUCTION_SET = "CORRSTEER_INSTRUCTION_SET"
ENCODED = ("relu", "jumprelu", "gated", "topk", "abstopk")
BUILD = "install a C++ compiler with OpenMP, then in the source folder: pip install --force-reinstall --no-deps ."
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def verify(call: Call) -> Verdict:
    """Whether the kernels can run a call."""
    if call.device.type != "cpu":
        return Verdict(False, "its kernels run on CPUs", "use another backend")
    if _native is None:
        return Verdict(False, f"its extension could not be imported ({MISSING})", BUILD, missed=True)
    if call.dtype not in DTYPES or call.precision == "fp64":
        return Verdict(False, "its kernels compute in float32", "use float32, bfloat16 or float16")
    if call.activation is not None and call.activation not in ENCODED:
        return Verdict(False, f"its kernels do not compute {call.activation}", "use the reference backend for it")
    return Verdict(True)


def instruction_set() -> str:
    """The instruction set in use: the best that this processor offers, or the one CORRSTEER_INSTRUCTION_SET names.

    Raises
    ------
    BackendUnavailable : if the processor does not offer that one.
    """
    offered = _native.instruction_sets()
    name = os.environ.get(INSTRUCTION_SET) or offered[0]
    if name not in offered:
        raise BackendUnavailable(
            f"{INSTRUCTION_SET} must be one that this processor offers, {' or '.join(offered)}, got {name!r}"
        )
    return name


# Packed weights


class _Packed(NamedTuple):
    storages: tuple[StorageWeakRef, ...]  # of what was packed
    versions: tuple[object, ...]
    weight: Tensor


_packed: dict[tuple[object, ...], _Packed] = {}
_packing = threading.Lock()


def packed_weight(encoder: SparseEncoder, isa: str) -> Tensor:
    """The encoder's weight as the kernels read it; packed when first asked for, and again if it has been changed.

    It takes as much memory as the weight (twice that for fp16, which is packed as float32) until the first call after
    the weight is gone. It belongs to the weight's memory and not to the encoder, as under `torch.compile` an encoder is
    put together anew at every call. Changes are seen that torch counts: not those through `.data` or NumPy.
    """
    if encoder.packed_weight is not None and encoder.packed_weight.shape[2] == _panel_rows(isa):
        return encoder.packed_weight.view(-1)
    parts = [p for p in (encoder.weight, encoder.weight_low, encoder.packed_weight) if p is not None]
    storages = tuple(StorageWeakRef(part.untyped_storage()) for part in parts)
    key = (isa, *((part.data_ptr(), part.dtype, part.shape) for part in parts))
    versions = tuple(_version(part) for part in parts)
    with _packing:
        for old in [old for old, entry in _packed.items() if any(s.expired() for s in entry.storages)]:
            del _packed[old]
        found = _packed.get(key)
        if found is not None and found.versions == versions and found.storages == storages:
            return found.weight
        _packed.pop(key, None)
        # bf16x2: hi + lo is exact in float32, where it costs no more than two products of bfloat16
        unpacked = encoder.unpacked()  # of one that was packed for another instruction set
        weight = required(unpacked.weight) if unpacked.weight_low is None else unpacked.full_weight()
        packed = _room_to_pack(unpacked, isa, "cpu")
        _native.pack(isa, _array(weight), _array(packed), torch.get_num_threads())
        _packed[key] = _Packed(storages, versions, packed)
        return packed


def held_bytes(encoder: SparseEncoder) -> int:
    """What is held of an encoder between calls, beside itself: its packed weight."""
    if encoder.packed_weight is not None:
        return 0
    return _room_to_pack(encoder, instruction_set(), "meta").nbytes


def _room_to_pack(encoder: SparseEncoder, isa: str, device: Device) -> Tensor:
    plain = encoder.weight_low is None and required(encoder.weight).dtype == torch.bfloat16
    dtype = torch.bfloat16 if plain else torch.float32
    return torch.empty(_native.packed_size(isa, encoder.d_sae, encoder.d_in, _name(dtype)), dtype=dtype, device=device)


def pack(encoder: SparseEncoder) -> SparseEncoder:
    """The encoder with its weight packed, and no other copy of it. See `corrsteer.ops.pack`."""
    isa = instruction_set()
    packed = packed_weight(encoder, isa)
    side = _packed_side(packed.dtype)
    depth = -(-encoder.d_in // side)
    shaped = packed.view(-1, depth, _panel_rows(isa), side)
    return replace(encoder, weight=None, weight_low=None, packed_weight=shaped)


def _panel_rows(isa: str) -> int:
    """Features side by side in a panel."""
    return _native.packed_size(isa, 1, 1, "float32")


def _packed_side(dtype: torch.dtype) -> int:
    """Numbers of one feature that lie side by side: those that one instruction multiplies."""
    return 2 if dtype == torch.bfloat16 else 1


def _version(weight: Tensor) -> float:
    """What changes when the weight does. Tensors made in inference mode do not count; of them a column is added up."""
    return float(weight[:, 0].double().sum()) if weight.is_inference() else weight._version


def _encoder(encoder: SparseEncoder) -> tuple[Any, Tensor]:
    """The extension's own encoder, and the packed weight, which is to be kept until the call is over."""
    isa = instruction_set()
    packed = packed_weight(encoder, isa)
    vectors = ("bias", "threshold", "magnitude_scale", "magnitude_bias")
    given = {name: getattr(encoder, name) for name in vectors}
    try:
        made = _native.Encoder(
            instruction_set=isa,
            d_in=encoder.d_in,
            d_sae=encoder.d_sae,
            activation=encoder.activation,
            input_norm=encoder.input_norm,
            k=encoder.k,
            weight=_array(packed),
            **{name: _array(vector) for name, vector in given.items() if vector is not None},
        )
    except ValueError as error:  # such as a threshold that is NaN
        raise CorrSteerError(str(error)) from None
    return made, packed


# Tensors by address. Whoever makes one of these keeps the tensor until the call is over.


@functools.cache
def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _array(tensor: Tensor) -> Any:
    return _native.Array(tensor.data_ptr(), tensor.shape, tensor.stride(), _name(tensor.dtype))


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


# The operations of `corrsteer.ops.reference`


def encode(x: Tensor, encoder: SparseEncoder) -> Tensor:
    x, (packed_encoder, _kept) = _rows(x), _encoder(encoder)
    out = torch.empty(len(x), encoder.d_sae, dtype=torch.float32, device="cpu")
    _native.encode(packed_encoder, _array(x), _array(out), torch.get_num_threads())
    return out


def encode_pool(x: Tensor, cu_seqlens: Tensor, encoder: SparseEncoder, pools: tuple[str, ...]) -> Tensor:
    x, cu_seqlens, (packed_encoder, _kept) = _rows(x), cu_seqlens.contiguous(), _encoder(encoder)
    out = torch.empty(len(pools), len(cu_seqlens) - 1, encoder.d_sae, dtype=torch.float32, device="cpu")
    into = dict(zip(pools, map(_array, out)))
    _native.encode_pool(
        packed_encoder, _array(x), _array(cu_seqlens), into.get("mean"), into.get("max"), torch.get_num_threads()
    )
    return out


def encode_update(
    x: Tensor,
    cu_seqlens: Tensor,
    y: Tensor,
    encoder: SparseEncoder,
    moments: tuple[Moments, ...],
    pools: tuple[str, ...],
) -> None:
    x, cu_seqlens, y = _rows(x), cu_seqlens.contiguous(), y.double().contiguous()
    packed_encoder, _kept = _encoder(encoder)
    into = dict(zip(pools, map(_state, moments)))
    _native.encode_update(
        packed_encoder, _array(x), _array(cu_seqlens), _array(y), into.get("mean"), into.get("max"),
        torch.get_num_threads(),
    )  # fmt: skip


def update_moments(pooled: Tensor, y: Tensor, moments: Moments) -> None:
    pooled, y = _rows(pooled), y.double().contiguous()
    _native.update_moments(instruction_set(), _array(pooled), _array(y), _state(moments), torch.get_num_threads())


def update_sums(pooled: Tensor, weights: Tensor, sums: Tensor, powers: tuple[int, ...]) -> None:
    pooled, weights = _rows(pooled), weights.contiguous()
    into = _rows(sums)
    _native.update_sums(
        instruction_set(), _array(pooled), _array(weights), _array(into), list(powers), torch.get_num_threads()
    )
    if into is not sums:
        sums.copy_(into)


def steer_add(h: Tensor, vectors: Tensor, row_vector: Tensor, positions: Tensor | None) -> None:
    vectors = vectors.float()
    where = None if positions is None else _array(positions)
    _native.steer_add(_array(h), _array(vectors), _array(row_vector), where)


# What has no counterpart there: rows and columns without zeros, see `corrsteer.ops.rows`


def nonzeros(pooled: Tensor, places: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """What is not 0 in `pooled: [N, D]`: values float32, their places in the row as `places`, and rows' offsets."""
    pooled, isa, threads = _rows(pooled), instruction_set(), torch.get_num_threads()
    offsets = torch.zeros(len(pooled) + 1, dtype=torch.int64, device="cpu")
    _native.count_nonzeros(isa, _array(pooled), _array(offsets[1:]), threads)
    offsets = offsets.cumsum(0)
    values = torch.empty(int(offsets[-1]), dtype=torch.float32, device="cpu")
    found = torch.empty(len(values), dtype=places, device="cpu")
    _native.list_nonzeros(isa, _array(pooled), _array(offsets), _array(values), _array(found), threads)
    return values, found, offsets


def update_sparse_sums(columns: Any, features: Tensor, weights: Tensor, sums: Tensor, first: int, power: int) -> None:
    parts = [part.contiguous() for part in (columns.values, columns.samples, columns.offsets, features, weights)]
    into = _rows(sums)
    _native.update_sparse_sums(
        instruction_set(), *map(_array, parts), first, power, _array(into), torch.get_num_threads()
    )
    if into is not sums:
        sums.copy_(into)


def _state(moments: Moments) -> dict[str, Any]:
    return {name: _array(getattr(moments, name)) for name in moments.STATE}


OPERATIONS = {
    "encode": encode,
    "encode_pool": encode_pool,
    "update_moments": update_moments,
    "update_sums": update_sums,
    "encode_update": encode_update,
    "steer_add": steer_add,
}
