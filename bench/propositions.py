"""The paper's statements on sampling, put to simulation: python -m bench.propositions

Cho, Wu & Koshiyama (2025, arXiv:2508.12535) say how many samples show a feature (Proposition 1), that the variance of
its correlation goes as 1/(sN) with s the share of samples in which it is active (Proposition 2), and pool by maximum.
Each part here gives rows: what the formulas say, what simulation says. `corrsteer.planning` has the formulas that hold.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from bench import record
from corrsteer import planning
from corrsteer.report.tables import table

# Values of an active feature: how they are drawn, and their raw moments E[v^i].
TAILS: dict[str, tuple[Callable, Callable]] = {
    "constant": (lambda rng, size: np.ones(size), lambda i: 1.0),
    "exponential": (lambda rng, size: rng.exponential(size=size), math.factorial),
    "lognormal 0.5": (lambda rng, size: rng.lognormal(0, 0.5, size), lambda i: math.exp(i * i / 8)),
    "lognormal 1": (lambda rng, size: rng.lognormal(0, 1, size), lambda i: math.exp(i * i / 2)),
}
# Rewards: real ones are correlation · standardised activation + normal noise; binary ones are 1 with a probability that
# depends on whether the feature is active or not.
REAL = {"real, independent": 0.0, "real, r = 0.3": 0.3}
BINARY = {"binary, independent": (0.5, 0.5), "binary, 0.9 if active, else 0.5": (0.9, 0.5)}
INDEPENDENT = ("real, independent", "binary, independent")
FORMULAS = ("published", "normal", "delta")
WAYS = ("exact", "chernoff", "hoeffding", "as_published")
OF_A_TOKEN, OF_ALL = "one token", "all tokens"
EFFECTS = {OF_A_TOKEN: 3.0, OF_ALL: 0.25}  # added where the reward is 1; the background is |N(0, 1)|
CHUNK = 2_000_000  # active samples drawn at a time

FULL: dict[str, Any] = {
    "k": (1, 3, 10, 30, 100), "miss_frequencies": (0.001, 0.01, 0.1), "delta": (0.1, 0.05, 0.01), "counts": 100_000,
    "frequencies": (0.001, 0.005, 0.02, 0.1, 0.5), "samples": (500, 2000, 8000), "replications": 10_000,
    "tokens": (4, 32, 256), "epsilon": (0.0, 0.001, 0.01, 0.1), "size": (5.0, 20.0), "pooled": 1000, "runs": 200,
}  # fmt: skip
QUICK: dict[str, Any] = FULL | {
    "k": (1, 10), "miss_frequencies": (0.01,), "delta": (0.05,), "counts": 20_000,
    "frequencies": (0.005, 0.1), "samples": (2000,), "replications": 1000,
    "tokens": (32,), "epsilon": (0.0, 0.01), "size": (20.0,), "runs": 30,
}  # fmt: skip


def study(seed: int, quick: bool = False) -> dict[str, Any]:
    """The whole result, the same for the same seed and versions."""
    grid = QUICK if quick else FULL
    seeing, spread, outliers = np.random.default_rng(seed).spawn(3)
    rows = variance_rows(spread, grid)
    return {
        **record.study("propositions", seed),
        "quick": quick,
        "grid": grid,
        "seeing": seeing_rows(seeing, grid),
        "variance": rows,
        "factors": factors(rows),
        "holds": holds(rows),
        "pooling": pooling_rows(outliers, grid),
    }


def seeing_rows(rng: np.random.Generator, grid: dict[str, Any]) -> list[dict[str, Any]]:
    """Proposition 1: each way's number of samples, and the chance of seeing fewer than k in them."""
    rows = []
    for s in grid["miss_frequencies"]:
        for k in grid["k"]:
            for delta in grid["delta"]:
                row: dict[str, Any] = {"k": k, "s": s, "delta": delta}
                for way, n in vars(planning.samples_to_see(k, s, delta)).items():
                    simulated = float((rng.binomial(n, s, grid["counts"]) < k).mean())
                    row[way] = {"n": n, "miss": _short(planning.miss_probability(n, k, s)), "simulated": simulated}
                rows.append(row)
    return rows


def variance_rows(rng: np.random.Generator, grid: dict[str, Any]) -> list[dict[str, Any]]:
    """Proposition 2: the variance of r over replications, beside what formulas say it is.

    `published` is (1 - r²)²/(sN), `normal` (1 - r²)²/N, `delta` the asymptotic one from the joint moments, over N.
    `active_only` is the variance of the correlation among active samples alone, where the reward is independent and 20
    of them or more are expected: the one that `published` is right for. Replications in which r does not exist,
    as the feature is active in no sample, are left out; `undefined` is their share.

    Under independence all pairings of the N activations with the N rewards are equally likely, and over these r has
    variance exactly 1/(N - 1), whatever the values (Pitman 1937): `published` is 1/s times as large.

    With a real reward linear in the activation, `asymptotic_variance` is (1 - r²)²(1 + r²(κ - 3)/4), κ being the
    activation's kurtosis, about E[v⁴]/(s E[v²]²) for active values v: there is a 1/s in it, times r²/4 and the tail. A
    binary reward leaves a rare feature an |r| of about √s, and then there is none.
    """
    rows = []
    for reward in (*REAL, *BINARY):
        for tail in TAILS:
            for s in grid["frequencies"]:
                moments = joint_moments(reward, tail, s)
                r = moments[0]
                for n in grid["samples"]:
                    seen, among_active = simulated(rng, reward, tail, s, n, grid["replications"])
                    defined = seen[np.isfinite(seen)]
                    centred = defined - defined.mean()
                    variance = (centred**2).mean()
                    known = reward in INDEPENDENT and tail != "constant" and s * n >= 20
                    rows.append(
                        {
                            "reward": reward,
                            "tail": tail,
                            "s": s,
                            "n": n,
                            "r": _short(r),
                            "kurtosis": _short(moments[4]),
                            "undefined": _short(1 - len(defined) / len(seen)),
                            "mean": _short(defined.mean()),
                            "variance": _short(variance),
                            "se": _short(math.sqrt(((centred**4).mean() - variance**2) / len(defined))),
                            "published": _short((1 - r * r) ** 2 / (s * n)),
                            "normal": _short((1 - r * r) ** 2 / n),
                            "delta": _short(planning.asymptotic_variance(*moments) / n),
                            "active_only": _short(np.nanvar(among_active)) if known else None,
                        }
                    )
    return rows


def factors(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """By reward and frequency, the least and greatest of each formula's variance over the simulated one."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["reward"], row["s"]), []).append(row)
    return [
        {"reward": reward, "s": s}
        | {name: [_short(pick(row[name] / row["variance"] for row in group)) for pick in (min, max)]
           for name in FORMULAS}
        for (reward, s), group in groups.items()
    ]  # fmt: skip


def holds(rows: Iterable[dict[str, Any]], tolerance: float = 0.1) -> list[dict[str, Any]]:
    """In how many settings each formula is within a tolerance of simulation."""
    rows = list(rows)
    many = [row for row in rows if row["s"] * row["n"] >= 40]
    statements = {
        "published": [(row["published"], row["variance"]) for row in rows],
        "published, of active samples alone": [(r["published"], r["active_only"]) for r in rows if r["active_only"]],
        "normal": [(row["normal"], row["variance"]) for row in rows],
        "normal, if independent": [(r["normal"], r["variance"]) for r in rows if r["reward"] in INDEPENDENT],
        "delta": [(row["delta"], row["variance"]) for row in rows],
        "delta, sN >= 40": [(row["delta"], row["variance"]) for row in many],
        "delta, sN >= 40, not lognormal 1": [(r["delta"], r["variance"]) for r in many if r["tail"] != "lognormal 1"],
    }
    return [
        {"formula": name, "holds": sum(abs(a / b - 1) <= tolerance for a, b in pairs), "of": len(pairs)}
        for name, pairs in statements.items()
    ]


def joint_moments(reward: str, tail: str, s: float) -> tuple[float, ...]:
    """r, m22, m31, m13, m40, m04 of the standardised activation and reward, exactly."""
    values = [TAILS[tail][1](i) for i in range(5)]
    mean = s * values[1]  # of the activation, which is 0 where inactive
    on, off = _about(mean, values), [(-mean) ** i for i in range(5)]
    x = [s * a + (1 - s) * b for a, b in zip(on, off)]
    if reward in REAL:
        r, noise = REAL[reward], 1 - REAL[reward] ** 2
        m4 = x[4] / x[2] ** 2
        m13 = r**3 * m4 + 3 * r * noise
        m04 = r**4 * m4 + 6 * r * r * noise + 3 * noise**2
        return r, r * r * m4 + noise, r * m4, m13, m4, m04
    active, inactive = BINARY[reward]
    rate = s * active + (1 - s) * inactive
    y_on, y_off = ([p * (1 - rate) ** j + (1 - p) * (-rate) ** j for j in range(5)] for p in (active, inactive))

    def joint(i: int, j: int) -> float:  # given whether it is active, activation and reward are independent
        value = s * on[i] * y_on[j] + (1 - s) * off[i] * y_off[j]
        return value / x[2] ** (i / 2) / (rate * (1 - rate)) ** (j / 2)

    return joint(1, 1), joint(2, 2), joint(3, 1), joint(1, 3), joint(4, 0), joint(0, 4)


def simulated(
    rng: np.random.Generator, reward: str, tail: str, s: float, n: int, replications: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pearson's r of many runs of n samples: over all samples, and over the active ones. NaN where there is none.

    Only active samples are drawn: of the others r needs the sum and the sum of squares of their rewards, which are
    drawn from their own distributions (binomial; normal and chi-squared).
    """
    parts = []
    chunk = max(1, int(CHUNK / (s * n)))
    for start in range(0, replications, chunk):
        size = min(chunk, replications - start)
        active = rng.binomial(n, s, size)
        run = np.repeat(np.arange(size), active)
        x = TAILS[tail][0](rng, len(run))
        others = n - active
        if reward in BINARY:
            on, off = BINARY[reward]
            y = (rng.random(len(run)) < on).astype(float)
            rest = rest_squares = rng.binomial(others, off).astype(float)
        else:
            r = REAL[reward]
            noise = math.sqrt(1 - r * r)
            deviation = math.sqrt(s * TAILS[tail][1](2) - (s * TAILS[tail][1](1)) ** 2)
            y = r / deviation * x + noise * rng.standard_normal(len(run))  # r does not mind the constant left out
            rest = noise * np.sqrt(others) * rng.standard_normal(size)
            rest_squares = noise**2 * rng.chisquare(np.maximum(others - 1, 1)) + rest**2 / np.maximum(others, 1)

        sums = [np.bincount(run, values, size) for values in (x, x * x, y, y * y, x * y)]
        parts.append((_pearson(active, *sums), _pearson(n, *sums[:2], sums[2] + rest, sums[3] + rest_squares, sums[4])))
    among_active, over_all = (np.concatenate(part) for part in zip(*parts))
    return over_all, among_active


def pooling_rows(rng: np.random.Generator, grid: dict[str, Any]) -> list[dict[str, Any]]:
    """Mean and max pooling of activations with outliers: r with a binary reward, its mean and spread over runs.

    Each token's activation is |N(0, 1)|. Where the reward is 1, a feature of `one token` adds its effect to one token
    of the sample, one of `all tokens` to each. Then each token becomes `size` with probability `epsilon`.
    """
    found: dict[tuple, list[list[float]]] = {}
    for tokens in grid["tokens"]:
        for effect, strength in EFFECTS.items():
            for _ in range(grid["runs"]):
                y = rng.integers(0, 2, grid["pooled"])
                clean = np.abs(rng.standard_normal((len(y), tokens)))
                chance = rng.random(clean.shape)
                if effect == OF_ALL:
                    clean += strength * y[:, None]
                else:
                    clean[np.arange(len(y)), rng.integers(0, tokens, len(y))] += strength * y
                for epsilon in grid["epsilon"]:
                    for size in grid["size"]:
                        z = np.where(chance < epsilon, size, clean)
                        both = [_correlation(y, pooled) for pooled in (z.mean(1), z.max(1))]
                        found.setdefault((effect, tokens, epsilon, size), []).append(both)
    rows = []
    for (effect, tokens, epsilon, size), runs in found.items():
        if epsilon or size == grid["size"][0]:  # without outliers their size says nothing
            row = {"effect": effect, "tokens": tokens, "epsilon": epsilon, "size": size if epsilon else None}
            for pool, rs in zip(("mean", "max"), zip(*runs)):
                row[pool] = {"r": _short(np.mean(rs)), "sd": _short(np.std(rs))}
            rows.append(row)
    return rows


def text(result: dict[str, Any]) -> str:
    """The result for a terminal."""
    seeing = [
        (
            f"{row['k']} of {row['s']:g}, {row['delta']:g}",
            *("{n} ({miss:.2g})".format(**row[way]) for way in WAYS),
        )
        for row in result["seeing"]
    ]
    spread = [
        (f"{row['reward']}, s = {row['s']:g}", *("{:.3g} to {:.3g}".format(*row[name]) for name in FORMULAS))
        for row in result["factors"]
    ]
    pooling = [
        (
            f"{row['effect']} of {row['tokens']}",
            f"{row['epsilon']:g}",
            "-" if row["size"] is None else f"{row['size']:g}",
            *("{r:.3f} ± {sd:.3f}".format(**row[pool]) for pool in ("mean", "max")),
        )
        for row in result["pooling"]
    ]
    return "\n\n".join(
        (
            "Samples, and in brackets the chance of fewer than k activations\n"
            + table(("k of s, delta", *(way.replace("_", " ") for way in WAYS)), seeing),
            "Variance of r: by formula, over simulated\n" + table(("", *FORMULAS), spread),
            "Within 10 % of simulation\n"
            + table(("", "settings"), [(row["formula"], f"{row['holds']} of {row['of']}") for row in result["holds"]]),
            "Correlation after pooling, with outliers\n"
            + table(("effect in", "epsilon", "size", "mean", "max"), pooling),
        )
    )


def summary(result: dict[str, Any]) -> list[str]:
    """What it comes to, in sentences."""
    short = [row for row in result["seeing"] if row["as_published"]["miss"] > row["delta"]]
    misses = [row["as_published"]["miss"] / row["delta"] for row in short]
    ours = [way for way in WAYS if way != "as_published"]
    enough = sum(all(row[way]["miss"] <= row["delta"] * (1 + 1e-5) for way in ours) for row in result["seeing"])
    holds = {row["formula"]: f"{row['holds']} of {row['of']}" for row in result["holds"]}
    pooled = {
        (row["effect"], row["epsilon"]): row
        for row in result["pooling"]
        if row["tokens"] == 32 and row["size"] in (None, max(result["grid"]["size"]))
    }
    lines = [
        f"Proposition 1 (samples to see k activations): the published number is too small in {len(short)} of "
        f"{len(result['seeing'])} settings, with {min(misses):.1f} to {max(misses):.0f} times the accepted chance of a "
        f"miss; the exact number, Chernoff's and Hoeffding's of `corrsteer plan` are enough in {enough}",
        f"Proposition 2 (Var r = (1 - r²)²/(sN)): within 10 % of simulation in {holds['published']} settings. "
        f"Where the reward is independent (1 - r²)²/N is so in {holds['normal, if independent']}, as sparsity does not "
        f"matter there; the delta method, with s N >= 40 and tails lighter than lognormal 1, in "
        f"{holds['delta, sN >= 40, not lognormal 1']}",
    ]
    for effect in (OF_A_TOKEN, OF_ALL):
        clean, spoilt = pooled[effect, 0.0], pooled[effect, 0.01]
        lines.append(
            f"Pooling, an effect in {effect} of 32: r is {clean['mean']['r']:.2f} with the mean and "
            f"{clean['max']['r']:.2f} with the maximum; with outliers in 1 % of tokens {spoilt['mean']['r']:.2f} and "
            f"{spoilt['max']['r']:.2f}"
        )
    return lines


def draw(result: dict[str, Any], path: Path) -> None:
    """Write the chart as SVG, the same bytes for the same result."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "corrsteer", "svg.fonttype": "none", "font.size": 8}):
        figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
        _draw_seeing(axes[0], result["seeing"])
        _draw_variance(axes[1], result["variance"])
        _draw_pooling(axes[2], result["pooling"])
        for ax in axes:
            ax.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def _draw_seeing(ax, rows: list[dict[str, Any]]) -> None:
    s, delta = 0.01, 0.05
    rows = [row for row in rows if (row["s"], row["delta"]) == (s, delta)]
    names = {"exact": "exact", "chernoff": "Chernoff", "hoeffding": "Hoeffding", "as_published": "as published"}
    colours = dict(zip(WAYS, ("black", "#6aa84f", "#0b5394", "#cc0000")))
    ks = [row["k"] for row in rows]
    for way, name in names.items():
        ax.plot(ks, [s * row[way]["n"] / row["k"] for row in rows], color=colours[way], marker="o", ms=3, label=name)
    for row in rows:
        where = (row["k"], s * row["as_published"]["n"] / row["k"])
        ax.annotate(f"{row['as_published']['miss']:.0%}", where, (0, -10), textcoords="offset points",
                    ha="center", fontsize=7, color=colours["as_published"])  # fmt: skip
    ax.set(xscale="log", yscale="log", xlabel="k, activations to see", ylabel="samples · s / k")
    ax.set_title(f"Samples to see k activations, s = {s:g}, δ = {delta:g}\n(red: chance of seeing fewer)")
    ax.legend(frameon=False)


def _draw_variance(ax, rows: list[dict[str, Any]]) -> None:
    n = max(row["n"] for row in rows)
    frequencies = sorted({row["s"] for row in rows})
    ax.plot(frequencies, [1 / s for s in frequencies], color="#cc0000", label="1/s, as published for r = 0")
    shown = {"real, independent": ("black", "o"), "binary, independent": ("#999999", "x"),
             "real, r = 0.3": ("#0b5394", "o"), "binary, 0.9 if active, else 0.5": ("#6aa84f", "x")}  # fmt: skip
    for reward, (colour, marker) in shown.items():
        chosen = [row for row in rows if (row["reward"], row["n"]) == (reward, n)]
        ax.scatter([row["s"] for row in chosen], [n * row["variance"] for row in chosen], 14, colour, marker=marker,
                   label=reward)  # fmt: skip
        for tail in TAILS:
            line = [row for row in chosen if row["tail"] == tail]
            ax.plot([row["s"] for row in line], [n * row["delta"] for row in line], color=colour, lw=0.6, alpha=0.6)
    ax.set(xscale="log", yscale="log", xlabel="s, share of samples in which it is active", ylabel="N · variance of r")
    ax.set_title(f"Variance of r, N = {n}, four tails\n(points: simulated; lines: asymptotic)")
    ax.legend(frameon=False, fontsize=7)


def _draw_pooling(ax, rows: list[dict[str, Any]]) -> None:
    tokens, size = 32, 20.0
    rows = [row for row in rows if row["tokens"] == tokens and row["size"] in (None, size)]
    for effect, colour in ((OF_A_TOKEN, "#0b5394"), (OF_ALL, "#b45f06")):
        chosen = [row for row in rows if row["effect"] == effect]
        for pool, style in (("mean", "-"), ("max", "--")):
            ax.errorbar(range(len(chosen)), [row[pool]["r"] for row in chosen], [row[pool]["sd"] for row in chosen],
                        color=colour, ls=style, marker="o", ms=3, label=f"{pool}, effect in {effect}")  # fmt: skip
        ax.set_xticks(range(len(chosen)), [f"{row['epsilon']:g}" for row in chosen])
    ax.set(xlabel="share of tokens that are outliers", ylabel="r")
    ax.set_title(f"Correlation after pooling {tokens} tokens,\noutliers of {size:g}")
    ax.legend(frameon=False)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.propositions", description=__doc__)
    parser.add_argument("--out", type=Path, default=record.STUDIES, help="folder for the result and the chart")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a small part of it, in seconds")
    options = parser.parse_args(arguments)
    result = study(options.seed, options.quick)
    path = record.write_study(result, options.out)
    draw(result, path.with_suffix(".svg"))
    print(f"{text(result)}\n\n{path}")
    return 0


def _about(point: float, raw: list[float]) -> list[float]:
    """Moments about a point, from those about 0."""
    return [sum(math.comb(i, j) * raw[j] * (-point) ** (i - j) for j in range(i + 1)) for i in range(len(raw))]


def _correlation(y: np.ndarray, z: np.ndarray) -> float:
    """r, or 0 where z is the same everywhere, as in `Moments.correlation`."""
    return 0.0 if z.min() == z.max() else float(np.corrcoef(y, z)[0, 1])


def _pearson(n, x, xx, y, yy, xy):
    """r from sums; NaN where either side does not vary."""
    scale = (n * xx - x * x) * (n * yy - y * y)
    # what rounding leaves of a variance of 0 is far below this share of the sums it came from
    varies = scale > 1e-18 * (n * xx) * (n * yy)
    return np.where(varies, (n * xy - x * y) / np.sqrt(np.where(varies, scale, 1)), np.nan)


def _short(value: float) -> float:
    return float(f"{value:.6g}")


if __name__ == "__main__":
    sys.exit(main())
