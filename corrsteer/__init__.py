"""corrsteer: steer language models along the SAE features that correlate with a reward.

The pipeline is `collect`, `select`, `Steering.apply`, `evaluate`; the operations underneath are `encode_pool`,
`encode_update` and `steer_add`. Names are loaded when first used, so that importing corrsteer stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from corrsteer.version import __version__

_HOME = {
    "SparseEncoder": "sae.encoder",
    "Benchmark": "tasks",
    "Task": "tasks",
    "benchmarks": "tasks",
    "load_benchmark": "tasks",
    "Moments": "ops",
    "encode": "ops",
    "encode_pool": "ops",
    "encode_update": "ops",
    "pack": "ops",
    "steer_add": "ops",
    "update_moments": "ops",
    "update_sums": "ops",
    "HookPoint": "lm.hook_points",
    "Capture": "lm.capture",
    "TeacherForcing": "lm.teacher_forcing",
    "Decoding": "lm.decoding",
    "Evidence": "stats.evidence",
    "Rollout": "rollouts.rollout",
    "regrade": "runs.regrade",
    "generate_rollouts": "rollouts.generate",
    "read_rollouts": "rollouts.rollout_file",
    "write_rollouts": "rollouts.rollout_file",
    "Steering": "steering.steering",
    "apply_rows": "steering.steering",
    "Run": "runs.run",
    "collect": "runs.collect",
    "select": "experiments.selection",
    "calibrate_best": "experiments.scaling",
    "calibrate_scale": "experiments.scaling",
    "baselines": "experiments.baselines",
    "evaluate": "experiments.evaluation",
    "SearchOptions": "experiments.search",
    "Trial": "experiments.trials",
    "run_trials": "experiments.trials",
    "accelerate": "integrations.saelens",
    "accelerated": "integrations.saelens",
    "restore": "integrations.saelens",
    "export_steering": "integrations.exports",
    "import_steering": "integrations.imports",
    "CorrSteerError": "errors",
    "BackendUnavailable": "errors",
    # modules
    "inference": "stats.inference",
    "planning": "stats.planning",
    "scores": "stats.scores",
    "stability": "stats.stability",
    "demo": "demo",
}
__all__ = [
    "BackendUnavailable",
    "Benchmark",
    "Capture",
    "CorrSteerError",
    "Decoding",
    "Evidence",
    "HookPoint",
    "Moments",
    "Rollout",
    "Run",
    "SearchOptions",
    "SparseEncoder",
    "Steering",
    "Task",
    "TeacherForcing",
    "Trial",
    "__version__",
    "accelerate",
    "accelerated",
    "apply_rows",
    "baselines",
    "benchmarks",
    "calibrate_best",
    "calibrate_scale",
    "collect",
    "demo",
    "encode",
    "encode_pool",
    "encode_update",
    "evaluate",
    "export_steering",
    "generate_rollouts",
    "import_steering",
    "inference",
    "load_benchmark",
    "pack",
    "planning",
    "read_rollouts",
    "regrade",
    "restore",
    "run_trials",
    "scores",
    "select",
    "stability",
    "steer_add",
    "update_moments",
    "update_sums",
    "write_rollouts",
]

if TYPE_CHECKING:
    from corrsteer import demo
    from corrsteer.errors import BackendUnavailable, CorrSteerError
    from corrsteer.experiments.baselines import baselines
    from corrsteer.experiments.evaluation import evaluate
    from corrsteer.experiments.scaling import calibrate_best, calibrate_scale
    from corrsteer.experiments.search import SearchOptions
    from corrsteer.experiments.selection import select
    from corrsteer.experiments.trials import Trial, run_trials
    from corrsteer.integrations.exports import export_steering
    from corrsteer.integrations.imports import import_steering
    from corrsteer.integrations.saelens import accelerate, accelerated, restore
    from corrsteer.lm.capture import Capture
    from corrsteer.lm.decoding import Decoding
    from corrsteer.lm.hook_points import HookPoint
    from corrsteer.lm.teacher_forcing import TeacherForcing
    from corrsteer.ops import Moments, encode, encode_pool, encode_update, pack, steer_add, update_moments, update_sums
    from corrsteer.rollouts.generate import generate_rollouts
    from corrsteer.rollouts.rollout import Rollout
    from corrsteer.rollouts.rollout_file import read_rollouts, write_rollouts
    from corrsteer.runs.collect import collect
    from corrsteer.runs.regrade import regrade
    from corrsteer.runs.run import Run
    from corrsteer.sae.encoder import SparseEncoder
    from corrsteer.stats import inference, planning, scores, stability
    from corrsteer.stats.evidence import Evidence
    from corrsteer.steering.steering import Steering, apply_rows
    from corrsteer.tasks import Benchmark, Task, benchmarks, load_benchmark


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'corrsteer' has no attribute {name!r}")
    home = importlib.import_module(f"corrsteer.{_HOME[name]}")
    value = getattr(home, name, home)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
