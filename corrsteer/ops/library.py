"""The operations as operators of `torch.library` (namespace `corrsteer`), which is how `torch.compile` sees them.

Each runs its function of `operations`, and has a fake implementation that says what shape comes out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from corrsteer.ops import operations
from corrsteer.ops.flat import ENCODER, restore_encoder, restore_moments


def _define(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any] = lambda *_: None) -> None:
    torch.library.define(f"corrsteer::{name}", schema)
    torch.library.impl(f"corrsteer::{name}", "CompositeExplicitAutograd", run)
    torch.library.register_fake(f"corrsteer::{name}", fake)


def _encode(x: Tensor, *rest: Any) -> Tensor:
    *encoder, backend = rest
    # a copy, as an operator may not return its input, which for `identity` is the result
    return operations.encode(x, restore_encoder(*encoder), backend=backend).clone()


def _fake_encode(x: Tensor, parts: Any, d_in: int, d_sae: int, *_: Any) -> Tensor:
    return x.new_empty(len(x), d_sae, dtype=torch.float32)


def _encode_pool(x: Tensor, cu_seqlens: Tensor, *rest: Any) -> Tensor:
    *encoder, pool, backend = rest
    out = operations.encode_pool(x, cu_seqlens, restore_encoder(*encoder), pool, backend=backend)
    return torch.stack(out) if isinstance(out, tuple) else out[None]


def _fake_encode_pool(x: Tensor, cu_seqlens: Tensor, parts: Any, d_in: int, d_sae: int, *rest: Any) -> Tensor:
    *_, pool, _backend = rest
    return x.new_empty(len(operations.POOLS[pool]), len(cu_seqlens) - 1, d_sae, dtype=torch.float32)


def _update_moments(pooled: Tensor, y: Tensor, flat: list[Tensor], backend: str | None) -> None:
    operations.update_moments(pooled, y, *restore_moments(flat), backend=backend)


def _update_sums(pooled: Tensor, weights: Tensor, sums: Tensor, powers: list[int], backend: str | None) -> None:
    operations.update_sums(pooled, weights, sums, powers, backend=backend)


def _encode_update(x: Tensor, cu_seqlens: Tensor, y: Tensor, *rest: Any) -> None:
    *encoder, flat, pool, backend = rest
    states = restore_moments(flat)
    into = (states[0], states[1]) if pool == "both" else states[0]
    operations.encode_update(x, cu_seqlens, y, restore_encoder(*encoder), into, pool, backend=backend)


def _steer_add(h: Tensor, vectors: Tensor, row_vector: Tensor, positions: Tensor | None, backend: str | None) -> None:
    operations.steer_add(h, vectors, row_vector, positions, backend=backend)


_define("encode", f"(Tensor x, {ENCODER}, str? backend) -> Tensor", _encode, _fake_encode)
_define(
    "encode_pool",
    f"(Tensor x, Tensor cu_seqlens, {ENCODER}, str pool, str? backend) -> Tensor",
    _encode_pool,
    _fake_encode_pool,
)
_define(
    "update_moments",
    "(Tensor pooled, Tensor y, Tensor(a!)[] moments, str? backend) -> ()",
    _update_moments,
)
_define(
    "update_sums",
    "(Tensor pooled, Tensor weights, Tensor(a!) sums, SymInt[] powers, str? backend) -> ()",
    _update_sums,
)
_define(
    "encode_update",
    f"(Tensor x, Tensor cu_seqlens, Tensor y, {ENCODER}, Tensor(a!)[] moments, str pool, str? backend) -> ()",
    _encode_update,
)
_define(
    "steer_add",
    "(Tensor(a!) h, Tensor vectors, Tensor row_vector, Tensor? positions, str? backend) -> ()",
    _steer_add,
)
