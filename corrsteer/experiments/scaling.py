"""`calibrate_scale`: how strongly to steer, by the score of validation samples."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from torch import nn

from corrsteer.arguments import check_type, numbers
from corrsteer.errors import CorrSteerError
from corrsteer.experiments.scale_grid import at_an_end, highest_reward, next_scale
from corrsteer.experiments.seen_samples import SELECTED, overlap_notes, validated
from corrsteer.experiments.trials import UNSTEERED, Trial, run_trials
from corrsteer.lm.decoding import Decoding
from corrsteer.rollouts.grading import Graded
from corrsteer.rollouts.journal import Journal
from corrsteer.steering.steering import Steering
from corrsteer.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCALES = (0.25, 0.5, 1.0, 2.0)  # to begin with


@dataclass(frozen=True)
class Point:
    """One scale and what it did.

    Attributes
    ----------
    scale : what coefficients were multiplied by; 0 is unsteered.
    score, error : mean reward and its standard error; None of a single sample.
    improved, worsened : samples whose reward rose, and fell, against unsteered.
    """

    scale: float
    score: float
    error: float | None
    improved: int
    worsened: int

    @classmethod
    def of(cls, scale: float, graded: Graded, unsteered: Graded) -> Point:
        """Of what was graded with a scale and without."""
        rewards, before = graded.rewards, unsteered.rewards
        error = statistics.stdev(rewards) / math.sqrt(len(rewards)) if len(rewards) > 1 else None
        improved, worsened = (sum(a > b for a, b in pairs) for pairs in (zip(rewards, before), zip(before, rewards)))
        return cls(scale, graded.score, error, improved, worsened)


def calibrate_scale(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    steering: Steering,
    validation: Task,
    *,
    scales: Sequence[float] | None = None,
    positions: str | None = None,
    decoding: Decoding | None = None,
    journal: Journal | None = None,
    progress: bool = True,
) -> Steering:
    """The same steering with the scale of the highest validation score.

    Of scales that score the same the smallest is taken. If none does as well as no steering, the scale stays as it is
    and a note says so. The whole curve, unsteered first, is kept in `provenance["calibration"]`. The chosen score is
    the best of several, and so flatters: evaluate on other samples.

    Parameters
    ----------
    validation : samples that the steering was not selected on.
    scales : to try, and no others; by default 0.25 to 2, and as much less or more, by factors of 2, as long as that is
        better.
    positions : as for `Steering.apply`; the returned steering's own.
    decoding : as for `evaluate`.
    journal : as for `run_trials`.

    Raises
    ------
    CorrSteerError : for scales that are 0 or not finite, and a steering without features.
    """
    (scaled,) = calibrate_each(
        model, tokenizer, [steering], validation,
        scales=scales, positions=positions, decoding=decoding, journal=journal, progress=progress,
    )  # fmt: skip
    return scaled


def calibrate_each(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    steerings: Sequence[Steering],
    validation: Task,
    *,
    scales: Sequence[float] | None = None,
    positions: str | None = None,
    stays: bool = True,
    decoding: Decoding | None = None,
    journal: Journal | None = None,
    progress: bool = True,
) -> list[Steering]:
    """`calibrate_scale` of several steerings, which share what is computed of prompts.

    Without `stays` a steering has the best of the scales that were tried, also where none does as well as no steering.
    """
    if not steerings:
        return []
    grows, wanted = scales is None, SCALES if scales is None else scales
    tried = [check_scaling(steering, wanted) for steering in steerings]
    at = [steering.applied_as(positions, None)[0] for steering in steerings]
    decoding = decoding or Decoding()
    unsteered, curves = _curves(
        model, tokenizer, steerings, validation, tried, grows, at, decoding, progress, journal
    )
    return [
        _calibrated(steering, curve, unsteered, validation, where, grows, stays)
        for steering, curve, where in zip(steerings, curves, at)
    ]


def calibrate_best(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    candidates: Mapping[str, Sequence[Steering]],
    validation: Task,
    *,
    positions: str | None = None,
    decoding: Decoding | None = None,
    journal: Journal | None = None,
    progress: bool = True,
) -> dict[str, Steering]:
    """Of the candidates of each name, the one that scores best on validation samples, at its best scale.

    All are tried in one run, at scales as `calibrate_scale` tries by default. `provenance["calibration"]["candidates"]`
    says of how many it is the best, which flatters its score the more.
    """
    flat = [(name, steering) for name, of_name in candidates.items() for steering in of_name]
    scaled = calibrate_each(
        model, tokenizer, [steering for _, steering in flat], validation,
        positions=positions, stays=False, decoding=decoding, journal=journal, progress=progress,
    )  # fmt: skip
    best: dict[str, Steering] = {}
    for (name, _), steering in zip(flat, scaled):
        if name not in best or _best_score(steering) > _best_score(best[name]):
            best[name] = steering
    for name, steering in best.items():
        steering.provenance["calibration"]["candidates"] = len(candidates[name])
    return best


def _best_score(steering: Steering) -> float:
    return max(point["score"] for point in steering.provenance["calibration"]["curve"][1:])


def _calibrated(
    steering: Steering,
    curve: dict[float, Graded],
    unsteered: Graded,
    validation: Task,
    positions: str,
    grows: bool,
    stays: bool,
) -> Steering:
    """The steering with the scale that its curve says is best."""
    points = [Point.of(scale, one, unsteered) for scale, one in sorted(curve.items(), key=lambda item: abs(item[0]))]
    best = max(points, key=lambda point: point.score)  # the first of equals
    notes, chosen = steering.notes + overlap_notes(validation, steering.provenance, (SELECTED,)), best.scale
    if best.score < unsteered.score:
        chosen = steering.scale if stays else best.scale
        notes.append(
            f"no scale of {[point.scale for point in points]} did as well as unsteered on validation "
            f"({unsteered.score:.4f})"
            + (f", so it stays at {chosen:g}; try smaller ones, or other features" if stays else "")
        )
    elif not any(point.improved or point.worsened for point in points):
        notes.append(f"no scale of {[point.scale for point in points]} changed any reward on validation")
    elif grows and at_an_end(best.scale, curve):
        notes.append(f"the best scale, {best.scale:g}, is an end of those tried, so a better one may lie beyond it")
    recorded = {
        "scale": chosen,
        "curve": [asdict(point) for point in [Point.of(0.0, unsteered, unsteered), *points]],
        "validation": {"task": validation.name, "n": len(validation), "positions": positions},
    }
    provenance = validated(steering.provenance, validation) | {"calibration": recorded}
    return replace(steering, notes=notes, provenance=provenance, positions=positions, scale=chosen)


def _curves(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    steerings: Sequence[Steering],
    validation: Task,
    scales: Sequence[Sequence[float]],
    grows: bool,
    positions: Sequence[str],
    decoding: Decoding,
    progress: bool,
    journal: Journal | None,
) -> tuple[Graded, list[dict[float, Graded]]]:
    """What is graded of no steering, and of each steering by scale; curves may grow where they are best."""
    curves: list[dict[float, Graded]] = [{} for _ in steerings]
    wanted = [(at, scale) for at, of_one in enumerate(scales) for scale in of_one]
    unsteered, seen = None, set()
    while wanted:
        trials = [Trial(steerings[at], scale, positions[at], f"scale {scale:g}") for at, scale in wanted]
        before = [UNSTEERED] if unsteered is None else []
        graded = run_trials(model, tokenizer, validation, before + trials, decoding, journal=journal, progress=progress)
        seen.update(reward for one in graded for reward in one.rewards)
        unsteered = graded.pop(0) if unsteered is None else unsteered
        for (at, scale), one in zip(wanted, graded):
            curves[at][scale] = one
        scores = [{scale: one.score for scale, one in curve.items()} for curve in curves]
        further = [next_scale(of_one, unsteered.score, highest_reward(seen)) for of_one in scores] if grows else []
        wanted = [(at, scale) for at, scale in enumerate(further) if scale is not None]
    assert unsteered is not None, "there is a steering, and a scale"
    return unsteered, curves


def check_scaling(steering: Steering, scales: Sequence[float]) -> list[float]:
    """Raise unless a steering can be scaled by these, which are given back in the order in which they are tried."""
    tried = set(numbers("scales", scales))
    if 0 in tried:
        raise CorrSteerError("scales must not be 0, which is unsteered and always tried; leave it out")
    check_type("steering", steering, Steering, "a Steering")
    if not steering.features:
        raise CorrSteerError("steering has no features to scale: " + ("; ".join(steering.notes) or "select some"))
    return sorted(tried, key=abs)
