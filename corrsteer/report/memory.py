"""What `corrsteer plan --memory` says: whether a collection fits a machine, and what to change where it does not."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from corrsteer.errors import CorrSteerError
from corrsteer.report.tables import table
from corrsteer.runs.memory import Memory
from corrsteer.runs.options import Options

USABLE = 0.9  # of a device's memory: the rest is for what passes need while they run, and for gaps between tensors
CONTROL_GROUP = Path("/sys/fs/cgroup")  # such as a container's
LIMITS = ("memory.max", "memory/memory.limit_in_bytes")

REMEDIES = {
    "model weights": "load the model in a smaller --dtype, or give one process more devices",
    "encoders": "take encoders in --precision bf16, or fewer layers at a time",
    "packed encoders": "take encoders in --precision bf16, or fewer layers at a time",
    "key-value cache": "take a smaller --batch-tokens or --batch-size",
    "captured residuals": "take a smaller --buffer-bytes",
    "a batch's samples": "take a smaller --batch-size, or fewer layers at a time",
    "pooled parts of a batch": "take a smaller --batch-size, or a larger --buffer-bytes",
    "a block's samples": "take a smaller --block-size, or fewer layers at a time",
    "moments": "take fewer layers at a time",
    "evidence": "take fewer --permutations, or --keep-activations always",
}


@dataclass(frozen=True)
class Machine:
    """Devices, and the memory of each; a CPU is one device, whose memory all processes share."""

    device: torch.device
    devices: int
    device_bytes: int

    def sharing(self, processes: int) -> int:
        """How many of so many processes are on the fullest device."""
        return math.ceil(processes / self.devices)

    @property
    def usable(self) -> int:
        """Of a device's memory."""
        return int(USABLE * self.device_bytes)


def machine(device: str, devices: int | None = None, device_bytes: int | None = None) -> Machine:
    """The one that is described, and otherwise this one.

    Parameters
    ----------
    device : `auto` (the GPUs, else the CPU), or one that torch knows.

    Raises
    ------
    CorrSteerError : for a device that torch does not know, and one of which this machine says nothing.
    """
    try:
        chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    except RuntimeError:
        raise CorrSteerError(f"device must be auto, cpu, cuda or another that torch knows, got {device!r}") from None
    if chosen.type == "cpu":
        if devices is not None:
            raise CorrSteerError(
                f"devices must be left out on a CPU, whose processes share its memory, got {devices}; for GPUs give "
                f"device cuda"
            )
        return Machine(chosen, 1, device_bytes or _ram())
    there = range(torch.cuda.device_count() if chosen.type == "cuda" else 0)
    if device_bytes is None and not there:
        raise CorrSteerError(f"device_bytes must be given for {chosen}, as this machine has none")
    default_bytes = min((torch.cuda.get_device_properties(at).total_memory for at in there), default=0)
    default_devices = len(there) if chosen.index is None and there else 1
    return Machine(chosen, devices or default_devices, device_bytes or default_bytes)


def fit(memory: Memory, machine: Machine, processes: int, options: Options) -> dict[str, Any]:
    """The plan for a machine, in anything JSON can hold."""
    sharing = machine.sharing(processes)
    held = math.ceil(memory.alone / machine.devices) if processes == 1 else memory.total(sharing)
    fits = held <= machine.usable
    return {
        "process": memory.process,
        "folding": memory.folding,
        "disk": memory.disk,
        "keeps_activations": memory.keeps_activations,
        "processes": processes,
        "each_process": memory.each,
        "folding_process": memory.alone,
        "all_processes": memory.total(processes),
        "device": machine.device.type,
        "devices": machine.devices,
        "device_bytes": machine.device_bytes,
        "usable_bytes": machine.usable,
        "fullest_device": held,
        "fits": fits,
        "largest": memory.largest,
        "advice": _advice(memory, machine, processes, fits, options),
    }


def _advice(memory: Memory, machine: Machine, processes: int, fits: bool, options: Options) -> list[str]:
    """What to change, and what would be quicker."""
    said = []
    statistics = memory.folding["a block's samples"] + memory.folding["evidence"]
    if statistics > options.statistics_bytes:
        said.append(f"collect refuses this with statistics_bytes={options.statistics_bytes}; it takes {statistics}")
    copies = 0  # processes that a device has room for
    while memory.total(copies + 1) <= machine.usable:
        copies += 1
    if fits:
        if processes == 1 and machine.devices > 1 and copies:
            said.append(f"every device has room for a copy: torchrun --nproc-per-node {machine.devices} is quicker")
        return said
    if processes > 1 and copies:
        return [*said, f"take at most {copies * machine.devices} processes"]
    said.append(REMEDIES[memory.largest])
    if machine.device.type != "cpu":
        needed = math.ceil(memory.alone / machine.usable)
        if processes > 1 and needed <= machine.devices:
            said.append(f"or one process, which device_map='auto' spreads over {needed} devices or more")
        elif processes == 1:
            said.append(f"or {needed} devices, over which device_map='auto' spreads one process")
    return said


def text(found: dict[str, Any]) -> str:
    """The plan for people."""
    several, processes = found["processes"] > 1, {"the process": found["folding_process"]}
    if several:
        processes = {
            "the process that folds blocks": found["folding_process"],
            "every other": found["each_process"],
            f"all {found['processes']}": found["all_processes"],
        }
    parts = {
        "Memory of each process" if several else "Memory": found["process"],
        "Memory of the one that folds blocks, besides" if several else "Memory for statistics": found["folding"],
        "Memory, together": processes,
        "Disk": found["disk"],
    }
    verdict = [
        f"It {'fits' if found['fits'] else 'does not fit'}: {size(found['fullest_device'])}"
        f"{' of the fullest device' if found['devices'] > 1 else ''}, where {size(found['usable_bytes'])} of "
        f"{size(found['device_bytes'])} are to be used.",
        f"The largest part is {found['largest']}.",
        *(f"{sentence[0].upper()}{sentence[1:]}." for sentence in found["advice"]),
    ]
    tables = [
        table((title, ""), [(name, size(nbytes)) for name, nbytes in listed.items()], "")
        for title, listed in parts.items()
    ]
    return "\n\n".join([*tables, "\n".join(verdict)])


def size(nbytes: int) -> str:
    """Bytes for people."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.2f} {name}"
    return f"{nbytes} B"


def _ram() -> int:
    """What the machine has, or the control group that this process is in may take."""
    found = []
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for name in LIMITS:
        try:
            found.append(int((CONTROL_GROUP / name).read_text(encoding="ascii")))
        except (OSError, ValueError):  # there is none, or it is "max"
            continue
    if not found:
        raise CorrSteerError("device_bytes must be given, as this machine does not say how much memory it has")
    return min(found)
