"""The `triton` backend: what it can run, and the way to the kernels, which are imported when first needed."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import Any

import torch

from corrsteer.errors import CorrSteerError
from corrsteer.ops import calls
from corrsteer.ops.calls import Call, Verdict

ENCODED = ("relu", "jumprelu", "gated", "topk", "abstopk")


def verify(call: Call) -> Verdict:
    """Whether the kernels can run a call."""
    if importlib.util.find_spec("triton") is None:
        return Verdict(False, "triton is not installed", "pip install triton")
    if importlib.util.find_spec("corrsteer.kernels") is None:
        return Verdict(False, "its kernels are not installed", "install the package: pip install .")
    if call.dtype == torch.float64 or call.precision == "fp64":
        return Verdict(False, "its kernels compute in float32", "use float32, bfloat16 or float16")
    if call.activation is not None and call.activation not in ENCODED:
        return Verdict(False, f"its kernels do not compute {call.activation}", "use the reference backend for it")
    if call.device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return Verdict(True, "interpreted, for tests: very slow", automatic=False)
        return Verdict(False, "its kernels need a GPU", "use a CUDA device, or another backend on a CPU")
    if call.device.type != "cuda" or torch.version.hip:
        return Verdict(False, "its kernels have been compiled for NVIDIA GPUs only", "use another backend")
    capability = torch.cuda.get_device_capability(call.device)
    if capability < (8, 0):
        return Verdict(False, f"its kernels need sm_80 or later, this GPU is sm_{10 * capability[0] + capability[1]}",
                       "use another backend")  # fmt: skip
    return Verdict(True)


def _run(operation: str, *args: Any) -> Any:
    with torch.cuda.device_of(args[0]):  # Triton launches on the current device
        kernels = importlib.import_module("corrsteer.kernels.operations")
        try:
            return getattr(kernels, operation)(*args)
        except kernels.LaunchError as error:  # kernels know nothing of the package, its errors included
            raise CorrSteerError(str(error)) from None


OPERATIONS = {operation: functools.partial(_run, operation) for operation in calls.OPERATIONS}
