"""Files that are written whole or not at all, and values as JSON can hold them."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import math
import os
import secrets
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corrsteer.errors import CorrSteerError

if TYPE_CHECKING:
    from torch import Tensor

# What systems say that cannot sync a folder, or let nobody open one.
NO_SYNC = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EACCES, errno.EPERM, errno.EBADF)
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)  # what file systems say that have none


def write_utf8(path: str | os.PathLike[str], text: str, *, once: bool = False) -> None:
    """Write a UTF-8 file, see `write_whole`."""
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"), once=once)


def write_tensors(path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, see `write_whole`."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file  # which imports torch, and the command line does without

    def write(part: Path) -> None:
        try:
            save_file(tensors, str(part), metadata=metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error

    write_whole(path, write)


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], object], *, once: bool = False) -> None:
    """Have `write` make a file beside `path`, and put it there in one step once all of it is on the disk.

    Whatever happens, `path` holds what it held before or all of the new. Of a symbolic link the file is replaced that
    it leads to.

    Parameters
    ----------
    once : a file that is there stays, as another process may have read it.

    Raises
    ------
    CorrSteerError : where it cannot be written.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise CorrSteerError(f"{path} cannot be written, as it is no file; give the path of one")
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        part.touch()
        like = os.stat(target if target.exists() else part).st_mode
        write(part)
        os.chmod(part, stat.S_IMODE(like))  # safetensors' own files are nobody else's to read
        _sync(part)
        (_put_once if once else os.replace)(part, target)
    except OSError as error:
        raise CorrSteerError(
            f"{path} cannot be written ({error}); give a path in a folder that exists, with room and the right to write"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    sync_folder(target.parent)


def _put_once(part: Path, target: Path) -> None:
    """Put a file there unless there is one, in one step also among machines that share a file system."""
    try:
        os.link(part, target)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if not target.exists():
            os.replace(part, target)


def remove_parts(path: Path) -> None:
    """Remove what writers of a file left that died before it was whole; nobody may be writing it now."""
    target = Path(os.path.realpath(path))
    for part in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
        part.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder reach the disk, where the file system can be asked to.

    Raises
    ------
    CorrSteerError : where the disk fails at it.
    """
    try:
        _sync(folder)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise CorrSteerError(
                f"what was written in {folder} may not last ({error}); see to the disk, and give the command again"
            ) from None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON of any value, see `plain`."""
    return json.dumps(plain(value), indent=indent, allow_nan=False)


def from_json(text: str | bytes) -> Any:
    """What JSON holds.

    Raises
    ------
    ValueError : for what is no JSON, and for values in values in values that are too deep to read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None


def plain(value: Any) -> Any:
    """A value in what JSON can hold: numbers and lists of NumPy's and torch's, text for what is none of these.

    NaN and infinite numbers, which JSON lacks, become text too.
    """
    try:
        return _plain(value)
    except RecursionError:
        raise CorrSteerError(f"a {type(value).__name__} that holds itself cannot be written as JSON") from None


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(part) for part in value), key=str)
    if hasattr(value, "tolist"):  # of NumPy or torch
        return _plain(value.tolist())
    return str(value)
