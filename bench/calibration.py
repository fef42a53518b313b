"""Whether p-values and intervals keep what they promise, by simulation: python -m bench.calibration

Features are sparse, non-negative and heavy-tailed, as pooled SAE activations are; rewards binary or real. Everything
goes through `Evidence`, block by block, as in a collection, and comes from one seed.

- `family_wise`: null runs, in which no feature has to do with the reward. How often does any survive alpha = 0.05?
- `coverage`: how often does a 95 % interval hold the true correlation, which is known?
- `demo`: the demo with its rewards shuffled, seed after seed. How often does no feature survive?
- `clustered_...`: several completions of a prompt, see `bench.clusters`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from bench import clusters, record
from corrsteer import inference
from corrsteer.report.tables import table
from corrsteer.stats.evidence import Evidence

ALPHA, LEVEL = 0.05, 0.95
WITHIN = {"family_wise": (0.03, 0.07), "coverage": (0.93, 0.97)}  # what is promised
ENOUGH = 50  # active samples from which coverage is promised
BOOTSTRAP, BOOTSTRAP_SAMPLES = 500, 10_000  # replicates, and samples up to which there are any (time)
MOST_SAMPLES = 50_000  # in a cell (time)
BLOCK = 256


# Made-up data


def active_values(rng: np.random.Generator, tail: str, shape) -> np.ndarray:
    """What active features are, by the weight of their tail."""
    if tail == "exponential":
        return rng.exponential(size=shape)
    if tail == "exponential past a threshold":  # as of jumprelu
        return 1 + rng.exponential(size=shape)
    return np.exp(float(tail.split()[1]) * rng.standard_normal(shape))


def moments_of(tail: str) -> tuple[float, float]:
    """Their mean and mean square."""
    if tail == "exponential":
        return 1.0, 2.0
    if tail == "exponential past a threshold":
        return 2.0, 5.0
    sigma = float(tail.split()[1])
    return math.exp(sigma**2 / 2), math.exp(2 * sigma**2)


def draw_rewards(rng: np.random.Generator, kind: str, n: int) -> np.ndarray:
    """`binary RATE`, `normal`, or `skewed` rewards, `[n]`."""
    if kind.startswith("binary"):
        return (rng.random(n) < float(kind.split()[1])).astype(float)
    return rng.standard_normal(n) if kind == "normal" else rng.lognormal(0, 0.75, n)


def dependent_features(
    rng: np.random.Generator, y: np.ndarray, kind: str, frequency: float, tail: str, effect: float, d: int
) -> tuple[np.ndarray, float]:
    """`d` features `[n, d]` that are active more often where the reward is high, and their true correlation with it.

    With g = 1 where y is above its median or mean and -1 elsewhere (for binary rewards of rate q: (1 - q)/q and -1, so
    that E g = 0), the chance of being active is s (1 + effect · g / max g).
    """
    mean, square = moments_of(tail)
    if kind.startswith("binary"):
        q = float(kind.split()[1])
        g, largest = np.where(y > 0, (1 - q) / q, -1.0), max((1 - q) / q, 1)
        g_times_y, deviation = 1 - q, math.sqrt(q * (1 - q))  # E[g y] and the reward's
    else:
        g, largest, g_times_y, deviation = np.sign(y), 1.0, math.sqrt(2 / math.pi), 1.0
    chance = frequency * (1 + effect * g / largest)
    active = rng.random((len(y), d)) < chance[:, None]
    z = active * active_values(rng, tail, (len(y), d))
    variance = frequency * square - (frequency * mean) ** 2
    return z, frequency * effect / largest * g_times_y * mean / math.sqrt(variance) / deviation


def null_features(rng: np.random.Generator, n: int, d: int, together: bool) -> np.ndarray:
    """`d` features `[n, d]` of frequencies 0.001 to 0.5 and all tails; `together`, in groups of ten that share what
    makes them active and how much."""
    frequency = np.exp(rng.uniform(math.log(0.001), math.log(0.5), d))
    common = np.repeat(rng.standard_normal((n, -(-d // 10))), 10, axis=1)[:, :d] if together else 0.0
    weight = 0.9 if together else 0.0
    score = weight * common + math.sqrt(1 - weight**2) * rng.standard_normal((n, d))
    active = score > torch.special.ndtri(torch.from_numpy(1 - frequency)).numpy()
    tails = [active_values(rng, tail, (n, d)) for tail in ("exponential", "lognormal 0.5", "lognormal 1.0")]
    values = np.choose(np.arange(d) % 3, tails) * (np.exp(0.5 * common) if together else 1.0)
    return active * values


def evidence_of(z: np.ndarray, y: np.ndarray, seed: int, **settings) -> Evidence:
    """Everything in blocks, as `collect` does it."""
    evidence = Evidence(z.shape[1], seed=seed, **settings)
    pooled, rewards = torch.from_numpy(z.astype(np.float32)), torch.from_numpy(y)
    for number, at in enumerate(range(0, len(y), BLOCK)):
        evidence.update(pooled[at : at + BLOCK], rewards[at : at + BLOCK], number)
    return evidence


# What is looked at


def family_wise(seed: int, runs: int, n: int, d: int, permutations: int, scenarios) -> Iterator[dict[str, Any]]:
    """Null runs of two layers of `d` features and `n` samples each."""
    for number, (kind, together) in enumerate(scenarios):
        rng = np.random.default_rng([seed, 1, number])
        survived = {"p_adjusted": 0, "p_layer": 0, "q": 0}
        below_raw, smallest = 0, []
        for run in range(runs):
            y = draw_rewards(rng, kind, n)
            layers = {
                layer: evidence_of(null_features(rng, n, d, together), y, run, permutations=permutations)
                for layer in (1, 2)
            }
            tested = inference.significance(layers)
            for name in survived:
                survived[name] += any(bool((getattr(t, name) <= ALPHA).any()) for t in tested.values())
            below_raw += sum(int((t.p_layer < t.p).sum() + (t.p_adjusted < t.p_layer).sum()) for t in tested.values())
            smallest.append(min(float(t.p_adjusted.min()) for t in tested.values()))
        rates = {name: count / runs for name, count in survived.items()}
        yield {
            "rewards": kind, "features": "in groups that go together" if together else "independent",
            "runs": runs, "samples": n, "features_tested": 2 * d, "permutations": permutations,
            "family_wise_error": rates["p_adjusted"], "any_layer_error": rates["p_layer"], "bh_error": rates["q"],
            "adjusted_below_raw": below_raw, "mean_smallest_p": float(np.mean(smallest)),
            "holds": WITHIN["family_wise"][0] <= rates["p_adjusted"] <= WITHIN["family_wise"][1],
        }  # fmt: skip


def coverage(seed: int, trials: int, d: int, cells: Iterable[tuple]) -> Iterator[dict[str, Any]]:
    """`trials` intervals of each method a cell: `d` features at a time, each time with new rewards."""
    for number, (frequency, n_active, tail, kind, effect) in enumerate(cells):
        rng = np.random.default_rng([seed, 2, number])
        n = round(n_active / frequency)
        bootstrap = BOOTSTRAP if n <= BOOTSTRAP_SAMPLES else 0
        methods = [m for m in inference.METHODS if bootstrap or m != "bootstrap"]
        hits, widths, seen = dict.fromkeys(methods, 0), dict.fromkeys(methods, 0.0), dict.fromkeys(methods, 0)
        for run in range(-(-trials // d)):
            y = draw_rewards(rng, kind, n)
            z, truth = dependent_features(rng, y, kind, frequency, tail, effect, d)
            evidence = evidence_of(z, y, run, bootstrap=bootstrap)
            for method in methods:
                low, high = inference.interval(evidence, method, LEVEL)
                there = low.isfinite() & high.isfinite()  # a feature that was never active has none
                hits[method] += int(((low <= truth) & (truth <= high))[there].sum())
                widths[method] += float((high - low)[there].sum())
                seen[method] += int(there.sum())
        covered = {m: hits[m] / max(seen[m], 1) for m in methods}
        yield {
            "frequency": frequency, "samples": n, "active_samples": n_active, "tail": tail, "rewards": kind,
            "effect": effect, "correlation": truth, "intervals": max(seen.values()),
            "coverage": covered, "width": {m: widths[m] / max(seen[m], 1) for m in methods},
            "holds": {m: WITHIN["coverage"][0] <= c <= WITHIN["coverage"][1] for m, c in covered.items()},
        }  # fmt: skip


def demo(seeds: int) -> Iterator[dict[str, Any]]:
    """The demo's negative control by seed."""
    from corrsteer.demo.run import run_demo

    for seed in range(seeds):
        result = run_demo(seed, say=lambda _: None, progress=False, shuffle_rewards=True)
        least = min(feature["statistics"]["p_adjusted"] for feature in result["features"].values())
        yield {"seed": seed, "survivors": len(result["survivors"]), "smallest_p_adjusted": least}


SCENARIOS = list(itertools.product(("binary 0.3", "skewed"), (False, True)))
TAILS = ("exponential past a threshold", "exponential", "lognormal 0.5", "lognormal 1.0")
CELLS = [
    (s, active, tail, kind, effect)
    for s, active in itertools.product((0.001, 0.01, 0.05, 0.2, 0.5), (20, 50, 200))
    if active / s <= MOST_SAMPLES
    for tail, kind, effect in itertools.product(TAILS, ("binary 0.5", "binary 0.1", "normal"), (0.0, 0.7))
]


PARTS = ("family_wise", "coverage", "demo", "clustered_family_wise", "clustered_confounded", "clustered_coverage")


def study(seed: int, quick: bool = False, only: Collection[str] = PARTS) -> dict[str, Any]:
    """Everything, or `only` some parts, as the result file has it; `quick` a little of each, for a test."""
    cells = [cell for cell in CELLS if cell[0] * 2000 > cell[1]][::31] if quick else CELLS
    runs, trials, seeds = (40, 200, 1) if quick else (4000, 2000, 20)
    parts = {
        "family_wise": (family_wise(seed, runs, 400, 60, 199, SCENARIOS), len(SCENARIOS)),
        "coverage": (coverage(seed, trials, 100, cells), len(cells)),
        "demo": (demo(seeds), seeds),
        **clusters.study(seed, quick),
    }
    result = record.study("calibration", seed)
    for name, (rows, total) in parts.items():
        if name in only:
            result[name] = list(tqdm(rows, total=total, desc=name))
    return result


def summary(result: dict[str, Any]) -> list[str]:
    """What it comes to, in sentences."""
    rates = [row["family_wise_error"] for row in result["family_wise"]]
    runs = sum(row["runs"] for row in result["family_wise"])
    below = sum(row["adjusted_below_raw"] for row in result["family_wise"])
    none = sum(row["survivors"] == 0 for row in result["demo"])
    return [
        f"family-wise error of maxT at {ALPHA}: {min(rates):.3f} to {max(rates):.3f} in {len(rates)} settings (binary "
        f"and skewed rewards, features independent and correlated), {runs} null runs; adjusted p-values below raw "
        f"ones: {below}",
        f"the demo with shuffled rewards: no feature survives in {none} of {len(result['demo'])} seeds",
    ]


COVERAGE_HEADER = ("rewards", "tails", *(f"{method} holds in" for method in inference.METHODS), *inference.METHODS)


def coverage_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Cells with enough active samples by kind: in how many a method's 95 % intervals cover 93 to 97 %, and how much
    they cover at least and at most."""
    cells = [row for row in result["coverage"] if row["active_samples"] >= ENOUGH]
    rows = []
    for kind, heaviest in itertools.product(dict.fromkeys(row["rewards"] for row in cells), (False, True)):
        of = [row for row in cells if row["rewards"] == kind and (row["tail"] == TAILS[-1]) == heaviest]
        held, spans = [], []
        for method in inference.METHODS:
            there = [row for row in of if method in row["coverage"]]
            covered = [row["coverage"][method] for row in there]
            held.append(f"{sum(row['holds'][method] for row in there)} of {len(there)}")
            spans.append(f"{min(covered):.1%} to {max(covered):.1%}" if covered else "-")
        rows.append((kind, TAILS[-1] if heaviest else "lighter", *held, *spans))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=record.STUDIES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a little of each, for a test")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run; the others are kept")
    args = parser.parse_args()
    torch.set_num_threads(1)  # everything here is small, and threads would wait for each other
    kept, head = {}, record.study("calibration", args.seed)
    if set(args.only) < set(PARTS):
        kept = json.loads((args.out / "calibration.json").read_text(encoding="utf-8"))
        if any(kept[name] != head[name] for name in ("seed", "version", "packages")):
            raise SystemExit("the parts that are kept are of another seed or of other packages; run all of it")
    result = kept | study(args.seed, args.quick, args.only)
    path = record.write_study(result, args.out)
    for part in (sys.modules[__name__], clusters):
        print("\n".join(part.summary(result)), table(part.COVERAGE_HEADER, part.coverage_rows(result)), sep="\n\n")
    print(path)


if __name__ == "__main__":
    main()
