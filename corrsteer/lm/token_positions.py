"""Which token positions each forward pass of a model reads: prompt, generated, or padding.

With a KV cache, `generate` reads the prompt once and then one token a pass; without, it reads everything every time.
`TokenPositions` tells the two apart, so that a hook treats the same token the same way in both. Padding is told by the
attention mask, never by position ids (left padding gives padded tokens position 0).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from corrsteer.errors import CorrSteerError

POSITIONS = ("generated", "all", "prompt")

_trackers: weakref.WeakKeyDictionary[nn.Module, TokenPositions] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def track(model: nn.Module) -> Iterator[TokenPositions]:
    """The model's `TokenPositions` for as long as the context lasts; nested contexts share one."""
    refuse_compiled(model)
    # a PEFT wrapper's generate runs the model inside and not its own forward
    base: Callable[[], nn.Module] | None = getattr(model, "get_base_model", None)
    if base is not None:
        model = base()
    tracker = _trackers.get(model)
    if tracker is None:
        tracker = _trackers[model] = TokenPositions(model)
    tracker.users += 1
    try:
        yield tracker
    finally:
        tracker.users -= 1
        if tracker.users == 0:
            tracker.remove()
            del _trackers[model]


class TokenPositions:
    """Watches a model's forward passes until it is removed.

    Attributes
    ----------
    start : absolute position of the first token that the running pass reads (the length of the cache).
    mask : `[B, start + S]` bool, which tokens are not padding, or None where all are.
    prompt_width : padded width of the prompt of the `generate` call under way. Outside of one, whatever is read
        without a cache is a prompt, and None stands here.
    generations : calls of `generate` so far.
    """

    def __init__(self, model: nn.Module):
        inner = getattr(model, "generate", None)
        if inner is None:
            raise CorrSteerError(
                f"model must be a Hugging Face causal language model with generate, got {type(model).__name__}"
            )
        self.users = self.generations = 0
        self.start: int = 0
        self.mask: Tensor | None = None
        self.prompt_width: int | None = None
        self._prefill_width = self._passes = 0
        self._selected: dict[tuple[str, torch.device], Tensor] = {}
        self._handle = model.register_forward_pre_hook(self._before_pass, with_kwargs=True)
        self._model = weakref.ref(model)
        self._shadowed = model.__dict__.get("generate")
        # With a static cache on a GPU, generate compiles the model by itself, and would go on without these hooks.
        self._config = getattr(model, "generation_config", None)
        self._disable_compile = getattr(self._config, "disable_compile", None)
        if self._config is not None:
            self._config.disable_compile = True

        @functools.wraps(inner)
        def generate(*args: Any, **kwargs: Any) -> Any:
            prompts = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs"), kwargs.get("inputs_embeds"))
            self.prompt_width = next((p.shape[1] for p in prompts if isinstance(p, Tensor)), None)
            mask = kwargs.get("attention_mask")
            if self.prompt_width and isinstance(mask, Tensor):  # which covers a filled cache, where the ids may not
                self.prompt_width = max(self.prompt_width, mask.shape[-1])
            self.generations += 1
            self._passes = 0
            try:
                return inner(*args, **kwargs)
            finally:
                self.prompt_width = None

        # Shadows the method on this one model, because a pass without a cache does not say where the prompt ended.
        model.__dict__["generate"] = generate

    def remove(self) -> None:
        """Stop watching and leave the model as it was."""
        self._handle.remove()
        model = self._model()
        if model is not None:
            del model.__dict__["generate"]
            if self._shadowed is not None:
                model.__dict__["generate"] = self._shadowed
        if self._config is not None:
            self._config.disable_compile = self._disable_compile

    def _before_pass(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._selected.clear()
        self._passes += 1
        if len(args) > 1:  # what the second argument is depends on the model
            kwargs = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
            args = ()
        # transformers calls it `cache` since 5.24, and takes the name it had before as well
        cache = kwargs.get("cache") if kwargs.get("past_key_values") is None else kwargs["past_key_values"]
        mask = kwargs.get("attention_mask")
        tokens = args[0] if args else kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs["inputs_embeds"]
        self.start = int(cache.get_seq_length()) if cache is not None else 0
        if self.start == 0:
            self._prefill_width = tokens.shape[1]
        if isinstance(mask, Tensor) and mask.dim() == 2:
            self.mask = mask[:, : self.start + tokens.shape[1]].bool()
        elif mask is None or self.start == 0:
            self.mask = _prepared_mask(mask, tokens.shape[1])
        # else: a mask prepared for a static cache; what the first pass said still holds

    def select(self, h: Tensor, positions: str) -> Tensor | None:
        """Which of the tokens in `h: [B, S, d]` count as `positions`: `[B, S]` bool on h's device, or None for all.

        `generated` is the last prompt token and every generated token, `prompt` every prompt token, `all` both;
        none of them padding.
        """
        if not self._passes:
            raise CorrSteerError("the model's layers run without its forward; give the model whose generate is called")
        if positions != "prompt" and self.prompt_width and self.start >= self.prompt_width:
            return None  # a decode step: every row reads a generated token
        key = (positions, h.device)
        if key not in self._selected:  # the same in every layer of a pass
            self._selected[key] = self._select(h, positions)
        return self._selected[key]

    def _select(self, h: Tensor, positions: str) -> Tensor:
        rows, steps = h.shape[:2]
        end = self.start + steps
        width = self.prompt_width or self._prefill_width
        column = torch.arange(self.start, end, device=h.device).expand(rows, steps)
        if self.mask is None:
            real = torch.ones(rows, steps, dtype=torch.bool, device=h.device)
            last = width - 1
        else:
            # A mask kept from the first pass is too short; what came since is no padding. So is that of a prompt
            # read in chunks, which has to end in a token.
            mask = nn.functional.pad(self.mask.to(h.device), (0, max(end, width) - self.mask.shape[1]), value=True)
            real = mask[:, self.start : end]
            # Where padding is on the right, the last prompt token is not in the last column.
            order = torch.arange(width, device=h.device)
            last = (mask[:, :width] * order).amax(1, keepdim=True)
        if positions == "generated":
            return real & (column >= last)
        return real & (column < width) if positions == "prompt" else real


def check_positions(positions: str, known: tuple[str, ...] = POSITIONS) -> None:
    """Raise unless `positions` is known."""
    if positions not in known:
        raise CorrSteerError(f"positions must be one of {', '.join(known)}, got {positions!r}")


def refuse_compiled(model: nn.Module) -> None:
    """Raise for a model that is compiled, wholly or in part: hooks added afterwards would silently do nothing."""
    for module in model.modules():
        compiled = hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        if compiled or hasattr(module.forward, "_torchdynamo_orig_callable"):
            raise CorrSteerError(
                "model is already compiled by torch.compile, which ignores hooks added afterwards; "
                "pass the model as it was before compiling"
            )


def _prepared_mask(mask: Any, steps: int) -> Tensor | None:
    """Which tokens are not padding, `[B, steps]`, by the mask that a static cache's first pass comes with.

    That mask is `[B, 1, steps, capacity]`, boolean or added to the attention scores, or one of them per kind of
    layer. A token that does not even attend to itself is padding.
    """
    if isinstance(mask, dict):
        mask = next((m for m in mask.values() if isinstance(m, Tensor)), None)
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return None
    own = mask[:, 0].diagonal(dim1=1, dim2=2)[:, :steps]
    return own if own.dtype == torch.bool else own >= 0
