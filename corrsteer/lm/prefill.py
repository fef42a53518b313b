"""Prompts read once: what a cache holds of them is given to many rows.

Whether a model's cache can be given to other rows, and read on from, is tried on a few tokens before it is relied on:
some caches are states that cannot be cut, and some models read several tokens after a cache as if it were empty.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from corrsteer.lm import hook_points
from corrsteer.lm.decoding import Decoding
from corrsteer.lm.own_passes import probe, read_ahead

log: logging.Logger = logging.getLogger(__name__)

NAMES = ("cache", "past_key_values")  # what `generate` calls it, the newer name first
PROBE = ((3, 4, 5, 6, 7, 8, 9), (3, 4, 5, 8, 6))  # prompts that a cache is tried on
PROBE_SHARED = 3  # tokens that they begin with


@dataclass(frozen=True)
class Prompts:
    """Padded on the left: `ids` and `mask`, `[B, W]` int64."""

    ids: Tensor
    mask: Tensor

    @classmethod
    def pad(cls, prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> Prompts:
        """Of token ids, with a padding token."""
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], dtype=torch.int64)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], dtype=torch.int64)
        return cls(ids.to(device), mask.to(device))

    @property
    def width(self) -> int:
        """W."""
        return self.ids.shape[1]

    def rows(self, rows: Tensor) -> Prompts:
        """Some of them, `rows: [R]` int64."""
        return Prompts(self.ids[rows], self.mask[rows])

    def begin(self, columns: int) -> Prompts:
        """Their first columns."""
        return Prompts(self.ids[:, :columns], self.mask[:, :columns])

    def grown(self, ids: Tensor) -> Prompts:
        """With what was generated after them, `ids: [B, W + n]`."""
        return Prompts(ids, torch.nn.functional.pad(self.mask, (0, ids.shape[1] - self.width), value=1))


@dataclass(frozen=True)
class Cache:
    """What a model has read, and under which name `generate` gives and takes it."""

    name: str
    value: Any

    @classmethod
    def of(cls, output: Any) -> Cache:
        """That of what `generate` put out."""
        for name in NAMES:
            if output.get(name) is not None:
                return cls(name, output[name])
        raise ValueError("generate puts out no cache")

    @property
    def nbytes(self) -> int:
        """What its tensors take."""
        return sum(t.nbytes for layer in self.value.layers for t in _tensors(layer))

    @property
    def grows_apart(self) -> bool:
        """Whether what is read on is put into new tensors, so that one that shares its tensors stays as it is."""
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

        return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in self.value.layers)

    def shared(self) -> Cache:
        """Another with the same tensors."""
        value = copy.copy(self.value)
        value.layers = [_copied(layer) for layer in value.layers]
        return Cache(self.name, value)

    def rows(self, rows: Tensor) -> Cache:
        """A copy for some of its rows, each as often as asked for, `rows: [R]` int64; this one stays as it is."""
        copied = self.shared()
        copied.value.reorder_cache(rows)
        return copied


@dataclass(frozen=True)
class Begun:
    """Prompts and what has been read of them."""

    prompts: Prompts
    cache: Cache | None = None

    def rows(self, rows: Sequence[int]) -> Begun:
        """A copy for some of its rows, each as often as asked for; this one stays as it is."""
        if self.cache is not None and list(rows) == list(range(len(self.prompts.ids))) and self.cache.grows_apart:
            return Begun(self.prompts, self.cache.shared())
        index = torch.tensor(rows, dtype=torch.int64, device=self.prompts.ids.device)
        return Begun(self.prompts.rows(index), None if self.cache is None else self.cache.rows(index))

    def most_rows(self, decoding: Decoding) -> int:
        """How many of its rows' completions fit in `decoding.cache_bytes`."""
        if self.cache is None:
            return decoding.batch_size
        n, width = self.prompts.ids.shape
        row = self.cache.nbytes / n * (width + decoding.max_new_tokens) / width
        return max(1, int(decoding.cache_bytes // row))


def read(model: nn.Module, prompts: Prompts, settings: Any, cache: Cache | None = None) -> Cache:
    """Read prompts that go on after these tokens; given a cache, those that are not in it.

    `settings` are those of `generate`, which is asked for one token that is thrown away: it knows what each
    architecture needs besides ids and mask.
    """
    settings = copy.copy(settings)
    settings.max_new_tokens, settings.return_dict_in_generate, settings.do_sample = 1, True, False
    given = {} if cache is None else {cache.name: cache.value}
    generator: Any = model
    with read_ahead():
        output = generator.generate(
            input_ids=prompts.ids, attention_mask=prompts.mask, generation_config=settings, **given
        )
    return Cache.of(output)


def read_prefix(model: nn.Module, prompts: Prompts, prefix: int, settings: Any) -> Cache:
    """Read what all prompts begin with in one row, and give it to each: the cache of the prompts' first columns.

    Padding stays on the left. So a row that is shorter than the longest has less of the prefix in those columns, and
    the rest of it is read again with what follows: as many columns are read as if padding lay in between, but every
    token is where it is without a shared prefix, and so are windows and distances between columns.
    """
    row = int(prompts.mask.sum(1).argmax())  # the longest, which has no padding
    first = Prompts(prompts.ids[row : row + 1, :prefix], prompts.mask[row : row + 1, :prefix])
    cache = read(model, first, settings, Cache(_cache_name(model), _whole_cache()))
    padding = prompts.width - prompts.mask.sum(1)
    columns = torch.arange(prefix, dtype=torch.int64, device=padding.device) - padding[:, None]
    shift = columns.clamp(min=0) if bool(padding.any()) else None
    for layer in cache.value.layers:
        for name in ("keys", "values"):
            kept = getattr(layer, name)  # [1, heads, prefix, d]
            if shift is None:
                moved = kept.expand(len(padding), *kept.shape[1:])
            else:
                moved = kept[0][:, shift.to(kept.device)].transpose(0, 1)
            setattr(layer, name, moved)
    return cache


@dataclass(frozen=True)
class Reuse:
    """What a model's cache can be used for again.

    Attributes
    ----------
    rows : whether it can be given to other rows.
    prefix : whether a prefix of it can.
    """

    rows: bool
    prefix: bool


def reuse(model: nn.Module, settings: Any) -> Reuse:
    """What a model's cache can be used for, tried once a model; the reason of what it cannot is logged."""
    if model not in _known:
        with probe(), torch.inference_mode():
            _known[model] = Reuse(
                _tried(model, settings, "trials of one prompt each read it anew", _try_rows),
                _tried(model, settings, "what prompts begin with is read in each", _try_prefix),
            )
    return _known[model]


_known: weakref.WeakKeyDictionary[nn.Module, Reuse] = weakref.WeakKeyDictionary()


def _tried(model: nn.Module, settings: Any, otherwise: str, attempt: Callable[..., tuple[Cache, int]]) -> bool:
    settings = copy.copy(settings)
    settings.output_logits, settings.max_new_tokens, settings.eos_token_id = True, 2, None
    prompts = Prompts.pad(PROBE, 0, hook_points.input_device(model))
    logits = functools.partial(_logits, model, prompts, settings)
    try:
        cache, tokens = attempt(model, prompts, settings)
        _check_kind(cache, tokens)
        expected, got = logits(), logits(cache)
        # half of the digits, as batches of other shapes round differently
        dtype: Any = model.dtype
        close = torch.finfo(dtype).eps ** 0.5 * expected.abs().max()
        if not bool(((got - expected).abs() <= close).all()):
            raise ValueError("what follows is not what follows without")
    except Exception as error:  # whatever a model raises where its cache is not meant to be used like that
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        log.info("the cache of %s cannot be used again, so %s (%s)", type(model).__name__, otherwise, reason)
        return False
    return True


def _try_rows(model: nn.Module, prompts: Prompts, settings: Any) -> tuple[Cache, int]:
    """A cache of all but the last token, that two rows have exchanged, and how many tokens it is to hold."""
    exchanged = torch.tensor([1, 0], dtype=torch.int64, device=prompts.ids.device)
    first = prompts.rows(exchanged).begin(prompts.width - 1)
    return read(model, first, settings).rows(exchanged), first.width


def _try_prefix(model: nn.Module, prompts: Prompts, settings: Any) -> tuple[Cache, int]:
    return read_prefix(model, prompts, PROBE_SHARED, settings), PROBE_SHARED


def _logits(model: Any, prompts: Prompts, settings: Any, cache: Cache | None = None) -> Tensor:
    settings = copy.copy(settings)
    settings.return_dict_in_generate = True
    given = {} if cache is None else {cache.name: cache.value}
    output = model.generate(input_ids=prompts.ids, attention_mask=prompts.mask, generation_config=settings, **given)
    return torch.stack(output.logits, 1).float()


def _check_kind(cache: Cache, tokens: int) -> None:
    from transformers import DynamicCache

    if type(cache.value) is not DynamicCache or cache.value.offloading:
        raise TypeError(f"it is a {type(cache.value).__name__}")
    if cache.value.get_seq_length() != tokens:
        raise ValueError("what was read is kept elsewhere")


def _whole_cache() -> Any:
    """A cache that keeps every token, also where layers see but a window of them."""
    from transformers import DynamicCache

    return DynamicCache()


def _cache_name(model: Any) -> str:
    return next(name for name in NAMES if name in inspect.signature(model.forward).parameters)


def _copied(layer: Any) -> Any:
    """A layer's cache that can be changed without changing the other."""
    copied = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            setattr(copied, name, dict(value))
    return copied


def _tensors(layer: Any) -> list[Tensor]:
    held = [part for value in vars(layer).values() for part in (value.values() if isinstance(value, dict) else [value])]
    return [part for part in held if isinstance(part, Tensor)]
