"""`select`: from what was collected to a `Steering`, by one of the paper's three strategies or by search."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from corrsteer.arguments import check_type, share, whole, wholes
from corrsteer.errors import CorrSteerError
from corrsteer.experiments.pruning import prune
from corrsteer.experiments.ranking import Ranking, in_direction
from corrsteer.experiments.search import SearchOptions, search
from corrsteer.experiments.seen_samples import selected
from corrsteer.lm.decoding import Decoding
from corrsteer.lm.token_positions import POSITIONS
from corrsteer.ops.moments import COEFFICIENTS
from corrsteer.rollouts.journal import Journal
from corrsteer.runs.run import Run
from corrsteer.sae.encoder import SparseEncoder
from corrsteer.stats import inference
from corrsteer.stats.evidence import FROM_ROWS, SCORES, STREAMED
from corrsteer.steering.features import CHANCE, Feature
from corrsteer.steering.steering import Steering, check_application
from corrsteer.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STRATEGIES = ("single", "all", "pruned", "search")
STEERED = ("pruned", "search")  # strategies that run the model
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
    coefficient: str | None = None,
    direction: str | None = None,
    layers: Iterable[int] | None = None,
    top_k: int = 10,
    encoders: Mapping[int, SparseEncoder] | None = None,
    model: nn.Module | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    validation: Task | None = None,
    positions: str | Sequence[str] = "generated",
    scale: float = 1.0,
    options: SearchOptions | None = None,
    decoding: Decoding | None = None,
    journal: Journal | None = None,
    progress: bool = True,
) -> Steering:
    """Select features and set their coefficients (CorrSteer-S, -A and -P, and by search).

    Parameters
    ----------
    run : what `collect` returned.
    strategy : `single`, the one feature with the highest correlation over all layers; `all`, the top feature of
        every layer; `pruned`, those of `all` whose feature, steered alone, beats the unsteered validation score;
        `search`, what does best on validation samples of the features that correlate best, by every pooling that the
        run holds, alone and together, at the scale that is best.
    score : what features are ranked by, see `scores.score`; `pearson`, as the paper.
    alpha : keep only features whose p-value, corrected for their number, is at most this. By default nothing is
        dropped, and a note says which of the selected features chance alone could explain.
    correction : `maxT`, the chance that any feature of any layer does as well (family-wise, Westfall & Young);
        `layer`, any feature of its layer; `bh`, the false discovery rate (Benjamini & Hochberg).
    interval : of the correlation, 95 %: `delta`, `bootstrap` or `fisher`, see `inference`.
    coefficient : `mean_positive`, `mean_positive_active` or `contrastive`, see `Moments.coefficient`. By default
        `mean_positive`, as published; to search, `mean_positive_active`, or of a feature that is not active where the
        reward is positive, its mean over all samples in which it is.
    direction : `positive` correlations, `negative` ones (steered with -|c|), or `both`, by |r|. By default `positive`,
        as published; to search, `both`, some of each.
    layers : which layers to select from; by default all but layer 0.
    top_k : rows of each layer's table.
    encoders : where decoder rows are read from, if not where the run's encoders came from.
    model, tokenizer, validation : for `pruned` and `search`: the model, and the task whose score decides.
    positions, scale : what the steering is to be applied at and by; for `pruned` also how each feature is tried. To
        search, one or more positions to try, and the middle of the scales to begin with.
    options : of the search.
    decoding : for `pruned` and `search`: how completions are generated.
    journal : as for `run_trials`.

    Returns
    -------
    The steering. Where nothing can be selected it has no features, and the first of its notes says why.

    Raises
    ------
    CorrSteerError : for unknown choices, and where the run does not hold what they need.
    """
    check_type("run", run, Run, "a Run, as collect returns")
    searches = strategy == "search"
    choices = chosen(strategy, score, alpha, correction, interval, coefficient, direction, layers, top_k).checked(run)
    tried = [positions] if isinstance(positions, str) else list(dict.fromkeys(positions))
    if not tried or len(tried) > 1 and not searches:
        raise CorrSteerError(f"positions must be one of {', '.join(POSITIONS)}, or more to search, got {positions!r}")
    for one in tried:
        scale = check_application(one, scale)
    if options is not None and not searches:
        raise CorrSteerError(f"options are of strategy 'search', got strategy {strategy!r}; leave them out")
    if searches and scale == 0:
        raise CorrSteerError("scale must not be 0 to search, as scales begin around it, got 0; leave it out")
    if strategy in STEERED and (model is None or tokenizer is None or validation is None):
        raise CorrSteerError(f"strategy {strategy!r} steers the model: give model, tokenizer and validation")
    ranked = _rank(run, choices)
    options = options or SearchOptions()
    features = candidates(run, choices, options.candidates) if searches else ranked.best
    if strategy == "single":
        features = sorted(features, key=lambda f: -abs(f.ranked_by))[:1]
    if not searches and _no_positive_reward(run):
        features = []
    steering = Steering(
        features,
        decoder_rows(run, features, encoders),
        ranked.table,
        _reasons(run, choices, features, ranked.dropped) + run.notes,
        _provenance(run, choices),
        tried[0],
        scale,
    )
    if features and model is not None and tokenizer is not None and validation is not None and strategy in STEERED:
        decoding = decoding or Decoding()
        if searches:
            alone = steering.alone()
            span = _reward_range(run)
            steering = search(
                alone, model, tokenizer, validation, tried, scale, span, decoding, options, progress, journal
            )
        else:
            steering = prune(steering, model, tokenizer, validation, decoding, progress, journal)
    by_chance = [f for f in steering.features if f.by_chance]
    if by_chance and alpha is None and not searches:
        steering.notes.append(
            f"{len(by_chance)} of {len(steering.features)} selected features chance alone could explain "
            f"(adjusted p > {CHANCE}): " + ", ".join(f"{f.name} (p {f.p_adjusted:.2f})" for f in by_chance)
        )
    return steering


def candidates(run: Run, choices: Choices, k: int) -> list[Feature]:
    """The features to search among: the k that rank best of every layer, pooling and sign, each once."""
    found: dict[tuple[int | None, int | None, bool], Feature] = {}
    signs = ("positive", "negative") if choices.direction == "both" else (choices.direction,)
    for layer in choices.layers or ():
        for pool in dict.fromkeys((run.pool, *run.moments[layer])):  # the run's own first
            ranking = Ranking(run, choices.score, choices.coefficient, choices.interval, pool)
            for sign in signs:
                for feature in ranking.top(layer, sign, k):
                    found.setdefault((layer, feature.index, feature.ranked_by < 0), ranking.with_strength(feature))
    return [feature for feature in found.values() if feature.coefficient]


def _provenance(run: Run, choices: Choices) -> dict[str, Any]:
    """That of the run, with what was selected from it and how."""
    return selected(run.provenance) | {
        "selection": asdict(choices),
        "reward": run.reward,
        "pool": run.pool,
        "coefficient_pool": run.coefficient_pool,
        "n": run.n,
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
        if self.strategy == "search":
            self._check_search()
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

    def _check_search(self) -> None:
        if self.alpha is not None:
            raise CorrSteerError(
                f"alpha must be left out to search, where trials decide and not p-values of correlations, got "
                f"{self.alpha}"
            )
        if self.score in FROM_ROWS:
            raise CorrSteerError(
                f"score must be one that every pooling has to search, and activations are not kept of each, got "
                f"{self.score!r}; use {', '.join(STREAMED)}"
            )

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


def chosen(
    strategy: str,
    score: str,
    alpha: float | None,
    correction: str,
    interval: str,
    coefficient: str | None,
    direction: str | None,
    layers: Iterable[int] | None,
    top_k: int,
) -> Choices:
    """Choices, with what a strategy takes by default where nothing is chosen."""
    searches = strategy == "search"
    coefficient = coefficient or ("mean_positive_active" if searches else "mean_positive")
    direction = direction or ("both" if searches else "positive")
    return Choices(strategy, score, alpha, correction, interval, coefficient, direction, layers, top_k)


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
    ranking, layers = Ranking(run, choices.score, choices.coefficient, choices.interval), set(choices.layers or ())
    ranked = _Ranked({}, [], [])
    for layer in sorted(run.moments):
        value = ranking.value(layer)
        rank = in_direction(value, choices.direction)
        ranked.table[layer] = best = ranking.best(layer, value, rank, choices.top_k)
        if layer not in layers:
            continue
        if best and choices.alpha is not None:
            p = getattr(run.significance(choices.score)[layer], CORRECTIONS[choices.correction]).to(rank.device)
            ranked.dropped.append(float(p[best[0].index]))
            best = ranking.best(layer, value, rank * (p <= choices.alpha), 1)
        ranked.best.extend(best[:1])
    return ranked


def _reward_range(run: Run) -> tuple[float, float]:
    """Between what rewards lie, as far as the run tells: 0 and 1, or its own lowest and highest."""
    rewards = run.rewards[run.rewards.isfinite()]
    low, high = float(rewards.min()), float(rewards.max())
    return (0.0, 1.0) if 0 <= low and high <= 1 else (low, high)


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
    elif choices.strategy != "search" and _no_positive_reward(run):
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


def decoder_rows(run: Run, features: Sequence[Feature], encoders: Mapping[int, SparseEncoder] | None) -> Tensor:
    """The decoder row of each feature of a run, `[len(features), d]`, from the encoders or where theirs came from."""
    decoders = run.decoders if encoders is None else {layer: e.decoder for layer, e in encoders.items()}
    if not features:
        return torch.zeros(0, 0, dtype=torch.float32, device="cpu")
    if missing := sorted({cast(int, f.layer) for f in features} - set(decoders)):
        raise CorrSteerError(
            f"encoders must hold layers {missing}, of which features were selected, got {sorted(decoders)}"
        )
    rows = [decoders[cast(int, f.layer)].rows([cast(int, f.index)]) for f in features]
    widths = {row.shape[1]: f"{row.shape[1]} of {f.name}" for row, f in zip(rows, features)}
    if len(widths) > 1:
        raise CorrSteerError(
            f"directions of one steering must be of one width, got {' and '.join(widths.values())}; select from layers "
            f"whose SAEs read the same kind of hook point"
        )
    return torch.cat(rows)
