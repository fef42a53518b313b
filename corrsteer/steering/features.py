"""What a steering is made of: directions with a coefficient at a hook point, and what a run says of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from corrsteer.arguments import number, whole

CHANCE = 0.05  # adjusted p above which a feature is said to be what chance explains


@dataclass(frozen=True)
class FeatureStatistics:
    """What a run says of an SAE feature. What it does not say is None, such as p-values without permutations.

    Attributes
    ----------
    correlation : Pearson's r of its pooled activation with the reward.
    frequency : share of samples in which it is active; `frequency_positive` and `frequency_negative` the same
        among the samples with reward > 0 and <= 0.
    score : what it was ranked by, if not by the correlation.
    low, high : ends of the correlation's 95 % interval.
    p_value, p_layer, p_adjusted, q_value : how often chance gives as large a score: to this feature, to any feature of
        its layer, to any of all layers, and the false discovery rate; see `inference.Significance`.
    coefficient_error : the coefficient's standard error.
    coefficients : every kind of coefficient, as `Moments.coefficient` gives it, and its standard error, by kind.
    pool : how its activations over a sample's tokens became one number, for all of the above but the coefficients.
    correlations : Pearson's r with the run's other rewards, by name.
    """

    correlation: float
    frequency: float
    frequency_positive: float
    frequency_negative: float
    score: float | None = None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    p_layer: float | None = None
    p_adjusted: float | None = None
    q_value: float | None = None
    coefficient_error: float | None = None
    coefficients: dict[str, list[float | None]] | None = None
    pool: str | None = None
    correlations: dict[str, float] | None = None


@dataclass(frozen=True)
class Feature:
    """A direction and how much of it is added: of an SAE's feature, or a vector of your own.

    Attributes
    ----------
    hook_point : where the direction is added, such as `blocks.20.hook_resid_post`, or a module's path.
    coefficient : what the direction is multiplied by; negative for a negatively correlated feature.
    layer, index : the layer whose SAE the feature is of, and its number in it; None for a vector that is no feature.
    statistics : what a run says of it; None where nothing is known.
    """

    hook_point: str
    coefficient: float = 1.0
    layer: int | None = None
    index: int | None = None
    statistics: FeatureStatistics | None = None

    def __post_init__(self) -> None:
        for name in ("layer", "index"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, whole(name, getattr(self, name), 0))
        object.__setattr__(self, "coefficient", number(f"coefficient of {self.name}", self.coefficient))

    @property
    def name(self) -> str:
        """What to call it in a sentence."""
        if self.index is None:
            return f"the vector at {self.hook_point}"
        return f"layer {self.layer} feature {self.index}"

    @property
    def ranked_by(self) -> float:
        """What it was ranked by: its score, or else the correlation; 0 where neither is known."""
        if self.statistics is None:
            return 0.0
        return self.statistics.correlation if self.statistics.score is None else self.statistics.score

    @property
    def p_adjusted(self) -> float | None:
        """How often chance gives any feature of all layers as large a score; None where that is not known."""
        return None if self.statistics is None else self.statistics.p_adjusted

    @property
    def by_chance(self) -> bool:
        """Whether chance explains its score; False where that is not known."""
        return self.p_adjusted is not None and self.p_adjusted > CHANCE

    def scaled(self, by: float) -> Feature:
        """The same with its coefficient, and the standard error of that, multiplied."""
        by, statistics = number("by", by), self.statistics
        if statistics is not None and statistics.coefficient_error is not None:
            statistics = replace(statistics, coefficient_error=abs(by) * statistics.coefficient_error)
        return replace(self, coefficient=by * self.coefficient, statistics=statistics)

    @classmethod
    def from_dict(cls, described: dict[str, Any]) -> Feature:
        """What `dataclasses.asdict` made of one."""
        feature = cls(**described)
        statistics = described["statistics"]
        return feature if statistics is None else replace(feature, statistics=FeatureStatistics(**statistics))
