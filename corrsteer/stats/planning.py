"""How many samples a run needs: to see a feature at all, to tell its correlation from chance, and to know it well.

**Seeing a feature.** It is active in a sample with probability s, in X ~ Binomial(N, s) of N samples. To see it at
least k times with confidence 1 - δ is to avoid X <= m, m = k - 1. Both bounds are for m <= Ns, and L is ln(1/δ).

- Chernoff, P(X <= (1 - η)Ns) <= exp(-η²Ns/2) (Mitzenmacher & Upfal 2005, Theorem 4.5), with (1 - η)Ns = m:
  exp(-(Ns - m)²/(2Ns)) <= δ means Ns - √(2L)·√(Ns) - m >= 0, so √(Ns) >= (√(2L) + √(2L + 4m))/2, the larger root.
  With (a + b)² <= 2a² + 2b², N <= (2L + 2m)/s: **N = O((k + log(1/δ))/s)**.
- Hoeffding, P(X <= Ns - t) <= exp(-2t²/N) (Hoeffding 1963, eq. 2.3), with Ns - t = m:
  exp(-2(Ns - m)²/N) <= δ means s·N - √(L/2)·√N - m >= 0, so √N >= (√(L/2) + √(L/2 + 4sm))/(2s).
  **N = O(k/s + log(1/δ)/s²)**, as it does not know that a rare feature's count varies little.

Cho, Wu & Koshiyama (2025, arXiv:2508.12535, Proposition 1) start from Hoeffding's with k for m, but give
N >= k/s + √(L/(2s²)): the deviation Ns - k >= √(NL/2) without its √N. Then Ns - k is the same √(L/2) for every k, while
X has a standard deviation of about √k: the chance of seeing too few goes to 1/2 as k grows, whatever δ.

**Samples** are independent here. Several completions of one prompt are not: count prompts. As far as what is asked for
differs within prompts, that is more than enough.

**Correlations.** Pearson's r on Fisher's scale, z = atanh r, varies with standard error 1/√(n - 3) (Fisher 1921) if
activation and reward are jointly normal. `interval_width_sparse` is for those that are anything but.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from scipy.integrate import quad
from scipy.special import betaincc, betainccinv

from corrsteer.arguments import number, share, whole
from corrsteer.errors import CorrSteerError

NORMAL = NormalDist()


@dataclass(frozen=True)
class SamplesToSee:
    """Samples in which a feature is active at least k times, with confidence 1 - δ.

    Attributes
    ----------
    exact : the fewest.
    chernoff, hoeffding : enough, by the bound of that name.
    as_published : what the paper's formula gives, which is mostly not enough.
    """

    exact: int
    chernoff: int
    hoeffding: int
    as_published: int


def samples_to_see(k: int, s: float, delta: float) -> SamplesToSee:
    """All four numbers of samples, for the arguments of `samples_exact`."""
    ways = (samples_exact, samples_chernoff, samples_hoeffding, samples_as_published)
    return SamplesToSee(*(way(k, s, delta) for way in ways))


def miss_probability(n: int, k: int, s: float) -> float:
    """Chance that a feature of frequency s is active in fewer than k of n samples: P(Binomial(n, s) < k).

    It is 1 - I_s(k, n - k + 1), with I the regularised incomplete beta function.
    """
    whole("n (samples)", n, 1)
    _seeing(k, s)
    return float(betaincc(k, n - k + 1, s)) if n >= k else 1.0


def samples_exact(k: int, s: float, delta: float) -> int:
    """The smallest N with P(Binomial(N, s) >= k) >= 1 - δ.

    Parameters
    ----------
    k : activations to see, at least 1.
    s : share of samples in which the feature is active, 1e-9 to 1.
    delta : δ, accepted chance of seeing fewer, between 0 and 1.

    N - k is the 1 - δ quantile of the negative binomial distribution of inactive samples before the k-th active one; it
    is found by bisection, as the chance of a miss falls with N, which keeps small δ exact where 1 - δ rounds to 1.
    """
    enough = samples_chernoff(k, s, delta)
    short = int(k) - 1  # too few: k activations take k samples
    accepted = delta * (1 + 1e-12)  # a probability that is δ up to rounding counts as δ
    while enough - short > 1:
        middle = (enough + short) // 2
        short, enough = (short, middle) if miss_probability(middle, k, s) <= accepted else (middle, enough)
    return enough


def samples_chernoff(k: int, s: float, delta: float) -> int:
    """Enough samples by Chernoff's bound, (√(2L) + √(2L + 4m))² / 4s with m = k - 1; see the module for the proof."""
    spread = 2 * _log_inverse(k, s, delta)
    return _up(((math.sqrt(spread) + math.sqrt(spread + 4 * (k - 1))) / 2) ** 2 / s, k)


def samples_hoeffding(k: int, s: float, delta: float) -> int:
    """Enough samples by Hoeffding's bound, (√(L/2) + √(L/2 + 4sm))² / 4s² with m = k - 1; see the module."""
    spread = _log_inverse(k, s, delta) / 2
    return _up(((math.sqrt(spread) + math.sqrt(spread + 4 * s * (k - 1))) / (2 * s)) ** 2, k)


def samples_as_published(k: int, s: float, delta: float) -> int:
    """k/s + √(L/(2s²)), as in Proposition 1 of the paper: for comparison, as it is not enough; see the module."""
    return _up((k + math.sqrt(_log_inverse(k, s, delta) / 2)) / s, k)


def detectable_correlation(
    n: int, features: int = 16384, layers: int = 1, alpha: float = 0.05, power: float = 0.8
) -> float:
    """The smallest |r| that n samples tell from 0 with the given power, when every feature of every layer is tested.

    Parameters
    ----------
    n : samples, at least 4.
    features, layers : M = features · layers two-sided tests.
    alpha : chance of one false discovery or more among all of them.
    power : chance that the correlation is found; above alpha.

    Each test is at 1 - (1 - α)^(1/M), which holds the family at α whatever the features' dependence (Šidák 1967,
    Theorem 1) as far as they are jointly normal. A feature is found when √(n - 3)·|atanh r| exceeds that level's
    quantile c, so the answer is tanh((c + Φ⁻¹(power)) / √(n - 3)). Where feature and reward are both rare, r has
    heavier tails than Fisher's z supposes: test by permutation then, and take this as a guide.
    """
    whole("n (samples)", n, 4)
    return math.tanh(_separation(features, layers, alpha, power) / math.sqrt(n - 3))


def samples_to_detect(r: float, features: int = 16384, layers: int = 1, alpha: float = 0.05, power: float = 0.8) -> int:
    """The fewest samples whose `detectable_correlation` is at most |r|: ((c + Φ⁻¹(power)) / atanh r)² + 3."""
    _correlation(r)
    if abs(r) < 1e-9:
        raise CorrSteerError(f"r (correlation) must differ from 0 by 1e-9 or more to be detected, got {r}")
    return _up((_separation(features, layers, alpha, power) / math.atanh(abs(r))) ** 2 + 3, 4)


def chance_correlation(n: int, features: int = 16384, layers: int = 1) -> float:
    """Expected largest |r| among features · layers = M independent features none of which goes with the reward.

    For n >= 3 samples and a normal reward, r² ~ Beta(1/2, (n - 2)/2) (Fisher 1915). The largest exceeds its v-quantile
    as often as one |r| exceeds the 1 - v^(1/M) upper quantile, and the mean is the integral of that over v in [0, 1].
    For large M and n it is a little below √(2 ln M / n). Dependent features give less (Šidák 1967), rare features
    with a reward that is itself rare more.
    """
    whole("n (samples)", n, 3)
    tests = _tests(features, layers)
    return quad(lambda v: math.sqrt(betainccinv(0.5, (n - 2) / 2, -math.expm1(math.log(v) / tests))), 0, 1)[0]


def interval_width(r: float, n: int, level: float = 0.95) -> float:
    """Width of the confidence interval tanh(atanh r ± q/√(n - 3)), q = Φ⁻¹((1 + level)/2), if all is jointly normal.

    Parameters
    ----------
    r : correlation, between -1 and 1.
    n : samples, at least 4.
    level : confidence, between 0 and 1.
    """
    return _width(r, n, level, 1.0)


def interval_width_sparse(r: float, n: int, frequency: float, reward_rate: float, level: float = 0.95) -> float:
    """The same for a feature that is on or off and a reward that is 1 or 0.

    Parameters
    ----------
    frequency : s, share of samples in which the feature is on, between 0 and 1.
    reward_rate : q, share of samples with reward 1, between 0 and 1.

    Raises
    ------
    CorrSteerError : where no 2 x 2 table has these margins and this r; `correlation_bounds` says which r there are.

    A standardised Bernoulli variable has a² = 1 + γa with γ = (1 - 2s)/√(s(1 - s)), and the reward b² = 1 + ηb.
    So E[a²b²] = 1 + γηr, E[a³b] = r(1 + γ²), E[a⁴] = 1 + γ², and `asymptotic_variance` becomes
    V = 1 - r² + γηr(1 + r²/2) - ¾r²(γ² + η²), the variance of Bishop, Fienberg & Holland (1975, p. 386). On Fisher's
    scale the standard error is √V / ((1 - r²)√(n - 3)), so that V = (1 - r²)², the normal one, gives `interval_width`.
    V is for many samples: of each of the table's four kinds there should be several.
    """
    _correlation(r)
    low, high = correlation_bounds(frequency, reward_rate)
    if not low - 1e-12 <= r <= high + 1e-12:
        raise CorrSteerError(
            f"r (correlation) must be between {low:.4g} and {high:.4g} for a feature that is on in {frequency:.4g} and "
            f"a reward that is 1 in {reward_rate:.4g} of the samples, got {r:.4g}"
        )
    skews = [(1 - 2 * p) / math.sqrt(p * (1 - p)) for p in (frequency, reward_rate)]
    squares = [1 + skew * skew for skew in skews]
    variance = asymptotic_variance(r, 1 + skews[0] * skews[1] * r, *(r * m for m in squares), *squares)
    return _width(r, n, level, math.sqrt(max(variance, 0)) / (1 - r * r))


def correlation_bounds(frequency: float, reward_rate: float) -> tuple[float, float]:
    """Lowest and highest r of a feature that is on or off and a reward that is 1 or 0.

    The share with both, sq + r√(s(1 - s)q(1 - q)), lies between max(0, s + q - 1) and min(s, q) (Fréchet 1951).
    """
    share("frequency", frequency)
    share("reward_rate", reward_rate)
    both = frequency * reward_rate
    scale = math.sqrt(both * (1 - frequency) * (1 - reward_rate))
    return (max(0.0, frequency + reward_rate - 1) - both) / scale, (min(frequency, reward_rate) - both) / scale


def asymptotic_variance(r: float, m22: float, m31: float, m13: float, m40: float, m04: float) -> float:
    """n · Var(r) of n independent samples as n grows, from the joint moments m_ij = E[a^i b^j] of standardised a and b.

    A sample moves r by ab - r(a² + b²)/2 (Devlin, Gnanadesikan & Kettenring 1975), a quantity of mean 0, and its
    variance is m22(1 + r²/2) + r²(m40 + m04)/4 - r(m31 + m13) (Hawkins 1989). It is (1 - r²)² under normality, and 1
    under independence whatever the distributions.
    """
    return m22 * (1 + r * r / 2) + r * r * (m40 + m04) / 4 - r * (m31 + m13)


def _separation(features: int, layers: int, alpha: float, power: float) -> float:
    """How many standard errors from 0 a correlation must lie on Fisher's scale."""
    share("alpha", alpha)
    share("power", power)
    if power <= alpha:
        raise CorrSteerError(f"power must be above alpha={alpha:.4g}, got {power:.4g}")
    level = -math.expm1(math.log1p(-alpha) / _tests(features, layers))
    if level < 1e-300:
        raise CorrSteerError(f"alpha must be at least 1e-300 for each of the tests, got {alpha}")
    return NORMAL.inv_cdf(power) - NORMAL.inv_cdf(level / 2)


def _width(r: float, n: int, level: float, inflation: float) -> float:
    _correlation(r)
    whole("n (samples)", n, 4)
    share("level", level)
    half = -NORMAL.inv_cdf((1 - level) / 2) * inflation / math.sqrt(n - 3)
    return math.tanh(math.atanh(r) + half) - math.tanh(math.atanh(r) - half)


def _log_inverse(k: int, s: float, delta: float) -> float:
    _seeing(k, s)
    share("delta (1 - confidence)", delta)
    return -math.log(delta)


def _up(samples: float, least: int) -> int:
    return max(math.ceil(samples), int(least))


def _seeing(k: int, s: float) -> None:
    whole("k (activations)", k, 1)
    if not 1e-9 <= number("s (frequency)", s) <= 1:
        raise CorrSteerError(f"s (frequency) must be between 1e-9 and 1, got {s}")


def _tests(features: int, layers: int) -> int:
    whole("features", features, 1)
    whole("layers", layers, 1)
    return features * layers


def _correlation(r: float) -> None:
    if not -1 < number("r (correlation)", r) < 1:
        raise CorrSteerError(f"r (correlation) must be between -1 and 1, got {r}")
