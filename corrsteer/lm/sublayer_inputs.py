"""What the two halves of a decoder layer read and what attention ends with, found by looking, as `sublayers` does.

A transcoder reads what the MLP reads, and an SAE on hook_z what the last linear layer of attention does. Neither is to
be told by names: a norm may come before or after the MLP, and several modules, one in another, put out what attention
does.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from corrsteer.lm import sublayers
from corrsteer.lm.own_passes import probing


class Inputs(NamedTuple):
    """Where a layer's halves read.

    Attributes
    ----------
    mlp : the module whose input is what the MLP reads; None where there is none.
    norm : the module whose output that is; None where there is none.
    eps : of a norm that divides by the root mean square of what it reads, and multiplies by a weight; None for others.
    projection : the linear layer that attention ends with; None where there is none.
    width : of what that reads, all heads together.
    """

    mlp: nn.Module | None
    norm: nn.Module | None
    eps: float | None
    projection: nn.Module | None
    width: int


class _Ran(NamedTuple):
    """What a module read and put out."""

    read: Tensor
    out: Tensor


_known: weakref.WeakKeyDictionary[nn.Module, dict[int, tuple[sublayers.Pair, Inputs]]] = weakref.WeakKeyDictionary()


def of_layer(model: nn.Module, layers: nn.ModuleList, layer: int, device: torch.device) -> Inputs | None:
    """Where the halves of a layer read; None where it has no two such parts, see `sublayers.of_layer`."""
    pair = sublayers.of_layer(model, layers, layer, device)
    if pair is None:
        return None
    known = _known.setdefault(model, {})
    if layer not in known or known[layer][0] != pair or not _holds(layers[layer], known[layer][1]):
        with sublayers.looked_at(model, device, _watched(layers[layer].modules())) as ran:
            known[layer] = pair, _inputs(layers[layer], *pair, ran)
    return known[layer][1]


def _holds(layer: nn.Module, found: Inputs) -> bool:
    """Whether what was found is still in the layer, parts of which may have been replaced."""
    return {found.mlp, found.norm, found.projection} - {None} <= set(layer.modules())


@contextlib.contextmanager
def _watched(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, _Ran]]:
    """What modules read and put out in the probing pass, in the order in which they end; none that run twice."""
    ran: dict[nn.Module, _Ran] = {}
    again: set[nn.Module] = set()

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not probing():
            return
        read = args[0] if args else next(iter(kwargs.values()), None)
        out = output[0] if isinstance(output, (tuple, list)) else output
        if module in ran:
            again.add(module)
        elif isinstance(read, Tensor) and isinstance(out, Tensor) and out.is_floating_point():
            ran[module] = _Ran(read.detach().clone(), out.detach().clone())

    handles = [module.register_forward_hook(keep, with_kwargs=True) for module in modules]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()
        for module in again:
            ran.pop(module, None)


def _inputs(layer: nn.Module, attention: nn.Module, mlp: nn.Module, ran: dict[nn.Module, _Ran]) -> Inputs:
    mlp_core, attention_core = (_before_norm(layer, part, ran) for part in (mlp, attention))
    norm, eps = None, None
    if mlp_core is not None and (_matrices(mlp_core) < 2 or ran[mlp_core].read.shape != ran[mlp_core].out.shape):
        mlp_core = None  # the last linear layer of an MLP that is no module of its own
    if mlp_core is not None:
        norms = [m for m, one in ran.items() if not _matrices(m) and sublayers.equal(one.out, ran[mlp_core].read)]
        norm = norms[0] if norms else None
        eps = None if norm is None else _rms_eps(norm, ran[norm])
    projection = None if attention_core is None else _projection(attention_core, ran)
    width = 0 if projection is None else ran[projection].read.shape[-1]
    return Inputs(mlp_core, norm, eps, projection, width)


def _matrices(module: nn.Module) -> int:
    return sum(parameter.dim() >= 2 for parameter in module.parameters())


def _before_norm(layer: nn.Module, part: nn.Module, ran: dict[nn.Module, _Ran]) -> nn.Module | None:
    """The part itself or, where it is a norm, the outermost module whose output it normalises; None without one."""
    if part not in ran:
        return None
    if _matrices(part):
        return part
    inside = (module for module in layer.modules() if module is not layer and module in ran and _matrices(module))
    return next((module for module in inside if sublayers.equal(ran[module].out, ran[part].read)), None)


def _projection(attention: nn.Module, ran: dict[nn.Module, _Ran]) -> nn.Module | None:
    """The innermost module with weights that puts out what attention does.

    Where a linear layer's output is what the layer adds, as in BLOOM, that is attention's.
    """
    ends = [
        module
        for module in attention.modules()
        if (module is not attention or isinstance(attention, nn.Linear)) and module in ran and _matrices(module)
        if sublayers.equal(ran[module].out, ran[attention].out)
    ]
    return ends[-1] if ends and ran[ends[-1]].read.dim() == 3 else None


def _rms_eps(norm: nn.Module, ran: _Ran) -> float | None:
    """The epsilon of a norm that only divides by the root mean square and multiplies by a weight."""
    found = (getattr(norm, name, None) for name in ("variance_epsilon", "eps", "epsilon"))
    eps = next((value for value in found if isinstance(value, float)), None)
    if eps is None or ran.read.shape != ran.out.shape:
        return None
    normalised, out = rms_normalised(ran.read.double(), eps), ran.out.double()
    squares = normalised.square().sum((0, 1)).clamp(min=torch.finfo(torch.float64).tiny)  # a padding token's may be 0
    fitted = normalised * ((normalised * out).sum((0, 1)) / squares)
    room = 16 * torch.finfo(ran.out.dtype).eps * (out.abs() + fitted.abs())
    return eps if bool(((out - fitted).abs() <= room).all()) else None


def rms_normalised(x: Tensor, eps: float) -> Tensor:
    """`x: [..., d]` over its root mean square, computed in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)).to(x.dtype)
