"""Which of the tokens that a forward pass reads are prompt, generated, or padding.

With a KV cache, `generate` reads the prompt once and then one token a pass; without, it reads everything every time.
A `Pass` tells the tokens apart by what the pass itself was given, so that a hook treats the same token the same way in
both. Padding is told by the attention mask, never by position ids (left padding gives padded tokens position 0).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from corrsteer.errors import CorrSteerError

POSITIONS = ("generated", "all", "prompt")

Shape = tuple[int, int, int]  # rows, tokens and width of a pass's residual stream


@dataclass(eq=False)
class Call:
    """A call of `model.generate` under way.

    Attributes
    ----------
    width : padded width of its prompts, tokens in a filled cache included; None where the call was not given any.
    tokens : `[B, W]` ids of its prompts' tokens; None where it was given embeddings.
    continues : whether it was given a filled cache.
    beams : of its search, 1 where it is none.
    prompt : width of its prompts where it is given their beginning, or what was generated before as well; else None.
    virtual : columns before the prompt that stand for no token, such as PEFT's virtual tokens.
    end : tokens read so far.
    passes : forward passes so far.
    cache : the KV cache of its first pass; None if that had none.
    """

    width: int | None
    tokens: Tensor | None = None
    continues: bool = False
    beams: int = 1
    prompt: int | None = None
    virtual: int = 0
    end: int = 0
    passes: int = 0
    cache: Any = None

    def read(self, shape: Shape, start: int | None, cache: Any, mask: Any, embedded: bool) -> Pass:
        """Its next pass.

        Parameters
        ----------
        start : how many tokens the cache holds; None for a cache that is a state and does not say.
        cache, mask : what the pass is given.
        embedded : whether it is given embeddings and not token ids.

        Raises
        ------
        CorrSteerError : if it does not go on where the last one ended, as a pass for something else does.
        """
        steps = shape[1]
        if start is None:  # what was read is counted
            start = self.end if self.passes and steps <= self.end else 0
        if self.passes:
            self._check_next(start, start + steps, cache)
        else:
            self._begin(start, start + steps, cache, embedded)
        self.passes += 1
        self.end = start + steps
        width = self.width or 0 if self.prompt is None else self.prompt
        return Pass(*shape, start, width, self.virtual, mask, call=self)

    def _begin(self, start: int, end: int, cache: Any, embedded: bool) -> None:
        """What the first pass says of the call."""
        self.cache = cache if hasattr(cache, "get_seq_length") else None
        # Embeddings where ids were given, or a cache where none was, are PEFT's, which puts virtual tokens first.
        if not self.continues and self.width and (start or embedded and self.tokens is not None):
            self.virtual = max(0, end - self.width)
        self.width = self.virtual + (self.width or end)
        if self.continues:
            check_continues(start, self.width)

    def _check_next(self, start: int, end: int, cache: Any) -> None:
        width = self.width or 0
        if self.end < width:  # the prompt is being read, in chunks
            follows = start == self.end
        else:
            follows = end > width if cache is not None else end == self.end + 1
        if not follows or (self.cache is not None and cache is not self.cache):
            raise CorrSteerError(
                "a pass inside generate reads something other than what is generated, as guidance does, and which of "
                "its tokens are prompt cannot be known; generate without it"
            )


@dataclass(eq=False)
class Pass:
    """A forward pass under way.

    Attributes
    ----------
    rows, steps, d : B and S, of the tokens it reads, and the width of the residual stream.
    start : absolute position of the first of them (how many tokens the cache holds).
    width : where prompts end: tokens from there on are generated.
    virtual : columns before the prompt that stand for no token.
    mask : the attention mask it was given, whatever its kind.
    call : the call of `generate` that it belongs to; None outside of one.
    shape : of the residual stream.
    decodes : whether every token that it reads is a generated one.
    """

    rows: int
    steps: int
    d: int
    start: int
    width: int
    virtual: int = 0
    mask: Any = None
    call: Call | None = None
    shape: Shape = field(init=False)
    decodes: bool = field(init=False)
    _selected: dict[tuple[str, torch.device], Tensor | None] = field(default_factory=dict)

    def __post_init__(self) -> None:  # hooks look these up in every layer
        self.shape = (self.rows, self.steps, self.d)
        self.decodes = self.start >= self.width

    @property
    def end(self) -> int:
        """Position after the last token read."""
        return self.start + self.steps

    def select(self, h: Tensor, positions: str) -> Tensor | None:
        """Which of the tokens in `h: [B, S, d]` count as `positions`: `[B, S]` bool on h's device, or None for all.

        `generated` is the last prompt token and every generated token, `prompt` every prompt token, `all` both;
        none of them padding.
        """
        key = (positions, h.device)
        if key not in self._selected:  # the same in every layer
            self._selected[key] = self._select(positions, h.device)
        return self._selected[key]

    def refuse(self, h: Tensor, d: int, what: str) -> None:
        """Raise for what is not `[rows, steps, d]`, as the residual stream of the tokens read is, or another place."""
        raise CorrSteerError(
            f"{what} must be [{self.rows}, {self.steps}, {d}], as {self.rows} rows of {self.steps} tokens are read and "
            f"its width is {d}, got {list(h.shape)}: a stream of several lanes, of other positions than tokens or in "
            f"another order can be neither captured nor steered"
        )

    def _select(self, positions: str, device: torch.device) -> Tensor | None:
        if positions != "prompt" and self.decodes:
            return None
        real = self.real(device)
        column = torch.arange(self.start, self.end, dtype=torch.int64, device=device).expand(self.rows, self.steps)
        if positions == "generated":
            return real & (column >= self._last(real, column))
        real = real & (column >= self.virtual)
        return real & (column < self.width) if positions == "prompt" else real

    def _last(self, real: Tensor, column: Tensor) -> Tensor:
        """Column of each row's last prompt token, `[B, 1]`; where a later pass reads it, one that is not here."""
        if self.end < self.width:
            return torch.full_like(column[:, :1], self.width)
        last = torch.where(real & (column < self.width), column, -1).amax(1, keepdim=True)
        # Where padding is on the right, the last prompt token is not in the last column.
        if self.start and bool((last < 0).any()):
            raise CorrSteerError(
                "which token is a prompt's last cannot be known, as padding follows it and the prompt is not read in "
                "one pass; pad prompts on the left"
            )
        return last

    def real(self, device: torch.device) -> Tensor:
        """Which of the tokens are not padding, `[B, S]` bool."""
        return real_tokens(self.mask, self.rows, self.steps, self.start, device)


def prompts_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int | None, Tensor | None]:
    """How wide the prompts of a call of `generate` are, tokens in a filled cache included, and their ids `[B, W]`.

    None where the arguments hold no prompts; ids are None where they hold embeddings.
    """
    given = [*args[:1], *(kwargs.get(name) for name in ("input_ids", "inputs", "inputs_embeds"))]
    given = [prompts for prompts in given if isinstance(prompts, Tensor) and prompts.dim() > 1]
    widths = [prompts.shape[1] for prompts in given]
    mask = kwargs.get("attention_mask")
    if widths and isinstance(mask, Tensor):  # which covers a filled cache, where the ids may not
        widths.append(mask.shape[-1])
    ids = [prompts for prompts in given if prompts.dim() == 2 and prompts.numel()]
    return max(widths, default=0) or None, ids[0] if ids else None


def check_continues(start: int, width: int) -> None:
    """Raise unless prompts of a width, given to `generate` with a cache of `start` tokens, go on after them."""
    if start >= width:
        raise CorrSteerError(
            f"generate was given a cache of {start} tokens, but neither its prompts nor their attention_mask go on "
            f"after them, so that which tokens are prompt cannot be known; give it an attention_mask [B, all tokens]"
        )


def real_tokens(mask: Any, rows: int, steps: int, start: int | Tensor, device: torch.device) -> Tensor:
    """Which tokens of a pass are not padding: `[rows, steps]` bool.

    Parameters
    ----------
    mask : the attention mask that the pass is given, whatever its kind.
    rows, steps : B and S, of the tokens it reads.
    start : absolute position of the first of them; a tensor `[]` where it is not known to Python, in a compiled graph.
    """
    if isinstance(mask, dict):
        mask = _furthest([kind for kind in mask.values() if kind is not None])
    if mask is None:
        return torch.ones(rows, steps, dtype=torch.bool, device=device)
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4) or mask.shape[-1] < steps:
        raise unknown_mask(mask)
    mask, keys, end = mask.to(device), mask.shape[-1], start + steps
    if not isinstance(end, Tensor) and mask.dim() == 2 and steps < keys < end:
        raise unknown_mask(mask)
    token = torch.arange(steps, dtype=torch.int64, device=device)
    # What keys there are ends in the tokens read, but where room was left for more.
    column = token + (end.clamp(max=keys) if isinstance(end, Tensor) else min(end, keys)) - steps
    if mask.dim() == 2:
        return mask[:, column].bool()
    if mask.shape[2] != steps:
        raise unknown_mask(mask)
    # Prepared for a static cache: [B, 1, S, keys], boolean or added to the attention scores. A token that does not even
    # attend to itself is padding.
    own = mask[:, 0][:, token, column]
    return (own if own.dtype == torch.bool else own >= 0).expand(rows, steps)


def _furthest(masks: list[Any]) -> Any:
    """Of masks for each kind of layer that of full attention, which sees the furthest; or one that is no tensor."""
    found = None
    for mask in masks:  # max() of them is not what torch.compile traces
        if not isinstance(mask, Tensor):
            return mask
        if found is None or mask.shape[-1] > found.shape[-1]:
            found = mask
    return found


def unknown_mask(mask: Any) -> CorrSteerError:
    """What to raise for a mask that does not say which tokens are padding."""
    shape = f"{list(mask.shape)} " if isinstance(mask, Tensor) else ""
    return CorrSteerError(
        f"attention_mask must be [B, S] or one that transformers prepares of it, got {shape}{type(mask).__name__}, "
        f"which does not say which tokens are padding; load the model with attn_implementation='sdpa'"
    )


def check_positions(positions: str, known: tuple[str, ...] = POSITIONS) -> None:
    """Raise unless `positions` is known."""
    if positions not in known:
        raise CorrSteerError(f"positions must be one of {', '.join(known)}, got {positions!r}")
