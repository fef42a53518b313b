"""`select`: from what was collected to a `Steering`, by one of the paper's three strategies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from corrsteer import inference, scores
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
CORRECTIONS = {"maxT": "p_adjusted", "layer": "p_layer", "bh": "q"}  # and what `Significance` calls them


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
    score : what features are ranked by, see `scores.score`; `pearson`, as the paper.
    alpha : keep only features whose p-value, corrected for their number, is at most this. By default nothing is
        dropped, and a note says which of the selected features chance alone could explain.
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
    The steering. Where nothing can be selected it has no features, and the first of its notes says why.

    Raises
    ------
    CorrSteerError : for unknown choices, and where the run does not hold what they need.
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
    smallest = 1 / (run.permutations + 1)
    if alpha is not None and correction != "bh" and run.n and alpha < smallest:
        raise CorrSteerError(
            f"alpha must be at least {smallest:.3g}, the smallest p-value of {run.permutations} "
            f"permutations, got {alpha:g}; collect with {math.ceil(1 / alpha) - 1} permutations or more"
        )
    if not run.evidence and (score, interval) != ("pearson", "delta"):
        raise CorrSteerError(
            f"score {score!r} and interval {interval!r} need evidence, which this run does not hold; collect again"
        )
    if strategy == "pruned" and (model is None or tokenizer is None or validation is None):
        raise CorrSteerError("strategy 'pruned' steers the model: give model, tokenizer and validation")
    unknown = set(layers or ()) - set(run.moments)
    if unknown:
        raise CorrSteerError(f"layers must be among those collected, {sorted(run.moments)}, got {sorted(unknown)}")
    layers = sorted(layers if layers is not None else set(run.moments) - {0})

    described = _Describer(run, score, coefficient, interval)
    table, chosen, dropped = {}, [], []  # dropped: corrected p-values of the best of layers in which none survives
    for layer in sorted(run.moments):
        value = described.value(layer)
        rank = {"positive": value, "negative": -value, "both": value.abs()}[direction]
        table[layer] = best = described.best(layer, value, rank, top_k)
        if layer in layers and best and alpha is not None:
            p = getattr(run.significance(score)[layer], CORRECTIONS[correction]).to(rank.device)
            dropped.append(float(p[best[0].index]))
            best = described.best(layer, value, rank * (p <= alpha), 1)
        if layer in layers:
            chosen += best[:1]
    if strategy == "single":
        chosen = sorted(chosen, key=lambda f: -abs(_ranked_by(f)))[:1]
    moments = next(iter(run.moments.values()))[run.pool]
    n_positive, reasons = int(moments.n_positive[0]), []
    if run.n == 0:
        reasons.append("no sample was collected")
    elif not bool(moments.label_varies()[0]):
        pass  # the run's own notes say so
    elif n_positive == 0:
        chosen = []
        reasons.append(
            "no reward was above 0, so every coefficient, a mean over the samples with reward > 0, would be 0; "
            "shift the reward so that good samples have a positive one"
        )
    elif n_positive == run.n and score != "pearson":
        reasons.append(f"every reward was above 0, so the score {score!r}, which compares with the others, is 0")
    elif not layers:
        reasons.append("no layer is left to select from: layer 0 is left out unless it is named in layers=[0]")
    elif dropped and not chosen:
        reasons.append(_none_survives(run, min(dropped), alpha, correction))
    elif not chosen:
        what = "correlation with the reward" if score == "pearson" else f"score {score!r}"
        reasons.append(
            f"no feature of layers {layers} has a {'nonzero' if direction == 'both' else direction} {what} "
            f"over {run.n} samples"
        )
    if coefficient == "contrastive" and chosen and n_positive == run.n:
        reasons.append("every reward was above 0, so the contrastive coefficient has nothing to subtract")
    notes = reasons + list(run.notes)
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
    by_chance = [f for f in steering.features if f.by_chance]
    if by_chance and alpha is None:
        steering.notes.append(
            f"{len(by_chance)} of {len(steering.features)} selected features chance alone could explain "
            f"(adjusted p > {CHANCE}): "
            + ", ".join(f"layer {f.layer} feature {f.index} (p {f.p_adjusted:.2f})" for f in by_chance)
        )
    return steering


def _ranked_by(feature: Feature) -> float:
    return feature.correlation if feature.score is None else feature.score


def _none_survives(run: Run, least: float, alpha: float, correction: str) -> str:
    """What to say where no feature is left."""
    everything = f"{run.n_features} features of {len(run.moments)} layers"
    family = "the features of its layer" if correction == "layer" else everything
    return (
        f"no feature survives alpha={alpha:g} ({correction}): among {family}, over {run.n} samples, chance alone could "
        f"explain what ranks best (smallest corrected p {least:.3g}); collect more samples, or steer along none of it"
    )


@dataclass(frozen=True)
class _Describer:
    """What is said of a run's features, by the score and coefficient asked for."""

    run: Run
    score: str
    coefficient: str
    interval: str

    def value(self, layer: int) -> Tensor:
        """Each feature's score, `[d_sae]`."""
        if self.score == "pearson":
            return self.run.correlation(layer)
        return scores.score(self.run.evidence[layer][self.run.pool], self.score)

    def best(self, layer: int, value: Tensor, rank: Tensor, k: int) -> list[Feature]:
        """The k features that rank best, of scores `value`; those whose rank is not above 0 are never among them."""
        run, (best, indices) = self.run, rank.topk(min(k, len(rank)))
        indices = indices[best > 0]
        if len(indices) == 0:
            return []
        moments, of_coefficient = run.moments[layer][run.pool], run.moments[layer][run.coefficient_pool]
        r, value = run.correlation(layer)[indices], value[indices]
        group = moments.group_frequency()[:, 0, indices]
        every = {kind: of_coefficient.coefficient(kind)[0, indices] for kind in COEFFICIENTS}
        c, errors = every[self.coefficient], {}
        columns = {
            "correlation": r,
            "coefficient": torch.where(value < 0, -c.abs(), c),
            "frequency": moments.frequency()[indices],
            "frequency_positive": group[POSITIVE],
            "frequency_negative": group[NEGATIVE],
        }
        if self.score != "pearson":
            columns["score"] = value
        if layer in run.evidence:
            evidence, other = (run.evidence[layer][pool] for pool in (run.pool, run.coefficient_pool))
            columns["low"], columns["high"] = inference.interval(evidence, self.interval, features=indices)
            errors = {kind: inference.coefficient_error(other, of_coefficient, kind, indices) for kind in COEFFICIENTS}
            columns["coefficient_error"] = errors[self.coefficient]
        if run.testable(self.score):
            tested = run.significance(self.score)[layer]
            for name, p in (("value", tested.p), ("layer", tested.p_layer), ("adjusted", tested.p_adjusted)):
                columns[f"p_{name}"] = p[indices.to(p.device)]
            columns["q_value"] = tested.q[indices.to(tested.q.device)]
        values = {name: _known(column) for name, column in columns.items()}
        pairs = {kind: (_known(every[kind]), _known(errors[kind])) for kind in errors}
        return [
            Feature(
                hook_point=str(run.points[layer]),
                layer=layer,
                index=index,
                **{name: column[at] for name, column in values.items()},
                coefficients={kind: [value[at], error[at]] for kind, (value, error) in pairs.items()} or None,
            )
            for at, index in enumerate(indices.tolist())
        ]


def _known(column: Tensor) -> list[float | None]:
    """Numbers as JSON can have them."""
    return [None if math.isnan(number) else number for number in column.tolist()]


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
        notes + steering.notes,
        steering.provenance,
    )
