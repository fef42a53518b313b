"""`Evidence`: streaming sums for inference, beside `Moments`: joint moments, permuted labels, bootstrap replicates.

Everything is a column of weighted power sums of pooled activations (`ops.update_sums`), so that it costs time for
activations that are not 0 only, and memory that does not grow with the number of samples: 8 · d_sae · columns bytes,
where columns are 23 + permutations + 3 · bootstrap for one label, and two more `within` prompts (`Evidence.n_columns`).

With u = (y - origin) / scale, whose powers neither overflow nor vanish, whatever the unit of rewards:

- Σ z^p u^q for p + q <= 6, what `inference.delta_interval` needs;
- Σ z u_π for every permutation π, of which the null distribution of r follows, since a permutation changes no mean and
  no variance (Westfall & Young, "Resampling-Based Multiple Testing", 1993);
- Σ w z, Σ w z u, Σ w z² for every bootstrap replicate, with weights w ~ Poisson(1) (Hanley & MacGibbon, "Creating
  non-parametric bootstrap samples using Poisson frequencies", 2006).

Samples arrive in numbered blocks. Labels are permuted within a block, which is valid as long as the samples of a block
are exchangeable, so a block must be a random part of the data, such as a slice of it in shuffled order. What a
permutation does to a sample depends on the seed, the block's number and the sample's place in it, and on nothing else:
neither on the order in which blocks come nor on the process that takes them.

Several samples of one prompt are not exchangeable with those of another, so `update` is told which prompt each is of.
Whole prompts change places then, and bootstrap weights are drawn for whole prompts; or, `within` prompts, u is centred
in each prompt and permuted there, and sums of (z - z̄_g)² are kept besides (see `stats.groups`). A prompt lies in one
block.

Sums are of z itself, as centring it would cost the zeros: r loses about 1e-16 times the square of a feature's mean over
its standard deviation; permuted sums on the `triton` backend, which multiplies in float32, 1e-7 times that ratio.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from corrsteer import ops
from corrsteer.arguments import check_type, shown, whole
from corrsteer.errors import CorrSteerError
from corrsteer.files import from_json, to_json, write_tensors
from corrsteer.ops.operations import check_rewards
from corrsteer.stats.groups import (
    Numbered,
    centred,
    fixed,
    informative,
    numbered,
    squares_within,
)
from corrsteer.stats.resampling import label_orders, permuted_labels, poisson_weights
from corrsteer.tensors import LARGEST, check_holds, zeros
from corrsteer.types import Device, Features, PathLike

ORDER = 6  # p + q of the highest joint moments
FEATURES_AT_A_TIME = 4096  # whose squares within prompts are made together
FORMAT = "corrsteer.evidence/3"
SCORES = (
    "pearson", "point_biserial", "contrastive", "squared_ratio", "mutual_information", "auroc", "spearman",
)  # fmt: skip
FROM_ROWS = ("mutual_information", "auroc", "spearman")  # what needs every sample's activations, see `stats.stored`
STREAMED = tuple(name for name in SCORES if name not in FROM_ROWS)
WITHIN = ("pearson", "point_biserial", "contrastive")  # those that there are of samples centred within prompts


def known_scores(scores: Sequence[str]) -> tuple[str, ...]:
    """Scores, or the one named, in the order of `SCORES`; raises unless streaming has them."""
    scores = (scores,) if isinstance(scores, str) else scores
    if not isinstance(scores, Collection):
        raise CorrSteerError(f"scores must be a list of {', '.join(SCORES)}, got {shown(scores)}")
    for name in scores:
        if not isinstance(name, str) or name not in SCORES:
            raise CorrSteerError(f"scores must be among {', '.join(SCORES)}, got {shown(name)}")
    if from_rows := [name for name in FROM_ROWS if name in scores]:
        raise CorrSteerError(
            f"scores must be among {', '.join(STREAMED)} where statistics are summed up as samples come, got "
            f"{', '.join(from_rows)}; keep activations, which give every score"
        )
    return tuple(name for name in SCORES if name in scores)


class Rows(Protocol):
    """What gives columns that are not kept: `stored.StoredRows`."""

    def has(self, name: str) -> bool: ...

    def columns(self, evidence: Evidence, name: str, features: Tensor, label: int) -> Tensor: ...

    def bins(
        self, evidence: Evidence, features: Tensor, label: int, permuted: bool
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def rank_squares(self, label: int) -> float: ...

    def bootstrap_labels(self, evidence: Evidence, replicates: int) -> Tensor: ...

    def forget(self) -> None: ...


class _Layout:
    """Where groups of columns lie: `groups` are (name, power of z, shares, width of a share), a share for each label or
    one for all."""

    def __init__(self, groups: list[tuple[str, int, int, int]]):
        groups = sorted(groups, key=lambda group: group[1])  # by power, as `update_sums` wants them
        self.groups: dict[str, tuple[int, int, int]] = {}
        self.width = 0
        for name, _, shares, width in groups:
            self.groups[name] = (self.width, shares, width)
            self.width += shares * width
        self.powers = tuple(
            sum(shares * width for _, power, shares, width in groups if power == p)
            for p in range(1, max(power for _, power, _, _ in groups) + 1)
        )

    def share(self, name: str, label: int) -> slice:
        """The columns of a label's share of a group."""
        first, shares, width = self.groups[name]
        first += label * width if shares > 1 else 0
        return slice(first, first + width)


class Evidence:
    """Sums of one layer's pooled activations and rewards, in float64.

    Parameters
    ----------
    d_sae : D, number of features.
    n_labels : R, number of reward columns; all of them are permuted alike.
    permutations : P, how many; 0 for no tests. The smallest p-value is 1 / (P + 1).
    bootstrap : B, how many replicates; 0 for no bootstrap intervals.
    scores : which scores' permutations are kept (see `scores.score`). `pearson` costs one column a permutation;
        `point_biserial` and `contrastive` another one together, unless rewards take two values, when they need none;
        `squared_ratio` one. The others need rows, see `stored.statistics`.
    seed : of permutations and bootstrap weights.
    within : whether rewards and activations are centred within each prompt, and rewards permuted within it. What is
        left is what tells good from bad samples of the same prompt. Of `scores`, there are `pearson`, and for rewards
        of two values `point_biserial` and `contrastive`.
    device : where the state lives.

    Attributes
    ----------
    sums : `[D, 6 + 17 R]` joint moments Σ z^p u^q, and Σ z and Σ z² over samples with y > 0; `within`, u is centred in
        each prompt, and there are two more columns, Σ_g s_g and Σ_g s_g² of prompts' s_g = Σ (z - z̄_g)².
    resampled : `[D, ...]` sums of permuted labels and bootstrap replicates; `columns` finds its way in both.
    labels : `[R, 7]` Σ u^q for q = 0 to 6; the first is the number of samples.
    bootstrap_labels : `[1 + 2 R, B]` Σ w, then Σ w u and Σ w u² of each label.
    n_positive : `[R]` samples with y > 0.
    origin, scale : `[R]` what rewards are measured from, and in which unit, a power of 2^16.
    low, high, n_low, n_high : `[R]` least and largest reward, and in how many samples it is that.
    n_groups : `[1]` prompts; samples that came without `groups` are each of their own.
    n_fixed : `[1]` samples that no permutation moves, see `fixed`.
    n_informative : `[R]` prompts in which rewards differ, all that there is to go by `within` prompts.
    blocks : numbers of the blocks seen.
    groups : numbers of the prompts seen, as `update` was given them.
    rows : the samples' own activations, which give what is resampled instead of `resampled`; or None.
    """

    STATE = (
        "sums",
        "resampled",
        "labels",
        "bootstrap_labels",
        "n_positive",
        "origin",
        "scale",
        "low",
        "high",
        "n_low",
        "n_high",
        "n_groups",
        "n_fixed",
        "n_informative",
    )
    sums: Tensor
    resampled: Tensor
    labels: Tensor
    bootstrap_labels: Tensor
    n_positive: Tensor
    origin: Tensor
    scale: Tensor
    low: Tensor
    high: Tensor
    n_low: Tensor
    n_high: Tensor
    n_groups: Tensor
    n_fixed: Tensor
    n_informative: Tensor

    def __init__(
        self,
        d_sae: int,
        n_labels: int = 1,
        *,
        permutations: int = 0,
        bootstrap: int = 0,
        scores: Sequence[str] = ("pearson",),
        seed: int = 0,
        within: bool = False,
        device: Device = "cpu",
    ):
        self.d_sae: int = whole("d_sae", d_sae, 1, LARGEST)
        self.n_labels: int = whole("n_labels", n_labels, 1, LARGEST)
        self.permutations: int = whole("permutations", permutations, 0, LARGEST)
        self.bootstrap: int = whole("bootstrap", bootstrap, 0, LARGEST)
        self.scores: tuple[str, ...] = known_scores(scores)
        self.seed: int = whole("seed", seed, 0)
        check_type("within", within, bool, "True or False")
        self.within: bool = within
        if within and not set(self.scores) <= set(WITHIN):
            raise CorrSteerError(
                f"scores must be among {', '.join(WITHIN)} with within=True, as the others are not defined for samples "
                f"that are centred within prompts, got {', '.join(self.scores)}"
            )
        R, P, B = self.n_labels, self.permutations, self.bootstrap
        moments = [(f"z{p}u{q}", p, R if q else 1, 1) for p in range(1, ORDER + 1) for q in range(ORDER + 1 - p)]
        moments += [("positive", 1, R, 1), ("positive2", 2, R, 1)]
        moments += [("within2", 1, 1, 1), ("within4", 1, 1, 1)] if within else []
        resampled = [("permuted", 1, R, P), ("bootstrap", 1, 1, B), ("bootstrap_u", 1, R, B), ("bootstrap2", 2, 1, B)]
        if {"point_biserial", "contrastive"} & set(self.scores) and not within:
            resampled += [("permuted_positive", 1, R, P)]
        if "squared_ratio" in self.scores:
            resampled += [("permuted_positive2", 2, R, P)]
        self._layouts = {"sums": _Layout(moments), "resampled": _Layout(resampled)}
        self.blocks: set[int] = set()
        self.groups: set[int] = set()
        widths = [layout.width for layout in self._layouts.values()]
        shapes = [(self.d_sae, width) for width in widths] + [(R, ORDER + 1), (1 + 2 * R, B), *[(R,)] * 7]
        shapes += [(1,), (1,), (R,)]
        with torch.inference_mode(False):  # made inside of it, it could not be updated outside
            for name, shape in zip(self.STATE, shapes):
                setattr(self, name, zeros(f"evidence of {self.d_sae} features", shape, device))
        self.scale.fill_(1)
        self.low.fill_(math.inf)
        self.high.fill_(-math.inf)
        self.rows: Rows | None = None

    def state(self) -> dict[str, Tensor]:
        """The arrays by name, not copies."""
        return {name: getattr(self, name) for name in self.STATE}

    @property
    def n_columns(self) -> int:
        """Float64 numbers a feature."""
        return sum(layout.width for layout in self._layouts.values())

    @property
    def nbytes(self) -> int:
        """Memory of the state: 8 · d_sae · n_columns, and a little."""
        return sum(getattr(self, name).nbytes for name in self.STATE)

    @property
    def n(self) -> int:
        """Samples seen."""
        return int(self.labels[0, 0])

    @property
    def clustered(self) -> bool:
        """Whether a prompt had several samples, or everything is centred within prompts, so that samples are not
        independent: then there are no `delta` and `fisher` intervals."""
        return self.within or int(self.n_groups) < self.n

    @property
    def fixed(self) -> int:
        """Samples that no permutation moves, as no other prompt of their block has as many samples; or, `within`
        prompts, as their prompt has no other sample. Tests find nothing in them."""
        return int(self.n_fixed)

    @property
    def device(self) -> torch.device:
        return self.sums.device

    def has(self, name: str) -> bool:
        """Whether a group of columns is kept, or follows from rows."""
        return self._keeps(name) or (self.rows is not None and self.rows.has(name))

    def _keeps(self, name: str) -> bool:
        return any(name in layout.groups for layout in self._layouts.values())

    def columns(self, name: str, features: Features = slice(None), label: int = 0) -> Tensor:
        """A group of columns of some features, `[features, width]`: of a group with a share for each reward, `label`'s.

        Groups are `z{p}u{q}`, `positive` and `positive2` (of z and z² where y > 0), one column each, `permuted`,
        `permuted_positive` and `permuted_positive2`, P each, and `bootstrap`, `bootstrap_u`, `bootstrap2`, B each; and
        what `stored.StoredRows.columns` has, where there are rows. `within` prompts there are `within2` and `within4`,
        Σ_g s_g and Σ_g s_g² of s_g = Σ (z - z̄_g)², and `bootstrap2` is of s_g.
        """
        self.check_label(label)
        if self.rows is not None and self.rows.has(name):
            return self.rows.columns(self, name, self.numbers(features), label)
        tensor = next(tensor for tensor, layout in self._layouts.items() if name in layout.groups)
        return getattr(self, tensor)[features, self._layouts[tensor].share(name, label)]

    def numbers(self, features: Features) -> Tensor:
        """The numbers of features, `[any]` int64 on the CPU."""
        every = torch.arange(self.d_sae, dtype=torch.int64, device="cpu")
        return every[features.cpu() if isinstance(features, Tensor) else features].reshape(-1)

    def of_features(self, parts: Sequence[tuple[Evidence, Tensor]]) -> Evidence:
        """Joint moments of some features of evidences of the same samples, one part after the other; `self` is one."""
        sums = torch.cat([evidence.sums[features].to(self.device) for evidence, features in parts])
        evidence = copy.copy(self)
        evidence.rows, evidence.permutations, evidence.bootstrap = None, 0, 0
        evidence.sums, evidence.d_sae = sums, len(sums)
        return evidence

    def with_rows(self, rows: Rows, permutations: int, bootstrap: int) -> Evidence:
        """The same with what is resampled from rows; see `stored.resampled`, which checks them."""
        evidence = copy.copy(self)
        evidence.rows, evidence.permutations, evidence.bootstrap = rows, permutations, bootstrap
        evidence.blocks = set(self.blocks)
        for name in self.STATE:
            setattr(evidence, name, getattr(self, name).clone())
        evidence.bootstrap_labels = rows.bootstrap_labels(self, bootstrap)
        return evidence

    def check_label(self, label: int) -> None:
        """Raise unless there is such a reward column."""
        if whole("label", label) not in range(self.n_labels):
            raise CorrSteerError(f"label must lie in 0..{self.n_labels - 1}, got {label}")

    @torch.no_grad()
    def update(
        self,
        pooled: Tensor,
        y: Tensor,
        block: int,
        *,
        groups: Sequence[int] | Tensor | None = None,
        backend: str | None = None,
    ) -> None:
        """Fold in a whole block: pooled activations `[N, d_sae]` and rewards `[N]` or `[N, n_labels]`.

        Parameters
        ----------
        block : the block's number, which no other block has; in this process or in any whose evidence is merged.
        groups : `[N]` whole numbers, which prompt each sample is of; by default each is of its own. All samples of a
            prompt are in one block. Prompts of the same number of samples change places, with all their rewards: the
            first sample of one gets that of the first of another. Prompts of one sample are permuted as without groups.

        Raises
        ------
        CorrSteerError : for wrong shapes, rewards that are not finite, a block or a prompt that was seen before,
            `within` without groups, and where there are rows.
        """
        self._check_streaming()
        for name, tensor in (("pooled", pooled), ("y", y)):
            check_holds(name, tensor)
        if y.is_complex() or not pooled.is_floating_point():
            raise CorrSteerError(f"pooled and y must be of real numbers, got {pooled.dtype} and {y.dtype}")
        y = (y[:, None] if y.dim() == 1 else y).detach().to("cpu", torch.float64)
        if pooled.dim() != 2 or pooled.shape[1] != self.d_sae or y.shape != (len(pooled), self.n_labels):
            raise CorrSteerError(
                f"pooled must be [N, d_sae={self.d_sae}] and y [N, n_labels={self.n_labels}], "
                f"got {list(pooled.shape)} and {list(y.shape)}"
            )
        check_rewards(y)
        block = whole("block", block, 0)
        if block in self.blocks:
            raise CorrSteerError(f"block must be a number that was not given before, got {block}")
        if self.within and groups is None:
            raise CorrSteerError("groups must be given with within=True, got None; say which prompt each sample is of")
        group, called = numbered(groups, len(y))
        self._refuse_split("groups", self.groups & set(called))
        if len(y) == 0:
            return
        values = centred(y, group) if self.within else y
        origin = self.origin.cpu() if self.blocks or self.within else y.mean(0)
        self._make_room((values - origin).abs().amax(0))
        u, positive = (values - origin) / self.scale.cpu(), (y > 0).double()
        permuted, drawn = (draw(len(y), block, group) for draw in (self._permutations, self._bootstrap_weights))
        weights = {f"z{p}u{q}": u**q if q else torch.ones_like(y[:, :1])
                   for p in range(1, ORDER + 1) for q in range(ORDER + 1 - p)}  # fmt: skip
        weights |= {
            "positive": positive,
            "positive2": positive,
            "permuted": permuted_labels(u, permuted),
            "bootstrap": drawn,
            "bootstrap2": drawn,
            "bootstrap_u": (drawn[:, None] * u[:, :, None]).flatten(1),
        }
        if self._keeps("permuted_positive") or self._keeps("permuted_positive2"):
            weights["permuted_positive"] = weights["permuted_positive2"] = permuted_labels(positive, permuted)
        if self.within:  # squares of centred activations, which are added below
            weights["within2"] = weights["within4"] = torch.zeros_like(y[:, :1])
            weights["bootstrap2"] = torch.zeros_like(drawn)
        for name, layout in self._layouts.items():
            if layout.width:
                columns = torch.cat([weights[group] for group in layout.groups], 1).to(self.device)
                ops.update_sums(pooled, columns, getattr(self, name), layout.powers, backend=backend)
        if self.within:
            of_prompts = drawn[np.unique(group, return_index=True)[1]].to(pooled.device)  # [G, B]
            for at in range(0, self.d_sae, FEATURES_AT_A_TIME):
                some = slice(at, at + FEATURES_AT_A_TIME)
                squares = squares_within(pooled[:, some], group).T  # [some, G]
                self.columns("within2", some).add_(squares.sum(1, keepdim=True).to(self.device))
                self.columns("within4", some).add_(squares.square().sum(1, keepdim=True).to(self.device))
                self.columns("bootstrap2", some).add_((squares @ of_prompts).to(self.device))
        self.origin.copy_(origin)
        self.labels += torch.stack([(u**q).sum(0) for q in range(ORDER + 1)], 1).to(self.device)
        self.bootstrap_labels += torch.cat([drawn[None].sum(1), u.T @ drawn, (u**2).T @ drawn]).to(self.device)
        self.n_positive += positive.sum(0).to(self.device)
        self.n_groups += max(group) + 1
        self.n_fixed += fixed(group, self.within)
        self.n_informative += informative(y, group).to(self.device)
        low, high = y.amin(0), y.amax(0)
        self._extend(low, high, (y == low).double().sum(0), (y == high).double().sum(0))
        self.blocks.add(block)
        self.groups.update(called)

    def _refuse_split(self, name: str, again: set[int]) -> None:
        """Raise where prompts that were seen in a block come in another."""
        if again:
            raise CorrSteerError(
                f"{name} must keep each prompt's samples in one block, but prompts {sorted(again)[:8]} are in two; "
                f"make blocks of whole prompts, as `shuffled_blocks` does"
            )

    def _make_room(self, largest: Tensor) -> None:
        """Choose `scale` for rewards as far as `largest: [R]` from the origin, and bring what was summed to it."""
        largest = largest.to(self.device)
        needed = torch.exp2((torch.frexp(largest).exponent.double() / 16).round() * 16)
        varied = self._varied()
        scale = torch.where(largest > 0, torch.where(varied, torch.maximum(self.scale, needed), needed), self.scale)
        ratio = torch.where(varied, self.scale / scale, 1)
        self.scale.copy_(scale)
        if bool((ratio != 1).any()):
            for name, moved in self._moved(ratio, torch.zeros_like(ratio)).items():
                getattr(self, name).copy_(moved)

    def _varied(self) -> Tensor:
        """`[R]` bool: whether a reward differed from the origin; where none did, sums of powers of u are 0."""
        return self.labels[:, 2] > 0

    def _extend(self, low: Tensor, high: Tensor, n_low: Tensor, n_high: Tensor) -> None:
        """Take in other samples' least and largest rewards, and how many there are of them."""
        low, high, n_low, n_high = (t.to(self.device) for t in (low, high, n_low, n_high))
        self.n_low = self.n_low * (self.low <= low) + n_low * (low <= self.low)
        self.n_high = self.n_high * (self.high >= high) + n_high * (high >= self.high)
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)

    def _permutations(self, n: int, block: int, groups: Numbered | None = None) -> Tensor:
        """`[P, n]`: in each row, which sample's label each sample of a block gets."""
        return label_orders(self.seed, block, self.permutations, groups or tuple(range(n)), self.within)

    def _bootstrap_weights(self, n: int, block: int, groups: Numbered | None = None) -> Tensor:
        """`[n, B]`, how often each replicate has each sample of a block: all of a prompt alike."""
        return poisson_weights(self.seed, block, self.bootstrap, groups or tuple(range(n)))

    @torch.no_grad()
    def merge(self, other: Evidence) -> None:
        """Fold in the evidence of other blocks, such as another process's; the order does not matter."""
        check_type("other", other, Evidence, "an Evidence")
        self._check_streaming()
        other._check_streaming()
        mine, theirs = self._settings(), other._settings()
        for name, value in mine.items():
            if theirs[name] != value:
                raise CorrSteerError(f"other must have {name}={value}, got {theirs[name]}; merge runs of the same kind")
        both = sorted(self.blocks & other.blocks)
        if both:
            raise CorrSteerError(f"other must hold other blocks, but blocks {both[:8]} are in both")
        self._refuse_split("other", self.groups & other.groups)
        if not other.blocks:
            return
        if not self.blocks:
            self.origin.copy_(other.origin)
        shift = other.origin.to(self.device) - self.origin
        varied, unit = other._varied().to(self.device), other.scale.to(self.device)
        self._make_room(torch.maximum(shift.abs(), torch.where(varied, unit, 0)))
        for name, moved in other._moved(torch.where(varied, unit / self.scale, 1), shift / self.scale).items():
            getattr(self, name).add_(moved)
        for name in ("n_positive", "n_groups", "n_fixed", "n_informative"):
            getattr(self, name).add_(getattr(other, name).to(self.device))
        self._extend(other.low, other.high, other.n_low, other.n_high)
        self.blocks |= other.blocks
        self.groups |= other.groups

    def _moved(self, ratio: Tensor, shift: Tensor) -> dict[str, Tensor]:
        """What is summed of u, with ratio · u + shift for u, by the binomial theorem; on the shift's device."""
        names = ("sums", "resampled", "labels", "bootstrap_labels")
        moved = {name: getattr(self, name).to(shift.device, copy=True) for name in names}
        sums, resampled, labels, bootstrap_labels = moved.values()
        groups, R = self._layouts["sums"], self.n_labels
        of_samples = self._layouts["resampled"]
        z, wz = sums[:, groups.share("z1u0", 0)].clone(), resampled[:, of_samples.share("bootstrap", 0)].clone()
        for r, (c, d) in enumerate(zip(ratio, shift)):

            def expand(table: Tensor, powers: list[Any], c: Tensor = c, d: Tensor = d) -> None:
                old = [table[place].clone() for place in powers]  # of u^0, u^1, ...
                for q, place in enumerate(powers):
                    table[place] = sum(math.comb(q, k) * c**k * d ** (q - k) * old[k] for k in range(q + 1))

            expand(labels, [(r, q) for q in range(ORDER + 1)])
            expand(bootstrap_labels, [0, 1 + r, 1 + R + r])
            for p in range(1, ORDER + 1):
                expand(sums, [(slice(None), groups.share(f"z{p}u{q}", r).start) for q in range(ORDER + 1 - p)])
            resampled[:, of_samples.share("permuted", r)].mul_(c).add_(d * z)
            resampled[:, of_samples.share("bootstrap_u", r)].mul_(c).add_(d * wz)
        return moved

    def two_valued(self, label: int = 0) -> bool:
        """Whether a reward took one value <= 0, one value > 0, and no other."""
        self.check_label(label)
        counted = self.n_low[label] + self.n_high[label] == self.labels[label, 0]
        return bool((self.low[label] <= 0) & (self.high[label] > 0) & counted)

    def _settings(self) -> dict[str, Any]:
        names = ("d_sae", "n_labels", "permutations", "bootstrap", "scores", "seed", "within")
        return {name: getattr(self, name) for name in names}

    def _check_streaming(self) -> None:
        """Raise where there are rows, which hold all samples there are."""
        if self.rows is not None:
            raise CorrSteerError(
                f"{self!r} must be without rows to take in more samples; update or merge before `stored.resampled`"
            )

    def save(self, path: PathLike) -> None:
        """Write the state to a safetensors file; `load` gives it back bit for bit. What rows give is not written."""
        if self.rows is not None:
            kept = copy.copy(self)
            kept.rows, kept.permutations, kept.bootstrap = None, 0, 0
            kept.bootstrap_labels = self.bootstrap_labels[:, :0]
            kept.save(path)
            return
        tensors = {name: getattr(self, name).cpu().contiguous() for name in self.STATE}
        described = self._settings() | {"blocks": sorted(self.blocks), "groups": sorted(self.groups)}
        write_tensors(path, tensors, {"format": FORMAT, "evidence": to_json(described)})

    @classmethod
    def load(cls, path: PathLike, device: Device = "cpu") -> Evidence:
        """Read what `save` wrote."""
        if not Path(path).is_file():
            raise CorrSteerError(f"there is no evidence file at {path}")
        try:
            with safe_open(str(path), framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise CorrSteerError(f"{path} is not an evidence file of this version ({FORMAT})")
                described = from_json(metadata["evidence"])
                blocks, groups = described.pop("blocks"), described.pop("groups")
                for name, tensor in cls(**described, device="meta").state().items():  # which takes no memory
                    if tuple(tensor.shape) != tuple(file.get_slice(name).get_shape()):
                        raise ValueError(f"{name} has another shape than its settings say")
                evidence = cls(**described, device=device)
                evidence.blocks, evidence.groups = set(blocks), set(groups)
                for name, tensor in evidence.state().items():
                    tensor.copy_(file.get_tensor(name))
            return evidence
        except CorrSteerError:
            raise
        except (SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise CorrSteerError(f"{path} is damaged ({error}); collect again") from None

    def __repr__(self) -> str:
        return f"Evidence(n={self.n}, d_sae={self.d_sae}, permutations={self.permutations}, bootstrap={self.bootstrap})"
