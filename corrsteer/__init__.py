"""corrsteer: steer language models along the SAE features that correlate with a reward.

The pipeline is `collect`, `select`, `Steering.apply`, `evaluate`; the operations underneath are `encode_pool`,
`encode_update` and `steer_add`. Names are loaded when first used, so that importing corrsteer stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "SparseEncoder": "encoder",
    "Moments": "moments",
    "Evidence": "evidence",
    "encode": "ops",
    "encode_pool": "ops",
    "encode_update": "ops",
    "steer_add": "ops",
    "update_moments": "ops",
    "update_sums": "ops",
    "HookPoint": "models",
    "Capture": "capture",
    "Task": "tasks",
    "Run": "collection",
    "collect": "collection",
    "select": "selection",
    "calibrate_scale": "scaling",
    "Steering": "steering",
    "apply_rows": "steering",
    "evaluate": "evaluation",
    "CorrSteerError": "errors",
    "BackendUnavailable": "errors",
}
__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from corrsteer.capture import Capture
    from corrsteer.collection import Run, collect
    from corrsteer.encoder import SparseEncoder
    from corrsteer.errors import BackendUnavailable, CorrSteerError
    from corrsteer.evaluation import evaluate
    from corrsteer.evidence import Evidence
    from corrsteer.models import HookPoint
    from corrsteer.moments import Moments
    from corrsteer.ops import encode, encode_pool, encode_update, steer_add, update_moments, update_sums
    from corrsteer.scaling import calibrate_scale
    from corrsteer.selection import select
    from corrsteer.steering import Steering, apply_rows
    from corrsteer.tasks import Task


def __getattr__(name: str):
    if name == "demo":  # a subpackage, imported on first use
        return importlib.import_module("corrsteer.demo")
    if name not in _HOME:
        raise AttributeError(f"module 'corrsteer' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"corrsteer.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(set(globals()) | set(__all__))
