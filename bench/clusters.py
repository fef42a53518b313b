"""Several completions of a prompt, for `bench.calibration`: what permuting and intervals promise where samples cluster.

Features and rewards both go with the prompt: each prompt has a difficulty, and of each feature a level of its own.

- `family_wise`: features that are independent of the reward. How often does any survive alpha, by what is permuted?
- `confounded`: a feature that goes with how easy a prompt is, and one that goes with the answer.
- `coverage`: how often does a 95 % interval hold the true correlation, which is known?
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from corrsteer import inference, scores
from corrsteer.stats.evidence import Evidence

ALPHA, LEVEL = 0.05, 0.95
PROMPTS, COMPLETIONS = 64, 8
BLOCK = 256  # samples
OF_FEATURES, OF_REWARDS = 0.9, 0.7  # shares of the variance that are the prompt's
PERMUTED = {"single samples": {}, "whole prompts": {"groups": True}, "within prompts": {"groups": True, "within": True}}


def evidence_of(z: np.ndarray, y: np.ndarray, seed: int, groups: bool, within: bool = False, **settings) -> Evidence:
    """Everything in blocks, where every `COMPLETIONS` samples are a prompt's; without `groups` as if each were one."""
    evidence = Evidence(z.shape[1], seed=seed, within=within, **settings)
    pooled, rewards = torch.from_numpy(z.astype(np.float32)), torch.from_numpy(y)
    prompts = np.arange(len(y)) // COMPLETIONS
    for number, at in enumerate(range(0, len(y), BLOCK)):
        some = slice(at, at + BLOCK)
        evidence.update(pooled[some], rewards[some], number, groups=prompts[some] if groups else None)
    return evidence


def repeated(of_prompts: np.ndarray) -> np.ndarray:
    """What prompts have, for each of their samples."""
    return np.repeat(of_prompts, COMPLETIONS, axis=0)


def sparse(rng: np.random.Generator, drive: np.ndarray, frequency: np.ndarray) -> np.ndarray:
    """Features that are active in a share of samples, where standard normal `drive: [n, d]` is highest."""
    active = drive > torch.special.ndtri(torch.from_numpy(1 - frequency)).numpy()
    return active * rng.exponential(size=drive.shape)


def null_samples(rng: np.random.Generator, kind: str, prompts: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Features `[n, d]` and rewards `[n]` that are independent of each other, and mostly the prompt's."""

    def mixed(share: float, k: int) -> np.ndarray:
        of_prompts, of_samples = rng.standard_normal((prompts, k)), rng.standard_normal((prompts * COMPLETIONS, k))
        return math.sqrt(share) * repeated(of_prompts) + math.sqrt(1 - share) * of_samples

    frequency = np.exp(rng.uniform(math.log(0.02), math.log(0.5), d))
    z, y = sparse(rng, mixed(OF_FEATURES, d), frequency), mixed(OF_REWARDS, 1)[:, 0]
    return z, (y > 0).astype(float) if kind == "binary" else y


def survivors(evidences: dict[int, Evidence]) -> dict[int, np.ndarray]:
    """Which features of each layer survive."""
    tested = inference.significance(evidences)
    return {layer: (found.p_adjusted <= ALPHA).numpy() for layer, found in tested.items()}


def family_wise(seed: int, runs: int, prompts: int, d: int, permutations: int) -> Iterator[dict[str, Any]]:
    """Null runs of two layers of `d` features each."""
    for number, kind in enumerate(("binary", "normal")):
        rng = np.random.default_rng([seed, 3, number])
        survived = dict.fromkeys(PERMUTED, 0)
        for run in range(runs):
            z, y = null_samples(rng, kind, prompts, 2 * d)
            for permuted, how in PERMUTED.items():
                layers = {
                    layer: evidence_of(part, y, run, permutations=permutations, **{"groups": False, **how})
                    for layer, part in enumerate(np.split(z, 2, axis=1))
                }
                survived[permuted] += any(bool(alive.any()) for alive in survivors(layers).values())
        for permuted, count in survived.items():
            yield {
                "rewards": kind, "permuted": permuted, "runs": runs, "prompts": prompts, "completions": COMPLETIONS,
                "features_tested": 2 * d, "permutations": permutations, "family_wise_error": count / runs,
            }  # fmt: skip


def confounded(seed: int, runs: int, prompts: int, d: int, permutations: int) -> Iterator[dict[str, Any]]:
    """A feature that is active in easy prompts, and one that is active in good answers, whatever the prompt, among `d`
    features of which the others go with neither."""
    rng = np.random.default_rng([seed, 4])
    kinds = ("goes with the prompt", "goes with the answer")
    permuted = [name for name, how in PERMUTED.items() if how]
    r = {(name, kind): 0.0 for name in permuted for kind in kinds}
    alive = dict.fromkeys(r, 0)
    for run in range(runs):
        n = prompts * COMPLETIONS
        ease, luck = repeated(rng.standard_normal(prompts)), rng.standard_normal(n)
        y = (ease + luck > 0).astype(float)
        drive = rng.standard_normal((n, d))
        drive[:, 0] = 0.8 * ease + 0.6 * drive[:, 0]
        drive[:, 1] = 0.6 * luck + 0.8 * drive[:, 1]
        z = sparse(rng, drive, np.full(d, 0.2))
        for name in permuted:
            evidence = evidence_of(z, y, run, permutations=permutations, **PERMUTED[name])
            found, correlation = survivors({0: evidence})[0], scores.correlation(evidence)
            for feature, kind in enumerate(kinds):
                r[name, kind] += float(correlation[feature]) / runs
                alive[name, kind] += int(found[feature])
    for (name, kind), value in r.items():
        yield {
            "permuted": name, "feature": kind, "runs": runs, "prompts": prompts, "completions": COMPLETIONS,
            "features_tested": d, "permutations": permutations, "correlation": value,
            "significant": alive[name, kind] / runs,
        }  # fmt: skip


def known_samples(
    rng: np.random.Generator, prompts: int, frequency: float, d: int
) -> tuple[np.ndarray, np.ndarray, dict[bool, float]]:
    """Features `[n, d]`, rewards of 0 and 1 `[n]`, and their true correlation, by whether it is within prompts.

    Half of the prompts are easy: c = 1, else -1. A good answer has the chance q = (1 + 0.8 c)/2. Of each feature, a
    prompt has a level l of 1 or -1, with E[l c] = 0.5; it is active with the chance s (1 + 0.8 l + 0.2 (y - q)), with
    exponential values past 1.
    """
    n, s = prompts * COMPLETIONS, frequency
    c = rng.choice([-1.0, 1.0], (prompts, 1))
    level = np.where(rng.random((prompts, d)) < 0.75, c, -c)
    q = repeated((1 + 0.8 * c) / 2)
    y = (rng.random((n, 1)) < q).astype(float)
    z = (rng.random((n, d)) < s * (1 + 0.8 * repeated(level) + 0.2 * (y - q))) * (1 + rng.exponential(size=(n, d)))
    mean, square = 2.0, 5.0  # of active values
    z_var, y_var = s * square - (s * mean) ** 2, 0.25
    z_within, y_within = z_var - (s * mean * 0.8) ** 2, 0.25 * (1 - 0.8**2)  # the prompt's own variance taken off
    cross_within = s * mean * 0.2 * y_within
    cross = s * mean * 0.8 * 0.5 * 0.8 / 2 + cross_within
    return z, y[:, 0], {False: cross / math.sqrt(z_var * y_var), True: cross_within / math.sqrt(z_within * y_within)}


def coverage(seed: int, trials: int, d: int, cells: Iterable[tuple[int, float]]) -> Iterator[dict[str, Any]]:
    """About `trials` intervals of each method a cell: `d` features at a time, each time with new rewards."""
    for number, (prompts, frequency) in enumerate(cells):
        rng = np.random.default_rng([seed, 5, number])
        hits: dict[bool, dict[str, list[bool]]] = {within: {} for within in (False, True)}
        truth = {}
        for run in range(-(-trials // d)):
            z, y, truth = known_samples(rng, prompts, frequency, d)
            of_prompts = np.arange(len(y)) // COMPLETIONS
            for within in hits:
                evidence = evidence_of(z, y, run, True, within, bootstrap=500)
                found = {
                    "cluster": inference.cluster_interval(
                        torch.from_numpy(z), torch.from_numpy(y), of_prompts, LEVEL, within=within
                    ),
                    "bootstrap": inference.interval(evidence, "bootstrap", LEVEL),
                }
                if not within:
                    found["delta"] = inference.interval(evidence_of(z, y, run, False), "delta", LEVEL)
                for method, (low, high) in found.items():
                    there = low.isfinite() & high.isfinite()
                    held = ((low <= truth[within]) & (truth[within] <= high))[there]
                    hits[within].setdefault(method, []).extend(held.tolist())
        for within, of in hits.items():
            yield {
                "correlation_is": "within prompts" if within else "of all samples", "prompts": prompts,
                "completions": COMPLETIONS, "frequency": frequency, "correlation": truth[within],
                "intervals": max(map(len, of.values())),
                "coverage": {method: float(np.mean(held)) for method, held in of.items()},
            }  # fmt: skip


CELLS = [(prompts, frequency) for prompts in (64, 256) for frequency in (0.05, 0.3)]


def study(seed: int, quick: bool) -> dict[str, tuple[Iterator[dict[str, Any]], int]]:
    """The parts of the study, with how many rows each has."""
    runs, trials = (10, 100) if quick else (600, 4000)
    return {
        "clustered_family_wise": (family_wise(seed, runs, PROMPTS, 60, 199), 2 * len(PERMUTED)),
        "clustered_confounded": (confounded(seed, runs, PROMPTS, 60, 199), 4),
        "clustered_coverage": (coverage(seed, trials, 100, CELLS), 2 * len(CELLS)),
    }


def summary(result: dict[str, Any]) -> list[str]:
    """What it comes to, in sentences."""
    rates: dict[str, list[float]] = {}
    for row in result["clustered_family_wise"]:
        rates.setdefault(row["permuted"], []).append(row["family_wise_error"])
    first = result["clustered_family_wise"][0]
    spans = ", ".join(
        f"{' and '.join(f'{rate:.3f}' for rate in found)} permuting {name}" for name, found in rates.items()
    )
    lines = [
        f"features and rewards that go with the prompt, but not with each other ({first['prompts']} prompts of "
        f"{first['completions']} completions, {first['runs']} runs each of binary and normal rewards): the family-wise "
        f"error at {ALPHA} is {spans}"
    ]
    for kind in dict.fromkeys(row["feature"] for row in result["clustered_confounded"]):
        said = ", ".join(
            f"{round(row['correlation'], 2) + 0.0:.2f} with {row['significant']:.0%} of runs significant permuting "
            f"{row['permuted']}"
            for row in result["clustered_confounded"]
            if row["feature"] == kind
        )
        lines.append(f"a feature that {kind}: r is {said}")
    return lines


COVERAGE_HEADER = ("correlation", "prompts", "frequency", "cluster", "bootstrap", "delta")


def coverage_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """How often 95 % intervals of each method hold the truth."""
    return [
        (
            row["correlation_is"], str(row["prompts"]), f"{row['frequency']:g}",
            *(f"{row['coverage'][m]:.1%}" if m in row["coverage"] else "-" for m in ("cluster", "bootstrap", "delta")),
        )
        for row in result["clustered_coverage"]
    ]  # fmt: skip
