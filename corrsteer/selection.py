"""`select`: from what was collected to a `Steering`, by one of the paper's three strategies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from torch import Tensor, nn

from corrsteer import inference
from corrsteer.collection import Run
from corrsteer.encoder import SparseEncoder
from corrsteer.errors import CorrSteerError
from corrsteer.evaluation import grade
from corrsteer.evidence import SCORES
from corrsteer.generation import Decoding
from corrsteer.moments import COEFFICIENTS, NEGATIVE, POSITIVE
from corrsteer.steering import CHANCE, Feature, Steering
from corrsteer.tasks import Task

STRATEGIES = ("single", "all", "pruned")
DIRECTIONS = ("positive", "negative", "both")
CORRECTIONS = {"maxT": "p_adjusted", "layer": "p_layer", "bh": "q_value"}  # and the p-values they are


def select(
    run: Run,
    strategy: str = "all",
    *,
    score: str = "pearson",
    alpha: float | None = None,
    correction: str = "maxT",
    interval: str = "delta",
    coefficient: str = "mean_positive",
    direction: str = "positive",
    layers: Sequence[int] | None = None,
    top_k: int = 10,
    encoders: Mapping[int, SparseEncoder] | None = None,
    model: nn.Module | None = None,
    tokenizer=None,
    validation: Task | None = None,
    positions: str = "generated",
    scale: float = 1.0,
    decoding: Decoding | None = None,
    progress: bool = True,
) -> Steering:
    """Select features and set their coefficients (CorrSteer-S, -A and -P).

    Parameters
    ----------
    run : what `collect` returned.
    strategy : `single`, the one feature with the highest correlation over all layers; `all`, the top feature of
        every layer; `pruned`, those of `all` whose feature, steered alone, beats the unsteered validation score.
    score : what features are ranked by, see `inference.score`; `pearson`, as the paper.
    alpha : keep only features whose p-value, corrected for their number, is at most this. By default nothing is
        dropped, and a note says which of the selected features chance explains.
    correction : `maxT`, the chance that any feature of any layer does as well (family-wise, Westfall & Young);
        `layer`, any feature of its layer; `bh`, the false discovery rate (Benjamini & Hochberg).
    interval : of the correlation, 95 %: `delta`, `bootstrap` or `fisher`, see `inference`.
    coefficient : `mean_positive`, `mean_positive_active` or `contrastive`, see `Moments.coefficient`.
    direction : `positive` correlations, `negative` ones (steered with -|c|), or `both`, by |r|.
    layers : which layers to select from; by default all but layer 0.
    top_k : rows of each layer's table.
    encoders : where decoder rows are read from, if not where the run's encoders came from.
    model, tokenizer, validation : for `pruned`: the model, and the task whose score decides.
    positions, scale, decoding : for `pruned`: how candidates are steered and completions generated.

    Returns
    -------
    The steering. Where nothing can be selected it has no features, and its notes say why.
    """
    for name, value, known in (
        ("strategy", strategy, STRATEGIES),
        ("score", score, SCORES),
        ("correction", correction, CORRECTIONS),
        ("interval", interval, inference.METHODS),
        ("coefficient", coefficient, COEFFICIENTS),
        ("direction", direction, DIRECTIONS),
    ):
        if value not in known:
            raise CorrSteerError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if top_k < 1:
        raise CorrSteerError(f"top_k must be at least 1, got {top_k}")
    if alpha is not None and not 0 < alpha < 1:
        raise CorrSteerError(f"alpha must lie between 0 and 1, got {alpha}")
    if alpha is not None and run.n and not run.testable(score):
        raise CorrSteerError(
            f"alpha needs p-values, but the run has no permutations of the score {score!r}; "
            f"collect with permutations=1000 and scores=[{score!r}]"
        )
    if strategy == "pruned" and (model is None or tokenizer is None or validation is None):
        raise CorrSteerError("strategy 'pruned' steers the model: give model, tokenizer and validation")
    unknown = set(layers or ()) - set(run.moments)
    if unknown:
        raise CorrSteerError(f"layers must be among those collected, {sorted(run.moments)}, got {sorted(unknown)}")
    layers = sorted(layers if layers is not None else set(run.moments) - {0})

    table = {
        layer: _top_features(run, layer, score, coefficient, direction, interval, top_k)
        for layer in sorted(run.moments)
    }
    candidates = [table[layer][0] for layer in layers if table[layer]]
    if strategy == "single":
        candidates = sorted(candidates, key=lambda f: -abs(_ranked_by(f)))[:1]
    chosen = [f for f in candidates if alpha is None or getattr(f, CORRECTIONS[correction]) <= alpha]
    notes = list(run.notes)
    n_positive = int(next(iter(run.moments.values()))[run.pool].n_positive[0])
    if not notes and n_positive == 0:
        chosen = []
        notes.append(
            "no reward was above 0, so every coefficient, a mean over the samples with reward > 0, would be 0; "
            "shift the reward so that good samples have a positive one"
        )
    if coefficient == "contrastive" and chosen and n_positive == run.n:
        notes.append("every reward was above 0, so the contrastive coefficient has nothing to subtract")
    if not chosen and not layers:
        notes.append("no layer is left to select from: layer 0 is left out unless it is named in layers=[0]")
    elif candidates and not chosen and not notes:
        notes.append(_none_survives(run, candidates, alpha, correction))
    elif not chosen and not notes:
        notes.append(
            f"no feature of layers {layers} has a {'nonzero' if direction == 'both' else direction} correlation "
            f"with the reward over {run.n} samples"
        )
    by_chance = [f for f in chosen if f.by_chance]
    if by_chance:
        notes.append(
            f"{len(by_chance)} of {len(chosen)} selected features chance explains (adjusted p > {CHANCE}): "
            + ", ".join(f"layer {f.layer} feature {f.index} (p {f.p_adjusted:.2f})" for f in by_chance)
        )
    steering = Steering(
        chosen,
        _directions(run, chosen, encoders),
        table,
        notes,
        run.provenance
        | {
            "selection": {
                "strategy": strategy,
                "score": score,
                "coefficient": coefficient,
                "direction": direction,
                "alpha": alpha,
                "correction": correction,
                "interval": interval,
            }
        }
        | {"pool": run.pool, "coefficient_pool": run.coefficient_pool, "n": run.n},
    )
    if strategy == "pruned" and chosen:
        steering = _prune(steering, model, tokenizer, validation, positions, scale, decoding or Decoding(), progress)
    return steering


def _ranked_by(feature: Feature) -> float:
    return feature.correlation if feature.score is None else feature.score


def _none_survives(run: Run, candidates: list[Feature], alpha: float, correction: str) -> str:
    """What to say where no feature is left."""
    least = min(getattr(f, CORRECTIONS[correction]) for f in candidates)
    tested = sum(moments[run.pool].d_sae for moments in run.moments.values())
    return (
        f"no feature survives alpha={alpha:g} ({correction}): among {tested} features of {len(run.moments)} layers and "
        f"{run.n} samples, chance alone explains what correlates best (smallest corrected p {least:.3g}); "
        f"collect more samples, or steer along none of these"
    )


def _top_features(
    run: Run, layer: int, score: str, coefficient: str, direction: str, interval: str, k: int
) -> list[Feature]:
    """A layer's best features in the given direction; those with a score of 0 are never among them."""
    moments, r = run.moments[layer][run.pool], run.correlation(layer)
    evidence = run.evidence.get(layer, {}).get(run.pool)
    if evidence is None and score != "pearson":
        raise CorrSteerError(f"score {score!r} needs evidence, which this run does not hold; collect again")
    value = r if score == "pearson" else inference.score(evidence, score).to(r.device)
    rank = {"positive": value, "negative": -value, "both": value.abs()}[direction]
    of_coefficient = run.moments[layer][run.coefficient_pool]
    c = of_coefficient.coefficient(coefficient)[0]
    frequency, group = moments.frequency(), moments.group_frequency()[:, 0]
    best, indices = rank.topk(min(k, len(rank)))
    indices = indices[best > 0]
    known = {}
    if evidence is not None and len(indices):
        known["low"], known["high"] = inference.interval(evidence, interval, features=indices)
        other = run.evidence[layer][run.coefficient_pool]
        known["coefficient_error"] = inference.coefficient_error(other, of_coefficient, coefficient, indices)
    if len(indices) and run.testable(score):
        tested = run.significance(score)[layer]
        at = indices.to(tested.p.device)
        known |= {"p_value": tested.p[at], "p_layer": tested.p_layer[at]}
        known |= {"p_adjusted": tested.p_adjusted[at], "q_value": tested.q[at]}
    if score != "pearson":
        known["score"] = value[indices]
    columns = {name: [None if math.isnan(v) else v for v in values.tolist()] for name, values in known.items()}
    features = []
    for at, index in enumerate(indices.tolist()):
        features.append(
            Feature(
                hook_point=str(run.points[layer]),
                layer=layer,
                index=index,
                correlation=float(r[index]),
                coefficient=-abs(float(c[index])) if value[index] < 0 else float(c[index]),
                frequency=float(frequency[index]),
                frequency_positive=float(group[POSITIVE, index]),
                frequency_negative=float(group[NEGATIVE, index]),
                **{name: values[at] for name, values in columns.items()},
            )
        )
    return features


def _directions(run: Run, features: list[Feature], encoders: Mapping[int, SparseEncoder] | None) -> Tensor:
    decoders = run.decoders if encoders is None else {layer: e.decoder for layer, e in encoders.items()}
    if not features:
        return torch.zeros(0, 0)
    return torch.cat([decoders[f.layer].rows([f.index]) for f in features])


def _prune(steering, model, tokenizer, validation, positions, scale, decoding, progress) -> Steering:
    """Keep the features that, steered alone, beat the unsteered validation score."""

    def score() -> float:
        return grade(model, tokenizer, validation, decoding, progress=progress).score

    unsteered = score()
    alone = []
    for feature, direction in zip(steering.features, steering.directions):
        with Steering([feature], direction[None]).apply(model, positions, scale):
            alone.append(score())
    kept = [at for at, value in enumerate(alone) if value > unsteered]
    steering.provenance["selection"] |= {
        "validation": {"task": validation.name, "n": len(validation), "positions": positions, "scale": scale},
        "unsteered_score": unsteered,
        "score_alone": [{"feature": asdict(f), "score": value} for f, value in zip(steering.features, alone)],
        "decoding": asdict(decoding),
    }
    notes = [] if kept else [f"no feature, steered alone, beat the unsteered validation score of {unsteered:.4f}"]
    return Steering(
        [steering.features[at] for at in kept],
        steering.directions[kept],
        steering.table,
        steering.notes + notes,
        steering.provenance,
    )
