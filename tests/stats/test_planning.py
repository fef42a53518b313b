"""Sample-size planning: bounds against exact probabilities, correlations against simulation, and `corrsteer plan`."""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import betaincc
from scipy.stats import binom, nbinom, norm
from typer.testing import CliRunner

from corrsteer import CorrSteerError, planning
from corrsteer.cli import app
from corrsteer.cli.settings import MemorySettings

GRID = list(itertools.product((1, 2, 10, 100), (0.001, 0.01, 0.1, 0.5, 0.9), (0.5, 0.1, 0.05, 1e-3, 1e-9)))


def plan(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def fisher(r, n):
    return np.arctanh(r) * math.sqrt(n - 3)


def correlations(x, y):
    """Pearson's r along the last axis."""
    x, y = (a - a.mean(-1, keepdims=True) for a in (x, y))
    return (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))


@pytest.mark.parametrize("k, s, delta", GRID)
def test_the_exact_number_of_samples_is_enough_and_one_less_is_not(k, s, delta):
    n = planning.samples_exact(k, s, delta)
    accepted = delta * (1 + 1e-11)  # (100, 0.5, 0.5) is a tie, which scipy rounds to the wrong side
    assert binom.cdf(k - 1, n, s) <= accepted < binom.cdf(k - 1, n - 1, s)
    if delta >= 1e-3:  # below, 1 - delta loses digits
        assert n == k + nbinom.ppf(1 - accepted, k, s)


def test_exact_numbers_at_the_edges():
    assert planning.samples_exact(7, 1.0, 0.05) == 7, "a feature that is always active"
    assert planning.samples_exact(1, 0.5, 0.25) == 2, "a probability of exactly 1 - delta suffices"
    assert planning.samples_exact(100, 0.5, 0.5) == 199, "also where it is rounded"
    assert planning.samples_exact(1, 0.3, 1 - 1e-12) == 1
    assert planning.samples_exact(1, 0.003, 1e-30) == math.ceil(math.log(1e-30) / math.log1p(-0.003))


def test_a_miss_has_the_binomial_probability():
    for n, k, s in ((1, 1, 0.2), (5, 6, 0.2), (50, 3, 0.04), (1000, 10, 0.01), (10**6, 1000, 0.001), (10, 3, 1.0)):
        assert planning.miss_probability(n, k, s) == pytest.approx(binom.cdf(k - 1, n, s), rel=1e-9)


def test_the_exact_number_of_samples_reaches_its_confidence_in_simulation():
    k, s, delta = 10, 0.02, 0.05
    n = planning.samples_exact(k, s, delta)
    seen = np.random.default_rng(0).binomial(n, s, 200_000) >= k
    assert seen.mean() == pytest.approx(binom.sf(k - 1, n, s), abs=3 * math.sqrt(0.05 / 200_000))


@settings(max_examples=300, deadline=None)
@given(k=st.integers(1, 500), s=st.floats(1e-4, 1), log_delta=st.floats(-60, -1e-6))
def test_both_bounds_are_sufficient_everywhere(k, s, log_delta):
    delta = math.exp(log_delta)
    needed = planning.samples_to_see(k, s, delta)
    for n in (needed.chernoff, needed.hoeffding):
        # the binomial distribution function, of which SciPy's own is NaN for thousands of millions of samples
        assert n >= needed.exact and betaincc(k, n - k + 1, s) <= delta


@pytest.mark.parametrize("k, s, delta", GRID)
def test_each_bound_is_the_first_number_of_samples_that_its_inequality_admits(k, s, delta):
    def chernoff(n):
        return math.exp(-((n * s - (k - 1)) ** 2) / (2 * n * s)) if n * s > k - 1 else 1

    def hoeffding(n):
        return math.exp(-2 * (n * s - (k - 1)) ** 2 / n) if n * s > k - 1 else 1

    for bound, n in (
        (chernoff, planning.samples_chernoff(k, s, delta)),
        (hoeffding, planning.samples_hoeffding(k, s, delta)),
    ):
        assert bound(n) <= delta * (1 + 1e-9)
        assert n == k or bound(n - 1) > delta * (1 - 1e-9)


def test_the_published_number_of_samples_is_not_enough_and_gets_worse_with_k():
    missed = [binom.cdf(k - 1, planning.samples_as_published(k, 0.01, 0.05), 0.01) for k in (1, 10, 100, 10_000)]
    assert missed[0] > 0.05 and missed[1] > 0.3 and missed == sorted(missed)
    assert missed[-1] == pytest.approx(0.5, abs=0.01)
    assert planning.samples_as_published(10, 0.01, 0.05) == math.ceil(1000 + math.sqrt(math.log(20) / 2e-4))


def test_chernoffs_number_grows_as_1_over_s_and_hoeffdings_as_1_over_s_squared():
    for way, growth in ((planning.samples_chernoff, 10), (planning.samples_hoeffding, 100)):
        assert way(10, 1e-6, 0.05) / way(10, 1e-5, 0.05) == pytest.approx(growth, rel=0.01)


def test_a_detectable_correlation_is_detected_with_the_stated_power():
    n, tests, power = 120, 50, 0.8
    r = planning.detectable_correlation(n, features=10, layers=5, alpha=0.05, power=power)
    critical = norm.isf((1 - 0.95 ** (1 / tests)) / 2)
    rng = np.random.default_rng(0)
    x, noise = rng.standard_normal((2, 20_000, n))
    found = abs(fisher(correlations(x, r * x + math.sqrt(1 - r * r) * noise), n)) > critical
    assert found.mean() == pytest.approx(power, abs=0.015)


def test_the_family_of_tests_keeps_to_alpha():
    n, tests = 60, 20
    x = np.random.default_rng(1).standard_normal((8000, tests + 1, n))
    largest = abs(fisher(correlations(x[:, 1:], x[:, :1]), n)).max(1)
    # with a power of 1/2 the detectable correlation is the critical value itself
    critical = fisher(planning.detectable_correlation(n, tests, alpha=0.05, power=0.5), n)
    assert (largest > critical).mean() == pytest.approx(0.05, abs=0.008)


def test_samples_to_detect_is_the_inverse_of_detectable_correlation():
    for r, features, layers in ((0.1, 16384, 1), (-0.05, 16384, 26), (0.9, 10, 1), (0.02, 1, 1)):
        n = planning.samples_to_detect(r, features, layers)
        assert planning.detectable_correlation(n, features, layers) <= abs(r) * (1 + 1e-12)
        assert n == 4 or planning.detectable_correlation(n - 1, features, layers) > abs(r)


def test_the_largest_correlation_by_chance_is_that_of_simulation():
    for n, features in ((30, 100), (30, 1), (5, 40)):
        x = np.random.default_rng(2).standard_normal((4000, features + 1, n))
        largest = abs(correlations(x[:, 1:], x[:, :1])).max(1)
        error = largest.std() / math.sqrt(len(largest))
        assert planning.chance_correlation(n, features) == pytest.approx(largest.mean(), abs=4 * error)


def test_the_largest_correlation_by_chance_is_a_little_below_the_usual_estimate():
    for n, layers in ((4000, 1), (4000, 26), (10**8, 1)):
        usual = math.sqrt(2 * math.log(16384 * layers) / n)
        assert 0.92 * usual < planning.chance_correlation(n, 16384, layers) < usual
    assert planning.chance_correlation(4000) == pytest.approx(0.0653, abs=1e-4)
    exact = math.gamma(4.5) / math.sqrt(math.pi) / math.gamma(5)
    assert planning.chance_correlation(10, 1) == pytest.approx(exact, rel=1e-6)


def test_the_interval_is_as_wide_as_simulated_intervals_and_covers():
    r, n = 0.4, 200
    rng = np.random.default_rng(3)
    x, noise = rng.standard_normal((2, 10_000, n))
    z = np.arctanh(correlations(x, r * x + math.sqrt(1 - r * r) * noise))
    half = 1.959964 / math.sqrt(n - 3)
    low, high = np.tanh(z - half), np.tanh(z + half)
    assert planning.interval_width(r, n) == pytest.approx((high - low).mean(), rel=0.01)
    assert ((low < r) & (r < high)).mean() == pytest.approx(0.95, abs=0.008)


@pytest.mark.parametrize(
    "r, s, q, n", [(0.0, 0.02, 0.5, 4000), (0.1, 0.01, 0.5, 20_000), (0.3, 0.1, 0.3, 4000), (-0.2, 0.3, 0.8, 4000),
                   (0.6, 0.5, 0.5, 1000), (0.5, 0.02, 0.03, 20_000)]
)  # fmt: skip
def test_the_sparse_interval_is_as_wide_as_the_spread_of_simulated_correlations(r, s, q, n):
    both = s * q + r * math.sqrt(s * (1 - s) * q * (1 - q))
    cells = np.random.default_rng(4).multinomial(n, [both, s - both, q - both, 1 - s - q + both], 40_000)
    a, b, c, d = cells.T.astype(float)
    phi = (a * d - b * c) / np.sqrt((a + b) * (c + d) * (a + c) * (b + d))
    assert phi.mean() == pytest.approx(r, abs=0.01)
    assert planning.interval_width_sparse(r, n, s, q) == pytest.approx(2 * 1.96 * phi.std(), rel=0.03)


def test_the_sparse_interval_is_the_normal_one_without_correlation_and_need_not_be_with_it():
    assert planning.interval_width_sparse(0, 500, 0.001, 0.3) == pytest.approx(planning.interval_width(0, 500))
    assert planning.interval_width_sparse(0.5, 500, 0.02, 0.03) > 1.9 * planning.interval_width(0.5, 500)
    assert planning.interval_width_sparse(0.1, 4000, 0.01, 0.5) < 0.6 * planning.interval_width(0.1, 4000)


def test_a_correlation_that_no_table_has_is_refused_with_the_range_that_there_is():
    low, high = planning.correlation_bounds(0.01, 0.5)
    assert (low, high) == pytest.approx((-math.sqrt(1 / 99), math.sqrt(1 / 99)))
    planning.interval_width_sparse(high, 100, 0.01, 0.5)
    with pytest.raises(CorrSteerError, match=r"r .* must be between -0.1005 and 0.1005 .* got 0.2"):
        planning.interval_width_sparse(0.2, 100, 0.01, 0.5)
    assert planning.correlation_bounds(0.3, 0.3)[1] == pytest.approx(1)


def test_the_asymptotic_variance_is_the_well_known_one_for_normal_moments():
    for r in (0.0, 0.3, -0.8):
        assert planning.asymptotic_variance(r, 1 + 2 * r * r, 3 * r, 3 * r, 3, 3) == pytest.approx((1 - r * r) ** 2)
    assert planning.asymptotic_variance(0, 1, 5, -7, 1000, 90) == 1, "independent, with whatever tails"


@pytest.mark.parametrize(
    "function, arguments, message",
    [
        (planning.samples_exact, (0, 0.1, 0.05), "k .activations. must be a whole number of at least 1, got 0"),
        (planning.samples_to_see, (1.5, 0.1, 0.05), "k .activations. must be a whole number of at least 1, got 1.5"),
        (planning.samples_chernoff, (1, 0, 0.05), "s .frequency. must be between 1e-9 and 1, got 0"),
        (planning.samples_hoeffding, (1, math.nan, 0.05), "s .frequency. must be .* got nan"),
        (planning.samples_as_published, (1, 0.1, 1), "delta .1 - confidence. must be between 0 and 1, got 1"),
        (planning.samples_as_published, (1, 0, 0.1), "s .frequency. must be between 1e-9 and 1, got 0"),
        (planning.miss_probability, (0, 1, 0.1), "n .samples. must be a whole number of at least 1, got 0"),
        (planning.detectable_correlation, (3,), "n .samples. must be a whole number of at least 4, got 3"),
        (planning.detectable_correlation, (30, 0), "features must be a whole number of at least 1, got 0"),
        (planning.detectable_correlation, (30, 1, -1), "layers must be a whole number of at least 1, got -1"),
        (planning.detectable_correlation, (30, 1, 1, 1.0), "alpha must be between 0 and 1, got 1.0"),
        (planning.detectable_correlation, (30, 1, 1, 0.1, 0.05), "power must be above alpha=0.1, got 0.05"),
        (planning.samples_to_detect, (0,), "r .correlation. must differ from 0"),
        (planning.samples_to_detect, (1.0,), "r .correlation. must be between -1 and 1, got 1.0"),
        (planning.chance_correlation, (math.inf,), "n .samples. must be a whole number of at least 3, got inf"),
        (planning.interval_width, (0.1, 50, 1.5), "level must be between 0 and 1, got 1.5"),
        (planning.interval_width_sparse, (0.1, 50, 1.0, 0.5), "frequency must be between 0 and 1, got 1.0"),
        (planning.interval_width_sparse, (0.1, 50, 0.1, 0), "reward_rate must be between 0 and 1, got 0"),
    ],
)
def test_an_impossible_argument_is_named_with_what_it_must_be(function, arguments, message):
    with pytest.raises(CorrSteerError, match=message):
        function(*arguments)


def test_plan_prints_what_planning_says():
    result = json.loads(plan("--frequency", 0.02, "--activations", 5, "--samples", 900, "--layers", 3, "--json").stdout)
    needed = planning.samples_to_see(5, 0.02, 1 - 0.95)
    assert {name: result["see"][name] for name in vars(needed)} == vars(needed)
    assert result["see"]["confidence_with_samples"] == pytest.approx(binom.sf(4, 900, 0.02))
    assert result["see"]["confidence_as_published"] < 0.95
    assert result["detect"] == {
        "chance_correlation": planning.chance_correlation(900, 16384, 3),
        "detectable_correlation": planning.detectable_correlation(900, layers=3),
        "samples_to_detect": planning.samples_to_detect(0.1, layers=3),
    }
    assert result["know"]["interval_width"] == planning.interval_width(0.1, 900)
    assert result["know"]["interval_width_sparse"] == planning.interval_width_sparse(0.1, 900, 0.02, 0.5)


def test_plan_reads_well_and_explains_every_option():
    text = plan().stdout
    assert "samples needed" in text and "1568" in text and "0.065" in text and max(map(len, text.splitlines())) <= 100
    lines = [line for line in plan("--help").output.splitlines() if line.strip().startswith("--")]
    assert len(lines) == 14 + len(MemorySettings.model_fields) and all(len(line.split()) > 2 for line in lines)


def test_plan_says_where_a_rare_feature_cannot_correlate_so_much():
    assert "r is impossible" in plan("--frequency", 0.001).stdout
    know = json.loads(plan("--frequency", 0.001, "--json").stdout)["know"]
    assert know["interval_width_sparse"] is None and know["highest_possible"] == pytest.approx(0.0316, abs=1e-4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--frequency", 2), "s (frequency) must be between 1e-9 and 1, got 2.0"),
        (("--confidence", 95), "confidence must be between 0 and 1, got 95"),
        (("--alpha", 1e-320), "alpha must be at least 1e-300 for each of the tests, got 1e-320"),
        (("--correlation", 1e-99), "r (correlation) must differ from 0 by 1e-9 or more to be detected, got 1e-99"),
        (("--samples", 0), "n (samples) must be a whole number of at least 1, got 0"),
    ],
)
def test_plan_ends_with_one_line_for_a_mistake(arguments, message):
    result = plan(*arguments)
    assert result.exit_code == 1 and result.stderr.strip() == f"error: {message}"
