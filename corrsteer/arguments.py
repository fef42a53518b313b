"""Arguments: what is not of the type, or not the number, that it must be is refused by name, before it is used.

NumPy's and torch's scalars become Python's numbers, which JSON can hold. A bool is no number, and NaN never is one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

from corrsteer.errors import CorrSteerError

T = TypeVar("T")

LARGEST_SEED = 2**32 - 1  # what every generator of random numbers takes


def check_type(name: str, value: object, kind: type, what: str, fix: str = "") -> None:
    """Raise unless an argument is of a type, `what` in words."""
    if not isinstance(value, kind):
        raise CorrSteerError(f"{name} must be {what}, got {shown(value)}{fix and '; ' + fix}")


def as_path(name: str, value: Any) -> Path:
    """A path that was given as one or as text."""
    if not isinstance(value, (str, os.PathLike)):
        raise CorrSteerError(f"{name} must be a path, got {shown(value)}")
    return Path(value)


def whole(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """The value as an int, which `least` and `most` bound; 3.0 is whole, 2.5 and True are not."""
    real = _real(value)
    if isinstance(real, Integral):
        found: int | None = int(real)
    else:
        found = int(real) if real is not None and math.isfinite(real) and real == int(real) else None
    if found is None or (least is not None and found < least) or (most is not None and found > most):
        raise CorrSteerError(f"{name} must be a whole number{_bounds(least, most)}, got {_shown(value)}")
    return found


def number(name: str, value: Any, least: float | None = None, most: float | None = None) -> float:
    """The value as a finite float, which `least` and `most` bound."""
    found = _finite(value)
    if found is None or (least is not None and found < least) or (most is not None and found > most):
        raise CorrSteerError(f"{name} must be a finite number{_bounds(least, most)}, got {_shown(value)}")
    return found


def share(name: str, value: Any) -> float:
    """The value as a float between 0 and 1, both left out."""
    found = _finite(value)
    if found is None or not 0 < found < 1:
        raise CorrSteerError(f"{name} must be between 0 and 1, got {shown(value)}")
    return found


def wholes(name: str, values: Iterable[Any], least: int | None = None, *, empty: bool = False) -> list[int]:
    """Each value as an int, see `whole`; none at all only where that may be."""
    return _each(name, values, f"whole numbers{_bounds(least, None)}", empty, lambda value: whole(name, value, least))


def numbers(name: str, values: Iterable[Any], *, empty: bool = False) -> list[float]:
    """Each value as a finite float, see `number`; none at all only where that may be."""
    return _each(name, values, "finite numbers", empty, lambda value: number(name, value))


def _each(name: str, values: Iterable[Any], kind: str, empty: bool, take: Callable[[Any], T]) -> list[T]:
    try:
        listed = [take(value) for value in values]
    except (TypeError, CorrSteerError):
        alone = "" if _real(values) is None else f", such as [{_shown(values)}]"
        raise CorrSteerError(f"{name} must be a sequence of {kind}{alone}, got {_shown(values)}") from None
    if not listed and not empty:
        raise CorrSteerError(f"{name} must hold at least one number, got none")
    return listed


def _real(value: Any) -> Any:
    """The Python number that a value is, or None."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # of NumPy or torch
        value = value.item()
    return value if isinstance(value, Real) and not isinstance(value, bool) else None


def _finite(value: Any) -> float | None:
    real = _real(value)
    try:
        return float(real) if real is not None and math.isfinite(real) else None
    except OverflowError:  # an int beyond the floats
        return None


def _bounds(least: float | None, most: float | None) -> str:
    if least is not None and most is not None:
        return f" from {least} to {most}"
    return f" of at least {least}" if least is not None else f" of at most {most}" if most is not None else ""


def shown(value: Any) -> str:
    """What an argument was: numbers, strings and None themselves, of anything else the type."""
    if value is None or isinstance(value, (bool, str)) or _real(value) is not None:
        return _shown(value)
    return type(value).__name__


def _shown(value: Any) -> str:
    real = _real(value)
    return f"{' '.join(repr(value if real is None else real).split()):.80}"
