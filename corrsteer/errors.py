"""The errors a user can cause. Each says which argument, what it was, what it must be, what to do."""

from __future__ import annotations


class CorrSteerError(ValueError):
    """A mistake in what corrsteer was given; the message is one clear line."""


class BackendUnavailable(CorrSteerError):
    """A backend asked for by name cannot run here; the message gives the reason and the fix."""
