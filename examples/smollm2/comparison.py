"""The same job by the paper's published way of working (`bench/published.py`) and by ours, in turns."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bench import published
from bench.published import Chosen, Sae
from corrsteer import SparseEncoder, collect, select
from corrsteer.steering.features import Feature

if TYPE_CHECKING:
    from examples.smollm2.study import Study

ROUNDS = 3


def as_published(encoder: SparseEncoder) -> Sae:
    """A top-k encoder as the published way holds it."""
    assert encoder.activation == "topk" and encoder.bias is not None and encoder.k is not None
    rows = encoder.decoder_rows(range(encoder.d_sae))
    return Sae(encoder.full_weight().float().T.contiguous(), encoder.bias.float(), None, rows.float(), encoder.k)


def compare(study: Study, collected: int, checked: int, pruned: int) -> dict[str, Any]:
    """Whether both find the same, and the seconds that each computes for.

    Parameters
    ----------
    study : whose model, SAEs and task are taken; its collection must be there.
    collected, checked, pruned : samples that collection is timed on, that features are compared on, and of the
        validation part that pruning is timed on.
    """
    saes = {layer: as_published(encoder) for layer, encoder in study.encoders.items()}
    return {
        "task": study.train.name, "new_tokens": study.decoding.max_new_tokens, "layers": list(saes),
        "check": check(study, saes, checked), "collection": collection(study, saes, collected),
        "pruning": pruning(study, saes, pruned),
    }  # fmt: skip


def check(study: Study, saes: dict[int, Sae], n: int) -> dict[str, Any]:
    """Rewards, correlations and the best feature of each layer, both ways in float32, as rounding decides between
    features that correlate alike."""
    model, task, new = copy.deepcopy(study.model).float(), study.train.take(n), study.decoding.max_new_tokens
    run = collect(
        model, study.tokenizer, study.encoders, task, decoding=study.decoding, permutations=0, progress=False
    )  # fmt: skip
    ours = [_chosen(feature) for feature in select(run, "all").features]
    theirs = published.collect(model, study.tokenizer, saes, task, new)
    apart = max(
        float((run.correlation(layer).flatten().double() - theirs.correlation(layer)).abs().max()) for layer in saes
    )
    best = theirs.best()
    return {
        "n": n, "same_rewards": run.rewards.tolist() == theirs.rewards, "r_apart": apart, "features": len(ours),
        "same_features": sum((a.layer, a.index) == (b.layer, b.index) for a, b in zip(ours, best)),
    }  # fmt: skip


def collection(study: Study, saes: dict[int, Sae], n: int) -> dict[str, Any]:
    """Seconds a sample: ours with p-values, and the published way without, as it has none."""
    task, new = study.train.take(n), study.decoding.max_new_tokens
    ways = {
        "corrsteer": lambda: collect(
            *study.lm, study.encoders, task, decoding=study.decoding, permutations=study.permutations, progress=False
        ),
        "published": lambda: published.collect(*study.lm, saes, task, new),
    }
    return {"n": n, **_timed(ways, n)}


def pruning(study: Study, saes: dict[int, Sae], n: int) -> dict[str, Any]:
    """Seconds a validation sample, of which each takes a completion unsteered, and one of each layer's feature."""
    run, validation, new = study.collected, study.validation.take(n), study.decoding.max_new_tokens
    chosen = [_chosen(feature) for feature in select(run, "all").features]
    of_model: dict[str, Any] = {"model": study.model, "tokenizer": study.tokenizer, "progress": False}
    ways = {
        "corrsteer": lambda: select(run, "pruned", validation=validation, decoding=study.decoding, **of_model),
        "published": lambda: published.prune(*study.lm, saes, chosen, validation, new),
    }
    return {"n": n, "features": len(chosen), **_timed(ways, n)}


def _chosen(feature: Feature) -> Chosen:
    return Chosen(int(feature.layer or 0), int(feature.index or 0), feature.coefficient)


def _timed(ways: dict[str, Callable[[], object]], n: int) -> dict[str, Any]:
    """CPU seconds a sample of each way, whose medians and ratio are of rounds in which they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for at in range(ROUNDS):
        for name in list(ways)[:: -1 if at % 2 else 1]:
            started = time.process_time()
            ways[name]()
            seconds[name].append((time.process_time() - started) / n)
    ratios = [theirs / ours for ours, theirs in zip(seconds["corrsteer"], seconds["published"])]
    return {
        "rounds": ROUNDS, "cpu_seconds_a_sample": {name: statistics.median(of) for name, of in seconds.items()},
        "ratio": statistics.median(ratios), "ratios": ratios,
    }  # fmt: skip
