"""Which path a call of an accelerated SAE takes: the kernels, or SAELens' own code and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.modules import module as torch_modules

from corrsteer.integrations.saelens_encoder import encoder_parameters
from corrsteer.sae.encoder import ARCHITECTURES

if TYPE_CHECKING:
    from sae_lens import SAE

# Tokens · d_in · d_sae from which on the kernels were faster in every measurement, by activation and dtype; generated:
# python -m bench.accelerate prints it, bench/results/studies/accelerate.json holds the measurements. None: in none.
LEAST_WORK: dict[tuple[str, str], int | None] = {}

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported(sae: SAE[Any]) -> str:
    """Why the kernels cannot stand in for this SAE's own `encode`; empty if they can."""
    from sae_lens.registry import get_sae_class

    architecture = sae.cfg.architecture()
    if architecture not in ARCHITECTURES:
        return f"the features of architecture {architecture!r} are not a function of one token"
    if type(sae) is not get_sae_class(architecture)[0]:
        return f"{type(sae).__name__} is no inference SAE of SAELens itself"
    if any(name in vars(sae) for name in ("process_sae_in", "forward")):
        return "a method of it has been replaced"
    if reason := _activation(sae, ARCHITECTURES[architecture]):
        return reason
    parameters = encoder_parameters(sae).values()
    if sae.dtype not in DTYPES or any(p.dtype != sae.dtype for p in parameters):
        return "its weights are not all float32, bfloat16 or float16, as its dtype says"
    if len({p.device for p in parameters}) > 1:
        return "its weights lie on several devices"
    if any(p.is_inference() or type(p) is not torch.nn.Parameter for p in parameters):
        return "its weights are not plain parameters, or were made in inference mode"
    return ""


def _activation(sae: SAE[Any], activation: str) -> str:
    from sae_lens.saes.abstopk_sae import AbsTopK
    from sae_lens.saes.topk_sae import TopK

    own = {"topk": TopK, "abstopk": AbsTopK}.get(activation, torch.nn.ReLU)
    function = sae.activation_fn
    if type(function) is not own or function._forward_hooks or function._forward_pre_hooks:
        return "its activation function has been replaced or hooked"
    if getattr(function, "use_sparse_activations", False):
        return "its activations are sparse tensors"
    if own is not torch.nn.ReLU and getattr(function, "k", None) != sae.cfg.k:
        return "its activation function's k is not that of its configuration"
    return ""


def unwanted(sae: SAE[Any], x: Tensor) -> str:
    """Why this call asks for what the kernels do not give; empty if they can."""
    if type(x) not in (Tensor, torch.nn.Parameter) or x.dtype not in DTYPES or x.device != sae.W_enc.device:
        return "x is no plain float32, bfloat16 or float16 tensor on the SAE's device"
    if torch.is_autocast_enabled(x.device.type):
        return "autocast decides on the dtype"
    if torch.jit.is_tracing() or _transformed():
        return "a transform or a tracer watches each operation"
    if any(getattr(torch_modules, hooks) for hooks in GLOBAL_HOOKS):
        return "hooks are on all modules"
    # Of hook_dict and not of the SAE: without hooks an error term takes the same path as the call it belongs to.
    if hooked(sae, "hook_sae_acts_pre"):
        return "hook_sae_acts_pre is hooked, and the kernels do not write pre-activations"
    return ""


def hooked(sae: SAE[Any], point: str) -> bool:
    """Whether there are hooks on a hook point."""
    return any(getattr(sae.hook_dict[point], hooks) for hooks in HOOKS)


def _transformed() -> bool:
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd.forward_ad._current_level >= 0
    )


def slower(sae: SAE[Any], x: Tensor) -> str:
    """Why SAELens' own `encode` is taken to be as fast; empty if the kernels have been measured to be faster."""
    if x.device.type != "cpu":
        return f"no {x.device.type} has been measured"
    dtype = str(sae.dtype).removeprefix("torch.")
    activation = ARCHITECTURES[sae.cfg.architecture()]
    least = LEAST_WORK.get((activation, dtype))
    if least is None:
        return f"the kernels were not faster for {activation} in {dtype}, or were not measured"
    if x.numel() * sae.cfg.d_sae < least:
        return f"the kernels were not always faster below {-(-least // (sae.cfg.d_in * sae.cfg.d_sae))} tokens of its size"
    return ""


@dataclass(frozen=True)
class Explanation:
    """The path of each kind of call: `rows` of (call, `kernels` or `SAELens`, why). Printed, it is a table."""

    sae: str
    rows: tuple[tuple[str, str, str], ...]

    def __str__(self) -> str:
        widths = [max(len(row[at]) for row in self.rows) for at in range(2)]
        lines = [f"{call:<{widths[0]}}  {path:<{widths[1]}}  {why}".rstrip() for call, path, why in self.rows]
        return "\n".join([self.sae, *(f"  {line}" for line in lines)])

    __repr__ = __str__


def explain(sae: SAE[Any]) -> Explanation:
    """The paths of calls as the SAE is now: its weights, its hooks and the modes that are on."""

    def row(call: str, why: str, otherwise: str = "") -> tuple[str, str, str]:
        return call, "SAELens" if why else "kernels", why or otherwise

    token = torch.empty(1, sae.cfg.d_in, dtype=sae.dtype, device=sae.W_enc.device)
    always = unsupported(sae)
    now = always or unwanted(sae, token)
    rows = [row(f"encode, {t} tokens", now or slower(sae, token.expand(t, -1))) for t in (1, 16, 256, 4096)]
    large = slower(sae, token.expand(4096, -1))
    usual = now or large
    rows += [
        row("forward, HookedSAETransformer", usual, "encode as above; decode and error term are SAELens' own"),
        row("backward", "recomputes encode, so that gradients are exactly its own"),
        row("hooks on hook_sae_input, hook_sae_acts_post", usual, "they are called with what they expect"),
        row("hooks on hook_sae_acts_pre", "the kernels do not write pre-activations"),
        row("run_with_cache of all points", "it hooks hook_sae_acts_pre; names_filter can leave that out"),
        row("torch.compile, autocast, torch.func", "the original is traced, cast or transformed"),
        row("encode_pooled, topk_features", now, "no dense [tokens, d_sae] matrix"),
    ]
    return Explanation(f"{type(sae).__name__} {sae.cfg.d_in}x{sae.cfg.d_sae} {sae.dtype}", tuple(rows))
