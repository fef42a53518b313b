"""`Run`: what a collection leaves, in memory and in a directory."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from corrsteer.errors import CorrSteerError
from corrsteer.lm.hook_points import HookPoint
from corrsteer.ops import Moments
from corrsteer.sae.sources import Decoder, open_decoder
from corrsteer.stats import inference, scores
from corrsteer.stats.evidence import Evidence
from corrsteer.stats.stability import Leader, Snapshot
from corrsteer.types import PathLike


@dataclass
class Run:
    """What a collection leaves: moments, evidence, rewards, and how they came about.

    Attributes
    ----------
    moments : layer -> pooling -> `Moments`.
    evidence : layer -> pooling -> `Evidence`, with permutations and bootstrap for `pool` alone.
    snapshots : which features were in front after how many samples, oldest first.
    points : layer -> hook point.
    decoders : layer -> where decoder rows are read from.
    rewards : `[n]` float64, in the task's order; NaN for samples that a stopped collection did not reach.
    pool, coefficient_pool : pooling for the correlation and for the coefficient.
    notes : what a user should know, such as a reward that never varied.
    provenance : model, task, SAEs, decoding and versions; anything JSON can hold.
    """

    moments: dict[int, dict[str, Moments]]
    points: dict[int, HookPoint]
    decoders: dict[int, Decoder]
    rewards: Tensor
    pool: str
    coefficient_pool: str
    evidence: dict[int, dict[str, Evidence]] = field(default_factory=dict)
    snapshots: list[Snapshot] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    _tested: dict[tuple[str, int], dict[int, inference.Significance]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def n_features(self) -> int:
        """Features of all layers."""
        return sum(moments[self.pool].d_sae for moments in self.moments.values())

    @property
    def n(self) -> int:
        """Samples collected."""
        return self.moments_of_rewards.n

    @property
    def moments_of_rewards(self) -> Moments:
        """Moments to ask about the rewards, which are the same in those of every layer."""
        return next(iter(self.moments.values()))[self.pool]

    def correlation(self, layer: int) -> Tensor:
        """Pearson's r of every feature of a layer with the reward, `[d_sae]`."""
        return self.moments[layer][self.pool].correlation()[0]

    @property
    def permutations(self) -> int:
        """How many permutations its p-values come from; 0 if there are none."""
        return next((by_pool[self.pool].permutations for by_pool in self.evidence.values()), 0)

    def testable(self, score: str = "pearson") -> bool:
        """Whether a score's permutations were kept."""
        kept = [by_pool[self.pool] for by_pool in self.evidence.values()]
        return bool(kept) and self.n > 0 and all(scores.testable(evidence, score) for evidence in kept)

    def significance(self, score: str = "pearson") -> dict[int, inference.Significance]:
        """P-values of every layer's features by layer, see `inference.significance`; computed once for a score."""
        if (score, self.n) not in self._tested:
            kept = {layer: by_pool[self.pool] for layer, by_pool in self.evidence.items()}
            if not kept:
                raise CorrSteerError("this run holds no evidence to test features by; collect again")
            self._tested[score, self.n] = inference.significance(kept, score)
        return self._tested[score, self.n]

    def save(self, directory: PathLike) -> None:
        """Write the run to a directory: `run.json`, the rewards and each layer's moments and evidence.

        Evidence is the largest part, 8 bytes a feature and permutation.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "run.json").unlink(missing_ok=True)  # written last, so that half a run is none
        for stale in directory.glob("layer_*.safetensors"):
            stale.unlink()
        for layer, moments in self.moments.items():
            for pool, state in moments.items():
                state.save(directory / f"layer_{layer}.{pool}.safetensors")
        for layer, evidences in self.evidence.items():
            for pool, evidence in evidences.items():
                evidence.save(directory / f"layer_{layer}.{pool}.evidence.safetensors")
        save_file({"rewards": self.rewards}, str(directory / "rewards.safetensors"))
        described = {
            "layers": {
                str(layer): {
                    "point": str(point),
                    "decoder": self.decoders[layer].source,
                    "pools": list(self.moments[layer]),
                }
                for layer, point in self.points.items()
            },
            "pool": self.pool,
            "coefficient_pool": self.coefficient_pool,
            "evidence": {str(layer): list(evidences) for layer, evidences in self.evidence.items()},
            "snapshots": [asdict(snapshot) for snapshot in self.snapshots],
            "notes": self.notes,
            "provenance": self.provenance,
        }
        (directory / "run.json").write_text(json.dumps(described, indent=2), encoding="utf-8")

    @classmethod
    def load(cls, directory: PathLike) -> Run:
        """Read what `save` wrote. Decoder rows are found again by where each SAE came from."""
        directory = Path(directory)
        try:
            described = json.loads((directory / "run.json").read_text(encoding="utf-8"))
            layers = {int(layer): entry for layer, entry in described["layers"].items()}
            return cls(
                moments={
                    layer: {
                        pool: Moments.load(directory / f"layer_{layer}.{pool}.safetensors") for pool in entry["pools"]
                    }
                    for layer, entry in layers.items()
                },
                points={layer: HookPoint.parse(entry["point"]) for layer, entry in layers.items()},
                decoders={layer: open_decoder(entry["decoder"]) for layer, entry in layers.items()},
                rewards=load_file(str(directory / "rewards.safetensors"))["rewards"],
                evidence={
                    int(layer): {
                        pool: Evidence.load(directory / f"layer_{layer}.{pool}.evidence.safetensors") for pool in kept
                    }
                    for layer, kept in described["evidence"].items()
                },
                snapshots=[_snapshot(entry) for entry in described["snapshots"]],
                **{key: described[key] for key in ("pool", "coefficient_pool", "notes", "provenance")},
            )
        except CorrSteerError:
            raise
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CorrSteerError(f"{directory} is not a saved run: it has no {Path(error.filename).name}") from None
        except (SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise CorrSteerError(f"the run in {directory} is damaged ({error}); collect again") from None


def _snapshot(entry: dict[str, Any]) -> Snapshot:
    leaders = {int(layer): tuple(Leader(**one) for one in rows) for layer, rows in entry["leaders"].items()}
    return Snapshot(entry["n"], leaders)
