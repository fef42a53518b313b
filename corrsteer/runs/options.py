"""The options of a collection, checked before anything is generated."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from corrsteer.arguments import check_type, shown, whole, wholes
from corrsteer.errors import CorrSteerError
from corrsteer.lm.capture import KEPT_POSITIONS
from corrsteer.lm.token_positions import check_positions
from corrsteer.ops import registry
from corrsteer.runs.pooling import LAST_PROMPT, POOLINGS
from corrsteer.sae.encoder import SparseEncoder
from corrsteer.stats.evidence import SCORES, STREAMED, Evidence
from corrsteer.types import Device

KEEP = ("auto", "always", "never")
FEWEST_PERMUTATIONS = 19  # with which a p-value can be 0.05


@dataclass(frozen=True)
class Options:
    """What `collect` was asked for; see there."""

    pool: str
    coefficient_pool: str
    positions: str
    permutations: int
    bootstrap: int
    scores: Sequence[str]
    block_size: int
    shuffle_seed: int
    patience: int | None
    patience_layers: Collection[int] | None
    buffer_bytes: int
    statistics_bytes: int
    backend: str | None
    exclude_tokens: Collection[int] = ()
    keep_activations: str = "auto"
    activation_bytes: int = 4 << 30
    within_prompt: bool = False

    def __post_init__(self) -> None:
        check_positions(self.positions, KEPT_POSITIONS)
        for name in ("pool", "coefficient_pool"):
            pool: Any = getattr(self, name)
            if not isinstance(pool, str) or pool not in POOLINGS:
                raise CorrSteerError(f"{name} must be one of {', '.join(POOLINGS)}, got {shown(pool)}")
        checked: dict[str, Any] = {
            name: whole(name, getattr(self, name), least)
            for name, least in (
                ("permutations", 0), ("bootstrap", 0), ("block_size", 1), ("shuffle_seed", 0), ("buffer_bytes", 1),
                ("statistics_bytes", 1), ("activation_bytes", 1),
            )
        }  # fmt: skip
        if self.patience is not None:
            checked["patience"] = whole("patience", self.patience, 1)
        if self.patience_layers is not None:
            checked["patience_layers"] = wholes("patience_layers", self.patience_layers, 0)
        checked["scores"] = _known_scores(self.scores)
        checked["exclude_tokens"] = wholes("exclude_tokens", self.exclude_tokens, 0, empty=True)
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.keep_activations not in KEEP:
            raise CorrSteerError(
                f"keep_activations must be one of {', '.join(KEEP)}, got {shown(self.keep_activations)}"
            )
        if self.backend is not None:
            registry.check_name(self.backend)
        check_permutations(self.permutations)
        check_type("within_prompt", self.within_prompt, bool, "True or False")
        if self.permutations and self.block_size == 1:
            raise CorrSteerError("block_size must be at least 2 for permutations, which are made within blocks, got 1")

    @property
    def pools(self) -> tuple[str, ...]:
        """The poolings that are kept, each once."""
        return tuple(dict.fromkeys((self.pool, self.coefficient_pool, LAST_PROMPT)))

    @property
    def streamed_scores(self) -> tuple[str, ...]:
        """The scores that evidence can hold permutations of."""
        return tuple(name for name in self.scores if name in STREAMED)

    def keeps(self, encoders: Mapping[int, SparseEncoder]) -> bool:
        """Whether activations are kept, to begin with."""
        if self.keep_activations == "auto":
            return not any(encoder.activation == "identity" for encoder in encoders.values())
        return self.keep_activations == "always"

    def check_encoders(self, encoders: Mapping[int, SparseEncoder]) -> None:
        """Raise unless what is asked of these encoders and layers can be had."""
        layers = self.patience_layers
        if layers is not None and not set(layers) <= set(encoders):
            raise CorrSteerError(f"patience_layers must be some of {sorted(encoders)}, got {sorted(layers)}")
        if not self.keeps(encoders) and (lost := [name for name in self.scores if name not in STREAMED]):
            raise CorrSteerError(
                f"scores must be among {', '.join(STREAMED)} where activations are not kept, got {', '.join(lost)}; "
                f"take keep_activations='always'"
            )

    def evidence(self, encoder: SparseEncoder, pool: str, device: Device, streams: bool = True) -> Evidence:
        """Empty evidence of an encoder's features: if it `streams`, with permutations and bootstrap for `pool`."""
        tested = {"permutations": self.permutations, "bootstrap": self.bootstrap, "scores": self.streamed_scores}
        settings: Any = tested if streams and pool == self.pool else {}
        return Evidence(encoder.d_sae, seed=self.shuffle_seed, within=self.within_prompt, device=device, **settings)


def check_permutations(permutations: Any) -> int:
    """How many permutations; refused where they are too few for any p-value to be 0.05."""
    found = whole("permutations", permutations, 0)
    if 0 < found < FEWEST_PERMUTATIONS:
        raise CorrSteerError(
            f"permutations must be 0 or at least {FEWEST_PERMUTATIONS}, as with fewer no p-value can be as small as "
            f"0.05, got {found}"
        )
    return found


def _known_scores(scores: Any) -> tuple[str, ...]:
    """Scores, or the one named, in the order of `SCORES`."""
    scores = (scores,) if isinstance(scores, str) else scores
    if not isinstance(scores, Collection) or not all(isinstance(name, str) and name in SCORES for name in scores):
        raise CorrSteerError(f"scores must be among {', '.join(SCORES)}, got {shown(scores)}")
    return tuple(name for name in SCORES if name in scores)
