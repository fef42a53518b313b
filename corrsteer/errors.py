"""The errors a user can cause. Each says which argument, what it was, what it must be, what to do."""

from __future__ import annotations

import operator
from typing import SupportsIndex


class CorrSteerError(ValueError):
    """A mistake in what corrsteer was given; the message is one clear line."""


class BackendUnavailable(CorrSteerError):
    """A backend asked for by name cannot run here; the message gives the reason and the fix."""


def check_type(name: str, value: object, kind: type, what: str, fix: str = "") -> None:
    """Raise unless an argument is of a type, `what` in words."""
    if not isinstance(value, kind):
        raise CorrSteerError(f"{name} must be {what}, got {shown(value)}{fix and '; ' + fix}")


def whole(name: str, value: SupportsIndex, least: int) -> int:
    """A number as an int; raises unless it is a whole one and at least `least`."""
    try:
        number = operator.index(value)
    except (TypeError, RuntimeError, ValueError):  # RuntimeError and ValueError by tensors and arrays
        number = least - 1
    if number < least:
        raise CorrSteerError(f"{name} must be a whole number of at least {least}, got {shown(value)}")
    return number


def shown(value: object) -> str:
    """What an argument was: numbers, strings and None themselves, of anything else the type."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    return type(value).__name__
