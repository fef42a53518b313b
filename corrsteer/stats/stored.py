"""Statistics from stored rows of pooled activations, in bounded memory: `statistics` of blocks of rows and rewards.

`Evidence` keeps the joint moments alone then, and asks `StoredRows` for what is resampled, some features at a time, so
that any number of permutations can be had afterwards. They are those of streaming: what a permutation does to a sample
depends on the seed, its block's number and its place in it.

With every sample's activations at hand, ranks are exact. A feature's activations are replaced by their mid-ranks less
that of 0, which are 0 where the activations are. Ranks moved by a constant correlate as before, so Spearman's
correlation and the area under the ROC curve are sums of these as Pearson's is of activations, and cost as much.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from corrsteer import ops
from corrsteer.arguments import check_type, whole
from corrsteer.errors import CorrSteerError
from corrsteer.ops.moments import Moments
from corrsteer.ops.rows import SparseColumns, SparseRows, update_sparse_sums
from corrsteer.stats.evidence import Evidence
from corrsteer.stats.groups import Numbered, centred, numbered, squares_within
from corrsteer.stats.resampling import label_orders, permuted_labels, poisson_weights
from corrsteer.tensors import check_holds
from corrsteer.types import Device

PART_BYTES = 1 << 27  # of the weights of some blocks' samples, of which the last few are kept
RANKED_AT_A_TIME = 4096  # features
BINS = 32  # of a sign's activations, from the feature's largest down; what is smaller is in the lowest
MANTISSA, SUB = 23, 2  # bits of a float32, and those that count: 4 bins to an octave, each at most 25 % wide


class Block(NamedTuple):
    """A block of samples, which rewards are permuted within.

    Attributes
    ----------
    number : the block's number, which no other block has.
    rows : `[n, d_sae]` pooled activations, on the CPU; they may be memory-mapped.
    y : `[n]` or `[n, n_labels]` rewards, float64.
    groups : which prompt each sample is of, see `Evidence.update`; None where each is of its own.
    """

    number: int
    rows: SparseRows
    y: Tensor
    groups: Sequence[int] | Tensor | None = None

    @property
    def numbered(self) -> Numbered:
        """Groups as `groups.numbered` gives them."""
        return numbered(self.groups, len(self.y))[0]


def statistics(
    blocks: Iterable[Block | tuple[int, SparseRows, Tensor] | tuple[int, SparseRows, Tensor, Tensor | None]],
    d_sae: int,
    n_labels: int = 1,
    *,
    permutations: int = 0,
    bootstrap: int = 0,
    seed: int = 0,
    within: bool = False,
    device: Device = "cpu",
    backend: str | None = None,
) -> tuple[Moments, Evidence]:
    """Moments and evidence of stored rows: to the bit those of streaming the same blocks, for any score.

    Parameters
    ----------
    blocks : in the order in which streaming would take them.
    permutations, bootstrap, seed, within : as of `Evidence`.
    device : where sums are computed and kept. Rows stay on the CPU.
    backend : a backend's name; by default the fastest that can.

    Raises
    ------
    CorrSteerError : for blocks that are none, rows of other features, and whatever `Evidence.update` refuses.
    """
    blocks = [_checked(block, d_sae, n_labels) for block in blocks]
    moments = Moments(d_sae, n_labels, device)
    evidence = Evidence(d_sae, n_labels, seed=seed, within=within, device=device)
    for block in blocks:
        pooled = block.rows.dense(device=device)
        fresh = Moments(d_sae, n_labels, device)
        ops.update_moments(pooled, block.y.to(device), fresh, backend=backend)
        fresh.merge(moments)
        moments = fresh
        evidence.update(pooled, block.y, block.number, groups=block.groups, backend=backend)
    return moments, resampled(evidence, blocks, permutations=permutations, bootstrap=bootstrap, backend=backend)


def resampled(
    evidence: Evidence,
    blocks: Iterable[Block | tuple[int, SparseRows, Tensor] | tuple[int, SparseRows, Tensor, Tensor | None]],
    *,
    permutations: int = 0,
    bootstrap: int = 0,
    backend: str | None = None,
) -> Evidence:
    """The same evidence with its blocks' rows, from which any score, permutation and replicate can be had.

    Parameters
    ----------
    evidence : of these blocks, without permutations and replicates of its own; it is not changed.

    Raises
    ------
    CorrSteerError : where the blocks are others than the evidence's.
    """
    check_type("evidence", evidence, Evidence, "an Evidence")
    if evidence.permutations or evidence.bootstrap:
        raise CorrSteerError(
            f"evidence must be without permutations and bootstrap, which rows give, got {evidence!r}; "
            f"collect it with permutations=0 and bootstrap=0"
        )
    rows = StoredRows([_checked(block, evidence.d_sae, evidence.n_labels) for block in blocks], evidence.d_sae, backend)
    if {block.number for block in rows.blocks} != evidence.blocks or rows.n != evidence.n:
        raise CorrSteerError(
            f"blocks must be those of the evidence, {sorted(evidence.blocks)[:8]} with {evidence.n} samples, got "
            f"{sorted(block.number for block in rows.blocks)[:8]} with {rows.n}"
        )
    if rows.n:
        positive = torch.stack([(block.y > 0).sum(0) for block in rows.blocks]).sum(0)
        if bool((evidence.n_positive.cpu() != positive).any()):
            raise CorrSteerError(
                f"blocks must have the rewards of the evidence, of which {evidence.n_positive.tolist()} are above 0, "
                f"got {positive.tolist()}"
            )
    permutations, bootstrap = whole("permutations", permutations, 0), whole("bootstrap", bootstrap, 0)
    return evidence.with_rows(rows, permutations, bootstrap)


@dataclass(frozen=True)
class _Sums:
    """A group of columns that rows give: of which activations to which power, with which labels, resampled how."""

    labels: str  # "one", "u", "positive" or "rank" of y
    resampled: str = ""  # "", "permuted" or "bootstrap"
    power: int = 1
    of_ranks: bool = False


COLUMNS = {
    "permuted": _Sums("u", "permuted"),
    "permuted_positive": _Sums("positive", "permuted"),
    "permuted_positive2": _Sums("positive", "permuted", power=2),
    "bootstrap": _Sums("one", "bootstrap"),
    "bootstrap_u": _Sums("u", "bootstrap"),
    "bootstrap2": _Sums("one", "bootstrap", power=2),
    "rank1": _Sums("one", of_ranks=True),
    "rank2": _Sums("one", power=2, of_ranks=True),
    "rank_positive": _Sums("positive", of_ranks=True),
    "rank_cross": _Sums("rank", of_ranks=True),
    "permuted_rank_positive": _Sums("positive", "permuted", of_ranks=True),
    "permuted_rank_cross": _Sums("rank", "permuted", of_ranks=True),
}


class StoredRows:
    """One layer's stored rows and their rewards; what `Evidence` asks for what it does not keep.

    When first asked, rows are brought into columns, 8 bytes an activation, and for scores of ranks 4 more.
    """

    def __init__(self, blocks: Sequence[Block], d_sae: int, backend: str | None = None):
        self.blocks: list[Block] = [block for block in blocks if len(block.y)]
        self.d_sae: int = d_sae
        self.backend: str | None = backend
        self.n: int = sum(len(block.y) for block in self.blocks)
        self._groups: dict[int, Numbered] = {block.number: block.numbered for block in self.blocks}

    def forget(self) -> None:
        """Let go of the columns, which are made anew when they are asked for."""
        for name in ("_columns", "_ranked"):
            self.__dict__.pop(name, None)

    def has(self, name: str) -> bool:
        """Whether there is such a group of columns."""
        return name in COLUMNS

    def columns(self, evidence: Evidence, name: str, features: Tensor, label: int) -> Tensor:
        """A group of columns of `features: [F]` int64, `[F, width]` float64 on the evidence's device.

        Beside those of streaming there are, of mid-ranks ρ of activations less that of 0: `rank1` and `rank2`, of ρ and
        ρ², `rank_positive` of ρ where y > 0, `rank_cross` of ρ times the centred mid-rank of y, and of every
        permutation `permuted_rank_positive` and `permuted_rank_cross`.
        """
        of = COLUMNS[name]
        if evidence.within and name == "bootstrap2":
            return self._squares_within(evidence, features)
        return self._sums(self._ranked if of.of_ranks else self._columns, of, evidence, features, label)

    def bins(self, evidence: Evidence, features: Tensor, label: int, permuted: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Samples in each bin of `features: [F]` that holds any, on the evidence's device.

        Bins are logarithmic, four to an octave, and those of negative activations others than those of positive. There
        are 32 of a sign, from the feature's largest magnitude down; what is smaller than the window falls into its
        lowest bin. The bin of zeros is not among them.

        Returns
        -------
        Which of the features each bin is of, `[V]` int64; its samples, `[V]`; and those of them with y > 0, `[V, 1]`,
        or of every permutation `[V, P]`. Float64.
        """
        chosen = self._columns.take(features)
        owner, bits = chosen.owners(), chosen.values.view(torch.int32)
        octave = ((bits & 0x7FFFFFFF) >> (MANTISSA - SUB)).clamp(min=1).to(torch.int64)
        top = torch.zeros(len(features), dtype=torch.int64, device="cpu").scatter_reduce_(0, owner, octave, "amax")
        bin = (octave - top[owner] + BINS - 1).clamp(min=0) + BINS * (bits < 0)
        bin, order = (owner * 2 * BINS + bin).sort(stable=True)
        bin, counts = bin.unique_consecutive(return_counts=True)
        members = SparseColumns(
            torch.ones(len(order), dtype=torch.float32, device="cpu"),
            chosen.samples[order],
            torch.cat([torch.zeros(1, dtype=torch.int64, device="cpu"), counts.cumsum(0)]),
            self.n,
        )
        every = torch.arange(len(bin), dtype=torch.int64, device="cpu")
        of = COLUMNS["permuted_positive"] if permuted else _Sums("positive")
        positive = self._sums(members, of, evidence, every, label)
        return (bin // (2 * BINS)).to(evidence.device), counts.double().to(evidence.device), positive

    def rank_squares(self, label: int) -> float:
        """Σ of the squares of y's centred mid-ranks."""
        return float(self._labels_of("rank", label).square().sum())

    def bootstrap_labels(self, evidence: Evidence, replicates: int) -> Tensor:
        """`[1 + 2 R, B]` Σ w, then Σ w u and Σ w u² of each label."""
        total = torch.zeros(1 + 2 * evidence.n_labels, replicates, dtype=torch.float64, device="cpu")
        for block in self.blocks:
            drawn = poisson_weights(evidence.seed, block.number, replicates, self._groups[block.number])
            u = self._u(evidence, block)
            total += torch.cat([drawn[None].sum(1), u.T @ drawn, (u**2).T @ drawn])
        return total.to(evidence.device)

    def _sums(self, z: SparseColumns, of: _Sums, evidence: Evidence, features: Tensor, label: int) -> Tensor:
        count = {"": 1, "permuted": evidence.permutations, "bootstrap": evidence.bootstrap}[of.resampled]
        sums = torch.zeros(len(features), count, dtype=torch.float64, device=evidence.device)
        if not self.n:
            return sums
        labels = self._labels_of(of.labels, label, evidence)
        for first, blocks in self._parts(count):
            last = first + sum(len(block.y) for block in blocks)
            of_blocks = tuple((block.number, self._groups[block.number]) for block in blocks)
            drawn = _Drawn(of.resampled, evidence.seed, count, evidence.within, of_blocks)
            weights = _weights(drawn, labels[first:last].numpy().tobytes(), str(evidence.device))
            update_sparse_sums(z, features, weights, sums, first=first, power=of.power, backend=self.backend)
        return sums

    def _squares_within(self, evidence: Evidence, features: Tensor) -> Tensor:
        """`[F, B]`: Σ_g w_g Σ (z - z̄_g)² of every replicate's weights w of prompts."""
        distinct, place = features.unique(return_inverse=True)
        total = torch.zeros(len(distinct), evidence.bootstrap, dtype=torch.float64, device=evidence.device)
        for block in self.blocks:
            groups = self._groups[block.number]
            drawn = poisson_weights(evidence.seed, block.number, evidence.bootstrap, groups)
            of_prompts = drawn[np.unique(groups, return_index=True)[1]]  # [G, B]
            squares = squares_within(block.rows.dense(features=distinct), groups)  # [G, F]
            total += (squares.T @ of_prompts).to(evidence.device)
        return total[place.to(evidence.device)]

    def _parts(self, count: int) -> Iterator[tuple[int, list[Block]]]:
        """Blocks whose weights have room together, and how many samples come before."""
        first, part, size = 0, [], 0
        for block in self.blocks:
            if part and 8 * count * (size + len(block.y)) > PART_BYTES:
                yield first, part
                first, part, size = first + size, [], 0
            part.append(block)
            size += len(block.y)
        if part:
            yield first, part

    def _labels_of(self, kind: str, label: int, evidence: Evidence | None = None) -> Tensor:
        """`[N]` float64: what samples are weighted with."""
        if kind == "one":
            return torch.ones(self.n, dtype=torch.float64, device="cpu")
        if kind == "u":
            assert evidence is not None
            return torch.cat([self._u(evidence, block)[:, label] for block in self.blocks])
        y = torch.cat(
            [block.y[:, label] for block in self.blocks] or [torch.empty(0, dtype=torch.float64, device="cpu")]
        )
        if kind == "positive":
            return (y > 0).double()
        from scipy.stats import rankdata  # which takes a second to import, and only scores of ranks need it

        return torch.from_numpy(rankdata(y.numpy()) - (self.n + 1) / 2)

    def _u(self, evidence: Evidence, block: Block) -> Tensor:
        """`[n, R]`: a block's rewards as the evidence measures them."""
        y = centred(block.y, self._groups[block.number]) if evidence.within else block.y
        return (y - evidence.origin.cpu()) / evidence.scale.cpu()

    @functools.cached_property
    def _columns(self) -> SparseColumns:
        return SparseColumns.from_rows([block.rows for block in self.blocks], self.d_sae)

    @functools.cached_property
    def _ranked(self) -> SparseColumns:
        z = self._columns
        values = torch.empty_like(z.values)
        for first in range(0, self.d_sae, RANKED_AT_A_TIME):
            offsets = z.offsets[first : first + RANKED_AT_A_TIME + 1]
            here = slice(int(offsets[0]), int(offsets[-1]))
            values[here] = ranks(z.values[here], offsets - offsets[0], self.n)
        return replace(z, values=values)


def ranks(values: Tensor, offsets: Tensor, n: int) -> Tensor:
    """Mid-ranks less the mid-rank of 0 of activations that are not 0, `[nnz]` float32, in columns of `n` samples.

    They are multiples of a half, exact in float32 for up to 2^23 samples.

    Parameters
    ----------
    values : `[nnz]` float32, column after column.
    offsets : `[columns + 1]` int64, where each begins, and the last one ends.
    """
    bits = values.view(torch.int32).to(torch.int64)
    rising = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)  # as the numbers do, NaN on the outside
    lengths = offsets.diff()
    columns = torch.arange(len(lengths), dtype=torch.int64, device=values.device)
    owner = columns.repeat_interleave(lengths)
    order = torch.from_numpy(np.argsort(((owner << 32) + rising).numpy()))  # ties in any order: they share a rank
    value = rising[order]
    owner = owner[order]
    new = torch.ones(len(order), dtype=torch.bool, device=values.device)
    new[1:] = (value.diff() != 0) | (owner.diff() != 0)
    begins = new.nonzero()[:, 0]
    size = torch.cat([begins, torch.tensor([len(order)], dtype=torch.int64, device=values.device)]).diff()
    less = (begins - offsets[owner[begins]]).repeat_interleave(size)  # of the column's activations that are not 0
    size = size.repeat_interleave(size)
    negative = torch.zeros(len(lengths), dtype=torch.int64, device=values.device)
    negative.index_add_(0, owner, (value < 0).to(torch.int64))
    zeros = (n - lengths)[owner]
    # mid-ranks are less + (size + 1) / 2, with all zeros below a positive one; that of 0 is negative + (zeros + 1) / 2
    twice = 2 * (less - negative[owner]) + size + torch.where(value < 0, -zeros, zeros)
    out = torch.empty_like(values)
    out[order] = twice.float() / 2
    return out


def _checked(block: tuple[object, ...], d_sae: int, n_labels: int) -> Block:
    """A block of whatever tuple it came as, with rewards of two dimensions."""
    number, rows, y, *groups = block
    check_type("rows", rows, SparseRows, "a SparseRows")
    check_holds("y", y)
    assert isinstance(rows, SparseRows) and isinstance(y, Tensor)
    number = whole("number (of a block)", number, 0)
    y = (y[:, None] if y.dim() == 1 else y).detach().to("cpu", torch.float64)
    if rows.d_sae != d_sae or y.shape != (rows.n, n_labels):
        raise CorrSteerError(
            f"blocks must hold rows of d_sae={d_sae} features and y [n, n_labels={n_labels}], but block {number} has "
            f"rows [{rows.n}, {rows.d_sae}] and y {list(y.shape)}"
        )
    if rows.device.type != "cpu":
        raise CorrSteerError(
            f"rows must be on the CPU, got those of block {number} on {rows.device}; use rows.to('cpu')"
        )
    return Block(number, rows, y, *groups)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Drawn:
    """How some blocks' samples are resampled: blocks by their number and which prompts their samples are of."""

    how: str
    seed: int
    count: int
    within: bool
    blocks: tuple[tuple[int, Numbered], ...]


@functools.lru_cache(maxsize=4)  # the evidence of every layer asks for the same
def _weights(drawn: _Drawn, labels: bytes, device: str) -> Tensor:
    """`[n, count]` float64: labels of samples in every permutation, or times how often each replicate has them."""
    column = torch.from_numpy(np.frombuffer(labels, dtype=np.float64).copy())
    out = torch.empty(len(column), drawn.count, dtype=torch.float64, device="cpu")
    first = 0
    for number, groups in drawn.blocks:
        here = slice(first, first + len(groups))
        some = column[here, None]
        if drawn.how == "permuted":
            out[here] = permuted_labels(some, label_orders(drawn.seed, number, drawn.count, groups, drawn.within))
        elif drawn.how == "bootstrap":
            out[here] = some * poisson_weights(drawn.seed, number, drawn.count, groups)
        else:
            out[here] = some
        first += len(groups)
    return out.to(device)
