"""What every format of SAE files has: how it is told, its configuration in one form, its tensors under one name each.

That form and those names are SAELens 6's: `W_enc [d_in, d_sae]`, `W_dec [d_sae, d_out]`, `b_enc`, `b_dec`, `threshold`,
`b_gate`, `b_mag`, `r_mag`.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from corrsteer.errors import CorrSteerError
from corrsteer.sae.formats.stores import Store

T = TypeVar("T")


@contextlib.contextmanager
def refused(path: object) -> Iterator[None]:
    """Have whatever goes wrong with a file's contents be said of the file: whoever wrote it, they may be anything."""
    try:
        yield
    except (CorrSteerError, MemoryError, torch.OutOfMemoryError):
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise CorrSteerError(
            f"{path} is damaged, or holds what SAEs of its format do not ({reason}); fetch or save it again"
        ) from error


def _refusing(read: Callable[..., T]) -> Callable[..., T]:
    @functools.wraps(read)
    def guarded(path: Path, *arguments: Any) -> T:
        with refused(path):
            return read(path, *arguments)

    return guarded


class Stored(NamedTuple):
    """Under which name a file holds a parameter, and whether as the transpose of what is meant."""

    name: str
    transposed: bool = False


@dataclass(frozen=True)
class Format:
    """One way in which SAEs lie on a disk.

    Attributes
    ----------
    name : what stored runs call it.
    title, files, activations : for people: what it is, what lies there, and which activations it can have.
    weights : the file that it is told by, relative to the path; a pattern.
    is_file : whether that file alone may be given as the path.
    origin : the file, or else the path, that says what the SAE is.
    config : its configuration in SAELens 6's form. Raises CorrSteerError for one that cannot be used.
    parameters : of a path and its configuration, the encoder's parameters, and `W_dec` only where its norms are needed.
    decoder_rows : of a path and features, rows of the decoder, `[len(features), d_out]`.
    """

    name: str
    title: str
    files: str
    activations: str
    weights: str
    origin: Callable[[Path], Path]
    config: Callable[[Path], dict[str, Any]]
    parameters: Callable[[Path, dict[str, Any]], dict[str, Tensor]]
    decoder_rows: Callable[[Path, Sequence[int]], Tensor]
    is_file: bool = False

    def __post_init__(self) -> None:
        for name in ("config", "parameters", "decoder_rows"):
            object.__setattr__(self, name, _refusing(getattr(self, name)))

    def recognises(self, path: Path) -> bool:
        """Whether an SAE of this format lies at a path."""
        return any(path.glob(self.weights)) or (self.is_file and path.is_file() and path.match(self.weights))


def needed(config: dict[str, Any]) -> set[str]:
    """The parameters that an encoder of this configuration is folded from."""
    architecture = config["architecture"]
    names = {"W_enc"} | ({"b_gate", "b_mag", "r_mag"} if architecture == "gated" else {"b_enc"})
    if "jumprelu" in architecture:
        names.add("threshold")
    if config.get("apply_b_dec_to_input") and "transcoder" not in architecture:
        names.add("b_dec")
    if config.get("rescale_acts_by_decoder_norm"):
        names.add("W_dec")
    return names


def read_parameters(store: Store, layout: Mapping[str, Stored], config: dict[str, Any]) -> dict[str, Tensor]:
    """What `needed` names, of a file that holds it by a layout."""
    names, there = needed(config), store.names()
    missing = sorted(name for name in names | {"W_dec"} if name not in layout or layout[name].name not in there)
    if missing:
        called = [layout[name].name if name in layout else name for name in missing]
        raise CorrSteerError(f"{store.path} lacks {', '.join(called)}, which a {config['architecture']} SAE has")
    read = {name: store.read(layout[name].name) for name in names}
    return {name: tensor.T if layout[name].transposed else tensor for name, tensor in read.items()}


def read_rows(store: Store, W_dec: Stored, features: Sequence[int]) -> Tensor:
    """Rows of a decoder that a file holds, or whose transpose it holds."""
    return store.columns(W_dec.name, features) if W_dec.transposed else store.rows(W_dec.name, features)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of JSON."""
    try:
        found = json.loads(path.read_bytes())  # in UTF-8, whatever the locale
    except OSError:
        raise CorrSteerError(f"{path.parent} is not an SAE directory: it has no {path.name}") from None
    except (ValueError, RecursionError) as error:  # neither JSON nor even text, or nested too deeply
        raise CorrSteerError(f"{path} is not JSON ({error}); fetch or save the SAE again") from None
    if not isinstance(found, dict):
        raise CorrSteerError(f"{path} must hold a JSON object, got {type(found).__name__}; fetch or save the SAE again")
    return found


def entry(config: Mapping[str, Any], name: str, origin: Path) -> Any:
    """An entry of a configuration that must be there."""
    if config.get(name) is None:
        raise CorrSteerError(f"{origin} has no {name}, which says what the SAE is; fetch or save it again")
    return config[name]
