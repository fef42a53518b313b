"""Formats in which SAEs lie on a disk, one file each, and which of them lies at a path."""

from __future__ import annotations

from pathlib import Path

from corrsteer.errors import CorrSteerError
from corrsteer.sae.formats import (
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    llama_scope,
    qwen_scope,
    sae_lens,
    sparsify,
)
from corrsteer.sae.formats.format import Format

FORMATS: dict[str, Format] = {
    module.FORMAT.name: module.FORMAT
    for module in (sae_lens, gemma_scope, gemma_scope_2, llama_scope, qwen_scope, sparsify, dictionary_learning)
}
CONFIGS = {"cfg.json": sae_lens.WEIGHTS, "hyperparams.json": llama_scope.FORMAT.weights}


def recognise(path: Path) -> Format:
    """The format of the SAE at a path.

    Raises
    ------
    CorrSteerError : where there is none, or there are several.
    """
    found = [one for one in FORMATS.values() if one.recognises(path)]
    if len(found) == 1:
        return found[0]
    if not path.exists():
        raise CorrSteerError(f"there is no SAE directory at {path}; was it moved?")
    if found:
        titles = " and ".join(one.title for one in found)
        raise CorrSteerError(f"{path} holds files of {titles}; keep each SAE in a directory of its own")
    for config, weights in CONFIGS.items():  # what a copy that was cut off may lack
        if (path / config).exists():
            raise CorrSteerError(f"{path} is not an SAE directory: it has no {weights}")
    raise CorrSteerError(
        f"{path} is not an SAE directory: it must hold one of {', '.join(one.weights for one in FORMATS.values())}"
    )
