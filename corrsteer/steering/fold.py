"""A steering at all positions as a part of the model: its vectors, added to biases.

Where a linear layer puts out what is added to the residual stream, its bias is added to every token, as a vector is.
A layer without one is given one where the model's configuration has an option for it, such as Llama's `mlp_bias`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from corrsteer.errors import CorrSteerError
from corrsteer.lm import hook_points, sublayers
from corrsteer.lm.hook_points import HookPoint


def fold_vectors(model: nn.Module, vectors: Mapping[HookPoint, Tensor]) -> None:
    """Add vectors `[d]` float32, hook point by hook point, to the biases of a model.

    Raises
    ------
    CorrSteerError : where there is no bias for one, and none to be had. The model is left as it was.
    """
    _check(model)
    added: dict[Any, Tensor] = {}  # to the bias of each linear layer
    for point, linear in _linears(model, vectors).items():
        vector = vectors[point].to(linear.weight.device)
        if point.kind == "z":
            vector = _through(linear, vector)
        added[linear] = added[linear] + vector if linear in added else vector
    options, without = _options(model, [linear for linear in added if linear.bias is None])
    if any(linear.weight.device.type == "meta" for linear in (*added, *without)):
        raise CorrSteerError("model must be in memory, but weights of it are offloaded; load it without a device_map")
    for linear in without:
        added.setdefault(linear, torch.zeros(linear.out_features, dtype=torch.float32, device=linear.weight.device))
    biases: dict[Any, Tensor] = {}
    for linear, vector in added.items():
        bias = torch.zeros_like(vector, dtype=linear.weight.dtype) if linear.bias is None else linear.bias.detach()
        biases[linear] = (bias.float() + vector).to(bias.dtype)  # rounded once
        if not bool(torch.isfinite(biases[linear]).all()):
            raise CorrSteerError(f"scale must leave biases finite in {bias.dtype}; take a smaller one")
    # Nothing is refused from here on.
    for option in options:
        setattr(hook_points.text_config(model), option, True)
    for linear, bias in biases.items():
        if linear.bias is None:
            linear.bias = nn.Parameter(bias, requires_grad=linear.weight.requires_grad)
        else:
            linear.bias.data.copy_(bias)


def _check(model: nn.Module) -> None:
    hook_points.check_generates(model)
    if hasattr(model, "get_base_model"):
        raise CorrSteerError(
            "model must not be a PEFT model, as its checkpoint holds no biases of the model inside; fold into what "
            "merge_and_unload gives"
        )


def _linears(model: nn.Module, points: Iterable[HookPoint]) -> dict[HookPoint, Any]:
    """The linear layer that puts out what is added to the residual stream at each hook point."""
    layers, device = hook_points.decoder_layers(model)[1], hook_points.input_device(model)
    parts: dict[HookPoint, nn.Module] = {}
    found: dict[HookPoint, Any] = {}
    for point in points:
        if point.kind == "z":
            found[point] = hook_points.projection(model, point)
            if not _is_linear(found[point]):
                raise _refusal(model, point, f"what reads it is {type(found[point]).__name__}, and no linear layer")
            continue
        layer, kind = (point.layer - 1, "resid_post") if point.kind == "resid_pre" else (point.layer, point.kind)
        if layer < 0:
            raise _refusal(model, point, "no layer comes before it")
        pair = sublayers.of_layer(model, layers, layer, device)
        if pair is None:
            name = type(layers[layer]).__name__
            raise _refusal(model, point, f"no two parts of {name} put out what it adds to the residual stream")
        parts[point] = pair[0 if kind == "attn_out" else 1]
    endings = sublayers.endings(model, set(parts.values()), device)
    for point, part in parts.items():
        linears = [module for module in endings[part] if _is_linear(module)]
        if not linears:
            name = type(part).__name__
            raise _refusal(model, point, f"what is added there is put out by {name}, and by no linear layer in it")
        found[point] = linears[-1]
    return found


def _is_linear(module: Any) -> bool:
    """Whether a module adds its bias to what it puts out; GPT-2's linear layers are called Conv1D."""
    linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    return linear and module.weight.dim() == 2 and module.weight.is_floating_point()


def _through(linear: Any, vector: Tensor) -> Tensor:
    """What a linear layer makes of a vector `[in_features]`, but for its bias; float32."""
    weight = linear.weight.detach().to(torch.float32)
    return weight @ vector if isinstance(linear, nn.Linear) else vector @ weight


def _refusal(model: nn.Module, point: object, reason: str) -> CorrSteerError:
    return CorrSteerError(
        f"steering cannot be folded into {type(model).__name__} at {point}, as {reason}; use apply or install"
    )


def _options(model: nn.Module, lacking: Iterable[nn.Module]) -> tuple[list[str], list[Any]]:
    """The options of a model's configuration that give linear layers a bias, and every layer that these give one."""
    modules = dict(model.named_modules())
    names = {module: name for name, module in modules.items()}
    config = hook_points.text_config(model)
    off = [option for option, value in config.to_dict().items() if value is False and "bias" in option]
    given: dict[str, set[str]] = {}  # option -> the layers that it gives a bias
    for name in (names[linear] for linear in lacking):
        if any(name in layers for layers in given.values()):
            continue
        found = ((option, _given_by(model, option)) for option in off if option not in given)
        option, layers = next(((o, layers) for o, layers in found if name in layers), (None, set[str]()))
        if option is None or not all(_is_linear(modules.get(layer)) for layer in layers):
            what = f"and {type(config).__name__} has no option that gives it one"
            raise _refusal(model, name, f"this linear layer has no bias, {what}")
        given[option] = layers
    return list(given), [modules[name] for name in sorted(set().union(*given.values()))]


def _given_by(model: nn.Module, option: str) -> set[str]:
    """The modules to which an option of the configuration gives a bias, if it does nothing else."""
    try:
        without, having = _parameters(model, None), _parameters(model, option)
    except Exception:  # whatever a configuration raises that does not hold together, or a model of another making
        return set()
    more = having - without
    if without - having or not all(name.endswith(".bias") for name in more):
        return set()
    return {name.removesuffix(".bias") for name in more}


def _parameters(model: nn.Module, option: str | None) -> set[str]:
    """The names of the parameters that such a model has, with an option of its configuration set."""
    kind: Any = type(model)
    config: Any = copy.deepcopy(model.config)
    if option is not None:
        setattr(config.get_text_config(decoder=True), option, True)
    config = type(config).from_dict(config.to_dict())  # as a checkpoint's is read, which checks it
    with torch.device("meta"):
        return {name for name, _ in kind(config).named_parameters(remove_duplicate=False)}
