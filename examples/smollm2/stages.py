"""Stages whose results are kept, so that a run that was stopped goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corrsteer.files import write_utf8


def stage(folder: Path, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` finds, kept in `folder/name.json` with the seconds that it took.

    `cpu_seconds` are what this process computed: beside other processes they are steadier than `seconds` by the clock.
    A stage that was stopped in its midst and goes on has the seconds of its last part.
    """
    path = folder / f"{name}.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        started, computed = time.perf_counter(), time.process_time()
        found = make()
        took = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - computed}
        write_utf8(path, json.dumps({**found, **{name: round(value, 2) for name, value in took.items()}}) + "\n")
    return json.loads(path.read_text(encoding="utf-8"))
