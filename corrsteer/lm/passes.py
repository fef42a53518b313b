"""Which forward pass of a model is under way, and what it reads.

A pass is known from what it was given, and kept for as long as it lasts, for its thread alone: nothing of it is left
behind. What a pass without a cache does not say is where the prompt ended. Therefore `generate` of the model's class is
intercepted while passes are followed, for that class and for as long; nothing is put on the model but hooks.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from torch import Tensor, nn

from corrsteer.errors import CorrSteerError
from corrsteer.lm import hook_points, module_hooks, own_passes
from corrsteer.lm.hook_points import HookPoint
from corrsteer.lm.interception import Context, intercepted, told
from corrsteer.lm.token_positions import Call, Pass, Shape, prompts_of

CACHES = ("past_key_values", "cache", "cache_params", "state", "past_buckets_states", "mems")  # what models call it

Function = Callable[[Tensor, Pass], "Tensor | None"]  # called at a hook point

_followed: weakref.WeakKeyDictionary[nn.Module, Passes] = weakref.WeakKeyDictionary()
_lock = threading.RLock()


@contextlib.contextmanager
def follow(model: nn.Module, *, steers: bool) -> Iterator[Passes]:
    """The model's `Passes` for as long as the context lasts, which steers or only looks; contexts of one share them."""
    # a PEFT wrapper's generate runs the model inside and not its own forward
    inside: Callable[[], nn.Module] | None = getattr(model, "get_base_model", None)
    base = model if inside is None else inside()
    thread = threading.get_ident()
    with _lock:
        if base not in _followed:
            _followed[base] = Passes(base)
        passes = _followed[base]
        passes.users[thread] += 1
        passes.steering[thread] += steers
        if inside is not None:
            passes.wrapper = weakref.ref(model)
    try:
        yield passes
    finally:
        with _lock:
            passes.users -= Counter([thread])  # the one that entered: another may leave
            passes.steering -= Counter([thread] * steers)
            if not passes.users:
                passes.remove()
                del _followed[base]


class Passes:
    """Follows a model's forward passes until it is removed.

    Attributes
    ----------
    users : contexts that are open, by the thread that opened them.
    steering : those of them that steer.
    wrapper : the PEFT model around this one, where it is known.
    """

    def __init__(self, model: nn.Module):
        hook_points.refuse_compiled(model)
        hook_points.check_generates(model)
        self.users: Counter[int] = Counter()
        self.steering: Counter[int] = Counter()
        self.wrapper: Callable[[], Any] = lambda: None
        self._model = weakref.ref(model)
        self._local = _Local()
        self._d = hook_points.width(model)
        self._attached: dict[object, HookPoint] = {}
        with contextlib.ExitStack() as stack:
            stack.enter_context(intercepted(type(model), _call_of))
            # Whichever is called is followed: the model, or one inside that runs the layers.
            for depth, module in enumerate(hook_points.owners(model)):
                hook_points.refuse_compiled(module)
                for handle in (
                    module_hooks.before(module, functools.partial(self._begin, depth)),
                    module_hooks.after(module, functools.partial(self._end, depth), always=True),
                ):
                    stack.callback(handle.remove)
            self.remove: Callable[[], None] = stack.pop_all().close

    @contextlib.contextmanager
    def attached(self, functions: Iterable[tuple[HookPoint, Function]], *, shared: bool = True) -> Iterator[None]:
        """Call `function(h, pass)` with the residual `h: [B, S, d]` at each hook point, in every pass of the context.

        What it returns replaces the residual; None leaves it. It is called in passes of this thread and, where
        `shared`, in those of threads that have opened no context on this model themselves. What another thread captures
        is not known to be meant, and refused.
        """
        model = self._model()
        assert model is not None, "whoever follows a model keeps it alive"
        with contextlib.ExitStack() as stack:
            for point, function in functions:
                key = object()
                handle = hook_points.attach(model, point, self._hook(key, point, function, shared, model))
                stack.callback(handle.remove)
                self._attached[key] = point  # while the hook hangs there, and no longer: other threads' passes check it
                stack.callback(self._attached.pop, key)
            yield

    def _hook(
        self, key: object, point: HookPoint, function: Function, shared: bool, model: nn.Module
    ) -> Callable[[Tensor], Tensor | None]:
        """What runs at a hook point. It does so in every layer of every step, so that each line of it counts."""
        owner, local = threading.get_ident(), self._local
        d = hook_points.width(model, point)
        of_stream = d == self._d
        what = "the model's residual stream" if point.kind in hook_points.KINDS else str(point)

        def at(h: Tensor) -> Tensor | None:
            passes = local.passes
            if not passes:
                return self._refuse_outside(owner)
            running = passes[-1]
            if key in running.called:
                raise CorrSteerError(
                    f"the model runs the layer of {point} more than once in a pass, so that it is not one place in "
                    f"the residual stream; it can be neither captured nor steered"
                )
            running.called.add(key)
            if running.thread != owner and not (shared and self._steers(running.thread)):
                return None
            reading = running.reading
            if h.shape != (reading.shape if of_stream else (*reading.shape[:2], d)):
                reading.refuse(h, d, what)
            return function(h, reading)

        return at

    @contextlib.contextmanager
    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """A call of `generate` with these arguments, while it runs."""
        width, ids = prompts_of(args, kwargs)
        calls, passes = self._local.calls, self._local.passes
        depth = len(passes)
        continues = any(_cached(kwargs.get(name)) != 0 for name in CACHES)
        call = Call(width, ids, continues, self._beams(args, kwargs), own_passes.prompt_width())
        calls.append(call)
        try:
            yield
        finally:
            calls.pop()
            call.cache = None  # a capture keeps the call for longer
            del passes[depth:]  # of a pass that was interrupted

    def _beams(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """How many beams `generate` searches with: as it was told, or else as the model's own configuration says."""
        return told("num_beams", self._model(), args, kwargs) or 1

    def _refuse_outside(self, owner: int) -> None:
        """Raise where a layer runs outside a pass, unless one of another thread began before the model was followed."""
        if threading.get_ident() == owner or not self._runs():
            raise CorrSteerError(
                "the model's layers run outside a forward pass of the model, as gradient checkpointing runs them again "
                "in the backward pass; call the model, or its generate, and train without it"
            )

    def _steers(self, thread: int | None) -> bool:
        """Whether a context of another thread steers the passes of this one."""
        if thread is None or self.steering[thread]:
            return False
        if self.users[thread]:
            raise CorrSteerError(
                "another thread steers the model, and whether it is to steer what this one captures cannot be "
                "known; enter the steering in the thread of the capture"
            )
        return True

    def _begin(self, depth: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the pass of the model (depth 0), or of the module in it that is `depth` nearer to the layers."""
        passes = self._local.passes
        if passes and passes[-1].reached < depth:
            if not _has_ended(passes[-1].frame):  # this is the inside of a pass that has begun
                passes[-1].reached = depth
                return
            passes.pop()  # it was interrupted from the keyboard, which no hook hears of
        if len(args) > 1:  # what the second argument is depends on the model
            kwargs = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
            args = ()
        ids = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs.get("inputs_embeds") if ids is None else ids
        if not isinstance(tokens, Tensor) or tokens.dim() < 2:
            raise CorrSteerError("a pass of the model must be given input_ids [B, S] or inputs_embeds, got neither")
        rows, steps = tokens.shape[0], tokens.shape[1]
        caches = [kwargs[name] for name in CACHES if kwargs.get(name) is not None]
        if any(cache is not caches[0] for cache in caches):
            raise CorrSteerError(
                "a pass of the model is given two caches, so that how many tokens were read before cannot be known; "
                "PEFT's prefix tuning does so with a transformers that is newer than it"
            )
        cache, mask = caches[0] if caches else None, kwargs.get("attention_mask")
        start = _cached(cache)
        if start and isinstance(mask, Tensor) and mask.dim() == 2 and steps < mask.shape[1] < start + steps:
            raise CorrSteerError(
                f"a pass of the model reads {steps} tokens after {start} in the cache, but its attention_mask covers "
                f"{mask.shape[1]}, so that which tokens are prompt cannot be known; give it an attention_mask [B, all "
                f"tokens]. PEFT's virtual tokens come again at each step with a transformers that is newer than it"
            )
        thread: int | None = threading.get_ident()
        if own_passes.probing():  # in whatever call it is, it is none of its passes, and no context's
            thread = None
            reading = Pass(rows, steps, self._d, 0, steps)
        elif self._local.calls:
            call = self._local.calls[-1]
            reading = call.read((rows, steps, self._d), start, cache, mask, embedded=ids is None)
        else:
            reading = self._outside(module, (rows, steps, self._d), start, cache, mask)
        passes.append(_Running(depth, depth, thread, sys._getframe(1), self._attached.copy(), reading))

    def _outside(self, module: nn.Module, shape: Shape, start: int | None, cache: Any, mask: Any) -> Pass:
        """A pass outside of `generate`: what is read without a cache is a prompt, and what comes after it generated."""
        steps = shape[1]
        if start is None:
            if not isinstance(mask, Tensor) or mask.dim() != 2:
                raise CorrSteerError(
                    f"how many tokens were read before cannot be known from a {type(cache).__name__}; give the model "
                    f"an attention_mask [B, all tokens], or call its generate"
                )
            start = mask.shape[1] - steps
        if cache is None or (start and steps > 1):
            self._refuse_generate(module)
        virtual = _virtual_tokens(self.wrapper())
        return Pass(*shape, start, start + steps if start <= virtual else start, virtual, mask)

    def _refuse_generate(self, module: nn.Module) -> None:
        """Raise where `generate` runs that was taken from the model before it was followed, or is a shallow copy's."""
        running = [frame.f_locals.get("self") for frame in _frames() if frame.f_code.co_name == "generate"]
        if any(one is self._model() or one is module for one in running):
            raise CorrSteerError(
                "generate was taken from the model before the context was entered, and without a cache, in chunks or "
                "after a filled cache does not say where its prompts end; call model.generate inside the context"
            )

    def _runs(self) -> bool:
        """Whether a pass is under way in this thread, followed or not."""
        model = self._model()
        owners = [] if model is None else hook_points.owners(model)
        return any(frame.f_locals.get("self") is owner for frame in _frames() for owner in owners)

    def _end(self, depth: int, module: nn.Module, _args: Any, output: Any) -> None:
        """After a pass: every hook point must have run, unless it raised and so has no output."""
        passes = self._local.passes
        if not passes or passes[-1].begun != depth:
            return
        running = passes.pop()
        missed = running.attached.keys() - running.called
        # A call in a call may leave layers out to draft tokens.
        if not missed or output is None or len(self._local.calls) > 1 or _drops_layers(module):
            return
        # other threads attach and remove theirs meanwhile
        points = [str(p) for key, p in running.attached.items() if key in missed and key in self._attached]
        if points:
            raise CorrSteerError(
                f"{', '.join(points)} did not run in the model's forward pass, so nothing was captured or steered "
                f"there: its layers are a frozen graph, or the model leaves them out; load the model as transformers "
                f"has it"
            )


def _call_of(model: nn.Module) -> Context | None:
    """What calls of `generate` of a model run in; None where the model is not followed."""
    passes = _followed.get(model)
    return None if passes is None else passes.call


class _Local(threading.local):
    """What a thread is at: calls of `generate`, and passes, innermost last."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.passes: list[_Running] = []


@dataclass(eq=False)
class _Running:
    """A pass under way.

    Attributes
    ----------
    begun, reached : depth of the module it was begun with, and how near to the layers it has come.
    thread : in which it runs; None where it only looks at the model, and is no context's.
    frame : of torch's call of that module, which ends with the pass, however it ends.
    attached : what hung at hook points when it began.
    reading : which tokens it reads.
    called : what hangs at hook points and has been called.
    """

    begun: int
    reached: int
    thread: int | None
    frame: FrameType
    attached: dict[object, HookPoint]
    reading: Pass
    called: set[object] = field(default_factory=set)


def _cached(cache: Any) -> int | None:
    """How many tokens a cache holds; None where it does not say, as it is a state."""
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError):  # transformers' own caches raise the latter
        return None


def _has_ended(frame: FrameType) -> bool:
    """Whether the call of a function is over, told without a walk over the stack in every pass."""
    try:
        frame.clear()
    except RuntimeError:  # Python clears none that runs
        return False
    return True


def _frames() -> Iterator[FrameType]:
    """What this thread is in the midst of, innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _drops_layers(module: nn.Module) -> bool:
    """Whether a model leaves layers out at random, as some do in training."""
    config = getattr(module, "config", None)
    shares = (getattr(config, name, 0) for name in ("layerdrop", "decoder_layerdrop"))
    return module.training and any(shares)


def _virtual_tokens(wrapper: Any) -> int:
    """How many tokens a PEFT model puts before each prompt."""
    config: Any = getattr(wrapper, "active_peft_config", None)
    return config.num_virtual_tokens if getattr(config, "is_prompt_learning", False) else 0
