"""GGUF control vectors, as llama.cpp and EasySteer read them: `direction.N` is added to the output of layer N."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from corrsteer.errors import CorrSteerError
from corrsteer.files import write_whole
from corrsteer.integrations.exports.form import Export, Form


def write_directions(path: Path, vectors: Mapping[int, Tensor], hint: str) -> None:
    """Write vectors `[d]` float32 by layer; ``hint`` says what model they are for.

    Raises
    ------
    CorrSteerError : without the package gguf.
    """
    check_gguf()
    import gguf

    def write(part: Path) -> None:
        writer = gguf.GGUFWriter(part, "controlvector")
        writer.add_string("controlvector.model_hint", hint)
        writer.add_uint32("controlvector.layer_count", len(vectors))
        for layer, vector in vectors.items():
            writer.add_tensor(f"direction.{layer}", vector.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write_whole(path, write)


def check_gguf() -> None:
    """Raise where the package that writes the format is not installed."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise CorrSteerError(
            "this format is written by the package gguf, which is not installed; pip install 'corrsteer[gguf]'"
        ) from None


def hint(export: Export) -> str:
    """What a control vector says of its model: the kind, or else the name."""
    return str(getattr(getattr(export.model, "config", None), "model_type", export.model_name))


def write(export: Export) -> str:
    """A control vector of llama.cpp, which steers every layer but the first."""
    vectors = export.outputs(FORM.name)
    if 0 in vectors:
        raise CorrSteerError(
            "steering adds to the output of layer 0, for which llama.cpp has no control vector; select without layer "
            "0, or use the format model or easysteer"
        )
    write_directions(export.path, vectors, hint(export))
    return f"llama-cli --model MODEL.gguf --control-vector {shlex.quote(str(export.path))}"


FORM = Form(
    "gguf",
    "a control vector of llama.cpp, as repeng writes them",
    ("all",),
    "gguf 0.19.0 reads it back the same to the bit; llama.cpp takes it, and agrees with `apply` for as many tokens "
    "as it agrees unsteered with transformers, see below",
    write,
)
