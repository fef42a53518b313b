"""What a format of a steering is: where it can steer, what it needs, and what writes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from corrsteer.errors import CorrSteerError
from corrsteer.steering.features import Feature
from corrsteer.steering.steering import Steering


@dataclass(frozen=True)
class Export:
    """A steering on its way out. It has a feature, and fits the model where that is given.

    Attributes
    ----------
    path : of the file or the folder to write.
    positions, scale : how the steering is applied, see `Steering.apply`.
    """

    steering: Steering
    path: Path
    model: nn.Module | None
    positions: str
    scale: float

    def check_row(self, feature: Feature) -> dict[str, Any]:
        """What is known of a feature's SAE, whose decoder row is what is steered along.

        Raises
        ------
        CorrSteerError : where the direction is that row over its norm, which tools that take the row itself multiply
            by another strength.
        """
        sae: dict[str, Any] = (self.steering.provenance.get("saes") or {}).get(str(feature.layer)) or {}
        if (sae.get("source") or {}).get("divide_by_norm"):
            raise CorrSteerError(
                f"{feature.name} is of an SAE that rescales activations by the norms of its decoder's rows, so that "
                f"its direction is not the row that this format multiplies; use a format that holds vectors"
            )
        return sae

    def make_folder(self) -> None:
        """Make the folder that is written to, where it is not there."""
        try:
            self.path.mkdir(exist_ok=True)
        except OSError as error:
            raise CorrSteerError(
                f"path {self.path} cannot be made a folder ({error.strerror}); give one in a folder that exists"
            ) from None

    @property
    def model_name(self) -> str:
        """What usage calls the model: its own name, or else the one in the provenance."""
        config = getattr(self.model, "config", None)
        return str(getattr(config, "_name_or_path", "") or self.steering.provenance.get("model") or "MODEL")

    def outputs(self, form: str) -> dict[int, Tensor]:
        """What is added to the outputs of decoder layers: layer -> scale · Σ c_i d_i, `[d]` float32, in layers' order.

        What a layer reads is what the one before it puts out.

        Raises
        ------
        CorrSteerError : for a steering that adds elsewhere, and a sum that is not finite.
        """
        found: dict[int, Tensor] = {}
        for point, vector in self.steering.vectors(self.model).items():
            layer = {"resid_post": point.layer, "resid_pre": point.layer - 1}.get(point.kind, -1)
            if layer < 0:
                raise CorrSteerError(
                    f"steering adds at {point}, and {form} holds what is added to the outputs of decoder layers; use "
                    f"the format model or json, or steer by apply"
                )
            found[layer] = found.get(layer, 0) + self.scale * vector.cpu()
        for layer, vector in found.items():
            if not bool(torch.isfinite(vector).all()):
                raise CorrSteerError(
                    f"scale must leave what is added finite in float32, got {self.scale:g} at layer {layer}; take a "
                    f"smaller one"
                )
        return dict(sorted(found.items()))


@dataclass(frozen=True)
class Form:
    """A format.

    Attributes
    ----------
    name : as `--to` takes it.
    what : what is written, and for whom.
    positions : those of `Steering.apply` that it can say.
    proven : how it is known to steer as `apply` does, for the documentation.
    write : writes it, and returns the usage: the command or the lines of Python that make use of it.
    needs : what of the model it cannot be written without: `structure`, `weights` or nothing.
    """

    name: str
    what: str
    positions: tuple[str, ...]
    proven: str
    write: Callable[[Export], str]
    needs: str = ""
