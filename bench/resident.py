"""How much memory a call takes on a CPU: the pages that become resident while it runs, as Linux counts them."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak(call: Callable[[], object]) -> int | None:
    """Bytes by which the process grows during a call, at most; None where the system does not tell.

    Memory that was freed before is given back to the system first, so that using it again counts.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
        CLEAR.write_text("5", encoding="utf-8")  # the high-water mark starts anew
    except (OSError, AttributeError):
        call()
        return None
    before = now()
    call()
    return max(0, _bytes("VmHWM") - before)


def now() -> int:
    """Bytes that are resident."""
    return _bytes("VmRSS")


def _bytes(name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text(encoding="utf-8"))[1])
