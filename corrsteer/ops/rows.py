"""Rows of pooled activations without their zeros, and the same by feature.

Most features are active in few samples, so most of a sample's pooled activations are 0. `SparseRows` are what is
stored, a row a sample. `SparseColumns` are what statistics are computed from, a column a feature.

A feature's number takes two bytes where `d_sae` is at most 65 536, and four elsewhere, so that an activation takes six
or eight. torch does little with uint16, but stores, copies and widens it, which is all that rows need.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from corrsteer.arguments import whole, wholes
from corrsteer.errors import CorrSteerError
from corrsteer.ops import native_backend, registry
from corrsteer.ops.calls import Call
from corrsteer.tensors import check_holds, check_tensor
from corrsteer.types import Device

NARROW = 1 << 16  # features that two bytes can tell apart
SAMPLES_AT_A_TIME = 1024  # that are made dense where there is no kernel for sparse ones


@dataclass(frozen=True, eq=False)
class SparseRows:
    """Pooled activations `[N, d_sae]`, a row a sample, without those that are 0; NaN and infinities are kept.

    Attributes
    ----------
    values : `[nnz]` float32.
    features : `[nnz]` uint16, or int32 where `d_sae` is above 65 536, which feature each value is of; they rise in a
        row.
    offsets : `[N + 1]` int64, where each row begins, and the last one ends.
    d_sae : number of features.
    """

    values: Tensor
    features: Tensor
    offsets: Tensor
    d_sae: int

    def __post_init__(self) -> None:
        for name in ("values", "features", "offsets"):
            check_tensor(name, getattr(self, name))
        d_sae, nnz = whole("d_sae", self.d_sae, 1), self.values.numel()
        wanted = {
            "values": ((nnz,), torch.float32),
            "features": ((nnz,), feature_dtype(d_sae)),
            "offsets": ((max(self.offsets.numel(), 1),), torch.int64),
        }
        for name, (shape, dtype) in wanted.items():
            found: Tensor = getattr(self, name)
            if found.shape != shape or found.dtype != dtype:
                raise CorrSteerError(
                    f"{name} must be {list(shape)} {dtype} for d_sae={d_sae}, got {list(found.shape)} {found.dtype}"
                )

    def __getstate__(self) -> dict[str, Any]:
        narrow = self.features.dtype == torch.uint16  # which torch pickles, and cannot read again
        return self.__dict__ | ({"features": self.features.view(torch.int16)} if narrow else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        features: Tensor = state["features"]
        self.__dict__.update(state | {"features": features.view(feature_dtype(state["d_sae"]))})

    @classmethod
    def from_dense(cls, pooled: Tensor, *, backend: str | None = None) -> SparseRows:
        """Those of `pooled: [N, d_sae]`, float32, float16 or bfloat16; -0 counts as 0.

        Parameters
        ----------
        backend : a backend's name; by default the fastest that can.
        """
        check_holds("pooled", pooled)
        if pooled.dim() != 2 or pooled.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise CorrSteerError(
                f"pooled must be [N, d_sae] float32, float16 or bfloat16, got {list(pooled.shape)} {pooled.dtype}"
            )
        d_sae = whole("d_sae, the width of pooled,", pooled.shape[1], 1)
        if _native(pooled, backend):
            return cls(*native_backend.nonzeros(pooled, feature_dtype(d_sae)), d_sae)
        at = pooled.nonzero()
        counts = torch.bincount(at[:, 0], minlength=len(pooled))
        values = pooled[at[:, 0], at[:, 1]].float()
        return cls(values, at[:, 1].to(torch.int32).to(feature_dtype(d_sae)), _offsets(counts), d_sae)

    @property
    def n(self) -> int:
        """N, the number of samples."""
        return len(self.offsets) - 1

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.features.nbytes + self.offsets.nbytes

    @property
    def device(self) -> torch.device:
        return self.values.device

    def __len__(self) -> int:
        return self.n

    def dense(
        self,
        rows: slice | Sequence[int] | Tensor = slice(None),
        features: slice | Sequence[int] | Tensor = slice(None),
        *,
        out: Tensor | None = None,
        device: Device | None = None,
    ) -> Tensor:
        """`[rows, features]` float32 of some samples and features, zeros included.

        Parameters
        ----------
        out : float32 of that shape, written to and returned; by default a new tensor.
        device : of a new tensor; by default that of the rows.
        """
        chosen, width = self.rows(rows), self.d_sae
        wanted = None
        if not isinstance(features, slice) or features != slice(None):
            wanted = _index(features, self.d_sae, "features", self.device)
            width = len(wanted)
            if len(wanted.unique()) < width:
                raise CorrSteerError("features must name each feature once, got some more than once")
        if out is None:
            out = torch.empty(chosen.n, width, dtype=torch.float32, device=device or self.device)
        elif out.shape != (chosen.n, width) or out.dtype != torch.float32:
            raise CorrSteerError(f"out must be [{chosen.n}, {width}] float32, got {list(out.shape)} {out.dtype}")
        if wanted is None and out.is_contiguous() and out.device.type == self.device.type == "cpu":
            chosen.to_scipy().toarray(out=out.numpy())  # a third of what torch takes for it
            return out
        sample = torch.arange(chosen.n, dtype=torch.int64, device=self.device).repeat_interleave(chosen.offsets.diff())
        feature, values = chosen.features.to(torch.int64), chosen.values
        if wanted is not None:
            place = torch.full((self.d_sae,), -1, dtype=torch.int64, device=self.device)
            place[wanted] = torch.arange(width, dtype=torch.int64, device=self.device)
            kept = place[feature] >= 0
            sample, feature, values = sample[kept], place[feature[kept]], values[kept]
        out.zero_()
        out[sample.to(out.device), feature.to(out.device)] = values.to(out.device)
        return out

    def to_scipy(self) -> sparse.csr_array:
        """The same as SciPy has it, of rows on the CPU; values and offsets are shared."""
        features = self.features.numpy().astype(np.int32)
        return sparse.csr_array((self.values.numpy(), features, self.offsets.numpy()), shape=(self.n, self.d_sae))

    def rows(self, index: slice | Sequence[int] | Tensor) -> SparseRows:
        """Some samples, in the order of `index`; of a slice without steps, nothing is copied but the offsets."""
        if isinstance(index, slice) and index.step in (None, 1):
            first, last, _ = index.indices(self.n)
            offsets = self.offsets[first : max(first, last) + 1]
            here = slice(int(offsets[0]), int(offsets[-1]))
            return SparseRows(self.values[here], self.features[here], offsets - offsets[0], self.d_sae)
        wanted = _index(index, self.n, "rows", self.device)
        at, offsets = _ranges(self.offsets, wanted)
        return SparseRows(self.values[at], self.features[at], offsets, self.d_sae)

    def to(self, device: Device) -> SparseRows:
        """The same on another device."""
        return SparseRows(self.values.to(device), self.features.to(device), self.offsets.to(device), self.d_sae)

    def tensors(self) -> dict[str, Tensor]:
        """What a safetensors file holds of them; `from_tensors` makes rows of it."""
        return {"values": self.values, "features": self.features, "offsets": self.offsets}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], d_sae: int) -> SparseRows:
        """Rows of what `tensors` gave; raises where something is missing, or is not what it must be."""
        if missing := [name for name in ("values", "features", "offsets") if name not in tensors]:
            raise CorrSteerError(f"tensors must hold values, features and offsets, got no {', '.join(missing)}")
        rows = cls(tensors["values"], tensors["features"], tensors["offsets"], d_sae)
        offsets, nnz = rows.offsets, len(rows.values)
        if int(offsets[0]) or int(offsets[-1]) != nnz or bool((offsets.diff() < 0).any()):
            raise CorrSteerError(f"offsets must rise from 0 to the number of values, {nnz}; the file is damaged")
        if nnz:
            least, most = rows.features.to(torch.int32).aminmax()
            if least < 0 or most >= d_sae:
                raise CorrSteerError(
                    f"features must lie in 0..{d_sae - 1}, got {int(least)} to {int(most)}; the file is damaged"
                )
        return rows


def concatenate(parts: Sequence[SparseRows]) -> SparseRows:
    """Rows of several, one after the other; all of the same features, and on one device."""
    if not parts:
        raise CorrSteerError("parts must hold at least one SparseRows, got none")
    widths = sorted({part.d_sae for part in parts})
    if len(widths) > 1:
        raise CorrSteerError(f"parts must be of the same features, got d_sae of {', '.join(map(str, widths))}")
    counts = torch.cat([part.offsets.diff() for part in parts])
    values, features = torch.cat([part.values for part in parts]), torch.cat([part.features for part in parts])
    return SparseRows(values, features, _offsets(counts), parts[0].d_sae)


@dataclass(frozen=True, eq=False)
class SparseColumns:
    """Pooled activations `[N, d_sae]`, a column a feature, without those that are 0.

    Attributes
    ----------
    values : `[nnz]` float32.
    samples : `[nnz]` int32, which sample each value is of; they rise in a column.
    offsets : `[d_sae + 1]` int64, where each column begins, and the last one ends.
    n : N, the number of samples.
    """

    values: Tensor
    samples: Tensor
    offsets: Tensor
    n: int

    @classmethod
    def from_rows(cls, parts: Iterable[SparseRows], d_sae: int) -> SparseColumns:
        """Columns of rows on the CPU, whose samples follow each other; of one part after the other, to save memory."""
        parts = list(parts)
        counts = np.zeros(d_sae, dtype=np.int64)
        for part in parts:
            if part.d_sae != d_sae:
                raise CorrSteerError(f"rows must have d_sae={d_sae} features, got {part.d_sae}")
            counts += np.bincount(part.features.numpy(), minlength=d_sae)
        offsets = np.concatenate([np.zeros(1, dtype=np.int64), counts.cumsum()])
        values = np.empty(offsets[-1], dtype=np.float32)
        samples = np.empty(offsets[-1], dtype=np.int32)
        following, n = offsets[:-1].copy(), 0  # where each column goes on
        for part in parts:
            of_part = part.to_scipy().tocsc()
            lengths = np.diff(of_part.indptr)
            at = np.repeat(following - of_part.indptr[:-1], lengths) + np.arange(len(of_part.data))
            values[at], samples[at] = of_part.data, of_part.indices + n
            following += lengths
            n += part.n
        return cls(torch.from_numpy(values), torch.from_numpy(samples), torch.from_numpy(offsets), n)

    @property
    def d_sae(self) -> int:
        return len(self.offsets) - 1

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.samples.nbytes + self.offsets.nbytes

    def take(self, features: Tensor) -> SparseColumns:
        """Some columns, `features: [F]` int64, in that order."""
        at, offsets = _ranges(self.offsets, features)
        return SparseColumns(self.values[at], self.samples[at], offsets, self.n)

    def to(self, device: Device) -> SparseColumns:
        """The same on another device."""
        return SparseColumns(self.values.to(device), self.samples.to(device), self.offsets.to(device), self.n)

    def owners(self) -> Tensor:
        """`[nnz]` int64, which column each value is in."""
        columns = torch.arange(self.d_sae, dtype=torch.int64, device=self.offsets.device)
        return columns.repeat_interleave(self.offsets.diff())

    def dense(self, samples: slice = slice(None)) -> Tensor:
        """`[samples, d_sae]` float32 of samples that follow each other, zeros included."""
        first, last, _ = samples.indices(self.n)
        here = (self.samples >= first) & (self.samples < last)
        out = torch.zeros(max(0, last - first), self.d_sae, dtype=torch.float32, device=self.values.device)
        out[self.samples[here].to(torch.int64) - first, self.owners()[here]] = self.values[here]
        return out


@torch.no_grad()
def update_sparse_sums(
    columns: SparseColumns,
    features: Tensor,
    weights: Tensor,
    sums: Tensor,
    *,
    first: int = 0,
    power: int = 1,
    backend: str | None = None,
) -> None:
    """Add weighted power sums of some features to `sums`, in place: `update_sums` of what is stored.

        sums[f, c] <- sums[f, c] + Σ_n weights[n, c] · z[first + n, features[f]]^power

    Parameters
    ----------
    columns : z, on the CPU.
    features : `[F]` int64 on the CPU.
    weights : `[n, C]` float64, finite, of samples from `first` on; they say the device of the computation.
    sums : `[F, C]` float64 on the same device, changed in place.
    backend : a backend's name; by default the fastest that can.
    """
    C, n = weights.shape[1], len(weights)
    if weights.dtype != torch.float64 or sums.dtype != torch.float64 or sums.shape != (len(features), C):
        raise CorrSteerError(
            f"weights must be [n, C] and sums [F={len(features)}, C] float64, got {list(weights.shape)} "
            f"{weights.dtype} and {list(sums.shape)} {sums.dtype}"
        )
    if first < 0 or first + n > columns.n:
        raise CorrSteerError(f"first must leave {n} samples of {columns.n}, got {first}")
    if _native(weights, backend):
        native_backend.update_sparse_sums(columns, features, weights, sums, first, power)
        return
    chosen = columns.take(features).to(weights.device)
    for at in range(0, n, SAMPLES_AT_A_TIME):
        some = weights[at : at + SAMPLES_AT_A_TIME]
        dense = chosen.dense(slice(first + at, first + at + len(some))).double()
        sums += dense.pow(power).T @ some


def feature_dtype(d_sae: int) -> torch.dtype:
    """What a feature's number is stored as."""
    return torch.uint16 if d_sae <= NARROW else torch.int32


def _native(on: Tensor, backend: str | None) -> bool:
    """Whether the native backend is the one that adds up activations here. Others have their definition in torch."""
    call = Call("update_sums", on.device, torch.float32)
    return registry.choose(call, backend).name == "native"


def _offsets(counts: Tensor) -> Tensor:
    zero = torch.zeros(1, dtype=torch.int64, device=counts.device)
    return torch.cat([zero, counts.to(torch.int64).cumsum(0)])


def _ranges(offsets: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Where the values of some rows lie, `[nnz]` int64, and these rows' own offsets."""
    lengths = offsets.diff()[wanted]
    own = _offsets(lengths)
    begins = (offsets[wanted] - own[:-1]).repeat_interleave(lengths)
    return begins + torch.arange(len(begins), dtype=torch.int64, device=offsets.device), own


def _index(index: slice | Sequence[int] | Tensor, n: int, name: str, device: torch.device) -> Tensor:
    """`[any]` int64 of an index into n things."""
    if isinstance(index, slice):
        return torch.arange(*index.indices(n), dtype=torch.int64, device=device)
    if not isinstance(index, Tensor):
        index = torch.tensor(wholes(name, index, empty=True), dtype=torch.int64, device=device)
    found = index.to(device)
    if found.dtype == torch.bool and found.shape == (n,):
        return found.nonzero()[:, 0]
    found = found.to(torch.int64)
    if found.dim() != 1 or bool(((found < 0) | (found >= n)).any()):
        raise CorrSteerError(f"{name} must be a slice, or numbers in 0..{n - 1}, got {found.tolist()[:8]}")
    return found
