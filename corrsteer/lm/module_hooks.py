"""Hooks on a model's modules that belong to the model they were put on, and to no copy of it.

`copy.deepcopy`, `pickle` and `torch.save` copy a module's hooks with it. A copy of one of these takes itself off the
module when it is first called.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


def before(module: nn.Module, function: Callable[..., Any]) -> RemovableHandle:
    """Call `function(module, args, kwargs)` before each forward pass of a module."""
    return module.register_forward_pre_hook(_Hook(function), with_kwargs=True)


def after(module: nn.Module, function: Callable[..., Any], *, always: bool = False) -> RemovableHandle:
    """Call `function(module, args, output)` after each forward pass; `always`, also where it raised."""
    return module.register_forward_hook(_Hook(function), always_call=always)


class _Hook(functools.partial[Any]):  # whose calls cost least
    def __reduce__(self) -> tuple[type[_Copied], tuple[()]]:
        return _Copied, ()


class _Copied:
    """What a copy of a module has in a hook's place."""

    def __call__(self, module: nn.Module, *_: Any) -> None:
        for hooks, flags in (
            (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
            (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
        ):
            for key in [key for key, hook in hooks.items() if hook is self]:
                del hooks[key]
                for flag in flags:
                    flag.pop(key, None)
