"""What the two halves of a decoder layer add to the residual stream, found by looking.

A layer adds what its attention puts out and what its MLP does. Which of its parts put that out is not to be told by
their names: some normalise it once more before they add it, some scale it, some normalise the sum. So a short pass is
run, and two parts are looked for whose outputs are what the layer added.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from corrsteer.errors import CorrSteerError
from corrsteer.lm.own_passes import probe, probing

T = TypeVar("T")

PROBE = 3  # tokens of the pass

Pair = tuple[nn.Module, nn.Module]  # the part that runs first, and the other

_known: weakref.WeakKeyDictionary[nn.Module, list[Pair | None]] = weakref.WeakKeyDictionary()
_one_at_a_time = threading.RLock()  # or each would watch the other's pass


def of_layer(model: nn.Module, layers: nn.ModuleList, layer: int, device: torch.device) -> Pair | None:
    """The parts of a layer whose outputs, added to its input, make its output; None where there are no such two.

    `device` is where the model takes its prompts.
    """
    with _one_at_a_time:
        found = _known[model][layer] if model in _known else ()
        if found is not None and not (found and set(found) <= set(layers[layer].modules())):  # never, or parts replaced
            _known[model] = _probe(model, layers, device)
        return _known[model][layer]


@contextlib.contextmanager
def looked_at(model: nn.Module, device: torch.device, watched: contextlib.AbstractContextManager[T]) -> Iterator[T]:
    """What hooks have seen of a short pass, which is run while they watch."""
    with _one_at_a_time, watched as seen:
        _look(model, device)
        yield seen


def endings(model: nn.Module, parts: Iterable[nn.Module], device: torch.device) -> dict[nn.Module, list[nn.Module]]:
    """Of each part of a model, itself and the modules in it that put out what it does; none that run more than once."""
    with _one_at_a_time, contextlib.ExitStack() as stack:
        outputs = {part: stack.enter_context(_outputs(part.modules(), once=True)) for part in parts}
        _look(model, device)
    return {
        part: [module for module, out in found.items() if part in found and equal(out, found[part])]
        for part, found in outputs.items()
    }


def _probe(model: nn.Module, layers: nn.ModuleList, device: torch.device) -> list[Pair | None]:
    with contextlib.ExitStack() as stack:
        watched = [stack.enter_context(_watched(layer)) for layer in layers]
        _look(model, device)
    return [_pair(*one) for one in watched]


def _look(model: nn.Module, device: torch.device) -> None:
    """Run the pass in which the model is looked at."""
    ids = torch.arange(PROBE, dtype=torch.int64, device=device)[None]
    with contextlib.ExitStack() as stack:
        stack.enter_context(_evaluated(model))
        stack.enter_context(probe())
        try:
            with torch.no_grad():
                model(input_ids=ids)
        except Exception as error:  # whatever a model raises
            raise CorrSteerError(
                f"attn_out and mlp_out are found by a pass of the model, which failed with {type(error).__name__}: "
                f"{error}; use resid_pre or resid_post"
            ) from error


@contextlib.contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """The model without dropout, which draws random numbers and is part of what a layer adds; then as it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _watched(layer: nn.Module) -> Iterator[tuple[list[Tensor], dict[nn.Module, Tensor]]]:
    """A layer's input and output, before any hook changes the latter, and the outputs of its parts, after theirs.

    Of the probing pass alone: other threads may run the model meanwhile.
    """
    ends: list[Tensor] = []

    def begin(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if probing():
            ends.append((args[0] if args else next(iter(kwargs.values()))).detach().clone())

    def end(_module: nn.Module, _args: Any, output: Any) -> None:
        if probing():
            ends.append((output[0] if isinstance(output, (tuple, list)) else output).detach().clone())

    handles = [layer.register_forward_pre_hook(begin, with_kwargs=True), layer.register_forward_hook(end, prepend=True)]
    try:
        with _outputs(part for part in layer.modules() if part is not layer) as parts:
            yield ends, parts
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _outputs(modules: Iterable[nn.Module], *, once: bool = False) -> Iterator[dict[nn.Module, Tensor]]:
    """What modules put out when they first run in the probing pass; `once`, of those alone that run no second time."""
    outputs: dict[nn.Module, Tensor] = {}
    again: set[nn.Module] = set()

    def keep(module: nn.Module, _args: Any, output: Any) -> None:
        if not probing():
            return
        output = output[0] if isinstance(output, (tuple, list)) else output
        if module in outputs:
            again.add(module)
        elif isinstance(output, Tensor) and output.is_floating_point():
            outputs[module] = output.detach().clone()

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
        for module in again if once else ():
            del outputs[module]


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether two outputs hold the same numbers, of tokens in rows or one after another."""
    return one.numel() == other.numel() and torch.equal(one.reshape(other.shape), other)


def _pair(ends: list[Tensor], parts: dict[nn.Module, Tensor]) -> Pair | None:
    if len(ends) != 2:  # it did not run, or not once
        return None
    before, after = (end.double() for end in ends)
    rounding = 4 * torch.finfo(ends[1].dtype).eps
    outputs = [(part, out.double()) for part, out in parts.items() if out.shape == ends[1].shape]
    for at, (first, one) in enumerate(outputs):  # in the order in which they ran
        for second, other in outputs[at + 1 :]:
            room = rounding * (before.abs() + one.abs() + other.abs() + after.abs())
            if bool(((before + one + other - after).abs() <= room).all()):
                pair = _outermost(first, parts), _outermost(second, parts)
                if pair[0] is not pair[1]:  # as where nothing is added yet
                    return pair
    return None


def _outermost(part: nn.Module, parts: dict[nn.Module, Tensor]) -> nn.Module:
    """Of the parts that put out the same, as an attention does that ends in a projection, the one around the others."""
    around = [other for other, out in parts.items() if torch.equal(out, parts[part]) and part in set(other.modules())]
    return around[-1]  # which ended last
