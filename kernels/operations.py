"""The operations of `corrsteer.ops.reference`, each by its launcher, and what they raise besides."""

from corrsteer.kernels.encode import encode
from corrsteer.kernels.encode_pool import encode_pool
from corrsteer.kernels.encode_update import encode_update
from corrsteer.kernels.launch import LaunchError
from corrsteer.kernels.steer_add import steer_add
from corrsteer.kernels.update_moments import update_moments
from corrsteer.kernels.update_sums import update_sums

__all__ = ["LaunchError", "encode", "encode_pool", "encode_update", "steer_add", "update_moments", "update_sums"]
