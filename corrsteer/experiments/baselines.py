"""`baselines`: what a steering has to beat, made of the same run."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from corrsteer.arguments import check_type, whole
from corrsteer.errors import CorrSteerError
from corrsteer.experiments.seen_samples import selected
from corrsteer.experiments.selection import decoder_rows, select, selectable
from corrsteer.ops import Moments
from corrsteer.runs.pooling import RESIDUAL_POOLINGS
from corrsteer.runs.run import Run
from corrsteer.sae.encoder import SparseEncoder
from corrsteer.stats import scores
from corrsteer.stats.evidence import SCORES
from corrsteer.steering.features import Feature
from corrsteer.steering.steering import Steering


def baselines(
    run: Run,
    steering: Steering,
    *,
    encoders: Mapping[int, SparseEncoder] | None = None,
    draws: int = 3,
    seed: int = 0,
) -> dict[str, list[Steering]]:
    """Steerings to compare another with, by the name of the baseline; of several candidates, trials take the best.

    - `difference of means`: of the residuals of samples with y > 0 and y <= 0 (contrastive activation addition; Rimsky
      et al., "Steering Llama 2 via contrastive activation addition", 2024), a candidate for each layer and pooling of
      `run.residuals`.
    - `random feature 1` and so on, as one tells little of others: at each hook point of `steering`, a random feature
      that was active in some sample and is none of the steering's, at the norm of what the steering adds there.
    - `best by <score>`: for each score but r, the one feature that ranks best, as `select(run, "single", score=...)`
      gives it. What r or a score before has chosen is left out.
    - `residual dimension`: the dimension of the residual stream that correlates best with the reward, of either sign,
      with the difference of its class means.

    The first note of each says what it is. Layer 0 is left out, as `select` does, unless the steering is of it. A
    baseline that cannot be had is left out, such as a difference of means where all rewards are positive, or a score
    that needs activations which the run does not keep.

    Parameters
    ----------
    run : what the steering was selected from.
    steering : what is to be compared. Baselines have its positions; their scale is 1.
    encoders : where decoder rows are read from, if not where the run's encoders came from.
    draws : how many random features.
    seed : of these.
    """
    check_type("run", run, Run, "a Run, as collect returns")
    check_type("steering", steering, Steering, "a Steering")
    draws, seed = whole("draws", draws, 0), whole("seed", seed, 0)
    layers = sorted({*selectable(run.residuals), *(f.layer for f in steering.features if f.layer in run.residuals)})
    of_residuals = [layer for layer in layers if layer not in run.steered]  # what is read elsewhere cannot be added
    found = {
        "difference of means": list(_differences_of_means(run, of_residuals)),
        **{
            f"random feature {draw + 1}": list(_random_feature(run, steering, encoders, seed, draw))
            for draw in range(draws)
        },
        **{f"best by {score}": [best] for score, best in _best_by_other_scores(run, encoders)},
        "residual dimension": list(_residual_dimension(run, of_residuals)),
    }
    return {
        name: [replace(candidate, positions=steering.positions) for candidate in candidates]
        for name, candidates in found.items()
        if candidates
    }


def _differences_of_means(run: Run, layers: Sequence[int]) -> Iterator[Steering]:
    for layer in layers:
        for pool in RESIDUAL_POOLINGS:
            moments = run.residuals[layer][pool]
            difference = moments.coefficient("contrastive")[0].to("cpu", torch.float32)
            if not _two_classes(moments) or not bool(difference.any()):
                continue
            yield _described(
                run, Steering.from_vectors({str(run.points[layer]): difference}),
                f"the difference of class means of layer {layer}'s residuals, pooled by {pool}",
                baseline="difference of means", layer=layer, pool=pool,
            )  # fmt: skip


def _random_feature(
    run: Run, steering: Steering, encoders: Mapping[int, SparseEncoder] | None, seed: int, draw: int
) -> Iterator[Steering]:
    layers = {str(run.steering_point(layer)): layer for layer in run.points}
    if not {feature.hook_point for feature in steering.features} <= set(layers):
        return  # vectors of the user's own at places that the run knows no features of
    taken = {(feature.layer, feature.index) for feature in steering.features}
    features, directions = [], []
    for point, vector in steering.vectors().items():
        layer, norm = layers[str(point)], abs(steering.scale) * float(vector.norm())
        drawn = _drawn(run, layer, str(point), taken, encoders, seed, draw)
        if drawn is None or norm == 0:
            return
        feature, direction = drawn
        features.append(replace(feature, coefficient=norm / float(direction.norm())))
        directions.append(direction)
    if features:
        yield _described(
            run, Steering(features, torch.stack(directions)),
            f"random features: {', '.join(feature.name for feature in features)}",
            baseline="random feature", seed=seed, draw=draw,
        )  # fmt: skip


def _drawn(
    run: Run,
    layer: int,
    point: str,
    taken: Collection[tuple[int | None, int | None]],
    encoders: Mapping[int, SparseEncoder] | None,
    seed: int,
    draw: int,
) -> tuple[Feature, Tensor] | None:
    """A random feature of a layer and its direction `[d]`: one that was active, is not taken, and has a direction.

    Draws of one seed are of different features; None where there are no more.
    """
    active = run.moments[layer][run.pool].n_active.nonzero()[:, 0].tolist()
    free = [index for index in active if (layer, index) not in taken]
    for at in np.random.default_rng([seed, layer]).permutation(len(free)):
        feature = Feature(point, layer=layer, index=free[at])
        (direction,) = decoder_rows(run, [feature], encoders)
        if bool(direction.isfinite().all()) and bool(direction.any()):
            if draw == 0:
                return feature, direction
            draw -= 1
    return None


def _best_by_other_scores(run: Run, encoders: Mapping[int, SparseEncoder] | None) -> Iterator[tuple[str, Steering]]:
    seen: set[tuple[int | None, int | None, bool]] = set()
    for score in ("pearson", *(name for name in SCORES if name != "pearson")):
        if score != "pearson" and not _has(run, score):
            continue
        best = select(run, "single", score=score, encoders=encoders)
        for feature in best.features:
            choice = (feature.layer, feature.index, feature.coefficient > 0)
            if choice not in seen and feature.coefficient and score != "pearson":
                yield score, replace(best, notes=[f"{feature.name}, which ranks best by {score}", *best.notes])
            seen.add(choice)


def _residual_dimension(run: Run, layers: Sequence[int]) -> Iterator[Steering]:
    correlations = {layer: run.residuals[layer]["mean"].correlation()[0] for layer in layers}
    if not correlations:
        return
    layer = max(correlations, key=lambda layer: float(correlations[layer].abs().max()))
    moments, dimension = run.residuals[layer]["mean"], int(correlations[layer].abs().argmax())
    r, coefficient = float(correlations[layer][dimension]), float(moments.coefficient("contrastive")[0, dimension])
    if not _two_classes(moments) or not r or not coefficient:
        return
    direction = torch.zeros(moments.d_sae, dtype=torch.float32, device="cpu")
    direction[dimension] = 1
    yield _described(
        run, Steering.from_vectors({str(run.points[layer]): direction}, coefficient),
        f"dimension {dimension} of layer {layer}'s residuals, r = {r:.3f}",
        baseline="residual dimension", layer=layer, pool="mean", dimension=dimension,
    )  # fmt: skip


def _two_classes(moments: Moments) -> bool:
    """Whether there are samples of both, y > 0 and y <= 0."""
    return 0 < int(moments.n_positive[0]) < moments.n


def _has(run: Run, score: str) -> bool:
    """Whether the run holds what a score needs."""
    try:
        for evidences in run.evidence.values():
            scores.check(evidences[run.pool], score)
    except CorrSteerError:
        return False
    return bool(run.evidence)


def _described(run: Run, steering: Steering, note: str, **how: Any) -> Steering:
    """The same with what it is, and the samples that it was made from."""
    provenance = selected(run.provenance) | {"selection": how, "n": run.n}
    return replace(steering, notes=[note], provenance=provenance)
