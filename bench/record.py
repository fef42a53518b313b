"""What a result file says besides times: the device, the versions and the commit, nothing that names a host."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import corrsteer
from corrsteer.files import write_utf8
from corrsteer.ops import native_backend

SCHEMA, VERSION = "corrsteer.bench", 1
DRY_RUN = f"{SCHEMA}.dry-run"  # the schema of a result whose times mean nothing
ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "numpy", "sae-lens")
STUDIES = ROOT / "bench" / "results" / "studies"  # simulations, which are of no device


def new(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """A result without cases; `commit` where the sources are not in a git repository."""
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "corrsteer": corrsteer.__version__,
        **_git(commit),
        "python": platform.python_version(),
        "packages": {name: _installed(name) for name in PACKAGES},
        "device": _gpu(device) if device.type == "cuda" else _cpu(),
        "cases": [],
    }


def write(result: dict[str, Any], directory: Path) -> Path:
    """Write the result to `directory`, named after its device, in one step and onto the disk: whenever the process or
    the machine ends, there is the result before or the one after, whole."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{stem(result)}.json"
    write_utf8(path, json.dumps(result, indent=1, allow_nan=False) + "\n")
    return path


def study(name: str, seed: int) -> dict[str, Any]:
    """The head of a simulation's result, which depends on its seed and versions alone."""
    return {
        "schema": f"corrsteer.{name}",
        "version": VERSION,
        "corrsteer": corrsteer.__version__,
        "python": platform.python_version(),
        "packages": {package: _installed(package) for package in ("torch", "numpy", "scipy")},
        "seed": seed,
    }


def write_study(result: dict[str, Any], directory: Path, stem: str | None = None) -> Path:
    """Write a study's result to `directory`, by default named after the study, with one row a line."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, value in result.items():
        if isinstance(value, list):
            rows = ",\n  ".join(json.dumps(row, allow_nan=False) for row in value)
            lines.append(f" {json.dumps(name)}: [\n  {rows}\n ]")
        else:
            lines.append(f" {json.dumps(name)}: {json.dumps(value, allow_nan=False)}")
    path = directory / f"{stem or result['schema'].removeprefix('corrsteer.')}.json"
    write_utf8(path, "{\n" + ",\n".join(lines) + "\n}\n")
    return path


def stem(result: dict[str, Any]) -> str:
    """What the files of a result are called, but for their endings."""
    device = result["device"]
    if result["schema"] == DRY_RUN:
        return "dry-run"
    return re.sub(r"[^a-z0-9]+", "-", f"{device['type']} {device['name']}".lower()).strip("-")


def sources() -> str:
    """A hash of all that is measured: the package, the kernels with their launch configurations, and the C++."""
    digest = hashlib.sha256()
    for folder in ("corrsteer", "kernels", "csrc"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".json", ".cpp", ".h", ".hpp", ".cu", ".cuh"):
                digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def commit_of(checkout: Path) -> str | None:
    """The commit that is checked out in a folder."""
    return _output("git", "-C", str(checkout), "rev-parse", "HEAD") or None


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(commit: str | None) -> dict[str, Any]:
    head = _output("git", "rev-parse", "HEAD")
    changes = _output("git", "status", "--porcelain", "--", ".", ":!bench/results")  # results change no result
    return {"commit": commit or head or None, "dirty": None if changes is None or commit else bool(changes)}


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "type": "gpu",
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "sm_count": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "driver": driver.splitlines()[0] if driver else None,
        "cuda": torch.version.cuda,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def _cpu() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text(encoding="utf-8")) if cpuinfo.exists() else None
    return {
        "type": "cpu",
        "name": named[1].strip() if named else platform.processor() or platform.machine(),
        "instructions": native_backend.instruction_set() if native_backend._native else "native backend not built",
        "threads": torch.get_num_threads(),
    }
