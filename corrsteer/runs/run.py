"""`Run`: what a collection leaves, in memory and in a directory."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from corrsteer.arguments import as_path
from corrsteer.errors import CorrSteerError
from corrsteer.files import sync_folder, to_json, write_tensors, write_utf8
from corrsteer.lm.hook_points import HookPoint
from corrsteer.ops import Moments
from corrsteer.runs.pooling import POOLINGS
from corrsteer.sae.sources import Decoder, open_decoder
from corrsteer.stats import inference, scores
from corrsteer.stats.evidence import Evidence
from corrsteer.stats.stability import Leader, Snapshot
from corrsteer.types import PathLike

FORMAT = "corrsteer.run/3"
INDEX, NEXT = "run.json", "run.json.next"  # what a run is made of, and the same of one that is being written
KINDS = {"moments": Moments, "evidence": Evidence, "residuals": Moments}  # what is kept of each layer and pooling
OWN = re.compile(  # a run's files, and no other
    rf"(layer_\d+\.({'|'.join(POOLINGS)})(\.evidence|\.residuals)?|rewards)(\.\d+)?\.safetensors"
)


@dataclass
class Run:
    """What a collection leaves: moments, evidence, rewards, and how they came about.

    Attributes
    ----------
    moments : layer -> pooling -> `Moments`.
    evidence : layer -> pooling -> `Evidence`, with permutations and bootstrap for `pool` alone.
    residuals : layer -> `mean` (over kept steps) or `last_prompt` -> `Moments` of the residual stream's d dimensions at
        the layer's hook point; `coefficient("contrastive")` is the difference of class means.
    snapshots : which features were in front after how many samples, oldest first.
    points : layer -> hook point.
    decoders : layer -> where decoder rows are read from.
    rewards : `[n]` float64, in the task's order; NaN for samples that a stopped collection did not reach.
    pool, coefficient_pool : pooling for the correlation and for the coefficient.
    notes : what a user should know, such as a reward that never varied.
    provenance : model, task, SAEs, decoding, versions and samples (see `Task.samples`); anything JSON can hold.
    """

    moments: dict[int, dict[str, Moments]]
    points: dict[int, HookPoint]
    decoders: dict[int, Decoder]
    rewards: Tensor
    pool: str
    coefficient_pool: str
    evidence: dict[int, dict[str, Evidence]] = field(default_factory=dict)
    residuals: dict[int, dict[str, Moments]] = field(default_factory=dict)
    snapshots: list[Snapshot] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict, repr=False)
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
        """Write the run to a directory: `run.json`, the rewards and each layer's moments, evidence and residuals.

        A run that is there is replaced, and any other file left alone. The new run is written beside the old one,
        which takes room for both, and takes its place in one step: whatever happens, the directory holds one or the
        other whole. Evidence is the largest part, 8 bytes a feature and permutation.

        Raises
        ------
        CorrSteerError : where it cannot be written.
        """
        directory = as_path("directory", directory)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CorrSteerError(f"{directory} cannot be written to ({error}); give another directory") from None
        old = _files_of(directory / INDEX)
        cut_off = _files_of(directory / NEXT) - old  # of a save that did not come to its end
        names = self._names(directory, cut_off)
        text = to_json(self._described(names), indent=2)  # before anything is written or removed
        _remove(directory, cut_off)
        try:
            write_utf8(directory / NEXT, text)
            for part, state in self._states().items():
                state.save(directory / names[part])
            write_tensors(directory / names["rewards"], {"rewards": self.rewards}, {})
            os.replace(directory / NEXT, directory / INDEX)
        except BaseException as error:
            _remove(directory, {NEXT, *names.values()})
            if isinstance(error, OSError):
                raise CorrSteerError(f"{directory} cannot be written to ({error}); give another directory") from None
            raise
        sync_folder(directory)
        _remove(directory, old)

    def _states(self) -> dict[tuple[str, int, str], Moments | Evidence]:
        """What is kept of layers, by kind, layer and pooling."""
        return {
            (kind, layer, pool): state
            for kind in KINDS
            for layer, states in getattr(self, kind).items()
            for pool, state in states.items()
        }

    def _names(self, directory: Path, reusable: set[str]) -> dict[Any, str]:
        """A file name for every part, none of which is taken."""
        parts: dict[Any, str] = {"rewards": "rewards"}
        for kind, layer, pool in self._states():
            ending = "" if kind == "moments" else f".{kind}"
            parts[kind, layer, pool] = f"layer_{layer}.{pool}{ending}"

        def numbered(number: int) -> dict[Any, str]:
            ending = ".safetensors" if number == 1 else f".{number}.safetensors"
            return {part: name + ending for part, name in parts.items()}

        def free(names: Iterable[str]) -> bool:
            return not any(os.path.lexists(directory / name) for name in set(names) - reusable)

        return next(names for names in map(numbered, itertools.count(1)) if free(names.values()))

    def _described(self, names: Mapping[Any, str]) -> dict[str, Any]:
        """Everything but arrays, and the files that these are in."""
        return {
            "format": FORMAT,
            "layers": {
                str(layer): {
                    "point": str(point),
                    "decoder": self.decoders[layer].source,
                }
                | {
                    kind: {pool: names[kind, layer, pool] for pool in getattr(self, kind).get(layer, ())}
                    for kind in KINDS
                }
                for layer, point in self.points.items()
            },
            "rewards": names["rewards"],
            "pool": self.pool,
            "coefficient_pool": self.coefficient_pool,
            "snapshots": [asdict(snapshot) for snapshot in self.snapshots],
            "notes": self.notes,
            "provenance": self.provenance,
        }

    @classmethod
    def load(cls, directory: PathLike) -> Run:
        """Read what `save` wrote. Decoder rows are found again by where each SAE came from.

        Raises
        ------
        CorrSteerError : if there is no run of this version, or it is damaged.
        """
        directory = as_path("directory", directory)
        try:
            described = json.loads((directory / INDEX).read_bytes())
            if described.get("format") != FORMAT:
                raise CorrSteerError(
                    f"{directory} is not a run of this version: its format must be {FORMAT!r}, "
                    f"got {described.get('format')!r}; collect again"
                )
            if strange := {name for name in _named(described) if not OWN.fullmatch(name)}:
                raise ValueError(f"it names files that are not a run's, {sorted(strange)}")
            layers = {int(layer): entry for layer, entry in described["layers"].items()}
            run = cls(
                points={layer: HookPoint.parse(entry["point"]) for layer, entry in layers.items()},
                decoders={layer: open_decoder(entry["decoder"]) for layer, entry in layers.items()},
                rewards=load_file(str(directory / described["rewards"]))["rewards"],
                **{kind: _load(directory, layers, kind) for kind in KINDS},
                snapshots=[_snapshot(entry) for entry in described["snapshots"]],
                **{key: described[key] for key in ("pool", "coefficient_pool", "notes", "provenance")},
            )
            run._check()
            return run
        except CorrSteerError:
            raise
        except (FileNotFoundError, NotADirectoryError) as error:
            if (directory / INDEX).is_file():
                raise CorrSteerError(f"the run in {directory} is damaged ({error}); collect again") from None
            raise CorrSteerError(f"{directory} is not a saved run: it has no {INDEX}") from None
        except (SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise CorrSteerError(f"the run in {directory} is damaged ({error}); collect again") from None

    def _check(self) -> None:
        """Raise where a description does not fit its parts."""
        for name in ("pool", "coefficient_pool"):
            if not all(getattr(self, name) in pools for pools in self.moments.values()):
                raise ValueError(f"{name} {getattr(self, name)!r} is none that it holds")
        for name, kind in (("notes", list), ("provenance", dict)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} is no {kind.__name__}")


def _load(directory: Path, layers: Mapping[int, Any], kind: str) -> dict[int, dict[str, Any]]:
    """What was kept of one kind, layer -> pooling -> state, of the layers of which something was."""
    return {
        layer: {pool: KINDS[kind].load(directory / name) for pool, name in entry[kind].items()}
        for layer, entry in layers.items()
        if entry[kind]
    }


def _named(described: dict[str, Any]) -> set[str]:
    """The files that a run's description names."""
    kinds = (entry[kind] for entry in described["layers"].values() for kind in KINDS)
    return {described["rewards"], *(name for names in kinds for name in names.values())}


def _files_of(index: Path) -> set[str]:
    """The same of a description on disk, as far as it can be read and names files as a run does."""
    try:
        return {name for name in _named(json.loads(index.read_bytes())) if OWN.fullmatch(name)}
    except (OSError, AttributeError, KeyError, TypeError, ValueError):
        return set()


def _remove(directory: Path, names: Iterable[str]) -> None:
    for name in names:
        with contextlib.suppress(OSError):
            (directory / name).unlink(missing_ok=True)


def _snapshot(entry: dict[str, Any]) -> Snapshot:
    leaders = {int(layer): tuple(Leader(**one) for one in rows) for layer, rows in entry["leaders"].items()}
    return Snapshot(entry["n"], leaders)
