"""Which tokens of a forward pass are meant, told by tensors alone, so that `torch.compile` can trace it.

`passes` follows a model in Python, which a compiled graph does not run. Here Python does one thing: when `generate` is
called, it writes into a tensor where prompts end. All else is computed in the graph, from what a pass is given: its
tokens, its cache and its mask.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from corrsteer.errors import CorrSteerError
from corrsteer.lm import hook_points, module_hooks, own_passes
from corrsteer.lm.hook_points import HookPoint
from corrsteer.lm.interception import Context, intercepted, told
from corrsteer.lm.passes import CACHES
from corrsteer.lm.token_positions import check_continues, check_positions, prompts_of, real_tokens

OUTSIDE = -1  # where prompts end outside of `generate`: what is read without a cache is a prompt

# (h [B, S, d], which of its tokens are meant [B, S] bool or None for all): what replaces h
Function = Callable[[Tensor, Tensor | None], Tensor]

_traced: weakref.WeakKeyDictionary[nn.Module, list[TracedPasses]] = weakref.WeakKeyDictionary()


class TracedPasses:
    """Calls a function at each of some hook points in every pass of a model, compiled or not, until it is removed.

    Parameters
    ----------
    functions : hook point -> what is called there with the residual and with which of its tokens count as `positions`.
        It must be one that `torch.compile` can trace, and keep what changes in tensors.
    positions : as for `Steering.apply`.

    Raises
    ------
    CorrSteerError : if the model has no such hook point, is already compiled, or has virtual tokens of PEFT's.
    """

    def __init__(self, model: nn.Module, functions: Mapping[HookPoint, Function], positions: str):
        check_positions(positions)
        hook_points.check_generates(model)
        inside: Callable[[], nn.Module] | None = getattr(model, "get_base_model", None)
        base = model if inside is None else inside()
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise CorrSteerError(
                "a model with PEFT's virtual tokens must be steered by Steering.apply, as a compiled graph cannot tell "
                "them from prompts"
            )
        for module in (model, *hook_points.owners(base)):
            hook_points.refuse_compiled(module)
        if "_compiled_call" in vars(base):
            raise CorrSteerError(
                "model was compiled by a call of generate with a static cache, which would go on without the hooks; "
                "install before the first such call, or load the model again"
            )
        self._positions = positions
        self._d = {point: hook_points.width(base, point) for point in functions}
        self._calls: list[int] = []  # the threads of calls of `generate` under way, one in another
        with torch.inference_mode(False):  # they are written outside of it, too
            device = hook_points.input_device(base)
            self._width = fixed(torch.full((), OUTSIDE, dtype=torch.int64, device=device))
        # Of the pass under way:
        self._mask: Any = None  # what a module around the reader was given
        self._shape: tuple[int, int] | None = None
        self._where: Tensor | None = None
        self._reached = 0
        self._points = len(functions)
        with contextlib.ExitStack() as stack:
            stack.enter_context(intercepted(type(base), _call_of, compiles=True))
            for handle in self._hook(base, functions):
                stack.callback(handle.remove)
            listed = _traced.setdefault(base, [])
            listed.append(self)
            stack.callback(listed.remove, self)
            self.remove: weakref.finalize[..., nn.Module] = weakref.finalize(base, stack.pop_all().close)
        self.remove.atexit = False

    def _hook(self, model: nn.Module, functions: Mapping[HookPoint, Function]) -> Iterator[RemovableHandle]:
        *around, (reader, names) = _readers(model)
        for module, given in around:
            yield module_hooks.before(module, functools.partial(self._keep_mask, given))
            yield module_hooks.after(module, self._drop_mask, always=True)
        yield module_hooks.before(reader, functools.partial(self._begin, names))
        for point, function in functions.items():
            yield hook_points.attach(model, point, functools.partial(self._at, point, function))
        yield module_hooks.after(reader, self._check)
        yield module_hooks.after(reader, self._end, always=True)

    @contextlib.contextmanager
    def call(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """A call of `generate` of the model with these arguments, while it runs."""
        width = _checked(prompts_of(args, kwargs)[0], model, args, kwargs)
        if set(self._calls) - {threading.get_ident()}:
            raise CorrSteerError("a model with installed hooks generates in one thread at a time; wait for the other")
        before = self._width.clone()  # of a call around this one
        self._calls.append(threading.get_ident())
        self._width.fill_(own_passes.prompt_width() or width)
        try:
            yield
        finally:
            self._width.copy_(before)
            self._calls.pop()

    def _keep_mask(self, names: list[str], _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = {**dict(zip(names, args)), **kwargs}.get("attention_mask")
        self._mask = self._mask if mask is None else mask

    def _begin(self, names: list[str], _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(names, args)), **kwargs}
        ids = given.get("input_ids")
        tokens = given.get("inputs_embeds") if ids is None else ids
        if not isinstance(tokens, Tensor) or tokens.dim() < 2:
            raise CorrSteerError("a pass of the model must be given input_ids [B, S] or inputs_embeds, got neither")
        rows, steps = tokens.shape[0], tokens.shape[1]
        self._shape, self._reached = (rows, steps), 0
        self._where = self._select(given, rows, steps, tokens.device)

    def _select(self, given: dict[str, Any], rows: int, steps: int, device: torch.device) -> Tensor | None:
        """Which of a pass's tokens count as the positions, `[B, S]` bool, or None for all; as `Pass.select` says."""
        if steps == 1 and self._positions == "all":
            return None  # it is no padding, as prompts in chunks of one are refused
        mask = given.get("attention_mask")
        mask = self._mask if mask is None else mask  # not every model hands its mask on
        start = _length(given, mask, steps)
        if start is None and steps == 1 and self._positions == "generated":
            return None  # after a state, which prompts are not read into token by token
        if start is None:
            raise CorrSteerError(
                "how many tokens were read before cannot be known, as the cache is a state that does not say; give the "
                "model an attention_mask [B, all tokens], or steer with Steering.apply"
            )
        start = start.to(device) if isinstance(start, Tensor) else start
        column = torch.arange(steps, dtype=torch.int64, device=device) + start  # [S]
        first, last = column[:1], column[-1:]
        width = self._width.to(device)
        if steps == 1 and self._positions == "generated":
            return (first >= width - 1).expand(rows, 1)  # as above, and so without the mask
        real = real_tokens(mask, rows, steps, start, device)
        width = torch.where(width == OUTSIDE, torch.where(first == 0, steps, first), width)  # [1]
        prompt = real & (column < width)
        if self._positions == "prompt":
            return prompt
        decoded = first >= width  # every row reads generated tokens
        if self._positions == "all":
            return real | decoded
        # Where a later pass reads the last prompt token, it is not here.
        at = torch.where(last < width - 1, width, torch.where(prompt, column, -1).amax(1, keepdim=True))  # [B, 1]
        return real & (column >= at) | decoded

    def _at(self, point: HookPoint, function: Function, h: Tensor) -> Tensor | None:
        if not torch.compiler.is_compiling() and own_passes.probing():
            return None
        if self._shape is None:
            raise CorrSteerError(
                "the model's layers run outside a forward pass of the model, as gradient checkpointing runs them again "
                "in the backward pass; call the model, or its generate, and train without it"
            )
        if h.dim() != 3 or (h.shape[0], h.shape[1]) != self._shape or h.shape[2] != self._d[point]:
            raise CorrSteerError(
                f"the model's residual stream at {point} must be "
                f"[{self._shape[0]}, {self._shape[1]}, {self._d[point]}], got {list(h.shape)}: a stream of several "
                f"lanes, of other positions than tokens or in another order cannot be steered"
            )
        self._reached += 1
        return function(h, None if self._where is None else self._where.to(h.device))

    def _check(self, module: nn.Module, *_: Any) -> None:
        if self._reached == self._points or module.training:  # in which some leave out layers at random
            return
        if len(self._calls) < 2:  # a call in a call may leave layers out to draft tokens
            raise CorrSteerError(
                f"each of the {self._points} hook points that were installed must run once in the model's forward "
                f"pass, but {self._reached} ran; install again where layers were replaced"
            )

    def _drop_mask(self, *_: Any) -> None:
        self._mask = None

    def _end(self, *_: Any) -> None:
        self._shape = self._where = None


def fixed(tensor: Tensor) -> Tensor:
    """A tensor that is changed in place and stays where it is, so that a CUDA graph may read it there."""
    torch._dynamo.mark_static_address(tensor)
    return tensor


def _call_of(model: nn.Module) -> Context | None:
    """What calls of `generate` of a model run in; None where nothing is installed on it."""
    listed = _traced.get(model)
    if not listed:
        return None

    @contextlib.contextmanager
    def context(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for passes in list(listed):
                stack.enter_context(passes.call(model, args, kwargs))
            yield

    return context


def _checked(width: int | None, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The width of the prompts of a call of `generate`, where tensors tell them from what is generated."""
    if width is None:
        raise CorrSteerError("generate must be given input_ids or inputs_embeds, got neither")
    if told("guidance_scale", model, args, kwargs) not in (None, 1):
        raise CorrSteerError("guidance_scale must be 1, as guidance reads something other than what is generated")
    if told("prefill_chunk_size", model, args, kwargs) == 1:
        raise CorrSteerError("prefill_chunk_size must be 2 or more, as a pass of one token is taken for a decode step")
    mask = kwargs.get("attention_mask")
    check_continues(int(_length(kwargs, mask, 1) or 0), width)
    if isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask[:, -1].all()):
        raise CorrSteerError("prompts must be padded on the left, got padding in the last column of attention_mask")
    return width


def _readers(model: nn.Module) -> list[tuple[nn.Module, list[str]]]:
    """The modules that are given a pass's tokens, that nearest to the layers last, and the names of their arguments."""
    named = [(module, list(inspect.signature(module.forward).parameters)) for module in hook_points.owners(model)]
    found = [(module, names) for module, names in named if not {"input_ids", "inputs_embeds"}.isdisjoint(names)]
    if not found:
        raise CorrSteerError(f"{type(model).__name__} must take input_ids or inputs_embeds in its forward pass")
    return found


def _length(given: dict[str, Any], mask: Any, steps: int) -> int | Tensor | None:
    """How many tokens were read before a pass; a tensor where the cache counts in one, None where nothing says."""
    cache = next((given[name] for name in CACHES if given.get(name) is not None), None)
    if cache is None:
        return 0
    # Of sliding windows a static cache counts in Python, which a CUDA graph would keep as it was when captured.
    for layer in getattr(cache, "layers", ()):
        if hasattr(layer, "get_seq_length") and isinstance(length := layer.get_seq_length(), Tensor):
            return length
    try:
        return cache.get_seq_length()
    except (AttributeError, ValueError):  # it is a state
        filled = getattr(cache, "has_previous_state", None)
        if filled is not None and not filled():
            return 0
    return mask.shape[1] - steps if isinstance(mask, Tensor) and mask.dim() == 2 else None
