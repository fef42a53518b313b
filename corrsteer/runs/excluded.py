"""Which tokens of prompts are left out of pooling, as SAEs were trained without them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from corrsteer.sae.encoder import SparseEncoder


def excluded_tokens(tokenizer: Any, encoders: Iterable[SparseEncoder]) -> tuple[int, ...]:
    """The BOS token, and those that any encoder's metadata says it was trained without, by id.

    The residual of a BOS token is far larger than any other, and most SAEs were trained without it: its activations
    would be every sample's maximum.
    """
    excluded = {tokenizer.bos_token_id} - {None}
    for encoder in encoders:
        named = encoder.metadata.get("exclude_special_tokens")  # SAELens': all special tokens, or their ids
        excluded |= set(tokenizer.all_special_ids) if named is True else set(named or ())
    return tuple(sorted(excluded))
