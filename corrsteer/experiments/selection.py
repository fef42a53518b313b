"""`select`: from what was collected to a `Steering`, by one of the paper's three strategies."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from corrsteer.arguments import check_type, share, whole, wholes
from corrsteer.errors import CorrSteerError
from corrsteer.experiments.pruning import prune
from corrsteer.experiments.seen_samples import SELECTED
from corrsteer.lm.decoding import Decoding
from corrsteer.ops.moments import COEFFICIENTS, NEGATIVE, POSITIVE
from corrsteer.runs.run import Run
from corrsteer.sae.encoder import SparseEncoder
from corrsteer.stats import inference, scores
from corrsteer.stats.evidence import SCORES
from corrsteer.steering.features import CHANCE, Feature, FeatureStatistics
from corrsteer.steering.steering import Steering, check_application
from corrsteer.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    layers: Iterable[int] | None = None,
    top_k: int = 10,
    encoders: Mapping[int, SparseEncoder] | None = None,
    model: nn.Module | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
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
    check_type("run", run, Run, "a Run, as collect returns")
    choices = Choices(strategy, score, alpha, correction, interval, coefficient, direction, layers, top_k).checked(run)
    pruned = None
    if strategy == "pruned":
        if model is None or tokenizer is None or validation is None:
            raise CorrSteerError("strategy 'pruned' steers the model: give model, tokenizer and validation")
        scale = check_application(positions, scale)
        pruned = functools.partial(prune, model=model, tokenizer=tokenizer, validation=validation)
    ranked = _rank(run, choices)
    chosen = ranked.best
    if strategy == "single":
        chosen = sorted(chosen, key=lambda f: -abs(f.ranked_by))[:1]
    if _no_positive_reward(run):
        chosen = []
    steering = Steering(
        chosen,
        _directions(run, chosen, encoders),
        ranked.table,
        _reasons(run, choices, chosen, ranked.dropped) + run.notes,
        _provenance(run, choices),
    )
    if pruned and chosen:
        steering = pruned(
            steering, positions=positions, scale=scale, decoding=decoding or Decoding(), progress=progress
        )
    by_chance = [f for f in steering.features if f.by_chance]
    if by_chance and alpha is None:
        steering.notes.append(
            f"{len(by_chance)} of {len(steering.features)} selected features chance alone could explain "
            f"(adjusted p > {CHANCE}): " + ", ".join(f"{f.name} (p {f.p_adjusted:.2f})" for f in by_chance)
        )
    return steering


def _provenance(run: Run, choices: Choices) -> dict[str, Any]:
    """That of the run, with what was selected from it and how."""
    of_run = dict(run.provenance)
    seen = [of_run.pop("samples")] if "samples" in of_run else []
    return of_run | {
        "selection": asdict(choices),
        "pool": run.pool,
        "coefficient_pool": run.coefficient_pool,
        "n": run.n,
        SELECTED: seen,
    }


def selectable(layers: Iterable[int]) -> list[int]:
    """Of collected layers, those that `select` considers unless told otherwise: all but layer 0."""
    return sorted(set(layers) - {0})


@dataclass(frozen=True)
class Choices:
    """What a selection was asked for; see `select`."""

    strategy: str
    score: str
    alpha: float | None
    correction: str
    interval: str
    coefficient: str
    direction: str
    layers: Iterable[int] | None
    top_k: int

    def checked(self, run: Run) -> Choices:
        """The same with the layers that are meant; raises for unknown choices and for what the run lacks."""
        for name, known in (
            ("strategy", STRATEGIES),
            ("score", SCORES),
            ("correction", CORRECTIONS),
            ("interval", inference.METHODS),
            ("coefficient", COEFFICIENTS),
            ("direction", DIRECTIONS),
        ):
            if getattr(self, name) not in known:
                raise CorrSteerError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        alpha = None if self.alpha is None else share("alpha", self.alpha)
        if alpha is not None:
            self._check_alpha(alpha, run)
        if not run.evidence and (self.score, self.interval) != ("pearson", "delta"):
            raise CorrSteerError(
                f"score {self.score!r} and interval {self.interval!r} need evidence, which this run does not hold; "
                f"collect again"
            )
        layers = selectable(run.moments) if self.layers is None else sorted(set(wholes("layers", self.layers)))
        if unknown := sorted(set(layers) - set(run.moments)):
            raise CorrSteerError(f"layers must be among those collected, {sorted(run.moments)}, got {unknown}")
        return replace(self, alpha=alpha, layers=layers, top_k=whole("top_k", self.top_k, 1))

    def _check_alpha(self, alpha: float, run: Run) -> None:
        if run.n and not run.testable(self.score):
            raise CorrSteerError(
                f"alpha needs p-values, but the run has no permutations of the score {self.score!r}; "
                f"collect with permutations=1000 and scores=[{self.score!r}]"
            )
        smallest = 1 / (run.permutations + 1)
        if self.correction != "bh" and run.n and alpha < smallest:
            raise CorrSteerError(
                f"alpha must be at least {smallest:.3g}, the smallest p-value of {run.permutations} "
                f"permutations, got {alpha:g}; collect with {math.ceil(1 / alpha) - 1} permutations or more"
            )


@dataclass(frozen=True)
class _Ranked:
    """The features that rank best.

    Attributes
    ----------
    table : the top features of every layer.
    best : the best of each layer that is selected from, of those that survive `alpha`.
    dropped : corrected p-values of the best of each layer that `alpha` was asked of.
    """

    table: dict[int, list[Feature]]
    best: list[Feature]
    dropped: list[float]


def _rank(run: Run, choices: Choices) -> _Ranked:
    described, layers = _Describer(run, choices), set(choices.layers or ())
    ranked = _Ranked({}, [], [])
    for layer in sorted(run.moments):
        value = described.value(layer)
        rank = {"positive": value, "negative": -value, "both": value.abs()}[choices.direction]
        ranked.table[layer] = best = described.best(layer, value, rank, choices.top_k)
        if layer not in layers:
            continue
        if best and choices.alpha is not None:
            p = getattr(run.significance(choices.score)[layer], CORRECTIONS[choices.correction]).to(rank.device)
            ranked.dropped.append(float(p[best[0].index]))
            best = described.best(layer, value, rank * (p <= choices.alpha), 1)
        ranked.best.extend(best[:1])
    return ranked


def _no_positive_reward(run: Run) -> bool:
    """Whether rewards vary, but none is above 0, so that every coefficient would be 0."""
    moments = run.moments_of_rewards
    return bool(moments.label_varies()[0]) and int(moments.n_positive[0]) == 0


def _reasons(run: Run, choices: Choices, chosen: Sequence[Feature], dropped: Sequence[float]) -> list[str]:
    """Why a selection is empty, or is not what it seems."""
    moments = run.moments_of_rewards
    all_positive, reasons = int(moments.n_positive[0]) == run.n, []
    if run.n == 0:
        reasons.append("no sample was collected")
    elif not bool(moments.label_varies()[0]):
        pass  # the run's own notes say so
    elif _no_positive_reward(run):
        reasons.append(
            "no reward was above 0, so every coefficient, a mean over the samples with reward > 0, would be 0; "
            "shift the reward so that good samples have a positive one"
        )
    elif all_positive and choices.score != "pearson":
        reasons.append(
            f"every reward was above 0, so the score {choices.score!r}, which compares with the others, is 0"
        )
    elif not choices.layers:
        reasons.append("no layer is left to select from: layer 0 is left out unless it is named in layers=[0]")
    elif dropped and not chosen:
        reasons.append(_none_survives(run, min(dropped), choices))
    elif not chosen:
        what = "correlation with the reward" if choices.score == "pearson" else f"score {choices.score!r}"
        kind = "nonzero" if choices.direction == "both" else choices.direction
        reasons.append(f"no feature of layers {choices.layers} has a {kind} {what} over {run.n} samples")
    if choices.coefficient == "contrastive" and chosen and all_positive:
        reasons.append("every reward was above 0, so the contrastive coefficient has nothing to subtract")
    return reasons


def _none_survives(run: Run, least: float, choices: Choices) -> str:
    """What to say where no feature is left."""
    everything = f"{run.n_features} features of {len(run.moments)} layers"
    family = "the features of its layer" if choices.correction == "layer" else everything
    return (
        f"no feature survives alpha={choices.alpha:g} ({choices.correction}): among {family}, over {run.n} samples, "
        f"chance alone could explain what ranks best (smallest corrected p {least:.3g}); collect more samples, or "
        f"steer along none of it"
    )


@dataclass(frozen=True)
class _Describer:
    """What is said of a run's features, by the score and coefficient asked for."""

    run: Run
    choices: Choices

    def value(self, layer: int) -> Tensor:
        """Each feature's score, `[d_sae]`."""
        if self.choices.score == "pearson":
            return self.run.correlation(layer)
        return scores.score(self.run.evidence[layer][self.run.pool], self.choices.score)

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
        c, errors = every[self.choices.coefficient], {}
        columns = {
            "correlation": r,
            "frequency": moments.frequency()[indices],
            "frequency_positive": group[POSITIVE],
            "frequency_negative": group[NEGATIVE],
        }
        if self.choices.score != "pearson":
            columns["score"] = value
        if layer in run.evidence:
            evidence, other = (run.evidence[layer][pool] for pool in (run.pool, run.coefficient_pool))
            columns["low"], columns["high"] = inference.interval(evidence, self.choices.interval, features=indices)
            errors = {kind: inference.coefficient_error(other, of_coefficient, kind, indices) for kind in COEFFICIENTS}
            columns["coefficient_error"] = errors[self.choices.coefficient]
        if run.testable(self.choices.score):
            tested = run.significance(self.choices.score)[layer]
            for name, p in (("value", tested.p), ("layer", tested.p_layer), ("adjusted", tested.p_adjusted)):
                columns[f"p_{name}"] = p[indices.to(p.device)]
            columns["q_value"] = tested.q[indices.to(tested.q.device)]
        known: dict[str, list[Any]] = {name: _known(column) for name, column in columns.items()}
        pairs = {kind: (_known(every[kind]), _known(errors[kind])) for kind in errors}
        return [
            Feature(
                hook_point=str(run.points[layer]),
                coefficient=chosen,
                layer=layer,
                index=index,
                statistics=FeatureStatistics(
                    **{name: column[at] for name, column in known.items()},
                    coefficients={kind: [value[at], error[at]] for kind, (value, error) in pairs.items()} or None,
                ),
            )
            for at, (index, chosen) in enumerate(zip(indices.tolist(), torch.where(value < 0, -c.abs(), c).tolist()))
        ]


def _known(column: Tensor) -> list[float | None]:
    """Numbers as JSON can have them."""
    return [None if math.isnan(number) else number for number in column.tolist()]


def _directions(run: Run, features: list[Feature], encoders: Mapping[int, SparseEncoder] | None) -> Tensor:
    decoders = run.decoders if encoders is None else {layer: e.decoder for layer, e in encoders.items()}
    if not features:
        return torch.zeros(0, 0, dtype=torch.float32, device="cpu")
    if missing := sorted({cast(int, f.layer) for f in features} - set(decoders)):
        raise CorrSteerError(
            f"encoders must hold layers {missing}, of which features were selected, got {sorted(decoders)}"
        )
    return torch.cat([decoders[cast(int, f.layer)].rows([cast(int, f.index)]) for f in features])
