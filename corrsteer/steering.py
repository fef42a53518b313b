"""`Steering`: selected features with their decoder directions and coefficients, and their addition to a model.

    h_t <- h_t + scale · Σ_i c_i d_i

at each feature's hook point, for the positions asked for. The sum is formed once per
hook point, in float32.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from corrsteer import models, ops
from corrsteer.errors import CorrSteerError
from corrsteer.models import HookPoint
from corrsteer.passes import check_positions, track

FORMAT = "corrsteer.steering/2"
READ = (FORMAT, "corrsteer.steering/1")  # whose features said less
CHANCE = 0.05  # adjusted p above which a feature is said to be what chance explains


@dataclass(frozen=True)
class Feature:
    """One SAE feature and what the moments say of it.

    Attributes
    ----------
    hook_point : where its direction is added, such as `blocks.20.hook_resid_post`.
    layer, index : the layer and the feature's number in that layer's SAE.
    correlation : Pearson's r of its pooled activation with the reward.
    coefficient : what its decoder row is multiplied by; negative for a negatively correlated feature.
    frequency : share of samples in which it is active; `frequency_positive` and `frequency_negative` the same
        among the samples with reward > 0 and <= 0.
    score : what it was ranked by, if not by the correlation.
    low, high : ends of the correlation's 95 % interval.
    p_value, p_layer, p_adjusted, q_value : how often chance gives as large a score: to this feature, to any feature of
        its layer, to any of all layers, and the false discovery rate; see `inference.Significance`.
    coefficient_error : the coefficient's standard error.
    coefficients : every kind of coefficient, as `Moments.coefficient` gives it, and its standard error, by kind.

    The last ones are None where they are not known, as for a run without permutations.
    """

    hook_point: str
    layer: int
    index: int
    correlation: float
    coefficient: float
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

    @property
    def by_chance(self) -> bool:
        """Whether chance explains its score; False where that is not known."""
        return self.p_adjusted is not None and self.p_adjusted > CHANCE


@dataclass
class Steering:
    """What `select` found: features, their decoder rows, and how they were found.

    Attributes
    ----------
    features : the selected features.
    directions : `[len(features), d]` float32, each feature's decoder row.
    table : the top features of every layer, selected or not.
    notes : what a user should know about the selection, such as why it is empty.
    provenance : model, SAEs, task, strategy and settings; anything JSON can hold.
    """

    features: list[Feature]
    directions: Tensor
    table: dict[int, list[Feature]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.directions.dim() != 2 or len(self.directions) != len(self.features):
            raise CorrSteerError(
                f"directions must be [{len(self.features)}, d], one per feature, got {list(self.directions.shape)}"
            )
        for feature in self.features:
            if not math.isfinite(feature.coefficient):
                raise CorrSteerError(
                    f"coefficient of feature {feature.index} must be finite, got {feature.coefficient}"
                )
        if not bool(torch.isfinite(self.directions).all()):
            raise CorrSteerError("directions must be finite; the SAE's decoder has NaN, infinite or all-zero rows")

    def vectors(self, model: nn.Module | None = None) -> dict[HookPoint, Tensor]:
        """The sum Σ c_i d_i of each hook point, `[d]` float32."""
        sums: dict[HookPoint, Tensor] = {}
        for feature, direction in zip(self.features, self.directions):
            point = HookPoint.parse(feature.hook_point, model)
            part = feature.coefficient * direction.float()
            sums[point] = sums[point] + part if point in sums else part
        return sums

    def apply(self, model: nn.Module, positions: str = "generated", scale: float = 1.0):
        """Steer every row of a model's passes for as long as the context lasts.

        Contexts nest and repeat: each adds its own vector. The model is left as it was, also after an exception.

        Parameters
        ----------
        model : a Hugging Face causal language model of the same width, on any devices and in any dtype.
        positions : `generated` (the last prompt token and every generated token), `all` (every token that is not
            padding) or `prompt`. Outside `generate`, whatever a pass reads without a cache is a prompt.
        scale : multiplies the coefficients.

        Raises
        ------
        CorrSteerError : if the model has another width or no such layer, or is already compiled.
        """
        return apply_rows(model, [self], None, positions=positions, scale=scale)

    def save(self, path) -> None:
        """Write a safetensors file: the directions, and everything else as JSON in its metadata."""
        described = {
            "features": [asdict(f) for f in self.features],
            "table": {str(layer): [asdict(f) for f in rows] for layer, rows in self.table.items()},
            "notes": self.notes,
            "provenance": self.provenance,
        }
        metadata = {"format": FORMAT, "steering": json.dumps(described)}
        try:
            save_file({"directions": self.directions.cpu().float().contiguous()}, str(path), metadata=metadata)
        except (OSError, SafetensorError) as error:
            raise CorrSteerError(f"{path} cannot be written ({error}); give a path in a folder that exists") from None

    @classmethod
    def load(cls, path, model: nn.Module | None = None) -> Steering:
        """Read what `save` wrote; given the model, refuse a file for another width or other layers.

        Raises
        ------
        CorrSteerError : if the file is missing, truncated, not a steering file, or not for this model.
        """
        if not Path(path).is_file():
            raise CorrSteerError(f"there is no steering file at {path}")
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") not in READ:
                    raise CorrSteerError(
                        f"{path} is not a corrsteer steering file: its format must be {FORMAT!r}, "
                        f"got {metadata.get('format')!r}"
                    )
                directions = file.get_tensor("directions")
            described = json.loads(metadata["steering"])
            steering = cls(
                [Feature(**f) for f in described["features"]],
                directions,
                {int(layer): [Feature(**f) for f in rows] for layer, rows in described["table"].items()},
                described["notes"],
                described["provenance"],
            )
        except CorrSteerError:
            raise
        except (SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise CorrSteerError(f"{path} is damaged ({error}); select again or fetch the file again") from None
        if model is not None:
            steering.check(model)
        return steering

    def check(self, model: nn.Module) -> None:
        """Raise unless this steering fits the model."""
        if self.features and self.directions.shape[1] != models.width(model):
            raise CorrSteerError(
                f"this steering is for a residual stream of width {self.directions.shape[1]}, "
                f"but the model's is {models.width(model)}; use it with the model it was made on"
            )
        for point in self.vectors(model):
            models.check_point(model, point)


@contextlib.contextmanager
def apply_rows(
    model: nn.Module,
    steerings: Sequence[Steering],
    rows: Sequence[int] | None,
    *,
    positions: str = "generated",
    scale: float = 1.0,
):
    """Steer each row of a batch by its own steering for as long as the context lasts.

    Parameters
    ----------
    steerings : V steerings.
    rows : which of them each of the batch's B rows gets, -1 for none; None gives every row the first.
    model, positions, scale : as for `Steering.apply`.
    """
    check_positions(positions)
    if not math.isfinite(scale):
        raise CorrSteerError(f"scale must be finite, got {scale}")
    chosen = None if rows is None else torch.tensor(list(rows), dtype=torch.int32)
    if chosen is not None and not bool(((chosen >= -1) & (chosen < len(steerings))).all()):
        raise CorrSteerError(f"rows must lie in -1..{len(steerings) - 1}, got {list(rows)}")
    vectors: dict[HookPoint, Tensor] = {}
    for at, steering in enumerate(steerings):
        steering.check(model)
        for point, vector in steering.vectors(model).items():
            if point not in vectors:
                vectors[point] = torch.zeros(len(steerings), len(vector))
            vectors[point][at] = scale * vector
    with contextlib.ExitStack() as stack:
        tracker = stack.enter_context(track(model))
        for point, table in vectors.items():
            add = _Add(tracker, table, chosen, positions)
            # The first layer's input may be the caller's own inputs_embeds.
            function = (lambda h, add=add: add(h.clone())) if point == HookPoint(0, "resid_pre") else add
            stack.callback(models.attach(model, point, function).remove)
        yield


class _Add:
    """The hook of one hook point."""

    def __init__(self, tracker, vectors: Tensor, rows: Tensor | None, positions: str):
        self._tracker, self._vectors, self._positions = tracker, vectors, positions
        self._rows, self._every_row = rows, torch.zeros(0, dtype=torch.int32)

    def __call__(self, h: Tensor) -> Tensor:
        if self._vectors.device != h.device:  # the residual's, since an offloaded layer's own is `meta` between passes
            self._vectors = self._vectors.to(h.device)
            self._rows = None if self._rows is None else self._rows.to(h.device)
        rows = self._rows
        if rows is None:
            if len(self._every_row) != len(h) or self._every_row.device != h.device:
                self._every_row = torch.zeros(len(h), dtype=torch.int32, device=h.device)
            rows = self._every_row
        elif len(rows) != len(h):
            raise CorrSteerError(f"rows must have one entry per row of the batch ({len(h)}), got {len(rows)}")
        where = self._tracker.select(h, self._positions)
        return ops.steer_add(h, self._vectors, rows, where)
