"""What a backend is asked, and what it answers: the operations, a call of one, and a verdict on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

OPERATIONS = ("encode", "encode_pool", "update_moments", "update_sums", "encode_update", "steer_add")


class Call(NamedTuple):
    """What a verifier judges: an operation on tensors of a device and dtype, and an encoder's form if there is one."""

    operation: str
    device: torch.device
    dtype: torch.dtype
    activation: str | None = None
    precision: str | None = None


@dataclass(frozen=True)
class Verdict:
    """A verifier's answer: yes, or no with the reason and what to do about it.

    A backend that is no user's choice for speed, such as an interpreter, is not `automatic`: it runs when asked for
    by name. One that should run on this machine and does not is `missed`: that it is passed over is a warning.
    """

    ok: bool
    reason: str = ""
    fix: str = ""
    automatic: bool = True
    missed: bool = False
