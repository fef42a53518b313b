"""The operations, their definition in eager torch, and the backends that run them; and `Moments`, which they update."""

from corrsteer.ops import library  # noqa: F401 (it registers the operators that `torch.compile` sees)
from corrsteer.ops.moments import Moments
from corrsteer.ops.operations import encode, encode_pool, encode_update, pack, steer_add, update_moments, update_sums
from corrsteer.ops.pooling import RunningPool

__all__ = [
    "Moments", "RunningPool", "encode", "encode_pool", "encode_update", "pack", "steer_add", "update_moments",
    "update_sums",
]  # fmt: skip
