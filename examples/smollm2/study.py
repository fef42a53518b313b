"""The method on one task: rollouts, collection, selection in four ways, baselines, and what all of them do on test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corrsteer import (
    Decoding,
    Run,
    SearchOptions,
    SparseEncoder,
    Steering,
    Task,
    baselines,
    calibrate_best,
    collect,
    evaluate,
    generate_rollouts,
    read_rollouts,
    select,
)
from corrsteer.steering.features import CHANCE
from examples.smollm2 import top_tokens
from examples.smollm2.stages import stage

NAMES = {"single": "CorrSteer-S", "all": "CorrSteer-A", "pruned": "CorrSteer-P", "search": "search"}
SHOWN = 6  # changed completions, of each steering


@dataclass(frozen=True)
class Study:
    """What is studied, and where what was found is kept."""

    model: Any
    tokenizer: Any
    encoders: Mapping[int, SparseEncoder]
    train: Task
    validation: Task
    test: Task
    decoding: Decoding
    folder: Path
    activations: Path  # whose tokens say what a feature is active at
    permutations: int = 1000
    completions: int | None = 10_000  # the most that search may generate
    progress: bool = True

    @property
    def lm(self) -> tuple[Any, Any]:
        """The language model and its tokenizer, as most calls take them."""
        return self.model, self.tokenizer

    def run(self) -> dict[str, Any]:
        """Every stage, and what each found. Those that are there already are read."""
        found = {
            name: stage(self.folder, name, getattr(self, name))
            for name in ("rollouts", "collection", "single_and_all", "pruning", "search", "baselines", "evaluation")
        }
        return found | {"features": stage(self.folder, "features", self.features)}

    def rollouts(self) -> dict[str, Any]:
        """Completions of the train part."""
        path = self.folder / "rollouts.jsonl"
        made = generate_rollouts(*self.lm, self.train, self.decoding, out=path, progress=self.progress)
        rewards = [next(iter(rollout.rewards.values())) for batch in made for rollout in batch]
        return {"n": len(rewards), "reward": sum(rewards) / len(rewards)}

    def collection(self) -> dict[str, Any]:
        """Activations of the rollouts, read again, and which features go with the reward beyond chance."""
        run = collect(
            *self.lm, self.encoders, rollouts=read_rollouts(self.folder / "rollouts.jsonl"), decoding=self.decoding,
            permutations=self.permutations, directory=self.folder / "run", progress=self.progress,
        )  # fmt: skip
        layers = {}
        for layer, tested in run.significance().items():
            r = run.correlation(layer).flatten()
            best = int(r.abs().argmax())
            layers[str(layer)] = {
                "significant": int((tested.p_adjusted <= CHANCE).sum()), "best": best, "r": float(r[best]),
                "p_adjusted": float(tested.p_adjusted[best]),
                "active": int((run.moments[layer][run.pool].n_active > 0).sum()),
            }  # fmt: skip
        return {"layers": layers, "notes": run.notes}

    def single_and_all(self) -> dict[str, Any]:
        """CorrSteer-S and -A, which need no model."""
        run = self.collected
        return {name: self._keep(name, select(run, name)) for name in ("single", "all")}

    def pruning(self) -> dict[str, Any]:
        """CorrSteer-P."""
        return {"pruned": self._keep("pruned", select(self.collected, "pruned", **self._validated()))}

    def search(self) -> dict[str, Any]:
        """What trials find."""
        options = SearchOptions(completions=self.completions)
        found = select(self.collected, "search", options=options, **self._validated())
        trials = found.provenance["search"]
        return {"search": self._keep("search", found)} | {
            name: trials[name] for name in ("completions", "confirmation") if name in trials
        }

    def baselines(self) -> dict[str, Any]:
        """What steering along features has to beat, each at its best scale on validation."""
        of_all = Steering.load(self.folder / "all.safetensors")
        if not of_all.features:
            return {}
        candidates = baselines(self.collected, of_all, draws=1)
        best = calibrate_best(*self.lm, candidates, self.validation, decoding=self.decoding, progress=self.progress)
        return {
            name: self._keep(name, one) | {"candidates": one.provenance["calibration"]["candidates"]}
            for name, one in best.items()
        }

    def evaluation(self) -> dict[str, Any]:
        """All of them against no steering, on the test part."""
        named = {shown: self._load(name) for name, shown in NAMES.items()}
        others = stage(self.folder, "baselines", self.baselines)
        named |= {name: self._load(name) for name, one in others.items() if isinstance(one, dict)}
        results = evaluate(*self.lm, self.test, named, decoding=self.decoding, progress=self.progress)
        described = {}
        for name, result in results.items():
            changed = [one for one in result.examples if one["change"] in ("improved", "worsened")]
            described[name] = result.to_dict(examples=False) | {"examples": changed[:SHOWN]}
        return {"steerings": described}

    def features(self) -> dict[str, Any]:
        """The tokens at which chosen features are most active."""
        chosen = {(f.layer, f.index) for name in NAMES for f in self._load(name).features if f.index is not None}
        rows = []
        for layer, encoder in self.encoders.items():
            indices = sorted(int(index or 0) for at, index in chosen if at == layer)
            if indices:
                found = top_tokens.top_tokens(self.activations, layer, encoder, indices, self.tokenizer)
                rows += [{"layer": layer, "index": index, **of_one} for index, of_one in found.items()]
        return {"top_tokens": rows}

    @property
    def collected(self) -> Run:
        """What collection left."""
        return Run.load(self.folder / "run")

    def _validated(self) -> dict[str, Any]:
        return {
            "model": self.model, "tokenizer": self.tokenizer, "validation": self.validation, "decoding": self.decoding,
            "progress": self.progress,
        }  # fmt: skip

    def _path(self, name: str) -> Path:
        return self.folder / f"{name.replace(' ', '_')}.safetensors"

    def _load(self, name: str) -> Steering:
        return Steering.load(self._path(name))

    def _keep(self, name: str, steering: Steering) -> dict[str, Any]:
        """Save a steering, and say what it is of."""
        steering.save(self._path(name))
        features = []
        for feature in steering.features:
            said = feature.statistics
            features.append({
                "layer": feature.layer, "index": feature.index, "hook_point": feature.hook_point,
                "coefficient": feature.coefficient, "r": said and said.correlation,
                "p_adjusted": said and said.p_adjusted, "pool": said and said.pool,
            })  # fmt: skip
        return {"features": features, "scale": steering.scale, "notes": steering.notes}
