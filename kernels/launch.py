"""Launch configurations: frozen in `configs/`, one JSON file a GPU or architecture.

Nothing is tuned at run time: tuning inside CUDA-graph capture breaks the capture, and would make results depend on
the machine's load. The file named after the GPU is used if there is one, else the one of its architecture, else that
of the nearest older architecture, which is logged.
"""

import functools
import json
import logging
from pathlib import Path
from typing import Any

import torch
import triton

log = logging.getLogger(__name__)
CONFIGS = Path(__file__).parent / "configs"
ARCHITECTURES = (80, 90, 100)  # of the files that ship
INTERPRETER = "interpreter"


@functools.cache
def read(name: str) -> dict[str, Any]:
    """The file of a GPU, such as `NVIDIA_H200`, or of an architecture, such as `sm_90`."""
    return json.loads((CONFIGS / f"{name}.json").read_text())


@functools.cache
def file_for(device: torch.device) -> str:
    """The name of the file whose configurations a device uses."""
    if device.type != "cuda":
        return INTERPRETER
    gpu = torch.cuda.get_device_name(device).replace(" ", "_")
    if (CONFIGS / f"{gpu}.json").is_file():
        return gpu
    major, minor = torch.cuda.get_device_capability(device)
    capability = 10 * major + minor
    nearest = max(a for a in ARCHITECTURES if a <= capability)
    if nearest != capability:
        log.warning("no launch configurations for sm_%d (%s): those of sm_%d are used", capability, gpu, nearest)
    return f"sm_{nearest}"


@functools.cache
def config(device: torch.device, kernel: str, kind: str, tokens: int) -> dict[str, int]:
    """What to launch a kernel with: the first entry of its list whose `up_to_tokens` is not below `tokens`."""
    entries = read(file_for(device))[kernel][kind]
    return next(e for e in entries if tokens <= e.get("up_to_tokens", tokens))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def tiles_per_group(tiles: int, blocks: int, most: int, programs: int) -> int:
    """How many token tiles one program walks, at most `most`.

    Time goes in waves of `programs` at once, each as long as a program; of equal times the longest walk is taken, as
    it stores the fewest partial results. The 1/8 stands for what a program costs besides its tiles.
    """

    def time(walk: int) -> float:
        return triton.cdiv(blocks * triton.cdiv(tiles, walk), programs) * (walk + 1 / 8)

    best = min(range(min(most, tiles), 0, -1), key=time)
    return triton.cdiv(tiles, triton.cdiv(tiles, best))  # the same number of groups, of even length
