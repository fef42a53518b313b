"""`generate` of a model's class, intercepted for as long as a context lasts.

The class is what is changed, and put back: an attribute of the model would be copied and saved with it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from corrsteer.errors import CorrSteerError

CONTINUOUS = "init_continuous_batching"  # of transformers' generate_batch

# What the arguments of a call, by position and by name, run in.
Context = Callable[[tuple[Any, ...], dict[str, Any]], contextlib.AbstractContextManager[None]]
ContextOf = Callable[[nn.Module], Context | None]

_lock = threading.RLock()  # a context that the garbage collector ends may end in the midst of another's entry


class _Intercepted:
    """By whom and how often a class is intercepted, whether models may be compiled for each, and what undoes it."""

    def __init__(self, model_class: type):
        self.users: Counter[tuple[ContextOf, bool]] = Counter()
        self.undo = _intercept(model_class, self.users)


_classes: dict[type, _Intercepted] = {}


@contextlib.contextmanager
def intercepted(model_class: type, context_of: ContextOf, *, compiles: bool = False) -> Iterator[None]:
    """Have `generate` of a class run in a context for models that `context_of` has one for; others do not notice.

    Parameters
    ----------
    context_of : gives what calls of a model run in, or None.
    compiles : whether `generate` may compile such a model, as hooks were on it before.
    """
    user = context_of, compiles
    with _lock:
        if model_class not in _classes:
            _classes[model_class] = _Intercepted(model_class)
        _classes[model_class].users[user] += 1
    try:
        yield
    finally:
        with _lock:
            users = _classes[model_class].users
            users[user] -= 1
            if not users[user]:
                del users[user]
            if not users:
                _classes.pop(model_class).undo()


def _intercept(model_class: Any, users: Counter[tuple[ContextOf, bool]]) -> Callable[[], None]:
    inner = model_class.generate
    takes = inspect.signature(inner).parameters.values()
    open_ended = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in takes)

    def contexts_of(model: nn.Module) -> list[tuple[Context, bool]]:
        found = [(context_of(model), compiles) for context_of, compiles in list(users)]
        return [(context, compiles) for context, compiles in found if context is not None]

    @functools.wraps(inner)
    def generate(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        contexts = contexts_of(self)
        # one of the model's own may be asked for nothing else
        if open_ended and not all(compiles for _, compiles in contexts):
            args, kwargs = _uncompiled(args, kwargs)
        with contextlib.ExitStack() as stack:
            for context, _ in contexts:
                stack.enter_context(context(args, kwargs))
            return inner(self, *args, **kwargs)

    def refuse(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if contexts_of(self):
            raise CorrSteerError(
                "generate_batch packs the tokens of many prompts into one row, and which of them are whose cannot be "
                "known; use model.generate"
            )
        return batching(self, *args, **kwargs)

    batching: Any = getattr(model_class, CONTINUOUS, None)
    with contextlib.ExitStack() as stack:
        stack.callback(_replace(model_class, "generate", generate))
        if batching is not None:
            stack.callback(_replace(model_class, CONTINUOUS, functools.wraps(batching)(refuse)))
        return stack.pop_all().close


def told(name: str, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a call of `generate` with these arguments is told, or else the model's own configuration says; or None."""
    given = args[1] if len(args) > 1 else kwargs.get("generation_config")
    own = getattr(model, "generation_config", None)
    values = (kwargs.get(name), getattr(given, name, None), getattr(own, name, None))
    return next((value for value in values if value is not None), None)


def _replace(model_class: type, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute of a class, and return what puts back the one that was there."""
    if name not in vars(model_class):  # it is inherited
        setattr(model_class, name, value)
        return lambda: delattr(model_class, name)
    before = vars(model_class)[name]
    setattr(model_class, name, value)
    return lambda: setattr(model_class, name, before)


def _uncompiled(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `generate`, with which it does not compile the model.

    With a static cache on a GPU it does so by itself, and what it compiled would go on without the hooks, or with them.
    """
    if kwargs.get("disable_compile") is False:
        raise CorrSteerError("disable_compile must not be False, as a compiled model ignores hooks added afterwards")
    at_second = len(args) > 1
    config = args[1] if at_second else kwargs.get("generation_config")
    if config is None:
        return args, kwargs | {"disable_compile": True}
    config = copy.copy(config)
    config.disable_compile = True
    if at_second:
        return (args[0], config, *args[2:]), kwargs
    return args, kwargs | {"generation_config": config}
