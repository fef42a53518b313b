"""Where SAEs lie: SAELens' directories, its published releases, and rows of their decoders read on demand."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from corrsteer.compatibility import warn_once
from corrsteer.errors import CorrSteerError
from corrsteer.sae.releases import check_names
from corrsteer.types import Device, PathLike

if TYPE_CHECKING:
    from sae_lens import SAE

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
DTYPES = {
    name: dtype
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    for name in (str(dtype), str(dtype).removeprefix("torch."))
}


@dataclass(frozen=True, eq=False)
class Decoder:
    """Decoder rows by feature index. It is data alone, so that it can be copied and sent to other processes.

    Attributes
    ----------
    source : where the rows lie, in words that can be stored and read back by `open_decoder`.
    W_dec : `[d_sae, d_out]`, the rows themselves where their owner keeps them in memory.
    """

    source: dict[str, Any]
    W_dec: Tensor | None = field(default=None, repr=False)

    def rows(self, features: list[int]) -> Tensor:
        """`[len(features), d_out]` float32 on the CPU, divided by their norms where the SAE rescales by them."""
        kind = self.source["kind"]
        if kind == "identity":
            numbers = torch.tensor(features, dtype=torch.int64, device="cpu")
            return torch.nn.functional.one_hot(numbers, self.source["d_in"]).float()
        if self.W_dec is not None:
            rows = self.W_dec[features]
        elif kind == "directory":
            rows = _rows_on_disk(Path(self.source["directory"]), features)
        elif kind == "release":  # loaded for as long as it takes to copy them
            rows = load_pretrained(self.source["release"], self.source["sae_id"]).W_dec[features]
        else:
            raise CorrSteerError(
                f"decoder rows cannot be read: the SAE was in memory when this was made (source {kind!r}). Give the "
                f"encoders to select, or make them with SparseEncoder.load or from_pretrained"
            )
        rows = rows.detach().to("cpu", torch.float32)
        return rows / rows.norm(dim=-1, keepdim=True) if self.source["divide_by_norm"] else rows


def read(directory: PathLike, config: dict[str, Any], device: Device = "cpu") -> dict[str, Tensor]:
    """Encoder parameters of an SAE directory; `W_dec` only where the encoder needs its norms.

    On the meta device, which holds no values, only the file's header is read.
    """
    directory = Path(directory)
    gated = config["architecture"] == "gated"
    needed = {"W_enc"} | ({"b_gate", "b_mag", "r_mag"} if gated else {"b_enc"})
    if "jumprelu" in config["architecture"]:
        needed.add("threshold")
    if config.get("apply_b_dec_to_input") and "transcoder" not in config["architecture"]:
        needed.add("b_dec")
    if config.get("rescale_acts_by_decoder_norm"):
        needed.add("W_dec")
    with _open(directory) as file:
        missing = sorted((needed | {"W_dec"}) - set(file.keys()))
        if missing:
            raise CorrSteerError(
                f"{directory / WEIGHTS} lacks {', '.join(missing)}, which a {config['architecture']} SAE has"
            )
        if torch.device(device).type == "meta":
            return {name: _without_values(file.get_slice(name)) for name in needed}
        return {name: file.get_tensor(name).to(device) for name in needed}


def _without_values(part: Any) -> Tensor:
    """What a slice of a safetensors file is of, on the meta device."""
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    dtype = dtypes.get(part.get_dtype(), torch.float32)  # others are converted when an encoder is made of them
    return torch.empty(part.get_shape(), dtype=dtype, device="meta")


def dtype_of(config: dict[str, Any], directory: PathLike) -> torch.dtype:
    """The dtype an SAE's configuration names."""
    if config.get("dtype", "float32") not in DTYPES:
        raise CorrSteerError(
            f"dtype in {Path(directory) / CONFIG} must be one of {', '.join(DTYPES)}, got {config['dtype']!r}"
        )
    return DTYPES[config.get("dtype", "float32")]


def read_config(directory: PathLike) -> dict[str, Any]:
    """Configuration of an SAE directory, in SAELens 6's form."""
    directory = Path(directory)
    path = directory / CONFIG
    try:
        config = json.loads(path.read_bytes())  # in UTF-8, whatever the locale
    except (FileNotFoundError, NotADirectoryError):
        _check_there(directory)
        raise CorrSteerError(
            f"{directory} is not an SAE directory: it has no {CONFIG}. It must hold {CONFIG} and {WEIGHTS}, "
            f"as SAELens' save_model writes them"
        ) from None
    except ValueError as error:  # neither JSON nor even text
        raise CorrSteerError(f"{path} is not JSON ({error}); save the SAE again") from None
    if not isinstance(config, dict):
        raise CorrSteerError(f"{path} must hold a JSON object, got {type(config).__name__}; save the SAE again")
    if "sae_lens_version" not in (config.get("metadata") or {}):
        # Written before SAELens 6: its own conversion knows every older layout.
        from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting

        try:
            config = handle_config_defaulting(config)
        except KeyError as error:
            raise CorrSteerError(f"architecture {error} in {path} is not one that SAELens knows") from None
    if not isinstance(config.get("architecture"), str):
        raise CorrSteerError(f"{path} names no architecture; save the SAE again with SAELens 6 or later")
    return config


def _check_there(directory: Path) -> None:
    if not directory.exists():
        raise CorrSteerError(f"there is no SAE directory at {directory}; was it moved?")


def _open(directory: Path) -> safe_open:
    path = directory / WEIGHTS
    try:
        return safe_open(str(path), framework="pt")
    except FileNotFoundError:
        _check_there(directory)
        raise CorrSteerError(f"{directory} is not an SAE directory: it has no {WEIGHTS}") from None
    except (SafetensorError, OSError) as error:
        raise CorrSteerError(f"{path} is damaged ({error}); fetch or save it again") from None


def _rows_on_disk(directory: Path, features: list[int]) -> Tensor:
    with _open(directory) as file, torch.device("cpu"):  # slices come on the default device, whatever that is
        W_dec = file.get_slice("W_dec")
        return torch.cat([W_dec[:0], *(W_dec[f : f + 1] for f in features)])


def decoder_in_memory(W_dec: Tensor, divide_by_norm: bool) -> Decoder:
    """Rows of a decoder that its owner keeps in memory."""
    return Decoder({"kind": "memory", "divide_by_norm": divide_by_norm}, W_dec)


def decoder_on_disk(directory: PathLike, divide_by_norm: bool) -> Decoder:
    """Rows read one by one from an SAE directory."""
    directory = str(Path(directory).resolve())
    return Decoder({"kind": "directory", "directory": directory, "divide_by_norm": divide_by_norm})


def decoder_in_release(release: str, sae_id: str, divide_by_norm: bool) -> Decoder:
    """Rows of a published SAE."""
    return Decoder({"kind": "release", "release": release, "sae_id": sae_id, "divide_by_norm": divide_by_norm})


def decoder_of_identity(d_in: int) -> Decoder:
    """Unit vectors."""
    return Decoder({"kind": "identity", "d_in": d_in})


def open_decoder(source: dict[str, Any]) -> Decoder:
    """The decoder that a stored source describes; of one that was in memory the rows are gone."""
    parts = dict(source)
    kind = parts.pop("kind", None)
    opens = {"directory": decoder_on_disk, "release": decoder_in_release, "identity": decoder_of_identity}
    return opens[kind](**parts) if kind in opens else Decoder({"kind": kind})


def load_pretrained(release: str, sae_id: str) -> SAE[Any]:
    """SAELens' own loader, on the CPU and in float32, with its complaints about names and downloads as ours."""
    with _ours(release, sae_id):
        from sae_lens import SAE

        return SAE.from_pretrained(release, sae_id, device="cpu", dtype="float32")


def pretrained_without_values(release: str, sae_id: str) -> SAE[Any]:
    """The same on the meta device, which holds no values: only the SAE's configuration is fetched."""
    with _ours(release, sae_id):
        from sae_lens import SAE
        from sae_lens.loading.pretrained_sae_loaders import load_sae_config_from_huggingface

        config = load_sae_config_from_huggingface(release, sae_id)
        return SAE.from_dict(config | {"device": "meta", "dtype": "float32"})


@contextlib.contextmanager
def _ours(release: str, sae_id: str) -> Iterator[None]:
    """SAELens' complaints about names and downloads as ours."""
    warn_once()
    check_names(release, sae_id)
    try:
        yield
    except (ValueError, OSError) as error:  # Hugging Face's own errors are OSErrors, of several lines
        raise CorrSteerError(f"release {release!r}, sae_id {sae_id!r}: {' '.join(str(error).split())}") from None
