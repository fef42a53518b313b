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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from corrsteer.lm import hook_points
from corrsteer.lm.decoding import Decoding
from corrsteer.lm.own_passes import probe

log: logging.Logger = logging.getLogger(__name__)

NAMES = ("cache", "past_key_values")  # what `generate` calls it, the newer name first
PROBE = ((3, 4, 5, 6, 7, 8, 9), (3, 4, 5, 8, 6))  # prompts that a cache is tried on
PROBE_SHARED, PROBE_NEW = 3, 2  # tokens that they begin with, and that are generated


@dataclass(frozen=True)
class Prompts:
    """Padded on the left: `ids` and `mask`, `[B, W]` int64."""

    ids: Tensor
    mask: Tensor

    @classmethod
    def pad(cls, prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> Prompts:
        """Of token ids, with a padding token."""
        width = max(map(len, prompts))
        ids = [[pad] * (width - len(p)) + list(p) for p in prompts]
        mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
        return cls(*(torch.tensor(rows, dtype=torch.int64, device=device) for rows in (ids, mask)))

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
    def can_be_shared(self) -> bool:
        """Whether what is read on leaves what was read as it is, so that one after the other can read on from it."""
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

        from corrsteer.lm.reserved_cache import ReservedLayer

        kinds = (ReservedLayer, DynamicLayer, DynamicSlidingWindowLayer)
        return all(type(layer) in kinds for layer in self.value.layers)

    def shared(self) -> Cache:
        """Another with the same tensors."""
        value = copy.copy(self.value)
        value.layers = [_copied(layer) for layer in value.layers]
        return Cache(self.name, value)

    def rows(self, rows: Tensor) -> Cache:
        """A copy for some of its rows, each as often as asked for, `rows: [R]` int64; this one stays as it is."""
        copied = self.shared()
        copied.keep(rows)
        return copied

    def keep(self, rows: Tensor) -> None:
        """Keep some of its rows, `rows: [R]` int64, layer by layer: one's memory is freed before the next takes any."""
        self.value.reorder_cache(rows)


@dataclass(frozen=True)
class Begun:
    """Prompts, and a cache of what has been read of them, with room for what is to be."""

    prompts: Prompts
    cache: Cache | None = None

    def reserve(self, room: int) -> Begun:
        """With room for so many tokens in the cache, which it takes over."""
        from corrsteer.lm.reserved_cache import reserve

        if self.cache is not None:
            reserve(self.cache.value, room)
        return self

    def rows(self, rows: Sequence[int]) -> Begun:
        """A copy for some of its rows, each as often as asked for; this one stays as it is."""
        if self.cache is not None and list(rows) == list(range(len(self.prompts.ids))) and self.cache.can_be_shared:
            return Begun(self.prompts, self.cache.shared())
        index = torch.tensor(rows, dtype=torch.int64, device=self.prompts.ids.device)
        return Begun(self.prompts.rows(index), None if self.cache is None else self.cache.rows(index))

    @property
    def nbytes(self) -> int:
        """What its cache takes."""
        return 0 if self.cache is None else self.cache.nbytes

    def most_rows(self, decoding: Decoding) -> int:
        """How many of its rows' completions fit in `decoding.cache_bytes`."""
        if self.cache is None:
            return decoding.batch_size
        n, width = self.prompts.ids.shape
        row = self.cache.nbytes / n * (width + decoding.max_new_tokens - 1) / (width - 1)  # all but one token are read
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
    output = generator.generate(input_ids=prompts.ids, attention_mask=prompts.mask, generation_config=settings, **given)
    return Cache.of(output)


def empty_cache(model: Any, room: int) -> Cache:
    """A cache with room for so many tokens, that keeps each, also where layers see but a window of them."""
    from corrsteer.lm.reserved_cache import reserved_cache

    inside = getattr(model, "get_base_model", None)  # of PEFT, whose forward takes anything
    takes = inspect.signature((model if inside is None else inside()).forward).parameters
    return Cache(next(name for name in NAMES if name in takes), reserved_cache(room))


def read_prefix(
    model: nn.Module,
    prompts: Prompts,
    prefix: int,
    room: int,
    settings: Any,
    reader: Callable[[nn.Module, Prompts, Any, Cache], Cache] = read,
) -> Cache:
    """Read what all prompts begin with in one row, and give it to each: the cache of the prompts' first columns.

    `room` is how many tokens it will hold, and `reader` reads into a cache, as `read` does.

    Padding stays on the left. So a row that is shorter than the longest has less of the prefix in those columns, and
    the rest of it is read again with what follows: as many columns are read as if padding lay in between, but every
    token is where it is without a shared prefix, and so are windows and distances between columns.
    """
    row = int(prompts.mask.sum(1).argmax())  # the longest, which has no padding
    first = Prompts(prompts.ids[row : row + 1, :prefix], prompts.mask[row : row + 1, :prefix])
    cache = reader(model, first, settings, empty_cache(model, prefix))
    padding = prompts.width - prompts.mask.sum(1)
    columns = torch.arange(prefix, dtype=torch.int64, device=padding.device) - padding[:, None]
    shift = columns.clamp(min=0) if bool(padding.any()) else None

    def moved(kept: Tensor) -> Tensor:  # [1, heads, prefix, d] to [B, heads, prefix, d]
        if shift is None:
            return kept.expand(len(padding), *kept.shape[1:])
        return kept[0][:, shift.to(kept.device)].transpose(0, 1)

    for layer in cache.value.layers:
        layer.room = room
        layer.hold(moved(layer.keys), moved(layer.values))
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
    """What a model's cache can be used for, tried once for each way it is run; why it cannot is logged."""
    own, anyone = getattr(model, "generation_config", None), cast(Any, model)
    asked = (getattr(own, name, None) for name in ("use_cache", "cache_implementation"))
    state = (model.training, anyone.dtype, *asked)
    known = _known.setdefault(model, {})
    if state not in known:
        with probe(), torch.inference_mode():
            tried = _Trial(model, settings)
            known[state] = Reuse(
                tried.goes("trials of one prompt each read it anew", tried.give_to_rows),
                tried.goes("what prompts begin with is read in each", tried.share_prefix),
            )
    return known[state]


_known: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], Reuse]] = weakref.WeakKeyDictionary()


class _Trial:
    """Tries a model's cache on a few tokens."""

    def __init__(self, model: nn.Module, settings: Any):
        self._model: Any = model
        self._settings = copy.copy(settings)
        self._settings.output_logits, self._settings.return_dict_in_generate = True, True
        self._settings.max_new_tokens = PROBE_NEW
        self._prompts = Prompts.pad(PROBE, 0, hook_points.input_device(model))

    def goes(self, otherwise: str, attempt: Callable[[], Iterator[tuple[Prompts, Cache]]]) -> bool:
        """Whether generation goes on from caches as without, for prompts and what `attempt` has read of them."""
        try:
            for prompts, cache in attempt():
                got = self._logits(prompts, cache)  # first, while what a model keeps on itself is of other rows
                expected = self._logits(prompts)
                if not bool(((got - expected).abs() <= self._close).all()):
                    raise ValueError("what follows is not what follows without")
        except Exception as error:  # whatever a model raises where its cache is not meant to be used like that
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            name = type(self._model).__name__
            log.info("the cache of %s cannot be used again, so %s (%s)", name, otherwise, reason)
            return False
        return True

    def give_to_rows(self) -> Iterator[tuple[Prompts, Cache]]:
        """Caches of all but the last token that are given to more rows, and to fewer."""
        first = self._prompts.begin(self._prompts.width - 1)
        cache = read(self._model, first, self._settings)
        _check_kind(cache, first.width)
        begun = Begun(self._prompts, cache).reserve(self._prompts.width + PROBE_NEW)
        for rows in ([1, 0, 1], [1], [0, 1]):
            some = begun.rows(rows)
            assert some.cache is not None
            yield some.prompts, some.cache

    def share_prefix(self) -> Iterator[tuple[Prompts, Cache]]:
        """A cache of what they begin with."""
        room = self._prompts.width + PROBE_NEW
        cache = read_prefix(self._model, self._prompts, PROBE_SHARED, room, self._settings)
        _check_kind(cache, PROBE_SHARED)
        yield self._prompts, cache

    @functools.cached_property
    def _close(self) -> float:
        """How near is near enough: some times what rows of a larger batch differ by, which are rounded differently."""
        few, rows = self._logits(self._prompts), torch.arange(8, dtype=torch.int64, device=self._prompts.ids.device) % 2
        noise = (self._logits(self._prompts.rows(rows))[:2] - few).abs().max()
        spread = (few - few.mean(-1, keepdim=True)).abs().max()
        return float(16 * (noise + torch.finfo(self._model.dtype).eps * spread))

    def _logits(self, prompts: Prompts, cache: Cache | None = None) -> Tensor:
        """Of what is generated greedily, `[B, PROBE_NEW, vocabulary]`."""
        given = {} if cache is None else {cache.name: cache.value}
        output = self._model.generate(
            input_ids=prompts.ids, attention_mask=prompts.mask, generation_config=copy.copy(self._settings), **given
        )
        return torch.stack(output.logits, 1).float()


def _check_kind(cache: Cache, tokens: int) -> None:
    from transformers import DynamicCache

    if type(cache.value) is not DynamicCache or cache.value.offloading:
        raise TypeError(f"it is a {type(cache.value).__name__}")
    if cache.value.get_seq_length() != tokens:
        raise ValueError("what was read is kept elsewhere")


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
