"""`Steering`: selected features with their decoder directions and coefficients, and their addition to a model.

    h_t <- h_t + scale · Σ_i c_i d_i

at each feature's hook point, for the positions asked for. The sum is formed once per
hook point, in float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from corrsteer.arguments import as_path, check_type, number, wholes
from corrsteer.compatibility import warn_once
from corrsteer.errors import CorrSteerError
from corrsteer.files import from_json, to_json, write_tensors
from corrsteer.lm import hook_points
from corrsteer.lm.hook_points import HookPoint
from corrsteer.lm.token_positions import check_positions
from corrsteer.steering.features import Feature
from corrsteer.steering.fold import fold_vectors
from corrsteer.steering.hooks import add_vectors
from corrsteer.steering.install import InstalledVectors, installed_on
from corrsteer.types import PathLike

M = TypeVar("M", bound=nn.Module)

FORMAT = "corrsteer.steering/4"


@dataclass
class Steering:
    """Directions with coefficients at hook points: what `select` found and how, or vectors of your own.

    Attributes
    ----------
    features : what is steered along.
    directions : `[len(features), d]` float32, the direction of each; for an SAE's feature, its decoder row.
    table : the top features of every layer, selected or not.
    notes : what a user should know about the selection, such as why it is empty.
    provenance : model, SAEs, task, strategy and settings, and the samples it was selected and validated on; anything
        JSON can hold.
    positions, scale : which tokens are steered, and what coefficients are multiplied by, wherever it is used and
        nothing else is said; see `apply`.
    """

    features: list[Feature]
    directions: Tensor
    table: dict[int, list[Feature]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict, repr=False)
    positions: str = "generated"
    scale: float = 1.0

    def __post_init__(self) -> None:
        self.scale = check_application(self.positions, self.scale)
        if self.directions.dim() != 2 or len(self.directions) != len(self.features):
            raise CorrSteerError(
                f"directions must be [{len(self.features)}, d], one per feature, got {list(self.directions.shape)}"
            )
        if not bool(torch.isfinite(self.directions).all()):
            raise CorrSteerError("directions must be finite; the SAE's decoder has NaN, infinite or all-zero rows")

    @classmethod
    def from_vectors(cls, vectors: Mapping[str, Tensor], coefficient: float = 1.0) -> Steering:
        """A steering along vectors of your own, such as a difference of means.

        Parameters
        ----------
        vectors : hook point -> `[d]`, such as `{"blocks.20.hook_resid_post": positive.mean(0) - negative.mean(0)}`.
        coefficient : what each is multiplied by.
        """
        coefficient = number("coefficient", coefficient)
        check_type("vectors", vectors, Mapping, "a mapping of hook points to tensors [d]")
        for name, vector in vectors.items():
            check_type("each key of vectors", name, str, "the name of a hook point")
            check_type(f"vectors[{name!r}]", vector, Tensor, "a tensor [d]", "use torch.as_tensor")
            if not vector.numel() or not bool(torch.isfinite(vector).all()):
                raise CorrSteerError(f"vectors[{name!r}] must hold finite numbers, one or more, got others or none")
        shapes = {name: list(vector.shape) for name, vector in vectors.items()}
        if len({tuple(shape) for shape in shapes.values()}) != 1 or any(len(shape) != 1 for shape in shapes.values()):
            raise CorrSteerError(f"vectors must map hook points to tensors [d], one or more of one d, got {shapes}")
        features = [Feature(name, coefficient) for name in vectors]
        return cls(features, torch.stack([vector.detach().float().cpu() for vector in vectors.values()]))

    @property
    def digest(self) -> str:
        """What tells what it adds, and where, from others; not its notes, nor how strongly it is applied."""
        described = to_json([asdict(feature) for feature in self.features])
        directions = self.directions.detach().cpu().contiguous().view(torch.uint8)
        return blake2b(described.encode() + directions.numpy().tobytes(), digest_size=16).hexdigest()

    def alone(self) -> list[Steering]:
        """Each of its features as a steering of that feature alone, with the same table, notes and provenance."""
        return [
            replace(self, features=[feature], directions=direction[None])
            for feature, direction in zip(self.features, self.directions)
        ]

    def vectors(self, model: nn.Module | None = None) -> dict[HookPoint, Tensor]:
        """The sum Σ c_i d_i of each hook point, `[d]` float32."""
        directions = self.directions.float()
        coefficients = torch.tensor(
            [feature.coefficient for feature in self.features], dtype=directions.dtype, device=directions.device
        )
        sums: dict[HookPoint, Tensor] = {}
        for feature, part in zip(self.features, coefficients[:, None] * directions):
            point = HookPoint.parse(feature.hook_point, model)
            sums[point] = sums[point] + part if point in sums else part
        return sums

    def apply(
        self, model: nn.Module, positions: str | None = None, scale: float | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Steer every row of a model's passes for as long as the context lasts.

        Contexts nest and repeat: each adds its own vector. The model is left as it was, also after an exception. A
        model that was compiled is steered by the hooks that `install` had put on it before.

        Parameters
        ----------
        model : a Hugging Face causal language model of the same width, on any devices and in any dtype.
        positions : `generated` (the last prompt token and every generated token), `all` (every token that is not
            padding) or `prompt`; by default the steering's own. Outside `generate`, whatever a pass reads without a
            cache is a prompt.
        scale : multiplies the coefficients; by default the steering's own.

        Raises
        ------
        CorrSteerError : if the model has another width or no such layer, or was compiled without hooks for it.
        """
        return apply_rows(model, [self], None, positions=positions, scale=scale)

    def applied_as(self, positions: str | None, scale: float | None) -> tuple[str, float]:
        """The positions and the scale that are meant: its own where they are None."""
        positions = self.positions if positions is None else positions
        return positions, check_application(positions, self.scale if scale is None else scale)

    def install(
        self, model: nn.Module, positions: str | None = None, scale: float | None = None, points: Iterable[str] = ()
    ) -> Installed:
        """Steer by hooks that stay on the model and that `torch.compile` keeps. Install them before it compiles.

        What they add is in tensors that stay where they are and are changed in place: another steering, another scale
        or none needs no compilation.

            with steering.install(model) as installed:
                model.forward = torch.compile(model.forward)
                model.generate(**inputs)
                installed.set(other, scale=0.5)
                model.generate(**inputs)

        Parameters
        ----------
        model : a Hugging Face causal language model that is not compiled yet.
        positions, scale : as for `apply`.
        points : hook points beside those of this steering at which others may be set later.

        Raises
        ------
        CorrSteerError : if the model has another width or no such layer, or is already compiled. And in a call of
            `generate` for prompts padded on the right, guidance, and a prompt read in chunks of one token.
        """
        return Installed(model, self, *self.applied_as(positions, scale), points)

    def fold_into(self, model: M, scale: float | None = None) -> M:
        """Make this steering a part of the model: of the biases that write to the residual stream.

        The model is changed in place and can be saved; whatever reads its checkpoint needs no hook. A bias is added at
        every token: whatever the steering's own positions, it gives what `apply(model, positions="all")` gives. Where a
        layer has no bias and the model's configuration has an option that gives it one, such as Llama's `mlp_bias`, the
        option is set.

        Parameters
        ----------
        model : a Hugging Face causal language model.
        scale : multiplies the coefficients; by default the steering's own. Its negative takes off what was folded in.

        Returns
        -------
        The model itself.

        Raises
        ------
        CorrSteerError : if the model has another width or no such layer, or no bias to add to: where layers normalise
            what they add (Gemma 2), in models without such an option (Qwen 3), in mixtures of experts, and before the
            first layer. The model is left as it was.
        """
        warn_once()
        tables = stack(model, [self], [self.applied_as("all", scale)[1]])
        fold_vectors(model, {point: table[0] for point, table in tables.items()})
        return model

    def described(self) -> dict[str, Any]:
        """All of it but the directions, as JSON can hold it."""
        return {
            "features": [asdict(f) for f in self.features],
            "table": {str(layer): [asdict(f) for f in rows] for layer, rows in self.table.items()},
            "notes": self.notes,
            "provenance": self.provenance,
            "positions": self.positions,
            "scale": self.scale,
        }

    @classmethod
    def from_described(cls, described: dict[str, Any], directions: Tensor) -> Steering:
        """What `described` made of one, with its directions."""
        return cls(
            [Feature.from_dict(f) for f in described["features"]],
            directions,
            {int(layer): [Feature.from_dict(f) for f in rows] for layer, rows in described["table"].items()},
            *(described[name] for name in ("notes", "provenance", "positions", "scale")),
        )

    def save(self, path: PathLike) -> None:
        """Write a safetensors file: the directions, and everything else as JSON in its metadata."""
        tensors = {"directions": self.directions.cpu().float().contiguous()}
        write_tensors(path, tensors, {"format": FORMAT, "steering": to_json(self.described())})

    @classmethod
    def load(cls, path: PathLike, model: nn.Module | None = None) -> Steering:
        """Read what `save` wrote; given the model, refuse a file for another width or other layers.

        Raises
        ------
        CorrSteerError : if the file is missing, truncated, not a steering file, or not for this model.
        """
        described, directions = _read(path)
        try:
            steering = cls.from_described(described, directions)
        except CorrSteerError as error:
            raise CorrSteerError(f"{path} is damaged, as {error}; select again or fetch the file again") from None
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise _damaged(path, error) from None
        if model is not None:
            steering.check(model)
        return steering

    def check(self, model: nn.Module) -> None:
        """Raise unless this steering fits the model."""
        self._fitting(model)

    def _fitting(self, model: nn.Module) -> dict[HookPoint, Tensor]:
        """Its vectors, which fit the model."""
        vectors, d = self.vectors(model), self.directions.shape[-1]
        for point in vectors:
            hook_points.check_steers(point)
            if d != hook_points.width(model, point):
                what = "a residual stream" if point.kind in hook_points.KINDS else str(point)
                raise CorrSteerError(
                    f"this steering is for {what} of width {d}, but the model's is {hook_points.width(model, point)}; "
                    f"use it with the model it was made on"
                )
        for point in vectors:
            hook_points.check_point(model, point)
        return vectors


def _read(path: PathLike) -> tuple[Any, Tensor]:
    """What a steering file says of its directions, and these."""
    if not as_path("path", path).is_file():
        raise CorrSteerError(f"there is no steering file at {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CorrSteerError(
                    f"{path} is not a steering file of this version: its format must be {FORMAT!r}, got "
                    f"{metadata.get('format')!r}; select again"
                )
            return from_json(metadata["steering"]), file.get_tensor("directions")
    except CorrSteerError:
        raise
    except (SafetensorError, KeyError, ValueError) as error:
        raise _damaged(path, error) from None


def _damaged(path: PathLike, error: Exception) -> CorrSteerError:
    return CorrSteerError(f"{path} is damaged ({error}); select again or fetch the file again")


class Installed:
    """Hooks that `Steering.install` put on a model, and what they add. As a context, it removes them at its end.

    Contexts and other installations on the same model add up.

    Attributes
    ----------
    steering, scale : what is added; no steering where nothing is.
    """

    def __init__(self, model: nn.Module, steering: Steering, positions: str, scale: float, points: Iterable[str]):
        warn_once()
        if isinstance(points, str):
            raise CorrSteerError(f"points must be a sequence of hook points, such as [{points!r}], got {points!r}")
        further = [HookPoint.parse(name, model) for name in points]
        self._model = model
        vectors = self._of(steering, scale)
        self._vectors = InstalledVectors(model, dict.fromkeys([*vectors, *further]), positions)
        self._vectors.set(vectors)
        self.steering: Steering | None = steering
        self.scale: float = scale

    def set(self, steering: Steering | None, scale: float | None = None) -> None:
        """Steer by another steering, or by another scale, from now on; by None, steer by nothing.

        Nothing is compiled anew. Positions are those of the installation, whatever the steering's own; the scale is by
        default the steering's own.

        Raises
        ------
        CorrSteerError : if the steering has another width, or a hook point at which no hook was installed.
        """
        if steering is None:
            self._vectors.set({})
        else:
            check_type("steering", steering, Steering, "a Steering")
            _, scale = steering.applied_as(None, scale)
            self._vectors.set(self._of(steering, scale))
            self.scale = scale
        self.steering = steering

    def _of(self, steering: Steering, scale: float) -> dict[HookPoint, Tensor]:
        return {point: table[0] for point, table in stack(self._model, [steering], [scale]).items()}

    def remove(self) -> None:
        """Take the hooks off the model, and undo the steering where a compiled graph keeps them."""
        self.steering = None
        self._vectors.remove()

    def __enter__(self) -> Installed:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def check_application(positions: str, scale: float) -> float:
    """Raise unless steerings can be applied at these positions and by this scale, which is given back as a float."""
    check_positions(positions)
    return number("scale", scale)


@contextlib.contextmanager
def apply_rows(
    model: nn.Module,
    steerings: Sequence[Steering],
    rows: Sequence[int] | None,
    *,
    positions: str | None = None,
    scale: float | None = None,
) -> Iterator[None]:
    """Steer each row of a batch by its own steering for as long as the context lasts.

    Parameters
    ----------
    steerings : V steerings.
    rows : which of them each of the batch's B rows gets, -1 for none; None gives every row the first.
    model, positions, scale : as for `Steering.apply`.

    Raises
    ------
    CorrSteerError : where steerings have different positions of their own and none are given, among others.
    """
    warn_once()
    asked = [steering.applied_as(positions, scale) for steering in steerings]
    meant = sorted({of_one for of_one, _ in asked})
    if len(meant) != 1:
        raise CorrSteerError(f"steerings must be one or more of the same positions, got {meant}; give positions")
    chosen = None
    if rows is not None:
        numbers = wholes("rows", rows)
        if not all(-1 <= row < len(steerings) for row in numbers):
            raise CorrSteerError(f"rows must lie in -1..{len(steerings) - 1}, got {numbers}")
        chosen = torch.tensor(numbers, dtype=torch.int32, device="cpu")
    tables = stack(model, steerings, [of_one for _, of_one in asked])
    vectors = {point: table[0] for point, table in tables.items()}
    installed = installed_on(model, vectors, meant[0]) if chosen is None else None
    with add_vectors(model, tables, chosen, meant[0]) if installed is None else installed.applied(vectors):
        yield


def stack(model: nn.Module, steerings: Sequence[Steering], scales: Sequence[float]) -> dict[HookPoint, Tensor]:
    """What steerings add at each hook point of a model, each by its scale: `[len(steerings), d]` float32.

    Raises
    ------
    CorrSteerError : where a steering does not fit the model, or what is added would not be finite.
    """
    each: list[dict[HookPoint, Tensor]] = []
    for steering, scale in zip(steerings, scales):
        vectors = steering._fitting(model)
        if vectors:
            added = scale * torch.stack(list(vectors.values())).cpu()  # all layers at once, as there may be many
            if not bool(torch.isfinite(added).all()):
                raise CorrSteerError(
                    f"scale must leave what is added finite in float32, got {scale:g}; take a smaller one"
                )
            vectors = dict(zip(vectors, added))
        each.append(vectors)
    points = dict.fromkeys(point for vectors in each for point in vectors)
    tables: dict[HookPoint, Tensor] = {}
    for point in points:
        nothing = torch.zeros(hook_points.width(model, point), dtype=torch.float32, device="cpu")
        tables[point] = torch.stack([vectors.get(point, nothing) for vectors in each])
    return tables
