"""`TeacherForcing`: the residuals that a generation's capture keeps, read again from the tokens, one pass a batch.

Pass t of a generation reads token t-1 of the completion, after the prompt and all tokens before. A pass over prompt and
completion at once (teacher forcing, in training) reads the same tokens in the same places. It needs no language-model
head and nothing above the last hook point, so the pass ends there.

Rows are laid out as `generate` has them: prompts end in one column, padded on the left, and completions begin in the
next, filled on the right. So hooks that steer know prompt from completion as they do while generating. The pass is made
by the model's own `generate`, which knows what an architecture needs besides ids and mask.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import weakref
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from corrsteer.arguments import shown, whole, wholes
from corrsteer.errors import CorrSteerError
from corrsteer.lm import batches, hook_points, own_passes, prefill
from corrsteer.lm.capture import KEPT_POSITIONS, Capture, Sink
from corrsteer.lm.generation_settings import settings
from corrsteer.lm.hook_points import HookPoint
from corrsteer.lm.passes import follow
from corrsteer.lm.prefill import Cache, Prompts, Reuse
from corrsteer.lm.token_positions import Pass, check_positions

Ids = tuple[Sequence[int], Sequence[int]]  # token ids of a prompt, and of its completion without the stop token

TRIED = 4  # tokens that a model writes, and reads again, to see whether it reads what it wrote


@dataclass(frozen=True)
class Residuals:
    """What was read of a batch.

    Attributes
    ----------
    lengths : how many tokens were kept of each sequence.
    flushed : whether they went to the sink.
    """

    lengths: list[int]
    flushed: bool
    _x: dict[Any, Tensor] = field(default_factory=dict)  # [T, d], or [0, d] where they went to the sink
    _last_prompt: dict[Any, Tensor] = field(default_factory=dict)  # [B, d]

    def packed(self, key: Hashable) -> tuple[Tensor, Tensor]:
        """What was kept at a hook point: `x [T, d]` in the model's dtype and `cu_seqlens [B + 1]` int32.

        Nothing, where it went to the sink.
        """
        self._check(key)
        x = self._x[key]
        return x, _cu_seqlens([0] * len(self.lengths) if self.flushed else self.lengths, x.device)

    def last_prompt(self, key: Hashable) -> Tensor:
        """The residual of each prompt's last token at a hook point, `[B, d]` in the model's dtype."""
        self._check(key)
        return self._last_prompt[key]

    def _check(self, key: Hashable) -> None:
        if key not in self._x:
            raise CorrSteerError(f"key must be one of {', '.join(map(repr, self._x))}, got {key!r}")


class TeacherForcing:
    """Reads completions again, and gives the residuals that `Capture` keeps while they are generated.

        reading = TeacherForcing(model, {20: HookPoint(20)})
        for batch in reading.plan(sequences):
            x, cu_seqlens = reading.read([sequences[i] for i in batch]).packed(20)

    A sequence is token ids of a prompt and of its completion, as generated, up to and without the first stop token. Of
    a completion of n tokens max(n, 1) steps are kept: the last prompt token, and the first n - 1 of the completion.
    Numbers differ from those of the generation by rounding alone, as products are of other shapes. A steering that is
    entered, or installed, acts as it does while generating.

    Parameters
    ----------
    model : a Hugging Face causal language model.
    points : what to call each hook point, and where it is.
    positions, exclude_tokens : which tokens are kept, see `Capture`.
    batch_tokens : a batch holds at most this many tokens, padding counted in, or one sequence.
    buffer_bytes : what the kept residuals of all points may take together, for which batches are made of fewer
        sequences. Past it, as one sequence may be, they go to the sink of `read`.

    Raises
    ------
    CorrSteerError : if the model has no such hook point, is compiled, or does not read what it wrote as it wrote it. A
        few tokens are generated to see that, once a model.
    """

    def __init__(
        self,
        model: nn.Module,
        points: Mapping[Any, HookPoint],
        *,
        positions: str = "generated",
        exclude_tokens: Iterable[int] = (),
        batch_tokens: int = 16384,
        buffer_bytes: int = 1 << 30,
    ):
        check_positions(positions, KEPT_POSITIONS)
        if not points:
            raise CorrSteerError("points must name at least one hook point, got none")
        for point in points.values():
            hook_points.check_point(model, point)
        self.model: nn.Module = model
        self.points: dict[Any, HookPoint] = dict(points)
        self._widths = sum(hook_points.width(model, point) for point in points.values())
        self.positions: str = positions
        self.exclude_tokens: frozenset[int] = frozenset(wholes("exclude_tokens", exclude_tokens, 0, empty=True))
        self.batch_tokens: int = whole("batch_tokens", batch_tokens, 1)
        self.buffer_bytes: int = whole("buffer_bytes", buffer_bytes, 0)
        self._settings = settings(model, max_new_tokens=1, stop_tokens=[], pad_token=_pad_token(model))
        self._settings.use_cache = False
        _check_reads(self)

    def plan(self, sequences: Sequence[Ids]) -> list[list[int]]:
        """Which sequences to read together, as indices; the longest first, so that what is too large fails at once.

        Raises
        ------
        CorrSteerError : for a prompt without tokens, a sequence longer than the model's context, and ids that the model
            does not know.
        """
        self._check(sequences)
        lengths = [(len(prompt), _steps(completion)) for prompt, completion in sequences]
        prompts = [list(prompt) for prompt, _ in sequences]
        plans = []
        for groups in batches.groupings(prompts, self._shares):
            for order in (lambda i: -sum(lengths[i]), lambda i: (-lengths[i][1], -lengths[i][0])):
                plans.append([batch for group in groups for batch in self._cut(sorted(group, key=order), lengths)])
        best = min(plans, key=lambda plan: sum(self._cost(batch, prompts, lengths) for batch in plan))
        return sorted(best, key=lambda batch: -_width([lengths[i] for i in batch]))

    @torch.inference_mode()
    def read(self, sequences: Sequence[Ids], sink: Sink | None = None) -> Residuals:
        """The residuals of a batch of sequences.

        Parameters
        ----------
        sequences : those of a batch.
        sink : called with (key, x, cu_seqlens) at each hook point as the pass comes to it, where together they would
            take more than `buffer_bytes`. Without one, that is an error.
        """
        self._check(sequences)
        if not sequences:
            raise CorrSteerError("sequences must hold at least one sequence, got none")
        batch = _Batch.of(sequences, self._settings.pad_token_id, hook_points.input_device(self.model))
        kept = [self._kept(*sequence, batch) for sequence in sequences]
        lengths = list(map(len, kept))
        reading = _Reading(self, batch, kept, sink, Residuals(lengths, self._bytes(sum(lengths)) > self.buffer_bytes))
        with follow(self.model, steers=False) as passes:
            stores = [(point, functools.partial(reading.store, key)) for key, point in self.points.items()]
            with passes.attached(stores, shared=False):
                prefix = self._prefix([list(prompt) for prompt, _ in sequences])
                reading.read(self._read_prefix(reading, prefix) if prefix else None)
        return reading.residuals

    def _read_prefix(self, reading: _Reading, prefix: int) -> Cache:
        """What prompts begin with, read once, and as far as the last hook point."""
        batch = reading.batch
        first = Prompts(batch.ids, batch.mask).begin(batch.prompt)
        with own_passes.prompts_of_width(batch.prompt):
            return prefill.read_prefix(
                self.model, first, prefix, batch.ids.shape[1], self._cached_settings, reading.read_beginning
            )

    @functools.cached_property
    def _cached_settings(self) -> Any:
        cached = copy.copy(self._settings)
        cached.use_cache = True
        return cached

    @functools.cached_property
    def _reuse(self) -> Reuse:
        return prefill.reuse(self.model, self._cached_settings)

    @property
    def _shares(self) -> bool:
        """Whether what prompts begin with may be read once: not where it is kept of each."""
        return self.positions == "generated" and self._reuse.prefix

    def _prefix(self, prompts: Sequence[list[int]]) -> int:
        """How many tokens that prompts begin with to read once."""
        prefix = batches.common_prefix(prompts)
        return prefix if batches.worth_sharing(prefix, len(prompts)) and self._shares else 0

    def _cut(self, order: Sequence[int], lengths: Sequence[tuple[int, int]]) -> list[list[int]]:
        """Batches of sequences in an order, each as large as it may be."""
        found: list[list[int]] = []
        prompt = steps = tokens = 0
        for index in order:
            own_prompt, own_steps = lengths[index]
            own = own_steps + (own_prompt - 1 if self.positions == "all" else 0)
            prompt, steps, tokens = max(prompt, own_prompt), max(steps, own_steps), tokens + own
            rows = len(found[-1]) + 1 if found else 1
            if not found or rows * (prompt + steps - 1) > self.batch_tokens or self._bytes(tokens) > self.buffer_bytes:
                found.append([])
                prompt, steps, tokens = own_prompt, own_steps, own
            found[-1].append(index)
        return found

    def _cost(self, batch: Sequence[int], prompts: Sequence[list[int]], lengths: Sequence[tuple[int, int]]) -> int:
        """What a batch costs, in tokens."""
        prefix = self._prefix([prompts[i] for i in batch])
        read = len(batch) * (_width([lengths[i] for i in batch]) - prefix)
        return read + prefix + batches.PASS * (1 + bool(prefix))

    def _bytes(self, tokens: int) -> int:
        """What so many kept tokens take at all hook points."""
        anyone: Any = self.model
        return tokens * self._widths * anyone.dtype.itemsize

    def _kept(self, prompt: Sequence[int], completion: Sequence[int], batch: _Batch) -> list[int]:
        """The columns of a sequence that are kept."""
        last = batch.prompt - 1  # that of the last prompt token
        generated = list(range(last, last + _steps(completion)))
        if self.positions == "generated":
            return generated
        first = batch.prompt - len(prompt)
        return [first + at for at, token in enumerate(prompt[:-1]) if token not in self.exclude_tokens] + generated

    def _check(self, sequences: Sequence[Ids]) -> None:
        limit = getattr(hook_points.text_config(self.model), "max_position_embeddings", None)
        known = getattr(hook_points.embeddings(self.model), "num_embeddings", math.inf)
        for at, sequence in enumerate(sequences):
            if not isinstance(sequence, (tuple, list)) or len(sequence) != 2:
                raise CorrSteerError(
                    f"sequences[{at}] must be token ids of a prompt and of its completion, got {shown(sequence)}"
                )
            prompt, completion = sequence
            for name, ids in (("prompt", prompt), ("completion", completion)):
                if not isinstance(ids, (tuple, list)) or set(map(type, ids)) - {int}:  # else as quick as it may be
                    wholes(f"sequences[{at}]'s {name}", ids, empty=True)
                if len(ids) and not (min(ids) >= 0 and max(ids) < known):
                    wrong = max(ids) if min(ids) >= 0 else min(ids)
                    raise CorrSteerError(
                        f"sequences[{at}] holds token {wrong} in its {name}, but the ids that the model knows are 0 to "
                        f"{known - 1}; use the tokenizer that belongs to the model"
                    )
            if not len(prompt):
                raise CorrSteerError(f"sequences[{at}] must have a prompt of at least one token, got none")
            tokens = len(prompt) + _steps(completion) - 1
            if limit and tokens > limit:
                raise CorrSteerError(
                    f"sequences[{at}] has {tokens} tokens to read, {len(prompt)} of its prompt, which is more than the "
                    f"model's context of {limit}; leave it out"
                )


@dataclass(frozen=True)
class _Batch:
    """Rows as `generate` has them.

    Attributes
    ----------
    ids, mask : `[B, W]` int64; what fills rows on the right is not masked.
    prompt : columns of prompts, which end in the last of them.
    unlike : a token that no row ends with. `generate` is told that it is padding, as some warn of rows that do.
    """

    ids: Tensor
    mask: Tensor
    prompt: int
    unlike: int

    @classmethod
    def of(cls, sequences: Sequence[Ids], pad: int, device: torch.device) -> _Batch:
        width = max(len(prompt) for prompt, _ in sequences)
        steps = max(_steps(completion) for _, completion in sequences)
        ids, mask = [], []
        for prompt, completion in sequences:
            before, own = width - len(prompt), _steps(completion) - 1
            row = [*prompt, *completion[:own]]
            after = steps - 1 - own
            ids.append([pad] * before + row + [pad] * after)
            # No token sees what comes after it, and `generate` warns of masks that end with padding.
            mask.append([0] * before + [1] * (len(row) + after))
        as_tensor = functools.partial(torch.tensor, dtype=torch.int64, device=device)
        ends = {row[-1] for row in ids}
        return cls(as_tensor(ids), as_tensor(mask), width, next(at for at in itertools.count() if at not in ends))


class _Seen(Exception):
    """Every hook point has been seen, so that the rest of a pass is for nothing."""


class _Reading:
    """A batch while it is read."""

    def __init__(
        self,
        forcing: TeacherForcing,
        batch: _Batch,
        kept: Sequence[Sequence[int]],
        sink: Sink | None,
        residuals: Residuals,
    ):
        self.batch = batch
        self.residuals = residuals
        self._forcing, self._kept, self._sink = forcing, kept, sink
        self._awaited: set[object] = set()
        self._start = 0  # columns that were read before the pass; those that all prompts begin with
        self._beginning = False
        self._index: dict[torch.device, Tensor] = {}  # [T] int64, the rows of h [B * S, d] that are kept
        self._cu_seqlens: dict[torch.device, Tensor] = {}
        needed = forcing._bytes(sum(residuals.lengths))
        if residuals.flushed and sink is None:
            raise CorrSteerError(
                f"buffer_bytes must be at least {needed} for {sum(residuals.lengths)} tokens of {len(kept)} sequences "
                f"at {len(forcing.points)} hook points, got {forcing.buffer_bytes}; raise it, read fewer at once, or "
                f"give a sink"
            )

    def read(self, cache: Cache | None) -> None:
        """Read the batch, after what is in a cache."""
        self._start = 0 if cache is None else cache.value.get_seq_length()
        forcing = self._forcing
        self._pass(self.batch.ids, self.batch.mask, forcing._settings if cache is None else forcing._cached_settings,
                   cache)  # fmt: skip

    def read_beginning(self, _model: nn.Module, prompts: Prompts, config: Any, cache: Cache) -> Cache:
        """Read what all prompts begin with into a cache, as far as the last hook point."""
        self._beginning = True
        self._pass(prompts.ids, prompts.mask, config, cache)
        self._beginning = False
        return cache

    def _pass(self, ids: Tensor, mask: Tensor, config: Any, cache: Cache | None) -> None:
        self._awaited = set(self._forcing.points)
        config = copy.copy(config)
        config.pad_token_id = self.batch.unlike
        generator: Any = self._forcing.model
        given = {} if cache is None else {cache.name: cache.value}
        try:
            with own_passes.prompts_of_width(self.batch.prompt):
                generator.generate(input_ids=ids, attention_mask=mask, generation_config=config, **given)
        except _Seen:
            return
        raise CorrSteerError(
            f"{type(generator).__name__}.generate ended before every hook point was seen, so that nothing was read"
        )

    def store(self, key: object, h: Tensor, reading: Pass) -> None:
        """Called by a hook point with `h: [B, S, d]`."""
        if not self._beginning:
            self._keep(key, h, reading)
        self._awaited.discard(key)
        if not self._awaited:  # whichever of them the model comes to last
            raise _Seen

    def _keep(self, key: object, h: Tensor, reading: Pass) -> None:
        rows, columns = self.batch.ids.shape
        steps = columns - self._start
        if len(h) != rows or h.shape[1] < steps or reading.end - reading.virtual != columns:
            raise CorrSteerError(
                f"sequences must be read in one pass of {rows} rows and {steps} tokens, but the model reads "
                f"{list(h.shape[:2])}; set in model.generation_config what makes it do so to None"
            )
        flat = h[:, -steps:].reshape(rows * steps, h.shape[2])  # behind virtual tokens, as those of PEFT
        if h.device not in self._index:
            at = [row * steps + c - self._start for row, columns_of in enumerate(self._kept) for c in columns_of]
            self._index[h.device] = torch.tensor(at, dtype=torch.int64, device=h.device)
            self._cu_seqlens[h.device] = _cu_seqlens(self.residuals.lengths, h.device)
        x = flat[self._index[h.device]]
        residuals = self.residuals
        residuals._last_prompt[key] = h[:, self.batch.prompt - 1 - columns].clone()
        if residuals.flushed:
            assert self._sink is not None, "it was looked for"
            self._sink(key, x, self._cu_seqlens[h.device])
            x = x.new_empty(0, h.shape[2])
        residuals._x[key] = x


def _steps(completion: Sequence[int]) -> int:
    """How many steps are kept of a completion."""
    return max(len(completion), 1)


def _width(lengths: Sequence[tuple[int, int]]) -> int:
    """Columns of a batch of prompts of so many tokens with so many kept steps."""
    return max(prompt for prompt, _ in lengths) + max(steps for _, steps in lengths) - 1


def _cu_seqlens(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Where each sequence starts once packed: `[B + 1]` int32."""
    ends = torch.tensor([0, *lengths], dtype=torch.int32, device="cpu").cumsum(0, dtype=torch.int32)
    return ends.to(device)


def _pad_token(model: Any) -> int:
    """What prompts are padded with, which the model does not read: its own padding token, where it has one."""
    named = (getattr(c, "pad_token_id", None) for c in (model.generation_config, hook_points.text_config(model)))
    return next((token for token in named if isinstance(token, int) and token >= 0), 0)


_known: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], str]] = weakref.WeakKeyDictionary()


def _check_reads(forcing: TeacherForcing) -> None:
    """Raise unless a pass over a completion is what the model did when it wrote it, which is tried once a model and way
    to run it: some models' residuals depend on the padding beside a prompt."""
    model: Any = forcing.model
    own = (getattr(model.generation_config, name, None) for name in ("cache_implementation", "use_cache"))
    state = (frozenset(forcing.points.values()), model.training, model.dtype, *own)
    known = _known.setdefault(model, {})
    if state not in known:
        known[state] = _problem(forcing)
    if known[state]:
        in_training = "; or call model.eval(), if it drops activations in training" if model.training else ""
        raise CorrSteerError(
            f"{type(model).__name__} does not read a completion again as it wrote it, so that what it did then cannot "
            f"be had from tokens: its residuals depend on what is beside a row in a batch, on its cache or on where a "
            f"prompt ends ({known[state]}); capture while it generates{in_training}"
        )


def _problem(forcing: TeacherForcing) -> str:
    """Have the model write a little, and read it again in a batch and each row alone: what goes wrong, if anything."""
    everything = copy.copy(forcing)
    everything.positions, everything.exclude_tokens, everything.buffer_bytes = "all", frozenset(), 1 << 62
    sequences, written = _written(everything)
    for chosen in ([1, 0], [0], [1]):
        try:
            residuals = everything.read([sequences[i] for i in chosen])
        except Exception as error:  # whatever a model raises where it cannot do without a cache
            return " ".join(f"{type(error).__name__}: {error}".split())[:200]
        for key, point in everything.points.items():
            x, cu_seqlens = residuals.packed(key)
            for row, read in zip(chosen, x.split(cu_seqlens.diff().tolist())):
                apart = _difference(read, written[key][row], len(sequences[row][0]))
                if not apart <= max(1e-3, 16 * torch.finfo(x.dtype).eps):  # nor NaN
                    return f"what is read at {point} differs by {apart:.2g} of its norm"
    return ""


@torch.inference_mode()
def _written(forcing: TeacherForcing) -> tuple[list[Ids], dict[Any, list[Tensor]]]:
    """What a model writes after two prompts, and what is captured of each meanwhile."""
    model: Any = forcing.model
    prompts = Prompts.pad(prefill.PROBE, forcing._settings.pad_token_id, hook_points.input_device(model))
    config = settings(model, max_new_tokens=TRIED, stop_tokens=[], pad_token=forcing._settings.pad_token_id)
    with Capture(model, forcing.points, stop_tokens=[], positions="all", max_new_tokens=TRIED) as capture:
        ids = model.generate(
            input_ids=prompts.ids, attention_mask=prompts.mask, generation_config=config,
            stopping_criteria=[capture.stopping_criterion],
        )  # fmt: skip
    completions = ids[:, prompts.width :].tolist()
    packed = {key: capture.packed(key) for key in forcing.points}
    rows = {key: list(x.split(cu_seqlens.diff().tolist())) for key, (x, cu_seqlens) in packed.items()}
    return list(zip(prefill.PROBE, completions)), rows


def _difference(read: Tensor, written: Tensor, prompt: int) -> float:
    """How far the residuals of a row `[T, d]` are apart, relative to their norms: of a prompt's tokens or of those
    after it, whichever are further apart.

    In low precision the median token counts, as one may be given to other experts by rounding alone.
    """
    if len(read) != len(written):
        return math.inf
    precise = torch.finfo(read.dtype).eps < 1e-6
    read, written = read.double(), written.double()
    difference = torch.where(read.isnan() & written.isnan(), 0, read - written)
    apart = difference.norm(dim=1) / written.nan_to_num().norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
    parts = [part for part in (apart[:prompt], apart[prompt:]) if len(part)]
    return max(float(part.max() if precise else part.median()) for part in parts)
