"""What a feature is active at: the tokens of the activation data that it is most active at, with those before them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from corrsteer import SparseEncoder, encode
from examples.smollm2 import activations

BEFORE = 4  # tokens of context


def top_tokens(
    folder: Path, layer: int, encoder: SparseEncoder, indices: Sequence[int], tokenizer: Any, n: int = 8
) -> dict[int, dict[str, Any]]:
    """Of each feature, `n` tokens at most at which it is most active, no token twice, and the share of tokens where
    it is active at all.

    Parameters
    ----------
    folder : what `activations.read` wrote.
    indices : which features of the layer's SAE.
    """
    x, _ = activations.load(folder, layer)
    tokens = activations.load_tokens(folder)
    z = torch.cat([encode(part, encoder)[:, list(indices)] for part in x.split(4096)])  # [T, F]
    starts = tokens.cu_seqlens
    found: dict[int, dict[str, Any]] = {}
    for column, index in enumerate(indices):
        best: dict[str, dict[str, Any]] = {}
        for at in z[:, column].topk(min(50 * n, len(z))).indices.tolist():
            token = tokenizer.decode([int(tokens.ids[at])])
            if len(best) == n or z[at, column] <= 0:
                break
            if token not in best:
                start = int(starts[torch.searchsorted(starts, at, right=True) - 1])
                before = tokenizer.decode(tokens.ids[max(start, at - BEFORE) : at].tolist())
                best[token] = {"token": token, "before": before, "activation": round(float(z[at, column]), 3)}
        found[index] = {"active": float((z[:, column] > 0).double().mean()), "top": list(best.values())}
    return found
