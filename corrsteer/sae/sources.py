"""Where decoder rows lie: on a disk, in SAELens' published releases or in memory; they are read on demand."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from corrsteer.compatibility import warn_once
from corrsteer.errors import CorrSteerError
from corrsteer.sae.formats import FORMATS
from corrsteer.sae.releases import check_names
from corrsteer.types import PathLike

if TYPE_CHECKING:
    from sae_lens import SAE


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
            rows = FORMATS[self.source["format"]].decoder_rows(Path(self.source["directory"]), features)
        elif kind == "release":  # loaded for as long as it takes to copy them
            rows = load_pretrained(self.source["release"], self.source["sae_id"]).W_dec[features]
        else:
            raise CorrSteerError(
                f"decoder rows cannot be read: the SAE was in memory when this was made (source {kind!r}). Give the "
                f"encoders to select, or make them with SparseEncoder.load or from_pretrained"
            )
        rows = rows.detach().to("cpu", torch.float32)
        return rows / rows.norm(dim=-1, keepdim=True) if self.source["divide_by_norm"] else rows


def decoder_in_memory(W_dec: Tensor, divide_by_norm: bool) -> Decoder:
    """Rows of a decoder that its owner keeps in memory."""
    return Decoder({"kind": "memory", "divide_by_norm": divide_by_norm}, W_dec)


def decoder_on_disk(directory: PathLike, divide_by_norm: bool, format: str = "sae_lens") -> Decoder:
    """Rows read one by one from where an SAE of one of `FORMATS` lies, a directory or a file."""
    # A link is not followed, as the hub's cache keeps files by their contents' names.
    directory = os.path.abspath(directory)
    return Decoder({"kind": "directory", "directory": directory, "format": format, "divide_by_norm": divide_by_norm})


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
