"""What a collection is, as far as its result depends on it: what goes on must be what was begun."""

from __future__ import annotations

from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any

from torch import nn

from corrsteer.fingerprints import fingerprint
from corrsteer.lm.decoding import Decoding
from corrsteer.lm.identity import described
from corrsteer.rollouts.journal import check_same
from corrsteer.runs.batches import BatchReader
from corrsteer.runs.run import BEGUN, Run
from corrsteer.runs.run_files import INDEX
from corrsteer.runs.sources import Given
from corrsteer.sae.encoder import TENSORS

LIMITS = ("statistics_bytes",)  # which change no result


def begun_as(model: nn.Module, reader: BatchReader, decoding: Decoding, hook_offset: int) -> dict[str, Any]:
    """Model, SAEs, samples and options of a collection."""
    source, options = reader.samples.source, asdict(reader.options)
    return {
        "model": described(model),
        "saes": {
            str(layer): {
                "encoder": encoder.describe(),
                "point": str(reader.points[layer]),
                "weights": fingerprint((name, getattr(encoder, name)) for name in TENSORS),
            }
            for layer, packed in reader.encoders.items()
            for encoder in [packed.unpacked()]  # how it is packed depends on the machine
        },
        "task": asdict(reader.samples.task.identity),
        "rollouts": _digest(source) if isinstance(source, Given) else None,
        "samples_per_prompt": reader.samples.provenance.get("samples_per_prompt"),
        "decoding": asdict(decoding),
        "hook_offset": hook_offset,
        **{name: value for name, value in options.items() if name not in LIMITS},
    }


def saved_run(directory: Path, begun: dict[str, Any], resumed: bool) -> Run | None:
    """The run of this collection, if it was finished and saved there.

    Raises
    ------
    JobDiffers : where the run that is there is another, unless this one was begun to take its place.
    """
    if not (directory / INDEX).exists():
        return None
    known = Run.load(directory)
    theirs = known.provenance.get(BEGUN, {})
    if not resumed or theirs == begun:
        check_same(theirs, begun, f"the run that is there in {directory}")
        return known
    return None


def _digest(source: Given) -> str:
    digest = blake2b(digest_size=16)
    for rollout in source.rollouts:
        digest.update(rollout.to_line().encode())
    return digest.hexdigest()
