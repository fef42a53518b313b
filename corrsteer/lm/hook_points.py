"""Where a hook point sits in a Hugging Face causal language model.

An SAE names the place it was trained at in TransformerLens' words (`blocks.20.hook_resid_post`) or as a module path
(`model.layers.20`). Capture and steering both happen exactly there, through `attach`, which hides whether the place
is a module's input or output and whether a layer returns a tensor or a tuple.
"""

from __future__ import annotations

import inspect
import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from corrsteer.arguments import check_type
from corrsteer.errors import CorrSteerError
from corrsteer.lm import module_hooks, sublayer_inputs, sublayers
from corrsteer.lm.sublayer_inputs import rms_normalised

KINDS = ("resid_pre", "resid_post", "mlp_out", "attn_out")
# Places inside a layer, by TransformerLens' names.
INSIDE = {"z": "attn.hook_z", "mlp_in": "mlp.hook_in", "mlp_normalized": "ln2.hook_normalized"}
READ_ONLY = ("mlp_in", "mlp_normalized")  # which other parts of a layer may read too
TOWERS = (re.compile("vision|visual|image|audio|speech"), re.compile("encoder"))


@dataclass(frozen=True)
class HookPoint:
    """A place in the residual stream: `resid_pre`, `resid_post`, `mlp_out` or `attn_out` of a layer (0-based).

    `attn_out` is what the layer's attention, or what it has in its place, adds to the stream, and `mlp_out` what comes
    after. Or a place inside the layer: `z`, what the last linear layer of attention reads, all heads one after the
    other; `mlp_in`, what the MLP reads; and `mlp_normalized`, the same before a norm's weight multiplies it. All but
    the first two are found by a short pass of the model, once.
    """

    layer: int
    kind: str = "resid_post"

    @classmethod
    def parse(cls, name: str, model: nn.Module | None = None) -> HookPoint:
        """From `blocks.L.hook_KIND`, `blocks.L.attn.hook_z` and the like or, given the model, from a module path.

        A decoder layer's path is its output, `resid_post`; paths of its attention and MLP are `attn_out` and `mlp_out`.
        A path may begin at the model or at its base model, and end with `.input` or `.output`: `layers.20.mlp.input`.

        Raises
        ------
        CorrSteerError : if the name is none of these.
        """
        check_type("hook point", name, str, "its name")
        found = re.fullmatch(r"blocks\.(\d+)\.([\w.]+)", name)
        if found:
            kind = next((kind for kind in (*KINDS, *INSIDE) if found[2] == _hook_name(kind)), None)
            if kind is not None:
                return cls(int(found[1]), kind)
        elif model is not None:
            point = _from_module_path(name, model)
            if point is not None:
                return point
        raise CorrSteerError(
            f"hook point {name!r} cannot be used: it must be blocks.L.hook_KIND with KIND one of {', '.join(KINDS)}, "
            f"or blocks.L.NAME with NAME one of {', '.join(INSIDE.values())}, or the path of a decoder layer, its "
            f"attention or its MLP, such as model.layers.20"
        )

    def __str__(self) -> str:
        return f"blocks.{self.layer}.{_hook_name(self.kind)}"

    def offset(self, by: int) -> HookPoint:
        """The same point `by` layers on; before the output of layer 0 comes its input."""
        if (self.layer + by, self.kind) == (-1, "resid_post"):
            return HookPoint(0, "resid_pre")
        return HookPoint(self.layer + by, self.kind)


def _hook_name(kind: str) -> str:
    return INSIDE.get(kind, f"hook_{kind}")


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The module path and the list of a model's decoder layers, found by structure.

    It is the outermost list of as many modules as the model's configuration has layers.
    """
    found = _found.get(model)
    if found is None or not _is_at(model, *found):
        found = _found[model] = _find_layers(model)
    return found


def _is_at(model: nn.Module, path: str, layers: nn.ModuleList) -> bool:
    inside: nn.Module | None = model
    for name in path.split("."):  # get_submodule takes ten times as long, and this is asked for every hook point
        inside = None if inside is None else inside._modules.get(name)
    return inside is layers


_found: weakref.WeakKeyDictionary[nn.Module, tuple[str, nn.ModuleList]] = weakref.WeakKeyDictionary()


def _find_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    config = text_config(model)
    if getattr(model.config, "is_encoder_decoder", False):
        raise CorrSteerError(
            f"model must be a decoder alone, got {type(model).__name__}, in which what an encoder reads and what a "
            f"decoder writes are two streams; it can be neither captured nor steered"
        )
    named = (getattr(config, name, None) for name in ("num_hidden_layers", "num_layers"))
    counts = {count for count in named if isinstance(count, int)}
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():  # a list inside a layer, as of its experts, comes after the layer's own
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists[name] = module
    every, lists = lists, {name: layers for name, layers in lists.items() if len(layers) in counts}
    for tower in TOWERS:  # which may have as many
        if len(lists) > 1:
            lists = {name: layers for name, layers in lists.items() if not tower.search(name)} or lists
    if len(lists) != 1:
        found = ", ".join(f"{name} ({len(layers)})" for name, layers in every.items()) or "none"
        raise CorrSteerError(
            f"model {type(model).__name__} must have exactly one list of {' or '.join(map(str, sorted(counts)))} "
            f"decoder layers, found lists {found}; this architecture is not supported"
        )
    return next(iter(lists.items()))


def owners(model: nn.Module) -> list[nn.Module]:
    """The modules that the list of decoder layers lies in, the model itself first, that run a forward pass."""
    path = decoder_layers(model)[0].split(".")
    inside = [model.get_submodule(".".join(path[:depth])) for depth in range(len(path))]
    return [module for module in inside if type(module).forward is not nn.Module.forward]


def text_config(model: nn.Module) -> Any:
    """The configuration of the language model, also inside a multi-modal one."""
    config: Any = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not hasattr(config, "get_text_config"):
        raise CorrSteerError(f"model must be a Hugging Face causal language model, got {type(model).__name__}")
    return config.get_text_config(decoder=True)


def check_generates(model: nn.Module) -> None:
    """Raise for what is no language model, or is one without its head."""
    if not isinstance(model, nn.Module) or not hasattr(model, "generate"):
        raise CorrSteerError(
            f"model must be a Hugging Face causal language model with generate, got {type(model).__name__}"
        )


def width(model: nn.Module, point: HookPoint | None = None) -> int:
    """Width of the residual stream, or of what is at a hook point."""
    if point is not None and point.kind == "z":
        return _inputs(model, point).width
    return text_config(model).hidden_size


def check_steers(point: HookPoint) -> None:
    """Raise for a hook point that can only be read."""
    if point.kind in READ_ONLY:
        raise CorrSteerError(
            f"hook point {point} can be captured, but not steered; steer where the MLP writes, at "
            f"{HookPoint(point.layer, 'mlp_out')}"
        )


def projection(model: nn.Module, point: HookPoint) -> nn.Module:
    """The linear layer whose input is the `z` of a hook point, the last one of attention."""
    found = _inputs(model, point).projection
    assert found is not None, "_inputs has seen to it"
    return found


def check_point(model: nn.Module, point: HookPoint) -> None:
    """Raise unless the model has that layer."""
    _, layers = decoder_layers(model)
    if not 0 <= point.layer < len(layers):
        raise CorrSteerError(f"hook point {point} is outside the model, whose layers are 0..{len(layers) - 1}")


def attach(model: nn.Module, point: HookPoint, function: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Call `function` with the residual `[B, S, d]` at a hook point in every forward pass.

    What it returns replaces the residual; None leaves it. Returns a handle whose `remove()` ends it.
    """
    check_point(model, point)
    layer = decoder_layers(model)[1][point.layer]
    module, at_input = _locate(model, point)
    refuse_compiled(layer)
    if module is not layer:
        refuse_compiled(module)
    if point.kind in READ_ONLY:
        function = _reading(function, _inputs(model, point).eps if point.kind == "mlp_normalized" else None)
    if at_input:
        name = next(iter(inspect.signature(module.forward).parameters))

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            changed = function(args[0] if args else kwargs[name])
            if changed is None:
                return None
            return ((changed, *args[1:]), kwargs) if args else (args, kwargs | {name: changed})

        return module_hooks.before(module, before)

    def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, Tensor):
            return function(output)
        if type(output) not in (tuple, list) or not isinstance(output[0], Tensor):
            raise CorrSteerError(
                f"{point} is no place in a residual stream, as {type(module).__name__} puts out neither a tensor nor a "
                f"tuple that begins with one, but {type(output).__name__}; it can be neither captured nor steered"
            )
        changed = function(output[0])
        return None if changed is None else type(output)([changed, *output[1:]])

    return module_hooks.after(module, after)


def _reading(function: Callable[[Tensor], Tensor | None], eps: float | None) -> Callable[[Tensor], None]:
    """The function of what is read, normalised where there is an epsilon; what it returns is left out."""

    def read(h: Tensor) -> None:
        function(h if eps is None else rms_normalised(h, eps))

    return read


def is_compiled(module: nn.Module) -> bool:
    """Whether a module was compiled by torch.compile, in whichever way."""
    compiled = hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
    return compiled or hasattr(module.forward, "_torchdynamo_orig_callable")


def refuse_compiled(module: nn.Module) -> None:
    """Raise for a module that is compiled: hooks added afterwards would silently do nothing."""
    if is_compiled(module):
        raise CorrSteerError(
            "model is already compiled by torch.compile, which ignores hooks added afterwards; "
            "pass the model as it was before compiling, or put hooks on it with Steering.install first"
        )


def device_of(model: nn.Module, point: HookPoint) -> torch.device:
    """Device that the layer of a hook point runs on."""
    return _runs_on(decoder_layers(model)[1][point.layer])


def input_device(model: nn.Module) -> torch.device:
    """Device that a model takes its prompts on: that of its embeddings."""
    return _runs_on(embeddings(model))


def embeddings(model: nn.Module) -> nn.Module:
    """The module that makes vectors of token ids."""
    anyone: Any = model
    return anyone.get_input_embeddings()


def _runs_on(module: nn.Module) -> torch.device:
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    # Weights that accelerate keeps on the disk or the CPU are `meta` between passes; its hooks know where they run.
    hooks = (getattr(inside, "_hf_hook", None) for inside in module.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((torch.device(d) for d in devices if d is not None), device)


def _locate(model: nn.Module, point: HookPoint) -> tuple[nn.Module, bool]:
    """The module, and whether the point is its input rather than its output."""
    layer = decoder_layers(model)[1][point.layer]
    if point.kind in ("resid_pre", "resid_post"):
        return layer, point.kind == "resid_pre"
    if point.kind in INSIDE:
        inputs = _inputs(model, point)
        modules = {"z": inputs.projection, "mlp_in": inputs.mlp, "mlp_normalized": inputs.norm}
        module = modules[point.kind]
        assert module is not None, "_inputs has seen to it"
        return module, True
    found = sublayers.of_layer(model, decoder_layers(model)[1], point.layer, input_device(model))
    if found is None:
        raise CorrSteerError(
            f"hook point {point} does not exist: no two parts of {type(layer).__name__} put out what it adds to the "
            f"residual stream, as where it scales or normalises their sum; use resid_post"
        )
    return found[0 if point.kind == "attn_out" else 1], False


def _inputs(model: nn.Module, point: HookPoint) -> sublayer_inputs.Inputs:
    """Where the halves of a hook point's layer read; raises where that place is not there."""
    check_point(model, point)
    layers = decoder_layers(model)[1]
    found = sublayer_inputs.of_layer(model, layers, point.layer, input_device(model))
    if found is not None:
        there = {"z": found.projection, "mlp_in": found.mlp, "mlp_normalized": found.norm if found.eps else None}
        if there[point.kind] is not None:
            return found
    what = {
        "z": "no linear layer puts out what its attention does",
        "mlp_in": "no part of it is an MLP that adds to the residual stream",
        "mlp_normalized": "no norm that only divides by the root mean square comes before an MLP; for what the MLP "
        f"reads use {HookPoint(point.layer, 'mlp_in')}",
    }
    raise CorrSteerError(
        f"hook point {point} does not exist: in {type(layers[point.layer]).__name__} {what[point.kind]}"
    )


def _from_module_path(name: str, model: nn.Module) -> HookPoint | None:
    path, layers = decoder_layers(model)
    inside: Any = getattr(model, "get_base_model", None)  # of PEFT, whose paths begin elsewhere
    paths = {path, path if inside is None else decoder_layers(inside())[0]}
    paths |= {own.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.") for own in paths}
    lists = "|".join(map(re.escape, sorted(paths)))
    found = re.fullmatch(rf"(?:{lists})\.(\d+)(?:\.([\w.]+?))??(?:\.(in|out)put)?", name)
    if not found:
        return None
    layer, part, at_input = int(found[1]), found[2], found[3] == "in"
    check_point(model, HookPoint(layer))
    if part is None:
        return HookPoint(layer, "resid_pre" if at_input else "resid_post")
    module = dict(layers[layer].named_modules()).get(part)
    outputs: Sequence[nn.Module | None] = sublayers.of_layer(model, layers, layer, input_device(model)) or ()
    places = [*zip(("attn_out", "mlp_out"), outputs, (False, False))]
    inputs = sublayer_inputs.of_layer(model, layers, layer, input_device(model))
    if inputs is not None:
        places += [("z", inputs.projection, True), ("mlp_in", inputs.mlp, True), ("mlp_in", inputs.norm, False)]
    kinds = (kind for kind, place, reads in places if place is not None and place is module and reads == at_input)
    return next((HookPoint(layer, kind) for kind in kinds), None)
