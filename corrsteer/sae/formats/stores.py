"""Files of tensors, read by name and row by row. None is unpickled: a file that would run code is refused."""

from __future__ import annotations

import contextlib
import pickle
import zipfile
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from corrsteer.errors import CorrSteerError

_without_values: ContextVar[bool] = ContextVar("without_values", default=False)
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # of encoders


@contextlib.contextmanager
def without_values(wanted: bool = True) -> Iterator[None]:
    """Have tensors read as the meta device has them: of files no more is read than what shapes they hold."""
    token = _without_values.set(wanted)
    try:
        yield
    finally:
        _without_values.reset(token)


class Store(Protocol):
    """A file of tensors."""

    path: Path

    def names(self) -> set[str]:
        """What it holds."""
        ...

    def read(self, name: str) -> Tensor:
        """One of its tensors, on the CPU and in the file's own dtype."""
        ...

    def rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """Some rows of a matrix, `[len(rows), columns]`, reading little else."""
        ...

    def columns(self, name: str, columns: Sequence[int]) -> Tensor:
        """Some columns of a matrix, each as a row: `[len(columns), rows]`."""
        ...


class Safetensors:
    """A safetensors file."""

    def __init__(self, path: Path):
        self.path: Path = path

    def names(self) -> set[str]:
        with self._open() as file:
            return set(file.keys())

    def read(self, name: str) -> Tensor:
        with self._open() as file:
            if _without_values.get():
                part = file.get_slice(name)
                return torch.empty(part.get_shape(), dtype=DTYPES.get(part.get_dtype(), torch.float32), device="meta")
            return file.get_tensor(name)

    def rows(self, name: str, rows: Sequence[int]) -> Tensor:
        with self._open() as file, torch.device("cpu"):  # slices come on the default device, whatever that is
            matrix = file.get_slice(name)
            return torch.cat([matrix[:0], *(matrix[row : row + 1] for row in rows)])

    def columns(self, name: str, columns: Sequence[int]) -> Tensor:
        with self._open() as file, torch.device("cpu"):
            matrix = file.get_slice(name)
            return torch.cat([matrix[:, :0], *(matrix[:, column : column + 1] for column in columns)], dim=1).T

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        _check_file(self.path)
        try:
            with safe_open(str(self.path), framework="pt") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise _damaged(self.path, error) from None


class Npz:
    """NumPy's archive of arrays. One that holds objects is refused."""

    def __init__(self, path: Path):
        self.path: Path = path

    def names(self) -> set[str]:
        with self._open() as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}

    def read(self, name: str) -> Tensor:
        with self._open() as archive, archive.open(f"{name}.npy") as member:
            if _without_values.get():
                shape, _, dtype = _header(member)
                return torch.empty(shape, dtype=torch.from_numpy(np.empty(0, dtype)).dtype, device="meta")
            return torch.from_numpy(np.lib.format.read_array(member, allow_pickle=False))

    def rows(self, name: str, rows: Sequence[int]) -> Tensor:
        with self._open() as archive, archive.open(f"{name}.npy") as member:
            shape, by_column, dtype = _header(member)
            if by_column or dtype.hasobject:
                return self.read(name)[list(rows)]
            start, length = member.tell(), shape[1] * dtype.itemsize
            found = np.empty((len(rows), shape[1]), dtype)
            for at in sorted(range(len(rows)), key=rows.__getitem__):  # forwards, as going back reads from the start
                member.seek(start + rows[at] * length)
                found[at] = np.frombuffer(member.read(length), dtype)
            return torch.from_numpy(found)

    def columns(self, name: str, columns: Sequence[int]) -> Tensor:
        return self.read(name)[:, list(columns)].T

    @contextlib.contextmanager
    def _open(self) -> Iterator[zipfile.ZipFile]:
        _check_file(self.path)
        try:
            with zipfile.ZipFile(self.path) as archive:
                yield archive
        except (zipfile.BadZipFile, ValueError, EOFError, OSError) as error:  # NumPy's of arrays are ValueErrors
            raise _damaged(self.path, error) from None


class TorchFile:
    """What `torch.save` wrote, a mapping of names to tensors; read with `weights_only`."""

    def __init__(self, path: Path):
        self.path: Path = path

    def names(self) -> set[str]:
        return set(self._load())

    def read(self, name: str) -> Tensor:
        found = self._load()[name]
        return found.to("meta") if _without_values.get() else found

    def rows(self, name: str, rows: Sequence[int]) -> Tensor:
        return self._load()[name][list(rows)]

    def columns(self, name: str, columns: Sequence[int]) -> Tensor:
        return self._load()[name][:, list(columns)].T

    def _load(self) -> dict[str, Tensor]:
        _check_file(self.path)
        found = load_torch(self.path)
        if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
            raise CorrSteerError(f"{self.path} must hold a mapping of names to tensors; save the state dict alone")
        return found


def load_torch(path: Path) -> Any:
    """What `torch.save` wrote, as far as that is tensors in mappings and lists.

    Raises
    ------
    CorrSteerError : for a file that is damaged, or holds more.
    """
    mapped = zipfile.is_zipfile(path)  # what torch has written since 1.6 is read only where it is looked at
    try:
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError:
        raise CorrSteerError(
            f"{path} holds more than tensors, which only unpickling reads, and that can run any code; load it where "
            f"you trust it, and save its state dict alone"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise _damaged(path, error) from None


def _header(member: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether columns come one after the other, and dtype of the array that a file begins with."""
    reads = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(member)
    if version not in reads:
        raise ValueError(f"its format is version {version}")
    return reads[version](member)


def _check_file(path: Path) -> None:
    if not path.parent.exists():
        raise CorrSteerError(f"there is no SAE directory at {path.parent}; was it moved?")
    if not path.is_file():
        raise CorrSteerError(f"{path.parent} is not an SAE directory: it has no {path.name}")


def _damaged(path: Path, error: Exception) -> CorrSteerError:
    return CorrSteerError(f"{path} is damaged ({' '.join(str(error).split())}); fetch or save it again")
