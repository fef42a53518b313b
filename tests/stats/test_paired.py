import itertools
import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as reference_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from corrsteer import CorrSteerError
from corrsteer.stats.paired import difference, holm, mcnemar, mean, paired_p_value


def pairs(both: int, gained: int, lost: int, neither: int) -> tuple[list[int], list[int]]:
    """Rewards before and after, of so many samples of each kind."""
    before = [1] * both + [0] * gained + [1] * lost + [0] * neither
    return before, [1] * both + [1] * gained + [0] * lost + [0] * neither


@pytest.mark.parametrize(("successes", "n"), ((0, 1), (1, 1), (0, 30), (17, 40), (40, 40), (123, 1000)))
@pytest.mark.parametrize("level", (0.9, 0.95))
def test_the_mean_of_right_and_wrong_has_wilsons_interval(successes, n, level):
    value, low, high = mean([1.0] * successes + [0.0] * (n - successes), level)
    expected = proportion_confint(successes, n, 1 - level, method="wilson")
    assert value == successes / n and (low, high) == pytest.approx(expected, abs=1e-12)


def test_the_mean_of_graded_rewards_has_the_bca_bootstraps_interval():
    rewards = np.random.default_rng(1).exponential(size=60).tolist()
    expected = stats.bootstrap((rewards,), np.mean, method="BCa", n_resamples=9999, rng=2).confidence_interval
    value, low, high = mean(rewards)
    assert value == pytest.approx(np.mean(rewards))
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.02)
    assert mean(rewards) == (value, low, high)  # the same bits again


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("unit", (1e-300, 1e-9, 1.0, 1e9, 1e300))
def test_the_bootstraps_interval_is_in_the_unit_of_the_rewards(unit):
    rewards = np.random.default_rng(4).exponential(size=9).tolist()
    scaled, shifted = mean([unit * reward for reward in rewards]), mean([reward + 1e3 for reward in rewards])
    expected = pytest.approx(mean(rewards), rel=0.01)  # rounding decides between means that are equal
    assert [end / unit for end in scaled] == expected and [end - 1e3 for end in shifted] == expected


@pytest.mark.parametrize("rewards", ([0.3], [0.1] * 7, [-2.0, -2.0]))
def test_equal_graded_rewards_say_nothing_of_the_next(rewards):
    value, low, high = mean(rewards)
    assert value == pytest.approx(rewards[0]) and math.isnan(low) and math.isnan(high)
    zero, low, high = difference(rewards, rewards)
    assert zero == 0 and math.isnan(low) and math.isnan(high)


@pytest.mark.parametrize(
    ("counts", "expected"),
    (
        ((36, 12, 2, 0), (0.2, 0.0569, 0.3404)),  # Newcombe 1998
        ((14, 5, 0, 22), (0.122, 0.011, 0.226)),  # Altman et al. 2000, "Statistics with confidence", table 6.2
        ((1, 1, 7, 12), (-0.286, -0.507, -0.026)),  # Fagerland, Lydersen and Laake 2014, airway hyper-responsiveness
        ((59, 6, 16, 80), (-0.0621, -0.1186, -0.0046)),  # the same, complete response
    ),
)
def test_the_difference_of_right_and_wrong_has_newcombes_published_interval(counts, expected):
    digits = len(str(expected[1]).split(".")[1])
    assert [round(value, digits) for value in difference(*pairs(*counts))] == list(expected)
    before, after = pairs(*counts)
    value, low, high = difference(after, before)  # the other way round, with the sign turned
    assert [round(end, digits) for end in (-value, -high, -low)] == list(expected)


def test_the_difference_where_nothing_changes_is_zero_with_an_interval_around_it():
    for n in (1, 5, 50):
        value, low, high = difference([1] * n, [1] * n)
        assert value == 0 and low == pytest.approx(-high) and 0 < high < 1
    assert difference([0] * 50, [1] * 50) == pytest.approx((1, 0.899, 1), abs=1e-3)


@pytest.mark.parametrize("n", (20, 100))
@pytest.mark.parametrize(
    "shares", ((0.3, 0.15, 0.1, 0.45), (0.05, 0.4, 0.05, 0.5), (0.9, 0.05, 0.01, 0.04), (0.25, 0.25, 0.25, 0.25))
)
def test_newcombes_interval_covers_the_true_difference(n, shares):
    drawn = np.random.default_rng(0).multinomial(n, shares, size=2000)
    covers = {}
    for counts in {tuple(map(int, row)) for row in drawn}:
        _, low, high = difference(*pairs(*counts))
        covers[counts] = low <= shares[1] - shares[2] <= high
    assert np.mean([covers[tuple(map(int, row))] for row in drawn]) >= 0.935


def test_the_difference_of_graded_rewards_is_that_of_paired_samples():
    rng = np.random.default_rng(3)
    easy = rng.normal(scale=10, size=400)  # what makes prompts easy cancels in the pairs
    before, after = easy + rng.normal(size=400), easy + rng.normal(0.5, size=400)
    value, low, high = difference(before.tolist(), after.tolist())
    expected = stats.ttest_rel(after, before).confidence_interval()
    assert value == pytest.approx(np.mean(after - before))
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.02)


@pytest.mark.parametrize(("improved", "worsened"), ((0, 0), (1, 0), (5, 2), (40, 3), (300, 11), (1500, 1490)))
def test_mcnemars_p_value_is_the_exact_one(improved, worsened):
    expected = reference_mcnemar([[7, improved], [worsened, 9]], exact=True).pvalue if improved + worsened else 1.0
    assert mcnemar(improved, worsened) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("p_values", ([], [0.04], [0.01, 0.04, 0.03, 0.005], [1.0, 0.9, 0.9], [0.02] * 3, [1e-9, 1, 0]))
def test_holms_p_values_are_those_of_statsmodels(p_values):
    expected = multipletests(p_values, method="holm")[1].tolist() if p_values else []
    assert holm(p_values) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("call", "message"),
    (
        (lambda: mean([]), "rewards must hold at least one number"),
        (lambda: mean([math.nan]), "rewards must be a sequence of finite numbers"),
        (lambda: mean([1], 95), "level must be between 0 and 1, got 95"),
        (lambda: difference([1, 0], [1]), "after must have a reward for each of before's 2 samples, got 1"),
        (lambda: mcnemar(-1, 2), "improved must be a whole number of at least 0"),
        (lambda: holm([0.2, 1.5]), "each of p_values must be a finite number from 0 to 1, got 1.5"),
    ),
)
def test_numbers_that_cannot_be_rewards_are_named(call, message):
    with pytest.raises(CorrSteerError, match=message):
        call()


@pytest.mark.parametrize("n", [9, 40])
def test_other_rewards_are_tested_by_the_signs_of_their_differences(n):
    """Against all signs by hand of few, and Student's t of many, which it comes to."""
    rng = np.random.default_rng(n)
    before = rng.normal(size=n)
    after = before + rng.normal(0.4, 1, size=n)
    p = paired_p_value(before.tolist(), after.tolist())
    if n == 9:
        signs = np.array(list(itertools.product((-1, 1), repeat=n)))
        means = np.abs(signs @ (after - before))
        assert p == pytest.approx((means >= abs((after - before).sum()) - 1e-12).mean())
    else:
        assert p == pytest.approx(stats.ttest_rel(after, before).pvalue, abs=0.03)
    assert paired_p_value(before.tolist(), before.tolist()) == 1
    assert paired_p_value([0, 1, 0, 0], [1, 1, 1, 1]) == mcnemar(3, 0)


@pytest.mark.parametrize("of", [difference, paired_p_value])
def test_rewards_of_other_samples_are_refused(of):
    with pytest.raises(CorrSteerError, match="after must have a reward for each of before's 2 samples, got 3"):
        of([0.0, 0.5], [1.0, 1.0, 1.0])
