"""Vectors that other tools made, as steerings: control vectors, and tensors by layer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corrsteer.arguments import as_path, whole
from corrsteer.errors import CorrSteerError
from corrsteer.files import from_json
from corrsteer.integrations.exports import plain_json
from corrsteer.lm.hook_points import KINDS, HookPoint
from corrsteer.sae.formats.stores import Safetensors, load_torch
from corrsteer.steering.steering import Steering
from corrsteer.types import PathLike

NAME = re.compile(r"(?:layer_|(?:[\w.]+\.)?(?:layers|layer|blocks|h)\.)?(\d+)")
SUFFIXES = (".gguf", ".json", ".pt", ".pth", ".bin", ".safetensors")


def import_steering(path: PathLike, layer: int | None = None, kind: str | None = None) -> Steering:
    """A steering at all positions from a file of another tool, told by its ending.

    ===================  ========================================================================================
    `.gguf`              a control vector of llama.cpp or repeng
    `.pt`, `.pth`,       tensors: `[d]` by layer (numbers, `layer_12`, module paths or hook points), a stack
    `.bin`,              `[layers, d]` of which rows of zeros are left out, one `[d]`, or the fields of a
    `.safetensors`       `SteeringVector` of steering-vectors
    `.json`              what `export_steering` wrote as `json`, with its own positions
    ===================  ========================================================================================

    No code of a file is run: `.pt` is read with `weights_only`.

    Parameters
    ----------
    layer : of a file that holds one vector.
    kind : where vectors that layers are named for are added: `resid_post` (by default), `resid_pre`, `mlp_out`,
        `attn_out`.

    Raises
    ------
    CorrSteerError : for a file that is missing, damaged or something else.
    """
    path = as_path("path", path)
    if kind is not None and kind not in KINDS:
        raise CorrSteerError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if path.suffix not in SUFFIXES:
        raise CorrSteerError(f"path must end with one of {', '.join(SUFFIXES)}, got {path}")
    if not path.is_file():
        raise CorrSteerError(f"there is no file at {path}")
    if path.suffix in (".gguf", ".json"):
        if layer is not None or kind is not None:
            raise CorrSteerError(f"layer and kind must be left out, as {path.name} says itself where it steers")
        return _control_vector(path) if path.suffix == ".gguf" else _plain_json(path)
    try:
        return _steering(path, _tensors(path), layer, kind or "resid_post", "tensors")
    except CorrSteerError as error:
        raise _named(path, error) from None


def _tensors(path: Path) -> Any:
    if path.suffix != ".safetensors":
        return load_torch(path)
    file = Safetensors(path)
    return {name: file.read(name) for name in sorted(file.names())}


def _steering(path: Path, found: Any, layer: int | None, kind: str, what: str) -> Steering:
    if isinstance(found, Mapping) and "layer_activations" in found:
        if found.get("layer_type") != "decoder_block":
            raise CorrSteerError(
                f"a vector of steering-vectors must have layer_type 'decoder_block', got {found.get('layer_type')!r}; "
                f"give its layer_activations with kind"
            )
        found = found["layer_activations"]
    vectors: dict[str, Tensor] = {}
    for name, vector in _by_layer(found, layer):
        point = _point(name, kind)
        if point in vectors:
            raise CorrSteerError(f"it has two vectors for {point}; leave one out")
        vectors[point] = _vector(name, vector)
    vectors = {point: vector for point, vector in vectors.items() if bool((vector != 0).any())}  # NaN is not 0
    if not vectors:
        raise CorrSteerError("it must hold a vector that is not all zeros")
    steering = Steering.from_vectors(vectors)
    steering.positions, steering.notes = "all", [f"imported from {path.name}, {what}"]
    return steering


def _by_layer(found: Any, layer: int | None) -> Iterator[tuple[Any, Any]]:
    """Names and vectors of what a file holds."""
    if isinstance(found, Mapping) and len(found) == 1:
        ((name, value),) = found.items()
        if isinstance(value, Tensor) and not _is_place(name):  # safetensors names what stands alone
            found = value
    vector = found.reshape(-1) if isinstance(found, Tensor) and _is_vector(found) else None
    if (vector is not None) != (layer is not None):
        raise CorrSteerError(
            "layer must be left out, as the file does not hold a single vector" if vector is None else
            "layer must be given, as the file holds a single vector"
        )  # fmt: skip
    if vector is not None:
        yield whole("layer", layer, 0), vector
    elif isinstance(found, Tensor) and found.dim() == 2:
        yield from enumerate(found)
    elif isinstance(found, Mapping):
        yield from found.items()
    else:
        got = f"a tensor {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise CorrSteerError(
            f"it must hold vectors by layer, a stack [layers, d] or one vector [d], got {got}; save it in one of these"
        )


def _is_vector(tensor: Tensor) -> bool:
    """Whether it is `[d]`, but for leading dimensions of 1."""
    return tensor.dim() > 0 and 0 < tensor.numel() == tensor.shape[-1]


def _is_place(name: Any) -> bool:
    try:
        _point(name, "resid_post")
    except CorrSteerError:
        return False
    return True


def _point(name: Any, kind: str) -> str:
    """The hook point that a file's name for a layer means."""
    layer = NAME.fullmatch(str(name))
    if layer is not None:
        return str(HookPoint(int(layer[1]), kind))
    try:
        return str(HookPoint.parse(str(name)))
    except CorrSteerError:
        raise CorrSteerError(
            f"it names {name!r}, which is neither a layer (12, layer_12, model.layers.12) nor a hook point"
        ) from None


def _vector(name: Any, vector: Any) -> Tensor:
    """`[d]` float32 of what may have leading dimensions of 1."""
    if isinstance(vector, Tensor) and vector.is_floating_point() and _is_vector(vector):
        return vector.detach().float().reshape(-1)
    got = f"{vector.dtype} {list(vector.shape)}" if isinstance(vector, Tensor) else type(vector).__name__
    raise CorrSteerError(f"it must hold a vector of real numbers [d] for each layer, got {got} for {name}")


def _control_vector(path: Path) -> Steering:
    try:
        import gguf
    except ImportError:
        raise CorrSteerError(
            f"{path} is read by the package gguf, which is not installed; pip install 'corrsteer[gguf]'"
        ) from None
    try:
        reader = gguf.GGUFReader(path)
        architecture = reader.fields.get("general.architecture")
        kind = None if architecture is None else architecture.contents()
        tensors = {one.name: torch.from_numpy(one.data.copy()) for one in reader.tensors}
    except Exception as error:  # the reader looks before it checks, and raises whatever comes of it
        raise CorrSteerError(f"{path} is damaged ({' '.join(str(error).split())}); fetch the file again") from None
    if kind != "controlvector":
        raise CorrSteerError(f"{path} must be a control vector, got architecture {kind!r}")
    try:
        vectors = {_layer(name): vector for name, vector in tensors.items()}
        return _steering(path, vectors, None, "resid_post", "a control vector")
    except CorrSteerError as error:
        raise _named(path, error) from None


def _layer(name: str) -> int | str:
    """The layer to whose output llama.cpp adds a direction."""
    found = re.fullmatch(r"direction\.(\d+)", name)
    return int(found[1]) if found else name


def _plain_json(path: Path) -> Steering:
    try:
        described = from_json(path.read_bytes())
        if not isinstance(described, dict):
            raise CorrSteerError(f"it must hold an object, got a {type(described).__name__}")
        return plain_json.read(described)
    except CorrSteerError as error:
        raise _named(path, error) from None
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CorrSteerError(f"{path} is damaged ({' '.join(str(error).split())}); export it again") from None


def _named(path: Path, error: CorrSteerError) -> CorrSteerError:
    return error if str(path) in str(error) else CorrSteerError(f"{path.name}: {error}")
