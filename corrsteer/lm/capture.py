"""`Capture`: the residuals of the kept steps of a generation, in buffers that are allocated once.

Pass 1 of a generation reads the last prompt token, pass t reads generated token t-1. Pass t is kept when token t
comes before the first stop token; the first pass always is. Whether a pass is kept is therefore
known only once its token has been sampled, which is when `generate` calls the stopping criterion found here.

Capture knows nothing of SAEs: when a buffer reaches the memory budget, what is in it goes to a `sink`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from corrsteer.arguments import whole, wholes
from corrsteer.errors import CorrSteerError
from corrsteer.lm import hook_points
from corrsteer.lm.hook_points import HookPoint
from corrsteer.lm.passes import follow
from corrsteer.lm.token_positions import Call, Pass, check_positions

KEPT_POSITIONS = ("generated", "all")

# (hook point's key, x [T, d], cu_seqlens [B + 1]): the tokens kept so far, sample after sample
Sink = Callable[[Any, Tensor, Tensor], None]


class Capture:
    """Captures the residual stream while `model.generate` runs inside the context.

        with Capture(model, {20: HookPoint(20)}, stop_tokens=[eos]) as capture:
            model.generate(**inputs, stopping_criteria=[capture.stopping_criterion])
        x, cu_seqlens = capture.packed(20)

    Parameters
    ----------
    model : a Hugging Face causal language model. Beam search is refused: beams change rows between passes.
    points : what to call each hook point, and where it is.
    stop_tokens : token ids that end an answer.
    positions : `generated`, the kept passes; or `all`, every prompt token that is not padding as well.
    max_new_tokens : the longest generation, which is what buffers are sized by.
    exclude_tokens : token ids that are not kept of prompts, such as that of the BOS token, with `all`. The last token
        of a prompt is kept, whatever it is.
    buffer_bytes : what the buffers of all points may take together. Past it, what was captured goes to `sink`. The
        residuals of last prompt tokens, one a row and point, are kept beside them.
    sink : called with (key, x, cu_seqlens) for each part of the capture that had to leave the buffer, in order of
        time. Without one, running out of budget is an error.

    Raises
    ------
    CorrSteerError : if the model has no such hook point or is already compiled.
    """

    def __init__(
        self,
        model: nn.Module,
        points: Mapping[Any, HookPoint],
        *,
        stop_tokens: Iterable[int],
        positions: str = "generated",
        max_new_tokens: int = 512,
        exclude_tokens: Iterable[int] = (),
        buffer_bytes: int = 1 << 30,
        sink: Sink | None = None,
    ):
        check_positions(positions, KEPT_POSITIONS)
        if not points:
            raise CorrSteerError("points must name at least one hook point, got none")
        max_new_tokens = whole("max_new_tokens", max_new_tokens, 1)
        buffer_bytes = whole("buffer_bytes", buffer_bytes, 0)
        for point in points.values():
            hook_points.check_point(model, point)
        self.model: nn.Module = model
        self.points: dict[Any, HookPoint] = dict(points)
        self.positions: str = positions
        self.max_new_tokens: int = max_new_tokens
        self.exclude_tokens: list[int] = sorted(set(wholes("exclude_tokens", exclude_tokens, 0, empty=True)))
        self.buffer_bytes: int = buffer_bytes
        self.sink: Sink | None = sink
        self.flushed: bool = False
        self._stop = sorted(set(wholes("stop_tokens", stop_tokens, 0, empty=True)))

    def __enter__(self) -> Capture:
        self._buffer: dict[object, Tensor] = {}  # key -> [B, capacity, d], on the device of its layer
        self._last_prompt: dict[object, Tensor] = {}  # key -> [B, d], which no flush takes
        self._capacity = 0
        self._prompt: Tensor  # [B, steps] bool, which of the first pass's tokens are kept
        self._kept: Tensor  # [B, capacity] bool, which of the buffered steps are kept
        self._filled = 0  # buffered steps whose token has been sampled
        self._pending = 0  # steps that the running pass has put behind them
        self._alive: Tensor  # [B] bool, no stop token so far
        self._rows: Tensor | None = None  # [R] int64, which rows the call of generate has; None for all
        self._stop_ids: Tensor | None = None
        self._empty: dict[object, Tensor] = {}  # key -> [0, d], for hook points that left nothing in a buffer
        self._passes = 0  # passes whose token has been sampled
        self._allocated = False
        self._call: Call | None = None
        self._reading: Pass | None = None  # the last pass that was looked at
        self.flushed = False
        with contextlib.ExitStack() as stack:
            passes = stack.enter_context(follow(self.model, steers=False))
            stores = [(point, functools.partial(self._store, key)) for key, point in self.points.items()]
            stack.enter_context(passes.attached(stores, shared=False))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def stopping_criterion(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        """Give this to `generate` among its stopping criteria: it stops nothing, but sees every token when sampled."""
        if not self._allocated:
            raise CorrSteerError(
                "the capture saw no pass of this generation: it is of another model or runs in another thread than the "
                "one that entered the capture; enter it where generate is called"
            )
        token = input_ids[:, -1]
        if self._stop:
            if self._stop_ids is None:
                self._stop_ids = torch.tensor(self._stop, dtype=torch.int64, device=token.device)
            stopped = torch.isin(token, self._stop_ids)
            stopped = stopped.to(self._alive.device)
            if self._rows is None:
                self._alive &= ~stopped
            else:
                self._alive[self._rows] &= ~stopped
        if self._passes:
            self._kept[:, self._filled] = self._alive
        self._filled += self._pending
        self._passes += 1
        if self._filled == self._capacity and self._passes < self.max_new_tokens:
            self._flush()
        return torch.zeros(len(token), dtype=torch.bool, device=token.device)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """The generation goes on in another call of `generate`, from its cache, with some of the capture's rows alone.

        `rows` are those that are left, of the first call's. The others must have come to a stop token.
        """
        if not self._passes:
            raise CorrSteerError("rows can be left out once a call of generate is over, and there was none")
        chosen = torch.tensor(list(rows), dtype=torch.int64, device=self._alive.device)
        left_out = self._alive.clone()
        left_out[chosen] = False
        if bool(left_out.any()):
            raise CorrSteerError(
                f"rows must hold every row without a stop token so far, but leaves out "
                f"{left_out.nonzero()[:, 0].tolist()}; give Capture the stop tokens that end a completion"
            )
        self._rows, self._call, self._reading = chosen, None, None

    def packed(self, key: Hashable) -> tuple[Tensor, Tensor]:
        """What the buffer holds of a hook point: `x [T, d]` in the model's dtype and `cu_seqlens [B + 1]` int32."""
        self._check_captured(key)
        kept = self._kept[:, : self._filled]
        if key not in self._buffer:  # everything went to the sink
            return self._empty[key], _cu_seqlens(kept).to(self._empty[key].device)
        kept = kept.to(self._buffer[key].device)
        return self._buffer[key][:, : self._filled][kept], _cu_seqlens(kept)

    def last_prompt(self, key: Hashable) -> Tensor:
        """The residual of each row's last prompt token at a hook point, `[B, d]` in the model's dtype.

        It is there at any `positions`, whatever went to the sink.
        """
        self._check_captured(key)
        return self._last_prompt[key]

    def _check_captured(self, key: Hashable) -> None:
        if key not in self.points:
            raise CorrSteerError(f"key must be one of {', '.join(map(repr, self.points))}, got {key!r}")
        if not self._passes:
            raise CorrSteerError(
                "nothing was captured; call model.generate inside the context, with the capture's stopping_criterion"
            )

    def _store(self, key: Hashable, h: Tensor, reading: Pass) -> None:
        """Called by a hook point with `h: [B, S, d]` in every pass."""
        if reading.call is not None and reading.call.prompt is not None and reading.end < reading.width:
            return  # the beginning of prompts, none of which is kept
        if reading is not self._reading:
            self._begin(h, reading)
        kept = self._prompt.to(h.device) if self._passes == 0 else None
        steps = 1 if kept is None else kept.shape[1]
        if kept is not None:  # prompts are padded on the left, so they all end in the last column
            self._last_prompt[key] = h[:, -1].clone()
        if kept is not None and steps > self._capacity:
            for at in range(0, steps, self._capacity):
                part = slice(at, at + self._capacity)
                self._to_sink(key, h[:, part][kept[:, part]], _cu_seqlens(kept[:, part]))
            self.flushed, self._pending, self._empty[key] = True, 0, h.new_empty(0, h.shape[2])
            return
        if key not in self._buffer:
            self._buffer[key] = h.new_empty(len(h), self._capacity, h.shape[2])
        kept_steps = h if h.shape[1] == steps else h[:, -steps:]
        if self._rows is None:
            self._buffer[key][:, self._filled : self._filled + steps] = kept_steps
        else:
            self._buffer[key][self._rows.to(h.device), self._filled] = kept_steps[:, 0]
        if kept is not None:
            self._kept[:, :steps] = kept.to(self._kept.device)
        self._pending = steps

    def _begin(self, h: Tensor, reading: Pass) -> None:
        """At the first hook point of a pass, what holds for all of them: that it is the next one, and what is kept."""
        first = self._passes == 0
        if reading.call is not None and reading.call.beams > 1:
            raise CorrSteerError("beam search changes rows between passes and cannot be captured; use num_beams=1")
        if first and (reading.end < reading.width or (reading.start > reading.virtual and self.positions == "all")):
            raise CorrSteerError(
                "prompts must be read in one pass; call generate without prefill_chunk_size and without a filled cache"
            )
        if not self._allocated or (self._call is None and self._rows is not None):
            self._call = reading.call
        if self._call is None or reading.call is not self._call:
            raise CorrSteerError("a capture holds one call of model.generate; enter a new Capture for the next one")
        if not self._allocated:
            self._prompt = self._first_kept(h, reading)  # which waits for a GPU
            self._allocate(h, self._prompt.shape[1] + self.max_new_tokens - 1)
        if reading.end != reading.width + self._passes:
            raise CorrSteerError(
                "a token went by unseen; give generate the capture's stopping_criterion, and no assistant model"
            )
        if self._passes >= self.max_new_tokens:
            raise CorrSteerError(
                f"generation went on past max_new_tokens={self.max_new_tokens}; give Capture the same limit as generate"
            )
        self._reading = reading

    def _first_kept(self, h: Tensor, reading: Pass) -> Tensor:
        """Which tokens of the first pass are kept, of its last one or of all, `[B, steps]` bool."""
        real = reading.real(h.device)
        if not bool(real[:, -1].all()):
            raise CorrSteerError("prompts must be padded on the left, got padding in the last column of a prompt")
        if self.positions == "generated":
            return real[:, -1:]
        kept = reading.select(h, "all")
        assert kept is not None and reading.call is not None, "a pass that reads prompts, of a call"
        if self.exclude_tokens:
            tokens = reading.call.tokens
            if tokens is None:
                raise CorrSteerError(
                    "exclude_tokens are told by their id, but generate was given none; give it input_ids, or Capture "
                    "exclude_tokens=()"
                )
            excluded = torch.isin(tokens, torch.tensor(self.exclude_tokens, dtype=torch.int64, device=tokens.device))
            excluded[:, -1] = False  # the first pass is kept, whatever it reads last
            excluded = excluded.repeat_interleave(len(kept) // len(tokens), 0)  # rows are, for several completions
            kept = kept.clone()  # what was selected is the pass's, and steering selects by it too
            kept[:, -tokens.shape[1] :] &= ~excluded.to(h.device)
        return kept

    def _allocate(self, h: Tensor, steps: int) -> None:
        rows = len(h)
        widths = sum(hook_points.width(self.model, point) for point in self.points.values())
        self._capacity = buffered_steps(
            steps, rows, widths, h.dtype, len(self.points), self.buffer_bytes, flushes=self.sink is not None
        )
        self._allocated = True
        self._kept = torch.zeros(rows, self._capacity, dtype=torch.bool, device=h.device)
        self._alive = torch.ones(rows, dtype=torch.bool, device=h.device)

    def _to_sink(self, key: Hashable, x: Tensor, cu_seqlens: Tensor) -> None:
        assert self.sink is not None, "_allocate has seen to it"
        self.sink(key, x, cu_seqlens)

    def _flush(self) -> None:
        """Hand what the buffers hold to the sink, and go on with empty ones."""
        for key in self.points:
            self._to_sink(key, *self.packed(key))
        self._filled = 0
        self.flushed = True


def buffered_steps(
    steps: int, rows: int, widths: int, dtype: torch.dtype, points: int, buffer_bytes: int, *, flushes: bool = True
) -> int:
    """How many steps the buffers have room for, `[rows, that many, d]` of a dtype at each of so many hook points.

    Parameters
    ----------
    widths : the hook points' widths d, added up.

    Raises
    ------
    CorrSteerError : where that is not one; or not all of them, unless the capture `flushes`.
    """
    step_bytes = rows * widths * dtype.itemsize
    capacity = min(steps, buffer_bytes // step_bytes)
    if capacity < 1 or (capacity < steps and not flushes):
        needed = step_bytes if flushes else steps * step_bytes
        raise CorrSteerError(
            f"buffer_bytes must be at least {needed} for {rows} rows, {points} hook points and {steps} steps, got "
            f"{buffer_bytes}; raise it or lower the batch size" + ("" if flushes else ", or give a sink")
        )
    return capacity


def _cu_seqlens(kept: Tensor) -> Tensor:
    """Where each row's kept steps start once packed: `[B + 1]` int32 of `kept: [B, steps]`."""
    return torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0)).to(torch.int32)
