"""`Activations`: the pooled activations of a run's samples, kept as sparse rows, a file a block."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from corrsteer.errors import CorrSteerError
from corrsteer.files import from_json, to_json, write_tensors, write_whole
from corrsteer.ops import Moments
from corrsteer.ops.rows import SparseRows
from corrsteer.runs.file_stamps import Stamp, check_stamp, stamp_of
from corrsteer.stats import stored
from corrsteer.stats.evidence import Evidence
from corrsteer.types import Device

FORMAT = "corrsteer.activations/1"


@dataclass(eq=False)
class Block:
    """The samples of a block, whose labels are permuted among each other.

    Attributes
    ----------
    number : of the block.
    samples : which of the run's, in the order of the rows.
    rows : (layer, pooling) -> rows, in memory; or None where they are in a file.
    nbytes : bytes of all rows.
    path, stamp : the file, of which is mapped into memory what is asked for, as it was.
    """

    number: int
    samples: list[int]
    nbytes: int
    rows: Mapping[tuple[int, str], SparseRows] | None = None
    path: Path | None = None
    stamp: Stamp = (0, 0)

    @classmethod
    def of_rows(cls, number: int, samples: list[int], rows: Mapping[tuple[int, str], SparseRows]) -> Block:
        """A block in memory."""
        return cls(number, samples, sum(of_pool.nbytes for of_pool in rows.values()), rows)

    def of(self, layer: int, pool: str) -> SparseRows:
        """Rows of a layer and pooling.

        Raises
        ------
        CorrSteerError : for a file that is damaged, or not the one that it was.
        """
        if self.rows is not None:
            return self.rows[layer, pool]
        check_stamp(self._path, self.stamp)
        with _opened(self._path) as file:
            widths = from_json(file.metadata()["d_sae"])
            names = ("values", "features", "offsets")
            tensors = {name: file.get_tensor(f"{layer}.{pool}.{name}") for name in names}
            rows = SparseRows.from_tensors(tensors, widths[str(layer)])
            if rows.n != len(self.samples):
                raise ValueError(f"it has {rows.n} rows of {len(self.samples)} samples")
        return rows

    def moved(self, path: Path) -> None:
        """Read it from another file from now on, as every run does that shares it."""
        self.path, self.stamp = path, stamp_of(path)

    @property
    def _path(self) -> Path:
        assert self.path is not None, "rows are in memory or in a file"
        return self.path

    def written(self, path: Path) -> Block:
        """Write it to a file, and read it from there: a file that it is in already is linked to."""
        if self.rows is None:
            check_stamp(self._path, self.stamp)
            write_whole(path, lambda part: _link(self._path, part))
        else:
            tensors = {"samples": torch.tensor(self.samples, dtype=torch.int64, device="cpu")}
            for (layer, pool), rows in self.rows.items():
                tensors |= {f"{layer}.{pool}.{name}": part for name, part in rows.tensors().items()}
            widths = {layer: rows.d_sae for (layer, _), rows in self.rows.items()}
            described = {"format": FORMAT, "block": str(self.number), "d_sae": to_json(widths)}
            write_tensors(path, tensors, described | {"nbytes": str(self.nbytes)})
        return Block.read(path)

    @classmethod
    def read(cls, path: Path) -> Block:
        """The block of a file; its rows are read when they are asked for.

        Raises
        ------
        CorrSteerError : for a file that is damaged.
        FileNotFoundError : where there is none.
        """
        with _opened(path) as file:
            described = file.metadata() or {}
            if described.get("format") != FORMAT:
                raise ValueError(f"it holds no activations of this version ({FORMAT})")
            samples = file.get_tensor("samples").tolist()
            if not all(isinstance(sample, int) and sample >= 0 for sample in samples):
                raise ValueError("its samples are no numbers of samples")
            return cls(int(described["block"]), samples, int(described["nbytes"]), path=path, stamp=stamp_of(path))


@dataclass(eq=False)
class Activations:
    """Pooled activations of samples, in blocks, in the order in which these were collected.

    Attributes
    ----------
    permutations, bootstrap : how many are made of them, unless others are asked for.
    """

    blocks: list[Block] = field(default_factory=list)
    permutations: int = 0
    bootstrap: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(block.nbytes for block in self.blocks)

    def of(self, layer: int, pool: str, y: Tensor, groups: Sequence[int]) -> list[stored.Block]:
        """What statistics of a layer and pooling are made from.

        Parameters
        ----------
        y : `[n]` or `[n, R]` rewards of all samples by number; NaN leaves a sample out.
        groups : which prompt each is of; empty where each is of its own.
        """
        found = []
        for block in self.blocks:
            of_block, rows = y[block.samples], block.of(layer, pool)
            there = of_block.reshape(len(of_block), -1).isfinite().all(1).nonzero()[:, 0]
            if len(there) == 0:
                continue
            if len(there) < len(of_block):
                rows, of_block = rows.rows(there), of_block[there]
            prompts = [groups[block.samples[i]] for i in there.tolist()] if groups else None
            found.append(stored.Block(block.number, rows, of_block, prompts))
        return found

    def resampled(self, evidence: Evidence, layer: int, pool: str, y: Tensor, groups: Sequence[int]) -> Evidence:
        """Evidence of all samples' joint moments, with everything else that rows give."""
        blocks = self.of(layer, pool, y, groups)
        return stored.resampled(evidence, blocks, permutations=self.permutations, bootstrap=self.bootstrap)

    def statistics(
        self, layer: int, pool: str, d_sae: int, y: Tensor, groups: Sequence[int], *, seed: int, within: bool,
        device: Device,
    ) -> tuple[Moments, Evidence]:  # fmt: skip
        """Moments and evidence of a layer and pooling, of rewards `y [n, R]`."""
        return stored.statistics(
            self.of(layer, pool, y, groups), d_sae, y.shape[1], permutations=self.permutations,
            bootstrap=self.bootstrap, seed=seed, within=within, device=device,
        )  # fmt: skip

    def of_feature(self, layer: int, pool: str, feature: int) -> Iterator[tuple[int, float]]:
        """Each sample and a feature's pooled activation."""
        for block in self.blocks:
            features = torch.tensor([feature], dtype=torch.int64, device="cpu")
            yield from zip(block.samples, block.of(layer, pool).dense(features=features)[:, 0].tolist())


@contextlib.contextmanager
def _opened(path: Path) -> Any:
    """A safetensors file, which errors name that say how it is damaged."""
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            yield file
    except FileNotFoundError:
        raise
    except (SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CorrSteerError(f"{path} is damaged ({error}); collect again") from None


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
