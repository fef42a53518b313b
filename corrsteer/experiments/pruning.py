"""Pruning: which features of a steering help when they are steered alone."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from torch import nn

from corrsteer.experiments.seen_samples import SELECTED, overlap_notes, validated
from corrsteer.experiments.trials import UNSTEERED, Trial, run_trials
from corrsteer.lm.decoding import Decoding
from corrsteer.rollouts.journal import Journal
from corrsteer.steering.steering import Steering
from corrsteer.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prune(
    steering: Steering,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    validation: Task,
    decoding: Decoding,
    progress: bool,
    journal: Journal | None = None,
) -> Steering:
    """Keep the features that, steered alone, beat the unsteered validation score (CorrSteer-P)."""
    alone = [Trial(one, name=one.features[0].name) for one in steering.alone()]
    graded = run_trials(model, tokenizer, validation, [UNSTEERED, *alone], decoding, journal=journal, progress=progress)
    unsteered, *scores = [one.score for one in graded]
    kept = [at for at, value in enumerate(scores) if value > unsteered]
    steering.provenance["selection"] |= {
        "validation": {
            "task": validation.name,
            "n": len(validation),
            "positions": steering.positions,
            "scale": steering.scale,
        },
        "unsteered_score": unsteered,
        "score_alone": [{"feature": asdict(f), "score": value} for f, value in zip(steering.features, scores)],
        "decoding": asdict(decoding),
    }
    notes = [] if kept else [f"no feature, steered alone, beat the unsteered validation score of {unsteered:.4f}"]
    return replace(
        steering,
        features=[steering.features[at] for at in kept],
        directions=steering.directions[kept],
        notes=notes + steering.notes + overlap_notes(validation, steering.provenance, (SELECTED,)),
        provenance=validated(steering.provenance, validation),
    )
