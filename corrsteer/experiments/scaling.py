"""`calibrate_scale`: how strongly to steer, by the score of validation samples."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from torch import nn

from corrsteer.arguments import check_type, numbers
from corrsteer.errors import CorrSteerError
from corrsteer.experiments.seen_samples import SELECTED, overlap_notes, validated
from corrsteer.experiments.trials import UNSTEERED, Trial, run_trials
from corrsteer.lm.decoding import Decoding
from corrsteer.rollouts.grading import Graded
from corrsteer.steering.steering import Steering, check_application
from corrsteer.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCALES = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0)


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
    scales: Sequence[float] = SCALES,
    positions: str = "generated",
    decoding: Decoding | None = None,
    progress: bool = True,
) -> Steering:
    """The same steering with its coefficients multiplied by the scale of the highest validation score.

    Of scales that score the same the smallest is taken. If none does as well as no steering, the coefficients stay as
    they are and a note says so. The whole curve, unsteered first, is kept in `provenance["calibration"]`. The chosen
    score is the best of several, and so flatters: evaluate on other samples.

    Parameters
    ----------
    validation : samples that the steering was not selected on.
    scales : to try.
    positions, decoding : as for `evaluate`.

    Raises
    ------
    CorrSteerError : for scales that are 0 or not finite, and a steering without features.
    """
    scales = check_scaling(steering, scales)
    check_application(positions, 1.0)
    trials = [Trial(steering, scale, positions, f"scale {scale:g}") for scale in scales]
    graded = run_trials(model, tokenizer, validation, [UNSTEERED, *trials], decoding, progress=progress)
    curve = [Point.of(scale, one, graded[0]) for scale, one in zip([0.0, *scales], graded)]
    unsteered = graded[0]
    best = max(curve[1:], key=lambda point: point.score)  # the first of equals
    notes, chosen = steering.notes + overlap_notes(validation, steering.provenance, (SELECTED,)), best.scale
    if best.score < unsteered.score:
        chosen = 1.0
        notes.append(
            f"no scale of {scales} did as well as unsteered on validation ({unsteered.score:.4f}), so the coefficients "
            f"are as they were; try smaller ones, or other features"
        )
    recorded = {"scale": chosen, "curve": [asdict(point) for point in curve]}
    if "calibration" in steering.provenance:  # whose scale is in the coefficients already
        recorded["previous"] = steering.provenance["calibration"]
    recorded["validation"] = {"task": validation.name, "n": len(validation), "positions": positions}
    features = [feature.scaled(chosen) for feature in steering.features]
    provenance = validated(steering.provenance, validation) | {"calibration": recorded}
    return Steering(features, steering.directions, steering.table, notes, provenance)


def check_scaling(steering: Steering, scales: Sequence[float]) -> list[float]:
    """Raise unless a steering can be scaled by these, which are given back in the order in which they are tried."""
    tried = set(numbers("scales", scales))
    if 0 in tried:
        raise CorrSteerError("scales must not be 0, which is unsteered and always tried; leave it out")
    check_type("steering", steering, Steering, "a Steering")
    if not steering.features:
        raise CorrSteerError("steering has no features to scale: " + ("; ".join(steering.notes) or "select some"))
    return sorted(tried, key=abs)
