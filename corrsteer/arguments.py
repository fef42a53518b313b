"""Arguments: what is not of the type, or not the number, that it must be is refused by name, before it is used.

NumPy's and torch's scalars become Python's numbers, which JSON can hold. A bool is no number, and NaN never is one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

from corrsteer.errors import CorrSteerError

LARGEST_SEED = 2**32 - 1  # what every generator of random numbers takes


def check_type(name: str, value: object, kind: type, what: str, fix: str = "") -> None:
    """Raise unless an argument is of a type, `what` in words."""
    if not isinstance(value, kind):
        raise CorrSteerError(f"{name} must be {what}, got {shown(value)}{fix and '; ' + fix}")


def whole(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """The value as an int, which `least` and `most` bound; 3.0 is whole, 2.5 and True are not."""
    number = _real(value)
    if isinstance(number, Integral):
        found: int | None = int(number)
    else:
        found = int(number) if number is not None and math.isfinite(number) and number == int(number) else None
    if found is None or (least is not None and found < least) or (most is not None and found > most):
        raise CorrSteerError(f"{name} must be a whole number{_bounds(least, most)}, got {shown(value)}")
    return found


def number(name: str, value: Any, least: float | None = None, most: float | None = None) -> float:
    """The value as a finite float, which `least` and `most` bound."""
    found = _finite(value)
    if found is None or (least is not None and found < least) or (most is not None and found > most):
        raise CorrSteerError(f"{name} must be a finite number{_bounds(least, most)}, got {shown(value)}")
    return found


def share(name: str, value: Any) -> float:
    """The value as a float between 0 and 1, both left out."""
    found = _finite(value)
    if found is None or not 0 < found < 1:
        raise CorrSteerError(f"{name} must be between 0 and 1, got {shown(value)}")
    return found


def wholes(name: str, values: Iterable[Any], least: int | None = None) -> list[int]:
    """Several whole numbers, as a list."""
    return [whole(f"each of {name}", value, least) for value in several(name, values)]


def several(name: str, values: Iterable[Any]) -> list[Any]:
    """Anything that holds one number or more, as a list."""
    try:
        listed = list(values)
    except TypeError:
        raise CorrSteerError(f"{name} must be a list, such as [{shown(values)}], got {shown(values)}") from None
    if not listed:
        raise CorrSteerError(f"{name} must hold at least one number, got none")
    return listed


def _real(value: Any) -> Any:
    """The Python number that a value is, or None."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # of NumPy or torch
        value = value.item()
    return value if isinstance(value, Real) and not isinstance(value, bool) else None


def _finite(value: Any) -> float | None:
    number = _real(value)
    try:
        return float(number) if number is not None and math.isfinite(number) else None
    except OverflowError:  # an int beyond the floats
        return None


def _bounds(least: float | None, most: float | None) -> str:
    if least is not None and most is not None:
        return f" from {least} to {most}"
    return f" of at least {least}" if least is not None else f" of at most {most}" if most is not None else ""


def shown(value: Any) -> str:
    """What an argument was: numbers, strings and None themselves, of anything else the type."""
    number = _real(value)
    if number is not None:
        return f"{number!r:.80}"
    return f"{value!r:.80}" if value is None or isinstance(value, (bool, str)) else type(value).__name__
