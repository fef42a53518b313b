"""Which path a call of an accelerated SAE takes: the kernels, or SAELens' own code and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.nn.modules import module as torch_modules

from corrsteer.integrations.saelens_encoder import encoder_parameters
from corrsteer.ops import native_backend
from corrsteer.sae.encoder import ARCHITECTURES

if TYPE_CHECKING:
    from sae_lens import SAE

# (call, activation, dtype) -> fewest and most tokens at which the kernels were faster in every measurement. `most` is
# None where the largest number measured is among them; a call that is missing was nowhere faster. Generated:
# python -m bench.accelerate prints it, bench/results/studies/accelerate.json holds the measurements.
FASTER: dict[tuple[str, str, str], tuple[int, int | None]] = {
    ("pooled", "relu", "float32"): (512, None),
    ("encode", "relu", "bfloat16"): (1, 1),
    ("encode", "jumprelu", "float32"): (64, None),
    ("pooled", "jumprelu", "float32"): (64, None),
    ("encode", "jumprelu", "bfloat16"): (1, 8),
    ("encode", "gated", "float32"): (1, None),
    ("pooled", "gated", "float32"): (64, None),
    ("encode", "gated", "bfloat16"): (1, 8),
    ("pooled", "gated", "bfloat16"): (64, 64),
    ("encode", "topk", "float32"): (8, 8),
    ("pooled", "topk", "float32"): (64, None),
    ("encode", "topk", "bfloat16"): (1, 1),
}
SMALLEST = 2097152  # d_in · d_sae of the smallest SAE measured

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
    function: Any = sae.activation_fn
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
    if torch._C._is_tracing() or _transformed():
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
        functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd.forward_ad._current_level >= 0
    )


def slower(sae: SAE[Any], tokens: int, call: str = "encode") -> str:
    """Why the kernels are not taken to be faster for this many tokens; `call` is `encode` or `pooled`."""
    device = sae.W_enc.device.type
    if device != "cpu":
        return f"no {device} has been measured"
    if not native_backend.instruction_set().startswith("avx512"):
        return "only CPUs with AVX-512 have been measured"
    if sae.cfg.d_in * sae.cfg.d_sae < SMALLEST:
        return "no SAE as small as this has been measured"
    activation, dtype = ARCHITECTURES[sae.cfg.architecture()], str(sae.dtype).removeprefix("torch.")
    least, most = FASTER.get((call, activation, dtype), (0, 0))
    if least <= tokens and (most is None or tokens <= most):
        return ""
    if most == 0:
        return f"{activation} in {dtype} was nowhere faster, or was not measured"
    return f"{activation} in {dtype} was faster {f'from {least} tokens on' if most is None else f'up to {most} tokens'}"


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
    rows = [row(f"encode, {t} tokens", now or slower(sae, t)) for t in (1, 16, 256, 4096)]
    rows += [
        row("forward, HookedSAETransformer", now, "by tokens, as encode; decode and error term are SAELens' own"),
        row("backward", "recomputes encode, so that gradients are exactly its own"),
        row("hooks on hook_sae_input, hook_sae_acts_post", now, "by tokens, as encode; the hooks are called"),
        row("hooks on hook_sae_acts_pre", "the kernels do not write pre-activations"),
        row("run_with_cache of all points", "it hooks hook_sae_acts_pre; names_filter can leave that out"),
        row("torch.compile, autocast, torch.func", "the original is traced, cast or transformed"),
        *(row(f"encode_pooled, topk_features, {t} tokens", now or slower(sae, t, "pooled")) for t in (64, 4096)),
    ]
    return Explanation(f"{type(sae).__name__} {sae.cfg.d_in}x{sae.cfg.d_sae} {sae.dtype}", tuple(rows))
