"""`Decoding`: how completions are generated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from corrsteer.arguments import LARGEST_SEED, number, whole
from corrsteer.errors import CorrSteerError


@dataclass(frozen=True)
class Decoding:
    """How completions are generated.

    Attributes
    ----------
    max_new_tokens : longest completion, in tokens.
    temperature : 0 decodes greedily; otherwise tokens are sampled.
    top_p : nucleus that is sampled from.
    seed : of the sampling. What a sample draws depends on it, its prompt and the step alone, see `lm/sampling.py`.
    batch_tokens : a batch holds at most this many tokens, padding and completions counted in.
    batch_size : and at most this many prompts.
    cache_bytes : what the keys and values take at most that are repeated for a batch of trials, beside those that were
        read of its prompts.
    first_token_among : labels, such as ``("A", "B")``: the first token is one of them, alone or after a space. None
        leaves it free.
    """

    max_new_tokens: int = 32
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    batch_tokens: int = 16384
    batch_size: int = 256
    cache_bytes: int = 8 << 30
    first_token_among: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            name: whole(name, getattr(self, name), 1)
            for name in ("max_new_tokens", "batch_tokens", "batch_size", "cache_bytes")
        }
        checked["seed"] = whole("seed", self.seed, 0, LARGEST_SEED)
        checked["temperature"] = number("temperature", self.temperature, 0)
        checked["top_p"] = number("top_p", self.top_p, 0, 1)
        if 0 < checked["temperature"] < 1e-6:
            raise CorrSteerError(
                f"temperature must be 0, which decodes greedily, or at least 1e-6, got {self.temperature:g}; take 0"
            )
        if checked["top_p"] == 0:
            raise CorrSteerError("top_p must be above 0 and at most 1, got 0")
        if self.first_token_among is not None:
            checked["first_token_among"] = _labels("first_token_among", self.first_token_among)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def rows(self, tokens: int) -> int:
        """How many prompts of so many tokens a batch holds."""
        return max(1, min(self.batch_size, self.batch_tokens // (tokens + self.max_new_tokens)))

    def told(self) -> dict[str, Any]:
        """What decides which tokens come out, as JSON can hold it; the rest is how they are computed."""
        told: dict[str, Any] = {
            name: getattr(self, name) for name in ("max_new_tokens", "temperature", "top_p", "seed")
        }
        return told if self.first_token_among is None else told | {"first_token_among": list(self.first_token_among)}


def _labels(name: str, value: Any) -> tuple[str, ...]:
    labels = tuple(value) if isinstance(value, (list, tuple)) else ()
    if not labels or not all(isinstance(label, str) and label.strip() == label != "" for label in labels):
        raise CorrSteerError(f"{name} must be labels without spaces around them, such as ('A', 'B'), got {value!r:.80}")
    if len(set(labels)) < len(labels):
        raise CorrSteerError(f"{name} must be labels that differ, got {value!r:.80}")
    return labels
