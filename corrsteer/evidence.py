"""`Evidence`: streaming sums for inference, beside `Moments`: joint moments, permuted labels, bootstrap replicates.

Everything is a column of weighted power sums of pooled activations (`ops.update_sums`), so that all of it costs one
pass, time for activations that are not 0 only, and memory that does not grow with the number of samples:
8 · d_sae · (columns) bytes, where columns are 27 + permutations + 3 · bootstrap for one label (`Evidence.n_columns`).

With u = y - origin, which keeps powers of rewards small:

- Σ z^p u^q for p + q <= 6, what `inference.delta_interval` needs;
- Σ z u_π for every permutation π, of which the null distribution of r follows, since a permutation changes no mean and
  no variance (Westfall & Young, "Resampling-Based Multiple Testing", 1993);
- Σ w z, Σ w z u, Σ w z² for every bootstrap replicate, with weights w ~ Poisson(1) (Hanley & MacGibbon, "Creating
  non-parametric bootstrap samples using Poisson frequencies", 2006).

Samples arrive in numbered blocks. Labels are permuted within a block, which is valid as long as the samples of a block
are exchangeable, so a block must be a random part of the data, such as a slice of it in shuffled order. What a
permutation does to a sample depends on the seed, the block's number and the sample's place in it, and on nothing else:
neither on the order in which blocks come nor on the process that takes them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from corrsteer import ops
from corrsteer.errors import CorrSteerError
from corrsteer.histograms import Histograms

ORDER = 6  # p + q of the highest joint moments
FORMAT = "corrsteer.evidence/1"
SCORES = (
    "pearson", "point_biserial", "contrastive", "squared_ratio", "mutual_information", "auroc", "spearman",
)  # fmt: skip
BINNED = ("mutual_information", "auroc", "spearman")  # what is read from histograms


class Evidence:
    """Sums of one layer's pooled activations and rewards, in float64.

    Parameters
    ----------
    d_sae : D, number of features.
    n_labels : R, number of reward columns; all of them are permuted alike.
    permutations : P, how many; 0 for no tests. The smallest p-value is 1 / (P + 1).
    bootstrap : B, how many replicates; 0 for no bootstrap intervals.
    scores : which scores' permutations are kept (see `inference.score`). `pearson` costs one column a permutation;
        `point_biserial` and `contrastive` another one together, unless rewards take two values, when they need none;
        `squared_ratio` one; `mutual_information`, `auroc` and `spearman` together one for each of the `bins`.
    bins : of each feature's histogram, kept if one of the last three scores is asked for.
    seed : of permutations and bootstrap weights.
    device : where the state lives.

    Attributes
    ----------
    sums : `[D, n_columns]`; `column` finds its way in it.
    labels : `[R, 7]` Σ u^q for q = 0 to 6; the first is the number of samples.
    bootstrap_labels : `[1 + 2 R, B]` Σ w, then Σ w u and Σ w u² of each label.
    n_positive : `[R]` samples with y > 0.
    origin, low, high : `[R]` what rewards are measured from, and their least and largest value.
    blocks : numbers of the blocks seen.
    """

    STATE = ("sums", "labels", "bootstrap_labels", "n_positive", "origin", "low", "high")

    def __init__(
        self,
        d_sae: int,
        n_labels: int = 1,
        *,
        permutations: int = 0,
        bootstrap: int = 0,
        scores: Sequence[str] = ("pearson",),
        bins: int = 32,
        seed: int = 0,
        device="cpu",
    ):
        for name, value, least in (
            ("d_sae", d_sae, 1), ("n_labels", n_labels, 1), ("permutations", permutations, 0),
            ("bootstrap", bootstrap, 0), ("bins", bins, 3), ("seed", seed, 0),
        ):  # fmt: skip
            if value < least:
                raise CorrSteerError(f"{name} must be at least {least}, got {value}")
        for name in scores:
            if name not in SCORES:
                raise CorrSteerError(f"scores must be among {', '.join(SCORES)}, got {name!r}")
        self.d_sae, self.n_labels = d_sae, n_labels
        self.permutations, self.bootstrap = permutations, bootstrap
        self.scores, self.bins, self.seed = tuple(scores), bins, seed
        self._slices, self._powers = self._layout()
        self.blocks: set[int] = set()
        R = n_labels
        shapes = ((d_sae, self.n_columns), (R, ORDER + 1), (1 + 2 * R, bootstrap), (R,), (R,), (R,), (R,))
        with torch.inference_mode(False):  # made inside of it, it could not be updated outside
            for name, shape in zip(self.STATE, shapes):
                setattr(self, name, torch.zeros(shape, dtype=torch.float64, device=device))
        self.low.fill_(math.inf)
        self.high.fill_(-math.inf)
        binned = any(name in BINNED for name in self.scores)
        self.histograms = Histograms(d_sae, bins, R * (1 + permutations), device) if binned else None

    def _layout(self) -> tuple[dict[str, slice], tuple[int, ...]]:
        """Where each group of columns lies, and how many columns take each power of z."""
        R, P, B = self.n_labels, self.permutations, self.bootstrap
        slices, powers, at = {}, [], 0
        for p in range(1, ORDER + 1):
            groups = {f"z{p}u{q}": R if q else 1 for q in range(ORDER + 1 - p)}
            if p == 1:
                groups |= {"positive": R, "permuted": R * P, "bootstrap": B, "bootstrap_u": R * B}
                if {"point_biserial", "contrastive"} & set(self.scores):
                    groups["permuted_positive"] = R * P
            if p == 2:
                groups |= {"positive2": R, "bootstrap2": B}
                if "squared_ratio" in self.scores:
                    groups["permuted_positive2"] = R * P
            for name, width in groups.items():
                slices[name] = slice(at, at + width)
                at += width
            powers.append(sum(groups.values()))
        return slices, tuple(powers)

    @property
    def n_columns(self) -> int:
        """Float64 numbers a feature, histograms not counted."""
        return sum(self._powers)

    @property
    def nbytes(self) -> int:
        """Memory of the state: 8 · d_sae · (n_columns + bins · columns of the histograms), and a little."""
        kept = sum(getattr(self, name).nbytes for name in self.STATE)
        return kept + (self.histograms.nbytes if self.histograms else 0)

    @property
    def n(self) -> int:
        """Samples seen."""
        return int(self.labels[0, 0])

    @property
    def device(self) -> torch.device:
        return self.sums.device

    def has(self, name: str) -> bool:
        """Whether a group of columns is kept."""
        return name in self._slices

    def columns(self, name: str, features=slice(None), label: int = 0) -> Tensor:
        """A group of columns of some features, `[features, width]`: of a group with a share for each reward, `label`'s.

        Groups are `z{p}u{q}`, `positive` and `positive2` (of z and z² where y > 0), one column each, `permuted`,
        `permuted_positive` and `permuted_positive2`, P each, and `bootstrap`, `bootstrap_u`, `bootstrap2`, B each.
        """
        group = self._slices[name]
        if not name.endswith("u0") and name not in ("bootstrap", "bootstrap2"):
            width = (group.stop - group.start) // self.n_labels
            group = slice(group.start + label * width, group.start + (label + 1) * width)
        return self.sums[features, group]

    @torch.no_grad()
    def update(self, pooled: Tensor, y: Tensor, block: int, *, backend: str | None = None) -> None:
        """Fold in a whole block: pooled activations `[N, d_sae]` and rewards `[N]` or `[N, n_labels]`.

        Parameters
        ----------
        block : the block's number, which no other block has; in this process or in any whose evidence is merged.

        Raises
        ------
        CorrSteerError : for wrong shapes, rewards that are not finite, a block that was seen before, and for negative
            activations where histograms are kept.
        """
        y = (y[:, None] if y.dim() == 1 else y).detach().to("cpu", torch.float64)
        if pooled.dim() != 2 or pooled.shape[1] != self.d_sae or y.shape != (len(pooled), self.n_labels):
            raise CorrSteerError(
                f"pooled must be [N, d_sae={self.d_sae}] and y [N, n_labels={self.n_labels}], "
                f"got {list(pooled.shape)} and {list(y.shape)}"
            )
        if not bool(torch.isfinite(y).all()):
            raise CorrSteerError("y must be finite, got NaN or infinite rewards; leave those samples out")
        if block < 0 or block in self.blocks:
            raise CorrSteerError(f"block must be a number from 0 on that was not given before, got {block}")
        if len(y) == 0:
            return
        if not self.blocks:
            self.origin.copy_(y.mean(0))
        u, positive = y - self.origin.cpu(), (y > 0).double()
        permuted, drawn = self._permutations(len(y), block), self._bootstrap_weights(len(y), block)
        weights = {f"z{p}u{q}": u**q if q else torch.ones(len(y), 1, dtype=torch.float64)
                   for p in range(1, ORDER + 1) for q in range(ORDER + 1 - p)}  # fmt: skip
        weights |= {
            "positive": positive,
            "positive2": positive,
            "permuted": _permute(u, permuted),
            "bootstrap": drawn,
            "bootstrap2": drawn,
            "bootstrap_u": (drawn[:, None] * u[:, :, None]).flatten(1),
        }
        for name in ("permuted_positive", "permuted_positive2"):
            if self.has(name):
                weights[name] = _permute(positive, permuted)
        if self.histograms:
            columns = torch.cat([positive, _permute(positive, permuted)], 1).to(self.device)
            self.histograms.update(pooled, columns, backend=backend)
        columns = torch.cat([weights[name] for name in self._slices], 1).to(self.device)
        ops.update_sums(pooled, columns, self.sums, self._powers, backend=backend)
        self.labels += torch.stack([(u**q).sum(0) for q in range(ORDER + 1)], 1).to(self.device)
        squares = [drawn[None].sum(1), u.T @ drawn, (u**2).T @ drawn]
        self.bootstrap_labels += torch.cat(squares).to(self.device)
        self.n_positive += positive.sum(0).to(self.device)
        self.low = torch.minimum(self.low, y.amin(0).to(self.device))
        self.high = torch.maximum(self.high, y.amax(0).to(self.device))
        self.blocks.add(block)

    def _permutations(self, n: int, block: int) -> Tensor:
        """`[P, n]`: in each row, which sample's label each sample of a block gets."""
        rng = np.random.default_rng([self.seed, block, 0])
        rows = np.tile(np.arange(n, dtype=np.int64), (self.permutations, 1))
        return torch.from_numpy(rng.permuted(rows, axis=1))

    def _bootstrap_weights(self, n: int, block: int) -> Tensor:
        """`[n, B]`, how often each replicate has each sample of a block."""
        rng = np.random.default_rng([self.seed, block, 1])
        return torch.from_numpy(rng.poisson(1.0, (n, self.bootstrap)).astype(np.float64))

    @torch.no_grad()
    def merge(self, other: Evidence) -> None:
        """Fold in the evidence of other blocks, such as another process's; the order does not matter."""
        mine, theirs = self._settings(), other._settings()
        for name, value in mine.items():
            if theirs[name] != value:
                raise CorrSteerError(f"other must have {name}={value}, got {theirs[name]}; merge runs of the same kind")
        both = sorted(self.blocks & other.blocks)
        if both:
            raise CorrSteerError(f"other must hold other blocks, but blocks {both[:8]} are in both")
        if not other.blocks:
            return
        if not self.blocks:
            self.origin.copy_(other.origin)
        shift = other.origin.to(self.device) - self.origin
        sums, labels, resampled = (t.to(self.device) for t in (other.sums, other.labels, other.bootstrap_labels))
        if bool((shift != 0).any()):
            sums, labels, resampled = other._about(shift, sums.clone(), labels.clone(), resampled.clone())
        self.sums += sums
        self.labels += labels
        self.bootstrap_labels += resampled
        self.n_positive += other.n_positive.to(self.device)
        self.low = torch.minimum(self.low, other.low.to(self.device))
        self.high = torch.maximum(self.high, other.high.to(self.device))
        if self.histograms:
            self.histograms.merge(other.histograms)
        self.blocks |= other.blocks

    def _about(self, shift: Tensor, sums: Tensor, labels: Tensor, resampled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same sums with u + shift for u, by the binomial theorem."""

        def expanded(of_power: list[Tensor], d: Tensor, q: int) -> Tensor:
            return sum(math.comb(q, k) * d ** (q - k) * of_power[k] for k in range(q + 1))

        R, B, old = self.n_labels, self.bootstrap, sums.clone()
        for r, d in enumerate(shift):
            for p in range(1, ORDER + 1):
                groups = [self._slices[f"z{p}u{q}"] for q in range(ORDER + 1 - p)]
                of_power = [old[:, g.start + (r if q else 0)] for q, g in enumerate(groups)]
                for q in range(1, len(groups)):
                    sums[:, groups[q].start + r] = expanded(of_power, d, q)
            labels[r] = torch.stack([expanded(list(labels[r].clone()), d, q) for q in range(ORDER + 1)])
            at, width = self._slices["permuted"].start, self.permutations
            sums[:, at + r * width : at + (r + 1) * width] += d * old[:, self._slices["z1u0"]]
            at = self._slices["bootstrap_u"].start
            sums[:, at + r * B : at + (r + 1) * B] += d * old[:, self._slices["bootstrap"]]
            of_power = [resampled[0], resampled[1 + r].clone(), resampled[1 + R + r].clone()]
            resampled[1 + r], resampled[1 + R + r] = (expanded(of_power, d, q) for q in (1, 2))
        return sums, labels, resampled

    def two_valued(self, label: int = 0) -> bool:
        """Whether a reward took one value <= 0, one value > 0, and no other."""
        low, high = float(self.low[label]), float(self.high[label])
        if not low <= 0 < high:
            return False
        a, b = low - float(self.origin[label]), high - float(self.origin[label])
        s = self.labels[label].tolist()
        # Σ (u - a)² (u - b)², which is 0 if nothing lies between
        product = np.polynomial.polynomial.polyfromroots([a, a, b, b])
        return abs(float(np.dot(product, s[:5]))) <= 1e-9 * s[0] * (b - a) ** 4

    def _settings(self) -> dict:
        names = ("d_sae", "n_labels", "permutations", "bootstrap", "scores", "bins", "seed")
        return {name: getattr(self, name) for name in names}

    def save(self, path) -> None:
        """Write the state to a safetensors file; `load` gives it back bit for bit."""
        tensors = {name: getattr(self, name).cpu().contiguous() for name in self.STATE}
        if self.histograms:
            tensors |= {"histogram_top": self.histograms.top.cpu(), "histogram_counts": self.histograms.counts.cpu()}
        described = self._settings() | {"blocks": sorted(self.blocks)}
        save_file(tensors, str(path), metadata={"format": FORMAT, "evidence": json.dumps(described)})

    @classmethod
    def load(cls, path, device="cpu") -> Evidence:
        """Read what `save` wrote."""
        if not Path(path).is_file():
            raise CorrSteerError(f"there is no evidence file at {path}")
        try:
            with safe_open(str(path), framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise CorrSteerError(f"{path} is not an evidence file of this version ({FORMAT})")
                described = json.loads(metadata["evidence"])
                blocks = described.pop("blocks")
                evidence = cls(**described, device=device)
                evidence.blocks = set(blocks)
                into = {name: getattr(evidence, name) for name in cls.STATE}
                if evidence.histograms:
                    histograms = evidence.histograms
                    into |= {"histogram_top": histograms.top, "histogram_counts": histograms.counts}
                for name, tensor in into.items():
                    if tuple(tensor.shape) != tuple(file.get_slice(name).get_shape()):
                        raise ValueError(f"{name} has another shape than its settings say")
                    tensor.copy_(file.get_tensor(name))
            return evidence
        except CorrSteerError:
            raise
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CorrSteerError(f"{path} is damaged ({error}); collect again") from None

    def __repr__(self) -> str:
        return f"Evidence(n={self.n}, d_sae={self.d_sae}, permutations={self.permutations}, bootstrap={self.bootstrap})"


def _permute(values: Tensor, permuted: Tensor) -> Tensor:
    """`[n, R · P]`: each column of `values: [n, R]` in every one of the orders `permuted: [P, n]`."""
    return torch.cat([values[:, r][permuted].T for r in range(values.shape[1])], 1)
