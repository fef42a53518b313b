"""Intervals of features' correlation with the reward, from `Evidence`.

Notation: n samples, B bootstrap replicates; r Pearson's correlation of a feature's pooled activation z with the reward
y; a and b are z and y, centred and scaled to variance 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.special import ndtri, stdtrit
from torch import Tensor

from corrsteer.arguments import share, whole
from corrsteer.errors import CorrSteerError
from corrsteer.stats import scores
from corrsteer.stats.evidence import ORDER, Evidence
from corrsteer.types import Features

METHODS = ("delta", "fisher", "bootstrap")
FAR = 50.0  # standard deviations from 0 of a mean past which sixth moments lose too much to rounding
FEW = 2.0  # samples that carry Σ a b below which its variance is not left to them


def fisher_interval(r: Tensor, n: int, level: float = 0.95) -> tuple[Tensor, Tensor]:
    """An interval of the correlation as if samples were bivariate normal: tanh(atanh r ± z / √(n - 3)).

    The standard error of atanh r is 1 / √(n - 3) (Fisher, "On the 'probable error' of a coefficient of correlation",
    1921), so that of r is (1 - r²) / √(n - 3). n counts all samples, not only, as in the paper's Proposition 2, those
    in which the feature is active (see `bench/propositions.py`). Pooled activations are not normal; `delta_interval`
    does without that.
    """
    level, n = share("level", level), whole("n (samples)", n, 0)
    if n < 4:
        return torch.full_like(r, torch.nan), torch.full_like(r, torch.nan)
    half = -ndtri((1 - level) / 2) / (n - 3) ** 0.5
    z = torch.atanh(r)
    return torch.tanh(z - half), torch.tanh(z + half)


def delta_interval(
    evidence: Evidence, level: float = 0.95, features: Features = slice(None), label: int = 0
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

    Samples of one prompt are not independent, and their influences would have to be summed by prompt, which moments do
    not tell: where a prompt had several samples there is no interval. See `cluster_interval`, which has it from the
    activations of a few features.

    Returns
    -------
    Low and high ends, `[features]` float64; NaN where the reward or the feature does not vary, where fewer than four
    samples were seen, for a feature whose mean is over 50 times its standard deviation, and where a prompt had several
    samples.
    """
    level = share("level", level)
    return ends(_influence(evidence, features, label), level)


def bootstrap_interval(
    evidence: Evidence, level: float = 0.95, features: Features = slice(None), label: int = 0
) -> tuple[Tensor, Tensor]:
    """The bias-corrected and accelerated interval of B Poisson bootstrap replicates of the correlation.

    BCa (Efron, "Better bootstrap confidence intervals", 1987), with the acceleration from the skewness of the samples'
    influence, and expanded to Student's quantile, as for few samples any percentile interval is too narrow (Hesterberg,
    "What teachers should know about the bootstrap", 2015). Its ends are quantiles of the replicates; 500 or more
    of these are enough for 95 %.

    A replicate has a prompt's samples all as often, so that it holds for several samples a prompt as well; then without
    acceleration, and with Student's quantile and Fisher's interval as if a prompt were one sample.

    Returns
    -------
    As `delta_interval`, and widened where few samples carry it as there. `within` prompts, NaN where rewards differ in
    fewer than four prompts.
    """
    if evidence.bootstrap < 20:
        raise CorrSteerError(
            f"evidence must hold at least 20 bootstrap replicates for an interval, got {evidence.bootstrap}; "
            f"collect with bootstrap=500"
        )
    level = share("level", level)
    of = _influence(evidence, features, label)
    quantile = of.quantile(level)
    replicates = bootstrap_correlations(evidence, features, label).sort(1).values
    B, apart = evidence.bootstrap, replicates - of.r[:, None]
    below = ((apart < -scores.TIE).double() + (apart <= scores.TIE).double()).mean(1) / 2
    bias = torch.special.ndtri(below.clamp(1 / B, 1 - 1 / B))
    acceleration = of.skew / 6

    def at(side: float) -> Tensor:
        moved = bias + side * quantile
        left = 1 - acceleration * moved
        # past its pole the formula would come back from the other end
        share = torch.where(left > 0, torch.special.ndtr(bias + moved / left), (moved > 0).double())
        rank = torch.where(quantile.isnan(), torch.nan, share) * (B - 1)
        lower = rank.floor().clamp(0, B - 1).nan_to_num().long()
        upper = (lower + 1).clamp(max=B - 1)
        low, high = (replicates.gather(1, k[:, None])[:, 0] for k in (lower, upper))
        return torch.lerp(low, high, rank - lower)

    return _widened(at(-1.0), at(1.0), of, level)


def bootstrap_correlations(evidence: Evidence, features: Features = slice(None), label: int = 0) -> Tensor:
    """Every bootstrap replicate's r, `[features, B]` float64; 0 where a replicate's variance is 0.

    `within` prompts, sums of z² and u² are of centred ones, and those of u are 0.
    """
    R = evidence.n_labels
    w, wu, wuu = (evidence.bootstrap_labels[at] for at in (0, 1 + label, 1 + R + label))
    z, zu, zz = (evidence.columns(name, features, label) for name in ("bootstrap", "bootstrap_u", "bootstrap2"))
    w = w.clamp(min=1)
    z_m2, u_m2 = zz if evidence.within else zz - z * z / w, wuu - wu * wu / w
    varies = (z_m2 > 1e-12 * zz) & (u_m2 > 1e-12 * wuu)
    r = (zu - z * wu / w) / torch.where(varies, z_m2 * u_m2, 1).sqrt()
    return torch.where(varies, r, 0).clamp(-1, 1)


def interval(
    evidence: Evidence, method: str = "delta", level: float = 0.95, features: Features = slice(None), label: int = 0
) -> tuple[Tensor, Tensor]:
    """Low and high ends of the correlation's interval by `delta`, `fisher` or `bootstrap`.

    Where a prompt had several samples, `delta` and `fisher`, which take samples for independent, are NaN.
    """
    if method not in METHODS:
        raise CorrSteerError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if method == "fisher":
        r, varies = scores.pearson(evidence, evidence.columns("z1u1", features, label), features, label)
        low, high = fisher_interval(r[:, 0], evidence.n, level)
        there = varies[:, 0] & (not evidence.clustered)
        return torch.where(there, low, torch.nan), torch.where(there, high, torch.nan)
    chosen = delta_interval if method == "delta" else bootstrap_interval
    return chosen(evidence, level, features, label)


@dataclass(frozen=True)
class Influence:
    """What an interval follows from, of features.

    Attributes
    ----------
    r : `[features]`.
    freedom : `[features]`, Student's degrees of freedom; NaN where there is no interval.
    skew : `[features]`, the skewness of Σ I.
    error : `[features]`, the standard error of atanh r; NaN where there is none.
    few : `[features]` bool, whether too few samples carry that.
    n : independent samples, or prompts.
    """

    r: Tensor
    freedom: Tensor
    skew: Tensor
    error: Tensor
    few: Tensor
    n: int

    def quantile(self, level: float) -> Tensor:
        """Student's, of a two-sided interval."""
        return torch.from_numpy(-stdtrit(self.freedom.cpu().numpy(), (1 - level) / 2)).to(self.r.device)


def ends(of: Influence, level: float) -> tuple[Tensor, Tensor]:
    """Low and high ends of the delta interval, `[features]`."""
    centre, quantile = torch.atanh(of.r), of.quantile(level)
    low = torch.tanh(centre - of.error * _unskewed(quantile, of.skew))
    high = torch.tanh(centre - of.error * _unskewed(-quantile, of.skew))
    low, high = _widened(low, high, of, level)
    perfect = (of.r**2 > 1 - 1e-7) & of.error.isfinite()  # the influence of every sample is rounding
    return torch.where(perfect, of.r, low), torch.where(perfect, of.r, high)


def _influence(evidence: Evidence, features: Features, label: int) -> Influence:
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
    error = variance.sqrt() / (1 - r**2).clamp(min=1e-12)
    carry_z, carry_u = n / k[4, 0], n / k[0, 4]  # how many samples carry Σ a² and Σ b²
    if evidence.clustered:  # how many prompts do, at least
        n = int(evidence.n_informative[label] if evidence.within else evidence.n_groups)
        carry_z, carry_u = n / k[4, 0], n / k[0, 4]
        r, varies = scores.pearson(evidence, evidence.columns("z1u1", features, label), features, label)
        r, trusted = r[:, 0], trusted & varies[:, 0] & (n > 3)
        skew, error = torch.zeros_like(r), torch.full_like(r, torch.nan)  # which moments do not tell
        if evidence.within:
            squares, fourth = (evidence.columns(name, features)[:, 0] for name in ("within2", "within4"))
            carry_z = squares**2 / torch.where(fourth > 0, fourth, 1)
            carry_u = (evidence.n / k[0, 4]).clamp(max=n)
    freedom = torch.minimum(carry_z, carry_u).clamp(min=1)
    few = carry_z * carry_u / max(n, 1) < FEW
    freedom, error = (torch.where(trusted, values, torch.nan) for values in (freedom, error))
    return Influence(r, freedom, skew, error, few, n)


def _widened(low: Tensor, high: Tensor, of: Influence, level: float) -> tuple[Tensor, Tensor]:
    """Ends that hold Fisher's interval where too few samples say how wide it is."""
    fisher = fisher_interval(of.r, of.n, level)
    return torch.where(of.few, low.minimum(fisher[0]), low), torch.where(of.few, high.maximum(fisher[1]), high)


def _unskewed(quantile: Tensor, skew: Tensor) -> Tensor:
    """The inverse of Hall's transformation g(t) = t + s t²/3 + s² t³/27 + s/6, s the skewness."""
    s = torch.where(skew.abs() < 1e-6, 1.0, skew)
    inner = 1 + s * (quantile - s / 6)
    root = inner.sign() * inner.abs() ** (1 / 3)
    return torch.where(skew.abs() < 1e-6, quantile, 3 / s * (root - 1))


def _standardised(evidence: Evidence, features: Features, label: int) -> tuple[dict[tuple[int, int], Tensor], Tensor]:
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
