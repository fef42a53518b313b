"""What `corrsteer doctor` says: what runs on this machine, and where something does not, why and what would fix it."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from corrsteer.compatibility import installed, newer_than_tested
from corrsteer.errors import BackendUnavailable
from corrsteer.ops import cuda_backend, native_backend, registry
from corrsteer.report.listing import Listing, Part
from corrsteer.version import __version__

PACKAGES = ("torch", "triton", "transformers", "sae-lens", "safetensors", "numpy")


def examine() -> dict[str, Any]:
    """Versions, devices and backends of this machine; anything JSON can hold."""
    devices = [torch.device("cpu")] + [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return {
        "corrsteer": __version__,
        "python": platform.python_version(),
        "packages": {name: installed(name) for name in PACKAGES},
        "newer_than_tested": newer_than_tested(),
        "devices": {str(device): _describe(device) for device in devices},
        "extensions": {"native": _native(), "cuda": _cuda()},
        "forced_backend": os.environ.get(registry.ENVIRONMENT) or None,
        "backends": [
            {
                "backend": backend.name,
                "device": device.type,
                "operation": operation,
                **vars(registry.judge(backend, registry.Call(operation, device, torch.float32))),
            }
            for backend in registry.registered()
            for device in {d.type: d for d in devices}.values()
            for operation in registry.OPERATIONS
        ],
    }


def text(report: dict[str, Any]) -> list[Part]:
    """The report for people."""
    packages = ", ".join(f"{name} {version or 'missing'}" for name, version in report["packages"].items())
    lines = [f"corrsteer {report['corrsteer']}, Python {report['python']}", packages, *report["newer_than_tested"]]
    lines += [f"{name}: {described}" for name, described in report["devices"].items()]
    lines += [f"{name} extension: {state}" for name, state in report["extensions"].items()]
    if report["forced_backend"]:
        known = {b["backend"] for b in report["backends"]}
        consequence = "" if report["forced_backend"] in known else ", which is no backend: every operation will raise"
        lines += [f"{registry.ENVIRONMENT} asks for {report['forced_backend']!r}{consequence}"]
    rows = [
        (
            b["backend"],
            b["device"],
            b["operation"],
            ("yes" if b["automatic"] else "by name") if b["ok"] else "no",
            "; ".join(filter(None, (b["reason"], b["fix"]))) or "-",
        )
        for b in report["backends"]
    ]
    return [*lines, "", Listing(("backend", "device", "operation", "runs", "why not, and the fix"), rows)]


def _describe(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor}"


def _native() -> str:
    extension = native_backend._native
    if extension is None:
        return f"cannot be imported ({native_backend.MISSING}); {native_backend.BUILD}"
    try:
        used = native_backend.instruction_set()
    except BackendUnavailable as error:
        return f"built, but every operation of it will raise: {error}"
    return f"built; this processor offers {', '.join(extension.instruction_sets())}; in use: {used}"


def _cuda() -> str:
    extension = cuda_backend._cuda
    if extension is None:
        return f"cannot be imported ({cuda_backend.MISSING}); {cuda_backend.BUILD}"
    return f"built; {extension.problem() or 'it finds a GPU'}"
