"""Launch configurations: frozen in `configs/`, one JSON file a GPU or architecture.

Nothing is tuned at run time: tuning inside CUDA-graph capture breaks the capture, and would make results depend on
the machine's load. The file named after the GPU is used if there is one (`python -m bench.tune` writes it), else the
one of its architecture, else that of the architecture most like it, which is logged.
"""

import functools
import json
import logging
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

log = logging.getLogger(__name__)
CONFIGS = Path(__file__).parent / "configs"
INTERPRETER = "interpreter"
# Architectures, by compute capability, whose tensor cores and shared memory the shipped files are for. 12.x has
# neither the tensor memory of 10.x nor its shared memory, and is launched like 8.x.
NEAREST = {8: "sm_80", 9: "sm_90", 10: "sm_100", 11: "sm_100"}
REPAIR = "write it again with python -m bench.tune, or install the package again"
MATMUL = ("BF", "BT", "BK", "SUBTILE", "GROUP_SIZE", "descriptors", "num_warps", "num_stages")
KEYS = {"encode": MATMUL, "encode_pool": (*MATMUL, "WIDE_SUBTILE", "max_tiles_per_chunk")}  # of each entry
# An entry of encode_pool may also say `"flatten": 1` (FLATTEN of its kernel); without BF16_SPLITS, see bench/NOTES.md.
# Where the product is made: in the kernel, or by the vendor's library a panel at a time (see panels.py), of which an
# entry then says the size. Kinds whose operands are 16-bit have panels; float32 ones would need more products.
WAYS = {"fused": (), "panels": ("panel_features", "panel_tokens")}
PANEL_KINDS = {"encode_pool": ("native", "bf16x2")}


class LaunchError(Exception):
    """A file of launch configurations lacks something; the message says what."""


@functools.cache
def read(name: str) -> dict[str, Any]:
    """The file of a GPU, such as `NVIDIA_H200`, or of an architecture, such as `sm_90`."""
    path = CONFIGS / f"{name}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LaunchError(f"{path} cannot be read ({error}); {REPAIR}") from None


@functools.cache
def file_for(device: torch.device) -> str:
    """The name of the file whose configurations a device uses."""
    if device.type != "cuda":
        return INTERPRETER
    gpu = torch.cuda.get_device_name(device).replace(" ", "_")
    if (CONFIGS / f"{gpu}.json").is_file():
        return gpu
    major, minor = torch.cuda.get_device_capability(device)
    nearest = NEAREST.get(major, "sm_80")
    if nearest != f"sm_{major}{minor}":
        log.warning("no launch configurations for sm_%d%d (%s): those of %s are used", major, minor, gpu, nearest)
    return nearest


def config(
    device: torch.device, kernel: str, kind: str, tokens: int, variants: tuple[str, ...] = (), panels: bool = False
) -> dict[str, Any]:
    """What to launch a kernel with: of `entries`, the first whose `up_to_tokens` is not below `tokens`; of those that
    go by the fused way, where a call cannot go by `panels`."""
    ways = WAYS if panels else ("fused",)
    return next(
        entry
        for entry in entries(device, kernel, kind, variants)
        if tokens <= entry.get("up_to_tokens", tokens) and entry.get("way", "fused") in ways
    )


@functools.cache  # not by tokens, of which there are as many counts as batches
def entries(device: torch.device, kernel: str, kind: str, variants: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """The configurations of a kernel, for more and more tokens.

    Of `kernel_variant` for each variant that applies, and then `kernel`, the first that the file has for this `kind`
    of product.
    """
    path = CONFIGS / f"{file_for(device)}.json"
    file = read(path.stem)
    names = (*(f"{kernel}_{v}" for v in variants), kernel)
    name = next((n for n in names if kind in file.get(n, ())), None)
    if name is None:
        raise LaunchError(f"{path} has no {' nor '.join(names)} for products of kind {kind!r}; {REPAIR}")
    for entry in file[name][kind]:
        way = entry.get("way", "fused")
        if way not in (WAYS if kind in PANEL_KINDS.get(kernel, ()) else ("fused",)):
            raise LaunchError(f"{path} has no way {way!r} in {name} for products of kind {kind!r}; {REPAIR}")
        if missing := [key for key in (*KEYS[kernel], *WAYS[way]) if key not in entry]:
            raise LaunchError(f"{path} lacks {', '.join(missing)} in {name} for products of kind {kind!r}; {REPAIR}")
    last = file[name][kind][-1] if file[name][kind] else {"up_to_tokens": 0}
    if "up_to_tokens" in last or last.get("way", "fused") != "fused":  # not every call can go by panels
        raise LaunchError(
            f"{path} has no {name} for any number of tokens, of kind {kind!r} and way 'fused', at the end; {REPAIR}"
        )
    return file[name][kind]


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.lru_cache(maxsize=1024)
def tiles_per_chunk(tiles: int, blocks: int, most: int, programs: int) -> int:
    """How many token tiles one program goes through, at most `most`.

    Time goes in waves of `programs` at once, each as long as a program; of equal times the longest chunk is taken, as
    it stores the fewest partial results. The 1/8 stands for what a program costs besides its tiles.
    """

    def time(chunk: int) -> float:
        return triton.cdiv(blocks * triton.cdiv(tiles, chunk), programs) * (chunk + 1 / 8)

    best = min(range(min(most, tiles), 0, -1), key=time)
    return triton.cdiv(tiles, triton.cdiv(tiles, best))  # the same number of chunks, of even length


def readable(values: Tensor) -> Tensor:
    """The same numbers in a dtype that Triton and its interpreter both read rightly."""
    return values.to({torch.bool: torch.uint8, torch.bfloat16: torch.float32}.get(values.dtype, values.dtype))
