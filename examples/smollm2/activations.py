"""What the SAEs are trained on: the residual streams of texts and prompts, a file a layer.

Every text begins with the same opening of the chat template. It is left out: its tokens are the same everywhere, and
the very first is an attention sink, whose norm is many times that of the others. There is no padding among what is
kept.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from corrsteer import HookPoint, TeacherForcing

HELD_OUT = 0.1  # of the sequences
Norms = dict[str, float]


@dataclass(frozen=True)
class Tokens:
    """The tokens whose residuals are kept, sequence after sequence.

    Attributes
    ----------
    ids : `[T]` int64.
    cu_seqlens : `[N + 1]` int64, where sequences begin.
    """

    ids: Tensor
    cu_seqlens: Tensor

    @property
    def training(self) -> int:
        """How many tokens are trained on; those after them, of the last sequences, are held out."""
        return int(self.cu_seqlens[-1 - round(HELD_OUT * (len(self.cu_seqlens) - 1))])


def read(model: Any, sequences: Sequence[Sequence[int]], layers: Sequence[int], folder: Path, seed: int = 0) -> None:
    """Write the residuals behind each layer to `folder`, of all layers in one pass. What is there is left there.

    Parameters
    ----------
    sequences : token ids of whole texts, which all begin alike. They are shuffled.
    """
    if (folder / "tokens.safetensors").exists():  # which is written last
        return
    folder.mkdir(parents=True, exist_ok=True)
    different = sorted({tuple(sequence) for sequence in sequences})
    random.Random(seed).shuffle(different)
    opening = shared_opening(different)
    # The last token of the opening takes a prompt's last place, whose step is kept; of the rest all but the last are.
    pairs = [(sequence[:opening], sequence[opening:]) for sequence in different]
    reading = TeacherForcing(model, {layer: HookPoint(layer) for layer in layers})
    found: dict[int, dict[int, Tensor]] = {layer: {} for layer in layers}
    for batch in reading.plan(pairs):
        residuals = reading.read([pairs[i] for i in batch])
        for layer in layers:
            x, cu_seqlens = residuals.packed(layer)
            for i, start, end in zip(batch, cu_seqlens.tolist(), cu_seqlens.tolist()[1:]):
                found[layer][i] = x[start + 1 : end].cpu()
    everywhere = TeacherForcing(model, {layer: HookPoint(layer) for layer in layers}, positions="all")
    first = everywhere.read(pairs[:1])
    for layer in layers:
        x = torch.cat([found[layer][i] for i in range(len(pairs))])
        norms = x.float().norm(dim=1)
        described = {"first": first.packed(layer)[0][0].float().norm(), "median": norms.median(), "most": norms.max()}
        save_file({"x": x, **{f"norm_{name}": norm for name, norm in described.items()}}, path(folder, layer))
    ids = [torch.tensor(rest[:-1], dtype=torch.int64) for _, rest in pairs]
    ends = torch.tensor([0, *map(len, ids)], dtype=torch.int64).cumsum(0)
    save_file({"ids": torch.cat(ids), "cu_seqlens": ends}, folder / "tokens.safetensors")


def path(folder: Path, layer: int) -> Path:
    """Where the residuals of a layer are."""
    return folder / f"layer_{layer}.safetensors"


def load(folder: Path, layer: int) -> tuple[Tensor, Norms]:
    """Residuals `[T, d]`, and the norms of the first token, and the median and the largest of those kept."""
    found = load_file(path(folder, layer))
    return found.pop("x"), {name.removeprefix("norm_"): float(norm) for name, norm in found.items()}


def load_tokens(folder: Path) -> Tokens:
    """The tokens that the residuals are of."""
    return Tokens(**load_file(folder / "tokens.safetensors"))


def shared_opening(sequences: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all sequences begin with; a token less, where one of them has no others."""
    first, last = min(sequences), max(sequences)  # in their order these two differ first
    same = next((at for at, (a, b) in enumerate(zip(first, last)) if a != b), len(first))
    return max(1, min(same, min(map(len, sequences)) - 2))
