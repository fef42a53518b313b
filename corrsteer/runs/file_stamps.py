"""Whether a file that a run is read from is still the one that it was, as another run may have taken its name."""

from __future__ import annotations

from pathlib import Path

from corrsteer.errors import CorrSteerError

Stamp = tuple[int, int]  # bytes, and when it was written; links and copies of a file system's own keep both


def stamp_of(path: Path) -> Stamp:
    """What tells a file from one that takes its name later.

    Raises
    ------
    FileNotFoundError : where there is none.
    """
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def check_stamp(path: Path, stamp: Stamp) -> None:
    """Raise CorrSteerError unless a file is the one that it was."""
    try:
        if stamp_of(path) == stamp:
            return
    except OSError:
        pass
    raise CorrSteerError(
        f"{path} is not what it was, as another run was saved there since this one was made or loaded; load it again"
    )
