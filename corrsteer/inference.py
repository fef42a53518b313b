"""What `Evidence` says: intervals of features' correlation, which of them chance explains, and errors of coefficients.

Notation: n samples, D features, P permutations, B bootstrap replicates; r Pearson's correlation of a feature's pooled
activation z with the reward y; a and b are z and y, centred and scaled to variance 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

from corrsteer import scores
from corrsteer.errors import CorrSteerError
from corrsteer.evidence import BINNED, ORDER, Evidence
from corrsteer.moments import COEFFICIENTS

METHODS = ("delta", "fisher", "bootstrap")
FEATURES_AT_A_TIME = 4096  # whose permutations are looked at together, 32 MB an array of 1000; fewer where binned
# Of the largest score, what counts as equal to the observed one: sums in another order differ by rounding (in float32,
# on GPUs), and of sparse features many permutations give the very same score.
TIE = 1e-6
FAR = 50.0  # standard deviations from 0 of a mean past which sixth moments lose too much to rounding
FEW = 2.0  # samples that carry Σ a b below which its variance is not left to them
LEVELS = 1 << 16  # of a score, to which the pooled null is rounded (up)


# Intervals of the correlation


def fisher_interval(r: Tensor, n: int, level: float = 0.95) -> tuple[Tensor, Tensor]:
    """An interval of the correlation as if samples were bivariate normal: tanh(atanh r ± z / √(n - 3)).

    The standard error of atanh r is 1 / √(n - 3) (Fisher, "On the 'probable error' of a coefficient of correlation",
    1921), so that of r is (1 - r²) / √(n - 3). n counts all samples, not only, as in the paper's Proposition 2, those
    in which the feature is active (see `bench/propositions.py`). Pooled activations are not normal; `delta_interval`
    does without that.
    """
    if n < 4:
        return torch.full_like(r, torch.nan), torch.full_like(r, torch.nan)
    half = stats.norm.isf((1 - level) / 2) / (n - 3) ** 0.5
    z = torch.atanh(r)
    return torch.tanh(z - half), torch.tanh(z + half)


def delta_interval(
    evidence: Evidence, level: float = 0.95, features=slice(None), label: int = 0
) -> tuple[Tensor, Tensor]:
    """A distribution-free interval of the correlation, from joint moments up to the sixth order.

    The influence of a sample on r is I = a b - r/2 (a² + b²), so Var(r) ≈ Σ I² / n², which needs fourth moments and
    nothing else of the distribution (Steiger & Hakstian, "The asymptotic distribution of elements of a correlation
    matrix", 1982). Of sparse features that is too small: few samples carry Σ I². Three corrections, each a sum over
    samples that moments give:

    - each I² is raised by its leverage, 1 + 2 (1 + a²) / n, the first order of the jackknife's 1 / (1 - h)² (MacKinnon
      & White, "Some heteroskedasticity-consistent covariance matrix estimators", 1985: HC3);
    - the skewness of Σ I bends the interval (Hall, "On the removal of skewness by transformation", 1992);
    - the quantile is Student's with n / max(Σ a⁴/n, Σ b⁴/n) degrees of freedom, the number of samples that carry the
      variance, about n s for a feature of frequency s (the degrees of freedom of Bell & McCaffrey, "Bias reduction in
      standard errors for linear regression with multi-stage samples", 2002, for one regressor).

    The interval is formed on the scale of atanh r. Where fewer than two samples carry Σ a b, by n / (Σ a⁴/n · Σ b⁴/n),
    such as those that are both active and rewarded where both are rare, they cannot tell its variance: there the
    interval is made to hold Fisher's, which is right for features that are independent of the reward.

    Returns
    -------
    Low and high ends, `[features]` float64; NaN where the reward or the feature does not vary, where fewer than four
    samples were seen, and for a feature whose mean is over 50 times its standard deviation.
    """
    of = _influence(evidence, level, features, label)
    centre = torch.atanh(of.r)
    low = torch.tanh(centre - of.error * _unskewed(of.quantile, of.skew))
    high = torch.tanh(centre - of.error * _unskewed(-of.quantile, of.skew))
    low, high = _widened(low, high, of, evidence.n, level)
    perfect = (of.r**2 > 1 - 1e-7) & of.error.isfinite()  # the influence of every sample is rounding
    return torch.where(perfect, of.r, low), torch.where(perfect, of.r, high)


def bootstrap_interval(
    evidence: Evidence, level: float = 0.95, features=slice(None), label: int = 0
) -> tuple[Tensor, Tensor]:
    """The bias-corrected and accelerated interval of B Poisson bootstrap replicates of the correlation.

    BCa (Efron, "Better bootstrap confidence intervals", 1987), with the acceleration from the skewness of the samples'
    influence, and expanded to Student's quantile, as for few samples any percentile interval is too narrow (Hesterberg,
    "What teachers should know about the bootstrap", 2015). Its ends are quantiles of the replicates; 500 or more
    of these are enough for 95 %.

    Returns
    -------
    As `delta_interval`, and widened where few samples carry it as there.
    """
    if evidence.bootstrap < 20:
        raise CorrSteerError(
            f"evidence must hold at least 20 bootstrap replicates for an interval, got {evidence.bootstrap}; "
            f"collect with bootstrap=500"
        )
    of = _influence(evidence, level, features, label)
    replicates = bootstrap_correlations(evidence, features, label).sort(1).values
    B, apart = evidence.bootstrap, replicates - of.r[:, None]
    below = ((apart < -TIE).double() + (apart <= TIE).double()).mean(1) / 2
    bias = torch.special.ndtri(below.clamp(1 / B, 1 - 1 / B))
    acceleration = of.skew / 6

    def at(side: float) -> Tensor:
        moved = bias + side * of.quantile
        left = 1 - acceleration * moved
        # past its pole the formula would come back from the other end
        share = torch.where(left > 0, torch.special.ndtr(bias + moved / left), (moved > 0).double())
        rank = torch.where(of.quantile.isnan(), torch.nan, share) * (B - 1)
        lower = rank.floor().clamp(0, B - 1).nan_to_num().long()
        upper = (lower + 1).clamp(max=B - 1)
        ends = (replicates.gather(1, k[:, None])[:, 0] for k in (lower, upper))
        return torch.lerp(*ends, rank - lower)

    return _widened(at(-1.0), at(1.0), of, evidence.n, level)


def bootstrap_correlations(evidence: Evidence, features=slice(None), label: int = 0) -> Tensor:
    """Every bootstrap replicate's r, `[features, B]` float64; 0 where a replicate's variance is 0."""
    R = evidence.n_labels
    w, wu, wuu = (evidence.bootstrap_labels[at] for at in (0, 1 + label, 1 + R + label))
    z, zu, zz = (evidence.columns(name, features, label) for name in ("bootstrap", "bootstrap_u", "bootstrap2"))
    w = w.clamp(min=1)
    z_m2, u_m2 = zz - z * z / w, wuu - wu * wu / w
    varies = (z_m2 > 1e-12 * zz) & (u_m2 > 1e-12 * wuu)
    r = (zu - z * wu / w) / torch.where(varies, z_m2 * u_m2, 1).sqrt()
    return torch.where(varies, r, 0).clamp(-1, 1)


def interval(
    evidence: Evidence, method: str = "delta", level: float = 0.95, features=slice(None), label: int = 0
) -> tuple[Tensor, Tensor]:
    """Low and high ends of the correlation's interval by `delta`, `fisher` or `bootstrap`."""
    if method not in METHODS:
        raise CorrSteerError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not 0 < level < 1:
        raise CorrSteerError(f"level must lie between 0 and 1, got {level}")
    if method == "fisher":
        r, varies = scores.pearson(evidence, evidence.columns("z1u1", features, label), features, label)
        ends = fisher_interval(r[:, 0], evidence.n, level)
        return tuple(torch.where(varies[:, 0], end, torch.nan) for end in ends)
    chosen = delta_interval if method == "delta" else bootstrap_interval
    return chosen(evidence, level, features, label)


@dataclass(frozen=True)
class _Influence:
    """`[features]` each: r, Student's quantile, the skewness of Σ I, the standard error of atanh r (NaN where there is
    no interval), and whether too few samples carry that."""

    r: Tensor
    quantile: Tensor
    skew: Tensor
    error: Tensor
    few: Tensor


def _influence(evidence: Evidence, level: float, features, label: int) -> _Influence:
    n = evidence.n
    k, trusted = _standardised(evidence, features, label)
    r = k[1, 1].clamp(-1, 1)
    square = k[2, 2] - r * (k[3, 1] + k[1, 3]) + r**2 / 4 * (k[4, 0] + 2 * k[2, 2] + k[0, 4])
    by_leverage = k[4, 2] - r * (k[5, 1] + k[3, 3]) + r**2 / 4 * (k[6, 0] + 2 * k[4, 2] + k[2, 4])
    cube = (
        k[3, 3]
        - r * 3 / 2 * (k[4, 2] + k[2, 4])
        + r**2 * 3 / 4 * (k[5, 1] + 2 * k[3, 3] + k[1, 5])
        - r**3 / 8 * (k[6, 0] + 3 * k[4, 2] + 3 * k[2, 4] + k[0, 6])
    )
    square = square.clamp(min=1e-30)  # 0, but for rounding, where r is 1
    variance = (square + 2 * (square + by_leverage.clamp(min=0)) / n) / n
    skew = (cube / square**1.5).clamp(-(n**0.5), n**0.5) / n**0.5
    freedom = (n / torch.maximum(k[4, 0], k[0, 4])).clamp(min=1)
    quantile = torch.from_numpy(stats.t.isf((1 - level) / 2, freedom.cpu().numpy())).to(r.device)
    error = torch.where(trusted, variance.sqrt() / (1 - r**2).clamp(min=1e-12), torch.nan)
    few = n / (k[4, 0] * k[0, 4]).clamp(min=1) < FEW
    return _Influence(r, torch.where(trusted, quantile, torch.nan), skew, error, few)


def _widened(low: Tensor, high: Tensor, of: _Influence, n: int, level: float) -> tuple[Tensor, Tensor]:
    """Ends that hold Fisher's interval where too few samples say how wide it is."""
    ends = fisher_interval(of.r, n, level)
    return torch.where(of.few, low.minimum(ends[0]), low), torch.where(of.few, high.maximum(ends[1]), high)


def _unskewed(quantile: Tensor, skew: Tensor) -> Tensor:
    """The inverse of Hall's transformation g(t) = t + s t²/3 + s² t³/27 + s/6, s the skewness."""
    s = torch.where(skew.abs() < 1e-6, 1.0, skew)
    inner = 1 + s * (quantile - s / 6)
    root = inner.sign() * inner.abs() ** (1 / 3)
    return torch.where(skew.abs() < 1e-6, quantile, 3 / s * (root - 1))


def _standardised(evidence: Evidence, features, label: int) -> tuple[dict[tuple[int, int], Tensor], Tensor]:
    """Moments E[a^p b^q] by (p, q), `[features]` each, and for which features they can be trusted."""
    evidence.check_label(label)
    n = max(evidence.n, 1)
    labels = evidence.labels[label] / n

    def raw(p: int, q: int) -> Tensor:
        return evidence.columns(f"z{p}u{q}", features, label)[:, 0] / n if p else labels[q]

    z, u = raw(1, 0), raw(0, 1)
    raws = {(p, q): raw(p, q) for p in range(ORDER + 1) for q in range(ORDER + 1 - p)}
    central = {
        (p, q): sum(
            math.comb(p, i) * math.comb(q, j) * (-z) ** (p - i) * (-u) ** (q - j) * raws[i, j]
            for i in range(p + 1)
            for j in range(q + 1)
        )
        for p, q in raws
    }
    z_var, u_var = central[2, 0], central[0, 2]
    varies = (z_var * FAR**2 > z**2) & (u_var > 1e-12 * raws[0, 2])
    z_std, u_std = torch.where(varies, z_var, 1).sqrt(), torch.where(varies, u_var, 1).sqrt()
    return {(p, q): c / (z_std**p * u_std**q) for (p, q), c in central.items()}, varies & (evidence.n > 3)


# Tests


@dataclass(frozen=True)
class Significance:
    """P-values of one layer's features, `[D]` float64 each.

    Attributes
    ----------
    p : of each feature's own permutations: how often |score| was as large or larger.
    p_layer : family-wise over the layer's features, for a selection that takes the best of each layer.
    p_adjusted : family-wise over all features of all layers. Never below `p_layer`, nor that below `p`.
    q : Benjamini & Hochberg's, over all features of all layers.
    """

    p: Tensor
    p_layer: Tensor
    p_adjusted: Tensor
    q: Tensor


def significance(evidences: Mapping[int, Evidence], name: str = "pearson", label: int = 0) -> dict[int, Significance]:
    """Permutation tests of every feature's score, of all layers together.

    - `p` = (1 + #{|score_π| >= |score|}) / (P + 1) (Phipson & Smyth, "Permutation p-values should never be zero",
      2010): exact where samples of a block are exchangeable, whatever their distribution. What is tested is that the
      feature and the reward are independent, not only uncorrelated.
    - Family-wise: the null of the *largest* |score|, with step-down, where the feature of rank k meets only those of
      ranks k and below (Westfall & Young 1993, algorithm 4.1, maxT). Features that go together cost no power.
    - False discoveries: q-values of Benjamini & Hochberg ("Controlling the false discovery rate", 1995), of p-values
      from the permutations of all features pooled (Tusher, Tibshirani & Chu, "Significance analysis of microarrays
      applied to the ionizing radiation response", 2001), as P + 1 is too few to tell p-values of one feature in a
      million apart. Scores are rounded to 1/65536 of the largest, in the direction of larger p-values.

    Parameters
    ----------
    evidences : layer -> evidence, all of the same blocks and permutations.

    Returns
    -------
    layer -> `Significance`.

    Raises
    ------
    CorrSteerError : where the score's permutations were not kept.
    """
    if not evidences:
        raise CorrSteerError("evidences must hold at least one layer, got none")
    first = next(iter(evidences.values()))
    for layer, evidence in evidences.items():
        scores.check(evidence, name, label)
        if not scores.testable(evidence, name, label):
            raise CorrSteerError(
                f"score {name!r} of layer {layer} has no permutations to be tested by; collect with permutations=1000 "
                f"and scores=[..., {name!r}]"
            )
        if _samples(evidence, label) != _samples(first, label):
            raise CorrSteerError(
                f"evidences must be of the same samples and permutations, but layer {layer} has {evidence!r} of seed "
                f"{evidence.seed}, and another {first!r} of seed {first.seed}"
            )
    if name == "contrastive":
        name = "point_biserial"
    layers = list(evidences)
    observed = [scores.score(evidences[layer], name, slice(None), label).abs().cpu() for layer in layers]
    sizes = [len(values) for values in observed]
    everything = torch.cat(observed)
    home = torch.cat([torch.full((size,), at) for at, size in enumerate(sizes)])
    index = torch.cat([torch.arange(size) for size in sizes])
    P = first.permutations
    together = max(1, FEATURES_AT_A_TIME // first.bins if name in BINNED else FEATURES_AT_A_TIME)

    order = everything.argsort(stable=True)
    largest = torch.zeros(P, dtype=torch.float64)  # of the features below, in each permutation
    largest_of_layer = torch.zeros(len(layers), P, dtype=torch.float64)
    # permutations as extreme as each feature: its own, its layer's, everybody's
    as_large = torch.zeros(3, len(everything), dtype=torch.float64)
    top = max(float(everything.max()), 1e-300)
    tie = TIE * top
    pooled = torch.zeros(LEVELS + 1, dtype=torch.float64)
    for at in range(0, len(order), together):
        here = order[at : at + together]
        null = torch.empty(len(here), P, dtype=torch.float64)
        for number, layer in enumerate(layers):
            mine = home[here] == number
            if not bool(mine.any()):
                continue
            features = index[here[mine]].to(evidences[layer].device)
            rows = scores.permuted(evidences[layer], name, features, label).abs().nan_to_num().cpu()
            null[mine] = rows
            running = torch.cat([largest_of_layer[number][None], rows]).cummax(0).values[1:]
            largest_of_layer[number] = running[-1]
            bound = everything[here[mine]][:, None] - tie
            as_large[1, here[mine]] = (running >= bound).sum(1).double()
        bound = everything[here][:, None] - tie
        running = torch.cat([largest[None], null]).cummax(0).values[1:]
        largest = running[-1]
        as_large[0, here] = (null >= bound).sum(1).double()
        as_large[2, here] = (running >= bound).sum(1).double()
        levels = (null * (LEVELS / top)).clamp(max=LEVELS).ceil().int()
        pooled += torch.bincount(levels.flatten(), minlength=LEVELS + 1)
    p, p_layer, p_adjusted = (1 + as_large) / (P + 1)
    downwards = order.flip(0)
    p_adjusted[downwards] = p_adjusted[downwards].cummax(0).values
    for number in range(len(layers)):
        mine = downwards[home[downwards] == number]
        p_layer[mine] = p_layer[mine].cummax(0).values

    exceeding = pooled.flip(0).cumsum(0).flip(0)
    level = ((everything - tie).clamp(min=0) * (LEVELS / top)).floor().long()
    q = benjamini_hochberg((1 + exceeding[level]) / (1 + pooled.sum()))
    parts = zip(*(values.split(sizes) for values in (p, p_layer, p_adjusted, q)))
    return {layer: Significance(*part) for layer, part in zip(layers, parts)}


def _samples(evidence: Evidence, label: int) -> tuple:
    """What evidences of the same samples and permutations have in common."""
    rewards = (float(t[label]) for t in (evidence.labels[:, 0], evidence.n_positive, evidence.low, evidence.high))
    return (evidence.permutations, evidence.seed, evidence.blocks, *rewards)


def benjamini_hochberg(p: Tensor) -> Tensor:
    """Adjusted p-values: the false discovery rate at which each would be let pass (Benjamini & Hochberg 1995)."""
    falling = p.argsort(descending=True, stable=True)
    m = len(p)
    scaled = p[falling] * m / torch.arange(m, 0, -1, dtype=p.dtype)
    out = torch.empty_like(p)
    out[falling] = scaled.cummin(0).values.clamp(max=1)
    return out


# Coefficients


def coefficient_error(evidence: Evidence, moments, kind: str, features=slice(None), label: int = 0) -> Tensor:
    """Standard errors of `moments.coefficient(kind)`, `[features]` float64; NaN for groups of fewer than two samples.

    A mean's is the group's standard deviation over the root of its size; a difference's the root of the sum of squares
    (Welch, "The generalization of 'Student's' problem when several different population variances are involved", 1947).
    For signed activations that of `mean_positive_active` is NaN, as squares are not kept by sign.
    """
    if kind not in COEFFICIENTS:
        raise CorrSteerError(f"coefficient must be one of {', '.join(COEFFICIENTS)}, got {kind!r}")
    n, n_positive = evidence.n, evidence.n_positive[label]
    squares = evidence.columns("positive2", features, label)[:, 0]
    sums = moments.group_sum[:, label, features]

    def square(total: Tensor, squares: Tensor, size) -> Tensor:
        size = torch.as_tensor(size, dtype=torch.float64, device=total.device)
        variance = (squares - total**2 / size.clamp(min=1)).clamp(min=0) / (size - 1).clamp(min=1)
        return torch.where(size > 1, variance / size.clamp(min=1), torch.nan)

    if kind == "mean_positive_active":
        active = moments.group_active_sum[0, label, features]
        unsigned = (moments.group_active_sum[:, label, features] == sums).all(0)
        error = square(active, squares, moments.group_active_count[0, label, features]).sqrt()
        return torch.where(unsigned, error, torch.nan)
    above = square(sums[0], squares, n_positive)
    if kind == "mean_positive":
        return above.sqrt()
    return (above + square(sums[1], evidence.columns("z2u0", features)[:, 0] - squares, n - n_positive)).sqrt()
