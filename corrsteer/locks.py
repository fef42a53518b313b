"""Locks on the bytes of a file, that a process loses when it ends, however it does (POSIX record locks).

They hold among processes of a machine, and of several machines where the file system has locks that all see, as NFSv4
has. A process is not kept out by its own, and loses all that it has on a file when it closes it.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from corrsteer.errors import CorrSteerError

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None

HELD = (errno.EACCES, errno.EAGAIN)


class NoLocks(CorrSteerError):
    """The file system has no locks, or the operating system has others."""


class ByteLocks:
    """Locks on the bytes of one file, which is made where it is not there.

    Raises
    ------
    OSError : where it cannot be opened.
    """

    def __init__(self, path: Path):
        self._path = path
        self._descriptor: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def take(self, byte: int, *, shared: bool = False) -> bool:
        """Lock a byte, unless another process has it: alone, or together with others that share it.

        Raises
        ------
        NoLocks : where there are none here.
        """
        if fcntl is None:
            raise NoLocks(f"{self._path} cannot be locked, as this operating system has no record locks")
        assert self._descriptor is not None, "it is open"
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.lockf(self._descriptor, kind | fcntl.LOCK_NB, 1, byte)
        except OSError as error:
            if error.errno in HELD:
                return False
            raise NoLocks(
                f"{self._path} cannot be locked ({error}); take a directory of a file system that has locks"
            ) from None
        return True

    def release(self, byte: int) -> None:
        """Give a byte back."""
        if fcntl is not None and self._descriptor is not None:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, byte)

    @property
    def current(self) -> bool:
        """Whether the file is still the one at its path, and was not removed meanwhile."""
        assert self._descriptor is not None, "it is open"
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self._path))
        except OSError:
            return False

    def close(self) -> None:
        """Give all back."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
