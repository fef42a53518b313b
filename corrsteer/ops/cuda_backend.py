"""The `cuda` backend: steering on NVIDIA GPUs with little to do on the host.

For few residuals what `steer_add` takes is the time of its launch. This one is a call of a C++ function with numbers
for arguments; Triton's, which does the same, has to bind and specialise its arguments first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from corrsteer.ops import extensions
from corrsteer.ops.calls import Call, Verdict

_cuda, MISSING = extensions.load("_cuda")

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}  # as the extension calls them
BUILD = (
    "install the CUDA toolkit (12 or later), then in the source folder: "
    "CORRSTEER_CUDA=1 pip install --force-reinstall --no-deps ."
)


def verify(call: Call) -> Verdict:
    """Whether the kernels can run a call."""
    if call.device.type != "cuda" or torch.version.hip:
        return Verdict(False, "its kernels run on NVIDIA GPUs", "use another backend")
    if _cuda is None:
        return Verdict(False, f"its extension could not be imported ({MISSING})", BUILD)
    if call.dtype not in DTYPES:
        return Verdict(False, "its kernels compute in float32", "use float32, bfloat16 or float16")
    if problem := _cuda.problem():
        return Verdict(False, f"its extension cannot run here ({problem})", f"update the driver, or {BUILD}")
    major, minor = torch.cuda.get_device_capability(call.device)
    if major < 8:
        return Verdict(False, f"it needs sm_80 or later, this GPU is sm_{major}{minor}", "use another backend")
    return Verdict(True)


def steer_add(h: Tensor, vectors: Tensor, row_vector: Tensor, positions: Tensor | None) -> None:
    device = h.get_device()
    if device != torch.cuda.current_device():
        with torch.cuda.device_of(h):
            return steer_add(h, vectors, row_vector, positions)
    vectors = vectors.float()
    _cuda.steer_add(
        DTYPES[h.dtype], h.data_ptr(), h.shape, h.stride(),
        vectors.data_ptr(), vectors.shape, vectors.stride(),
        row_vector.data_ptr(), row_vector.stride(0),
        0 if positions is None else positions.data_ptr(), (0, 0) if positions is None else positions.stride(),
        torch._C._cuda_getCurrentRawStream(device),
    )  # fmt: skip


OPERATIONS = {"steer_add": steer_add}
