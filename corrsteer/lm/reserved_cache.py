"""A cache with room for the tokens to come, so that to read on copies nothing that was read.

The library's grows by concatenation: at every token, all keys and values are copied. Here new ones are put behind the
old. So several can share what was read, as long as one is used at a time: each puts its own tokens behind.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class ReservedLayer(DynamicLayer):
    """One layer's keys and values, `[B, heads, tokens, d]`: views of tensors with room for more tokens."""

    keys: Any  # None before there are any
    values: Any

    def __init__(self, room: int):
        super().__init__()
        self.room: int = room  # tokens in all
        self._reserved: tuple[Tensor, ...] = ()

    def hold(self, keys: Tensor, values: Tensor, rows: Tensor | None = None) -> None:
        """Begin with these; given `rows: [B] int64`, with some of their rows."""
        held = [_with_room(states, self.room, rows) for states in (keys, values)]
        self._reserved = tuple(reserved for reserved, _ in held)
        self.keys, self.values = (view for _, view in held)
        self.dtype: torch.dtype = keys.dtype
        self.device: torch.device = keys.device
        self.is_initialized: bool = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Put these behind the others, and give all."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if not start:
            self.hold(key_states, value_states)
        elif end > self._reserved[0].shape[-2]:  # more than was planned for
            self.hold(torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2))
        else:
            for reserved, states in zip(self._reserved, (key_states, value_states)):
                reserved[..., start:end, :] = states
            self.keys, self.values = (reserved[..., :end, :] for reserved in self._reserved)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take some of the rows, each as often as it is asked for."""
        self.hold(self.keys, self.values, beam_idx.to(self.keys.device))


def reserved_cache(room: int) -> DynamicCache:
    """An empty cache of every token, also where layers see but a window of them, with room for so many."""
    cache = DynamicCache()
    layer_class: Any = functools.partial(ReservedLayer, room)
    cache.layer_class_to_replicate = layer_class
    return cache


def reserve(cache: DynamicCache, room: int) -> None:
    """Give the layers of a cache that keep every token room for so many."""
    for at, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.get_seq_length():
            states: tuple[Any, Any] = layer.keys, layer.values
            cache.layers[at] = roomy = ReservedLayer(room)
            roomy.hold(*states)


def _with_room(states: Tensor, room: int, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """A tensor with room, and the view of what it holds."""
    batch, heads, tokens, d = states.shape
    reserved = states.new_empty(batch if rows is None else len(rows), heads, max(room, tokens), d)
    view = reserved[..., :tokens, :]
    if rows is None:
        view.copy_(states)
    else:
        torch.index_select(states, 0, rows, out=view)
    return reserved, view
