"""A run in words and numbers: its samples, rewards, lengths and top features, and the extremes of one feature."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from corrsteer.experiments.ranking import Ranking
from corrsteer.report.listing import Listing, Part
from corrsteer.report.tables import feature_listing
from corrsteer.runs.peaks import Extreme
from corrsteer.runs.run import Run
from corrsteer.steering.features import Feature

SHOWN = 160  # characters of a text


def described(run: Run, top_k: int = 3) -> dict[str, Any]:
    """Everything that `summary` says; anything JSON can hold but for the features."""
    rollouts = [rollout for rollout in run.rollouts if rollout is not None]
    ranking = Ranking(run)
    return {
        "samples": run.n,
        "prompts": len(set(run.groups)) if run.groups else run.n,
        "rewards": {name: _spread(values[values.isfinite()].tolist()) for name, values in run.all_rewards().items()},
        "prompt_tokens": _spread([len(rollout.prompt_ids or ()) for rollout in rollouts if rollout.prompt_ids]),
        "completion_tokens": _spread(
            [len(rollout.completion_ids) for rollout in rollouts if rollout.completion_ids is not None]
        ),
        "finish": dict(Counter(rollout.finish or "unknown" for rollout in rollouts)),
        "model": run.provenance.get("model"),
        "engine": sorted({rollout.engine for rollout in rollouts if rollout.engine}),
        "layers": sorted(run.points),
        "features": run.n_features,
        "pool": run.pool,
        "permutations": run.permutations,
        "activation_bytes": None if run.activations is None else run.activations.nbytes,
        "top": {layer: ranking.top(layer, "both", top_k) for layer in sorted(run.points)},
        "notes": run.notes,
    }


def summary(found: dict[str, Any]) -> list[Part]:
    """What `described` found, in words and listings."""
    several = f" of {found['prompts']} prompts" if found["prompts"] < found["samples"] else ""
    ends = ", ".join(f"{n} {name}" for name, n in sorted(found["finish"].items()))
    kept = found["activation_bytes"]
    return [
        f"{found['samples']} samples{several}, {found['features']} features of layers "
        f"{', '.join(map(str, found['layers']))}, pooled by {found['pool']}",
        f"model {found['model']}" + (f", {', '.join(found['engine'])}" if found["engine"] else ""),
        "activations not kept" if kept is None else f"activations kept, {kept / 2**20:.1f} MiB",
        "",
        Listing(("", "mean", "least", "median", "most"), list(_spreads(found)), indent="   "),
        *([f"completions ended by: {ends}"] if ends else []),
        "",
        f"Top features of each layer, by |r| ({found['permutations']} permutations)",
        replace(feature_listing([feature for features in found["top"].values() for feature in features]), indent="   "),
    ]


def extremes_text(layer: int, feature: int, highest: Sequence[Extreme], lowest: Sequence[Extreme]) -> str:
    """The completions of a feature's extremes, the token at which it peaks between angle brackets."""
    lines = [f"Layer {layer} feature {feature}"]
    for title, found in (("Most active", highest), ("Least active", lowest)):
        lines += ["", f"{title} in"]
        for one in found:
            rewards = ", ".join(f"{name} {value:g}" for name, value in one.rollout.rewards.items())
            lines += [f"  {one.activation:.4g}  {one.rollout.id}  {rewards}", f"    {_text(one)}"]
    return "\n".join(lines)


def extreme_row(one: Extreme) -> dict[str, Any]:
    """An extreme in what JSON can hold."""
    peak = one.peak and {
        "before": one.peak.before, "token": one.peak.token, "after": one.peak.after, "activation": one.peak.activation
    }  # fmt: skip
    return {
        "sample": one.sample, "id": one.rollout.id, "activation": one.activation, "rewards": one.rollout.rewards,
        "prompt": one.rollout.prompt_text, "completion": one.rollout.completion, "peak": peak,
    }  # fmt: skip


def top_rows(features: Sequence[Feature]) -> list[dict[str, Any]]:
    """Features in what JSON can hold: number, r and its interval, p-value."""
    rows = []
    for feature in features:
        s = feature.statistics
        assert s is not None, "a run's features have statistics"
        rows.append(
            {"feature": feature.index, "r": s.correlation, "low": s.low, "high": s.high, "p_adjusted": s.p_adjusted}
        )
    return rows


def _text(one: Extreme) -> str:
    if one.peak is None:
        return _shortened(repr(f"{one.rollout.prompt_text} -> {one.rollout.completion}"), SHOWN)
    peak = one.peak
    half = SHOWN // 2
    before = repr(peak.before)[1:-1]
    before = before if len(before) <= half else "..." + before[-half:]
    return f"{before}<{repr(peak.token)[1:-1]}>{_shortened(repr(peak.after)[1:-1], half)}"


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most] + "..."


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {
        "mean": statistics.fmean(values), "least": min(values), "median": statistics.median(values),
        "most": max(values),
    }  # fmt: skip


def _spreads(found: dict[str, Any]) -> Any:
    named = {f"reward {name!r}": spread for name, spread in found["rewards"].items()}
    named |= {"prompt tokens": found["prompt_tokens"], "completion tokens": found["completion_tokens"]}
    for name, spread in named.items():
        if spread:
            yield (name, *(f"{spread[key]:.4g}" for key in ("mean", "least", "median", "most")))
