"""Which features of a run rank best by a score, and what is said of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from corrsteer.ops.moments import COEFFICIENTS, NEGATIVE, POSITIVE
from corrsteer.runs.run import Run
from corrsteer.stats import inference, scores
from corrsteer.steering.features import Feature, FeatureStatistics


@dataclass(frozen=True)
class Ranking:
    """Features of a run by a score of one pooling, and what is said of them.

    Attributes
    ----------
    score : see `scores.score`.
    coefficient : a kind of coefficient, see `Moments.coefficient`.
    interval : of the correlation, see `inference`; of another pooling than the run's, of which no bootstrap is kept,
        `delta`.
    pool : over a sample's tokens; by default the run's, with coefficients by `run.coefficient_pool`.
    """

    run: Run
    score: str = "pearson"
    coefficient: str = "mean_positive"
    interval: str = "delta"
    pool: str | None = None

    def value(self, layer: int) -> Tensor:
        """Each feature's score, `[d_sae]`."""
        if self.score == "pearson":
            return self.run.correlation(layer, self._pool)
        return scores.score(self.run.evidence[layer][self._pool], self.score)

    @property
    def _pool(self) -> str:
        return self.pool or self.run.pool

    @property
    def _coefficient_pool(self) -> str:
        return self.run.coefficient_pool if self._pool == self.run.pool else self._pool

    def top(self, layer: int, direction: str, k: int) -> list[Feature]:
        """The k features that rank best in a direction: by the score, its negative, or its size (`both`)."""
        value = self.value(layer)
        return self.best(layer, value, in_direction(value, direction), k)

    def best(self, layer: int, value: Tensor, rank: Tensor, k: int) -> list[Feature]:
        """The k features that rank best, of scores `value`; those whose rank is not above 0 are never among them."""
        run, pool, (best, indices) = self.run, self._pool, rank.topk(min(k, len(rank)))
        indices = indices[best > 0]
        if len(indices) == 0:
            return []
        moments, of_coefficient = run.moments[layer][pool], run.moments[layer][self._coefficient_pool]
        r, value = run.correlation(layer, pool)[indices], value[indices]
        group = moments.group_frequency()[:, 0, indices]
        every = {kind: of_coefficient.coefficient(kind)[0, indices] for kind in COEFFICIENTS}
        c, errors = every[self.coefficient], {}
        columns = {
            "correlation": r,
            "frequency": moments.frequency()[indices],
            "frequency_positive": group[POSITIVE],
            "frequency_negative": group[NEGATIVE],
        }
        if self.score != "pearson":
            columns["score"] = value
        if layer in run.evidence:
            evidence, other = (run.evidence[layer][name] for name in (pool, self._coefficient_pool))
            method = self.interval if pool == run.pool else "delta"
            columns["low"], columns["high"] = run.interval(layer, pool, method, indices)
            errors = {kind: inference.coefficient_error(other, of_coefficient, kind, indices) for kind in COEFFICIENTS}
            columns["coefficient_error"] = errors[self.coefficient]
        if pool == run.pool and run.testable(self.score):
            tested = run.significance(self.score)[layer]
            for name, p in (("value", tested.p), ("layer", tested.p_layer), ("adjusted", tested.p_adjusted)):
                columns[f"p_{name}"] = p[indices.to(p.device)]
            columns["q_value"] = tested.q[indices.to(tested.q.device)]
        others = moments.correlation()[1:, indices]
        known: dict[str, list[Any]] = {name: _known(column) for name, column in columns.items()}
        pairs = {kind: (_known(every[kind]), _known(errors[kind])) for kind in errors}
        return [
            Feature(
                hook_point=str(run.steering_point(layer)),
                coefficient=chosen,
                layer=layer,
                index=index,
                statistics=FeatureStatistics(
                    **{name: column[at] for name, column in known.items()},
                    coefficients={kind: [value[at], error[at]] for kind, (value, error) in pairs.items()} or None,
                    correlations=dict(zip(run.other_rewards, others[:, at].tolist())) or None,
                    pool=pool,
                ),
            )
            for at, (index, chosen) in enumerate(zip(indices.tolist(), torch.where(value < 0, -c.abs(), c).tolist()))
        ]

    def with_strength(self, feature: Feature) -> Feature:
        """The same with a coefficient of the correlation's sign, and not 0.

        Where it is 0, as a negatively correlated feature may not be active in any sample with a positive reward, it is
        the mean over the samples in which it is active; and of one whose activations are never above 0, the difference
        of the means of both groups.
        """
        assert feature.layer is not None and feature.index is not None, "a run's features have both"
        moments, strength = self.run.moments[feature.layer][self._coefficient_pool], feature.coefficient
        of_feature = (slice(None), 0, feature.index)
        active = int(moments.group_active_count[of_feature].sum())
        if strength == 0 and active:
            strength = float(moments.group_active_sum[of_feature].sum()) / active
        elif strength == 0:
            strength = float(moments.coefficient("contrastive")[0, feature.index])
        return replace(feature, coefficient=math.copysign(strength, feature.ranked_by))


def in_direction(value: Tensor, direction: str) -> Tensor:
    """What features of such scores are ranked by."""
    return {"positive": value, "negative": -value, "both": value.abs()}[direction]


def _known(column: Tensor) -> list[float | None]:
    """Numbers as JSON can have them."""
    return [None if math.isnan(number) else number for number in column.tolist()]
