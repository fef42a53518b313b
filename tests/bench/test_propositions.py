"""The study of the paper's propositions: what its small form finds, and that its committed result is of this schema."""

import json
import math

import numpy as np
import pytest

from bench import propositions, record
from corrsteer import planning


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    directory = tmp_path_factory.mktemp("results")
    assert propositions.main(["--out", str(directory), "--quick"]) == 0
    return directory


@pytest.fixture(scope="module")
def result(out):
    return json.loads((out / "propositions.json").read_text())


def of(rows, **wanted):
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def test_bounds_are_enough_and_the_published_number_is_not(result):
    for row in result["seeing"]:
        assert max(row[way]["miss"] for way in ("exact", "chernoff", "hoeffding")) <= row["delta"]
        assert row["as_published"]["miss"] > 2 * row["delta"]
        for way in propositions.WAYS:
            error = math.sqrt(max(row[way]["miss"], 1e-4) / result["grid"]["counts"])
            assert row[way]["simulated"] == pytest.approx(row[way]["miss"], abs=5 * error)


def test_without_dependence_the_variance_is_1_over_n_whatever_the_sparsity_and_the_tail(result):
    rows = [row for row in result["variance"] if row["reward"] in propositions.INDEPENDENT]
    assert len(rows) == 16
    for row in rows:
        assert row["variance"] == pytest.approx(1 / (row["n"] - 1), abs=4 * row["se"])
        assert row["published"] / row["variance"] == pytest.approx(1 / row["s"], rel=0.25)


def test_the_published_variance_is_that_of_the_correlation_among_active_samples(result):
    rows = [row for row in result["variance"] if row["active_only"] and row["s"] == 0.1]
    assert len(rows) == 6
    assert all(row["active_only"] == pytest.approx(row["published"], rel=0.2) for row in rows)


def test_with_dependence_only_the_moments_of_the_data_give_the_variance(result):
    (row,) = of(result["variance"], reward="real, r = 0.3", tail="exponential", s=0.1)
    assert row["delta"] == pytest.approx(row["variance"], abs=5 * row["se"])
    assert row["published"] > 3 * row["variance"] and row["normal"] < 0.6 * row["variance"]
    (row,) = of(result["variance"], reward="binary, 0.9 if active, else 0.5", tail="constant", s=0.1)
    assert row["delta"] == pytest.approx(row["variance"], abs=5 * row["se"])
    assert row["published"] > 10 * row["variance"] and row["normal"] > 1.4 * row["variance"]
    (row,) = of(result["variance"], reward="real, r = 0.3", tail="lognormal 1", s=0.005)
    assert row["delta"] > 3 * row["variance"], "a tail so heavy needs more samples than there are"


def test_max_pooling_wins_where_one_token_matters_and_loses_to_the_mean_with_outliers(result):
    def r(effect, epsilon):
        (row,) = of(result["pooling"], effect=effect, epsilon=epsilon)
        return row["mean"]["r"], row["max"]["r"]

    mean, largest = r("one token", 0.0)
    assert largest > 1.5 * mean
    mean, largest = r("all tokens", 0.0)
    assert mean > 2 * largest
    for effect in propositions.EFFECTS:
        mean, largest = r(effect, 0.01)
        assert mean > largest + 0.03 and largest < 0.15


@pytest.mark.parametrize("reward", [*propositions.REAL, *propositions.BINARY])
@pytest.mark.parametrize("tail", ["constant", "exponential", "lognormal 0.5"])
def test_moments_and_simulated_correlations_are_those_of_samples_drawn_one_by_one(reward, tail):
    s, n, runs = 0.3, 100, 20_000
    rng = np.random.default_rng(0)
    active = rng.random((runs, n)) < s
    x = active * propositions.TAILS[tail][0](rng, (runs, n))
    if reward in propositions.REAL:
        r = propositions.REAL[reward]
        raw = propositions.TAILS[tail][1]
        y = r * x / math.sqrt(s * raw(2) - (s * raw(1)) ** 2) + math.sqrt(1 - r * r) * rng.standard_normal(x.shape)
    else:
        y = (rng.random(x.shape) < np.where(active, *propositions.BINARY[reward])).astype(float)

    a, b = ((v - v.mean()) / v.std() for v in (x, y))
    powers = ((1, 1), (2, 2), (3, 1), (1, 3), (4, 0), (0, 4))
    exact = propositions.joint_moments(reward, tail, s)
    assert exact == pytest.approx([(a**i * b**j).mean() for i, j in powers], rel=0.03, abs=0.03)

    a, b = (v - v.mean(1, keepdims=True) for v in (x, y))
    one_by_one = (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))
    drawn, _ = propositions.simulated(rng, reward, tail, s, n, runs)
    assert drawn.mean() == pytest.approx(one_by_one.mean(), abs=4 * drawn.std() * math.sqrt(2 / runs))
    assert drawn.var() == pytest.approx(one_by_one.var(), rel=0.06)


def test_a_correlation_among_active_samples_needs_them_to_vary():
    rng = np.random.default_rng(0)
    over_all, among_active = propositions.simulated(rng, "real, independent", "constant", 0.01, 50, 99)
    assert np.isnan(among_active).all() and 0 < np.isnan(over_all).sum() < 99


def test_with_a_linear_reward_the_variance_has_the_kurtosis_in_proportion_to_r_squared():
    for tail in propositions.TAILS:
        r, *moments = propositions.joint_moments("real, r = 0.3", tail, 0.01)
        expected = (1 - r * r) ** 2 * (1 + r * r * (moments[3] - 3) / 4)
        assert planning.asymptotic_variance(r, *moments) == pytest.approx(expected)


def test_the_same_seed_gives_the_same_bytes_and_another_gives_others(out, tmp_path):
    propositions.main(["--out", str(tmp_path), "--quick", "--seed", "0"])
    for name in ("propositions.json", "propositions.svg"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()
    grid = propositions.QUICK | {"runs": 2}
    one, other = (propositions.pooling_rows(np.random.default_rng(seed), grid) for seed in (0, 1))
    assert one != other


def test_the_committed_result_is_of_this_schema_and_full(result):
    directory = record.STUDIES
    committed = json.loads((directory / "propositions.json").read_text())
    assert (committed["schema"], committed["version"]) == ("corrsteer.propositions", record.VERSION)
    assert not committed["quick"] and committed["seed"] == 0
    assert committed["grid"] == json.loads(json.dumps(propositions.FULL))
    assert list(committed) == list(result)
    for part in ("seeing", "variance", "factors", "holds", "pooling"):
        assert {tuple(row) for row in committed[part]} == {tuple(row) for row in result[part]}, part
    assert propositions.text(committed) and (directory / "propositions.svg").read_text().startswith("<?xml")
