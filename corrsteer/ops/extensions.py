"""The compiled extensions, where there are any."""

from __future__ import annotations

import importlib
from typing import Any


def load(name: str) -> tuple[Any, str]:
    """`corrsteer._native` or `corrsteer._cuda`; or None, and what the import said."""
    try:
        return importlib.import_module(f"corrsteer.{name}"), ""
    except ImportError as error:
        return None, str(error)
