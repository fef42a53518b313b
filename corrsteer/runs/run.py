"""`Run`: what a collection leaves, in memory and in a directory."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from corrsteer.arguments import as_path, check_type, shown, whole, wholes
from corrsteer.errors import CorrSteerError
from corrsteer.lm.hook_points import HookPoint
from corrsteer.ops import Moments
from corrsteer.rollouts.rollout import Rollout
from corrsteer.runs import run_files
from corrsteer.runs.activations import Activations
from corrsteer.runs.options import check_permutations
from corrsteer.runs.statistics_notes import statistics_notes
from corrsteer.runs.stored_rollouts import StoredRollouts, rewarded_first
from corrsteer.sae.sources import Decoder, open_decoder
from corrsteer.stats import inference, scores
from corrsteer.stats.evidence import Evidence
from corrsteer.stats.stability import Leader, Snapshot
from corrsteer.tasks.identity import pack_prompts
from corrsteer.types import PathLike

BEGUN = "begun"  # in the provenance of a run as it was collected: which collection it is


@dataclass(eq=False)
class Run:
    """What a collection leaves: moments, evidence, rewards, and how they came about. A run equals itself alone.

    Attributes
    ----------
    moments : layer -> pooling -> `Moments`.
    evidence : layer -> pooling -> `Evidence`, with permutations and bootstrap for `pool` alone.
    residuals : layer -> `mean` (over kept steps) or `last_prompt` -> `Moments` of the residual stream's d dimensions at
        the layer's hook point; `coefficient("contrastive")` is the difference of class means.
    snapshots : which features were in front after how many samples, oldest first.
    points : layer -> hook point.
    steered : layer -> where directions are added, of transcoders, which write elsewhere than they read; see
        `steering_point`.
    decoders : layer -> where decoder rows are read from.
    rewards : `[n]` float64, in the task's order; NaN for samples that a stopped collection did not reach.
    reward : what that reward is called; moments and evidence are of it.
    other_rewards : the others of the graders by name, `[n]` float64 each; further labels of the moments, in this order.
    rollouts : the samples' completions, in the task's order; None for samples that were not reached.
    activations : pooled activations of every sample, if they were kept, see `statistics`.
    groups : which prompt each sample is of, where prompts have several samples; else empty.
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
    steered: dict[int, HookPoint] = field(default_factory=dict)
    evidence: dict[int, dict[str, Evidence]] = field(default_factory=dict)
    residuals: dict[int, dict[str, Moments]] = field(default_factory=dict)
    reward: str = "reward"
    other_rewards: dict[str, Tensor] = field(default_factory=dict)
    rollouts: Sequence[Rollout | None] = field(default_factory=list, repr=False)
    activations: Activations | None = field(default=None, repr=False)
    groups: list[int] = field(default_factory=list, repr=False)
    snapshots: list[Snapshot] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict, repr=False)
    _tested: dict[tuple[str, int], dict[int, inference.Significance]] = field(
        default_factory=dict, init=False, repr=False
    )

    def steering_point(self, layer: int) -> HookPoint:
        """Where directions of a layer's features are added."""
        return self.steered.get(layer, self.points[layer])

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

    def correlation(self, layer: int, pool: str | None = None) -> Tensor:
        """Pearson's r of every feature of a layer with the reward, `[d_sae]`, by a pooling, by default the run's."""
        pool = pool or self.pool
        evidence = self.evidence.get(layer, {}).get(pool)
        if evidence is not None and evidence.within:
            return scores.correlation(evidence)
        return self.moments[layer][pool].correlation()[0]

    def interval(self, layer: int, pool: str, method: str, features: Tensor) -> tuple[Tensor, Tensor]:
        """Ends of 95 % intervals of some features' correlation, `[features]` float64 each, see `inference.interval`.

        Where prompts have several samples, `delta` takes prompts for samples, which needs the activations that were
        kept; without them it is NaN.
        """
        evidence = self.evidence[layer][pool]
        if method != "delta" or not evidence.clustered or self.activations is None:
            return inference.interval(evidence, method, features=features)
        blocks = self.activations.of(layer, pool, self.rewards, self.groups)
        z = torch.cat([block.rows.dense(features=features.cpu()) for block in blocks])
        y = torch.cat([block.y for block in blocks])
        groups = [int(prompt) for block in blocks for prompt in block.groups or ()]
        return inference.cluster_interval(z, y, groups, within=evidence.within)

    def all_rewards(self) -> dict[str, Tensor]:
        """Every reward by name, the one that this is of first."""
        return {self.reward: self.rewards, **self.other_rewards}

    def add_rollouts(self, rollouts: Mapping[int, Rollout]) -> None:
        """Take in graded completions, by the number of their sample."""
        n = len(self.rewards)
        known = list(self.rollouts) or [None] * n
        names = list(next(iter(rollouts.values())).rewards)
        before = self.all_rewards()
        rewards = [
            before[name].clone() if name in before else torch.full((n,), torch.nan, dtype=torch.float64, device="cpu")
            for name in names
        ]
        for sample, rollout in rollouts.items():
            known[sample] = rollout
            for name, of_name in zip(names, rewards):
                of_name[sample] = rollout.rewards[name]
        self.rollouts, (self.reward, *others) = known, names
        self.rewards, self.other_rewards = rewards[0], dict(zip(others, rewards[1:]))

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
            for evidence in kept.values():
                if evidence.rows is not None:
                    evidence.rows.forget()  # those of all layers are needed at once here, and nowhere else
        return self._tested[score, self.n]

    def statistics_notes(self) -> list[str]:
        """Those of the notes that go with the rewards and samples that are looked at."""
        evidence = next((by_pool[self.pool] for by_pool in self.evidence.values()), None)
        return statistics_notes(self.moments_of_rewards, evidence)

    def ask_rows(self) -> None:
        """Have evidence of the pooling that is tested ask the activations that were kept for what is resampled, and
        make evidence where there is none of them."""
        assert self.activations is not None, "they were kept"
        for layer, pools in self.moments.items():
            evidence = self.evidence.setdefault(layer, {})
            for pool, moments in pools.items():
                known = evidence.get(pool)
                if known is None:  # some layers had a block that others had not
                    evidence[pool] = self.activations.statistics(
                        layer, pool, moments.d_sae, self.rewards[:, None], self.groups, seed=self._seed,
                        within=self._within, device=moments.device,
                    )[1]  # fmt: skip
                elif pool == self.pool:
                    y = torch.stack(list(self.all_rewards().values())[: known.n_labels], 1)
                    evidence[pool] = self.activations.resampled(known, layer, pool, y, self.groups)

    def statistics(
        self,
        reward: str | None = None,
        *,
        rewards: Mapping[str, Tensor] | None = None,
        permutations: int | None = None,
        bootstrap: int | None = None,
        samples: Collection[int] | Callable[[Rollout], bool] | None = None,
        within_prompt: bool | None = None,
        pool: str | None = None,
        seed: int | None = None,
    ) -> Run:
        """The same completions, looked at in another way; what is not given stays as it is.

        All of it comes from the activations that were kept, and needs neither model nor SAE. Without them, another
        reward of the graders can be had, without permutations, and nothing else.

        Parameters
        ----------
        reward : name of the reward to look at.
        rewards : other rewards by name, `[n]` each in the samples' order; NaN in any of them leaves a sample out.
        permutations, bootstrap, within_prompt : as for `collect`. Every score can be had.
        seed : of permutations and the bootstrap.
        samples : which samples to look at, by their number or by what a function says of their rollouts, such as
            `lambda rollout: rollout.meta["topic"] == "algebra"`; by default all that were reached.
        pool : the pooling to look at, of those that were kept.

        Returns
        -------
        A run of its own. Of new rewards it has no moments of residuals, and the completions of samples with all of them
        alone.

        Raises
        ------
        CorrSteerError : for what cannot be had from what was kept.
        """
        known = self.all_rewards() if rewards is None else _checked(rewards, len(self.rewards))
        reward = next(iter(known)) if reward is None else reward
        if reward not in known:
            raise CorrSteerError(f"reward must be one of {', '.join(known)}, got {reward!r}")
        asked = {
            "permutations": None if permutations is None else check_permutations(permutations),
            "bootstrap": None if bootstrap is None else whole("bootstrap", bootstrap, 0),
        }
        if within_prompt is not None:
            check_type("within_prompt", within_prompt, bool, "True or False")
        pool = self.pool if pool is None else pool
        if pool not in next(iter(self.moments.values())):
            kept = ", ".join(next(iter(self.moments.values())))
            raise CorrSteerError(f"pool must be one of those that were kept, {kept}, got {pool!r}")
        names = [reward, *(name for name in known if name != reward)]
        order = [list(self.all_rewards()).index(name) for name in names] if rewards is None else []
        residuals = {
            layer: {name: moments.of_labels(order) for name, moments in pools.items()}
            for layer, pools in self.residuals.items()
            if order and samples is None
        }
        like: dict[str, Any] = {"reward": reward, "residuals": residuals, "pool": pool}
        if self.activations is None:
            if any(value is not None for value in (rewards, permutations, bootstrap, samples, within_prompt, seed)):
                raise CorrSteerError(
                    "the run holds no activations, from which statistics could be made anew; collect with "
                    "keep_activations='always', or from its rollouts"
                )
            moments = {
                layer: {name: of_pool.of_labels(order) for name, of_pool in pools.items()}
                for layer, pools in self.moments.items()
            }
            evidence = self.evidence if reward == self.reward and pool == self.pool else {}
            return self._seen_by(known, names, moments=moments, evidence=evidence, **like)
        y = torch.stack([known[name] for name in names], 1)
        if samples is not None:
            y[_left_out(samples, self.rollouts, len(y))] = torch.nan
        y[~y.isfinite().all(1)] = torch.nan  # a sample is in the statistics of all rewards, or of none
        known = dict(zip(names, y.unbind(1)))
        seed = self._seed if seed is None else whole("seed", seed, 0)
        within = self._within if within_prompt is None else within_prompt
        if within and not self.groups:
            raise CorrSteerError(
                "within_prompt must be False where every prompt has one sample, got True; take several samples of each"
            )
        asked = {name: value for name, value in asked.items() if value is not None}
        activations = replace(self.activations, blocks=list(self.activations.blocks), **asked)
        found = {
            layer: {
                name: activations.statistics(
                    layer, name, moments.d_sae, y, self.groups, seed=seed, within=within, device=moments.device
                )
                for name, moments in pools.items()
            }
            for layer, pools in self.moments.items()
        }
        again = self._seen_by(
            known,
            names,
            moments={layer: {name: both[0] for name, both in pools.items()} for layer, pools in found.items()},
            evidence={layer: {name: both[1] for name, both in pools.items()} for layer, pools in found.items()},
            activations=activations,
            snapshots=[],
            provenance=self.provenance | {"shuffle_seed": seed, "within_prompt": within},
            **like,
        )
        again._record_samples()
        if rewards is not None:
            again.rollouts = [
                rollout and replace(rollout, rewards=dict(zip(names, given))) if not math.isnan(given[0]) else None
                for rollout, given in zip(self.rollouts, y.tolist())
            ]
        return again

    def _seen_by(self, known: Mapping[str, Tensor], names: Sequence[str], **statistics: Any) -> Run:
        """The same completions with other statistics, rewards in this order, and notes of what these are."""
        first, *others = names
        rollouts = self.rollouts
        if first != self.reward and first in self.other_rewards and rollouts:
            stored = isinstance(rollouts, StoredRollouts)  # which are not read for it
            rollouts = replace(rollouts, reward=first) if stored else rewarded_first(rollouts, first)
        rewards = {"rewards": known[first], "other_rewards": {name: known[name] for name in others}}
        again = replace(self, rollouts=rollouts, **rewards, **statistics)
        again.provenance = {name: value for name, value in again.provenance.items() if name != BEGUN}
        of_statistics = self.statistics_notes()
        again.notes = [note for note in self.notes if note not in of_statistics] + again.statistics_notes()
        return again

    def _record_samples(self) -> None:
        """Have provenance say of which samples the statistics are, where fewer than were collected."""
        chosen = [rollout for rollout, y in zip(self.rollouts, self.rewards.tolist()) if not math.isnan(y)]
        prompts = [rollout.prompt_text for rollout in chosen if rollout is not None]
        recorded = self.provenance.get("samples")
        if recorded is not None and len(prompts) == self.n != recorded["n"]:
            fewer = recorded | {"n": self.n, "prompt_hashes": pack_prompts(prompts)}
            self.provenance = self.provenance | {"samples": fewer}

    @property
    def _seed(self) -> int:
        return self.provenance.get("shuffle_seed", 0)

    @property
    def _within(self) -> bool:
        return self.provenance.get("within_prompt", False)

    def save(self, directory: PathLike) -> None:
        """Write the run to a directory: `run.json`, and files of rewards, rollouts, activations and statistics.

        A run that is there is replaced, and any other file left alone. The new run is written beside the old one,
        which takes room for both, and takes its place in one step: whatever happens, the directory holds one or the
        other whole. Permutations that are kept are the largest part, 8 bytes each a feature; where activations are
        kept instead, these.

        Raises
        ------
        CorrSteerError : where it cannot be written.
        """
        layers = {
            str(layer): {
                "point": str(point), "steered": str(self.steering_point(layer)), "decoder": self.decoders[layer].source
            }
            for layer, point in self.points.items()
        }  # fmt: skip
        described = {
            "layers": layers,
            "pool": self.pool,
            "coefficient_pool": self.coefficient_pool,
            "reward_names": list(self.all_rewards()),
            "snapshots": [asdict(snapshot) for snapshot in self.snapshots],
            "notes": self.notes,
            "provenance": self.provenance,
        }
        arrays = {"rewards": torch.stack(list(self.all_rewards().values()))}
        if self.groups:
            arrays["groups"] = torch.tensor(self.groups, dtype=torch.int64, device="cpu")
        kept = {name: getattr(self, name) for name in (*run_files.KINDS, "rollouts", "activations")}
        directory = as_path("directory", directory)
        names = run_files.save(directory, described, kept | {"rewards": arrays})
        if self.activations is not None:  # whose files may have been another run's, or of a collection under way
            for block in self.activations.blocks:
                if block.path is not None:
                    block.moved(directory / names["activations", block.number])

    @classmethod
    def load(cls, directory: PathLike) -> Run:
        """Read what `save` wrote. Decoder rows are found again by where each SAE came from.

        Rollouts and activations are read when they are asked for.

        Raises
        ------
        CorrSteerError : if there is no run of this version, or it is damaged.
        """
        directory = as_path("directory", directory)
        with run_files.damage(directory):
            described, parts = run_files.load(directory)
            arrays = parts.pop("rewards")
            layers = {int(layer): entry for layer, entry in described["layers"].items()}
            (reward, *others), (rewards, *others_rewards) = described["reward_names"], arrays["rewards"]
            points = {layer: HookPoint.parse(entry["point"]) for layer, entry in layers.items()}
            writes = {layer: HookPoint.parse(entry.get("steered", entry["point"])) for layer, entry in layers.items()}
            run = cls(
                points=points,
                steered={layer: point for layer, point in writes.items() if point != points[layer]},
                decoders={layer: open_decoder(entry["decoder"]) for layer, entry in layers.items()},
                reward=reward,
                rewards=rewards,
                other_rewards=dict(zip(others, others_rewards)),
                groups=arrays["groups"].tolist() if "groups" in arrays else [],
                snapshots=[snapshot_of(entry) for entry in described["snapshots"]],
                **{key: described[key] for key in ("pool", "coefficient_pool", "notes", "provenance")},
                **parts,
            )
            run._check()
            if run.activations is not None:
                run.ask_rows()
            return run
        raise AssertionError("`damage` lets no error through")

    def _check(self) -> None:
        """Raise where a description does not fit its parts."""
        for layer, pools in self.evidence.items():
            if set(pools) != set(self.moments.get(layer, ())):
                raise ValueError(f"evidence of layer {layer} is of other poolings than its moments")
        for name in ("pool", "coefficient_pool"):
            if not all(getattr(self, name) in pools for pools in self.moments.values()):
                raise ValueError(f"{name} {getattr(self, name)!r} is none that it holds")
        for name, kind in (("notes", list), ("provenance", dict)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} is no {kind.__name__}")
        samples = self.provenance.get("samples", {"n": 0, "prompt_hashes": ""})
        if not isinstance(samples["n"], int) or not isinstance(samples["prompt_hashes"], str):
            raise TypeError("provenance does not say which samples it is of")
        if any(of_name.dtype != torch.float64 or of_name.dim() != 1 for of_name in self.all_rewards().values()):
            raise TypeError("rewards are no float64 numbers, one a sample")


def snapshot_of(entry: dict[str, Any]) -> Snapshot:
    """What `asdict` gave, as JSON holds it."""
    leaders = {int(layer): tuple(Leader(**one) for one in rows) for layer, rows in entry["leaders"].items()}
    return Snapshot(entry["n"], leaders)


def _left_out(
    samples: Collection[int] | Callable[[Rollout], bool], rollouts: Sequence[Rollout | None], n: int
) -> Tensor:
    """`[n]` bool: which of n samples are none of these."""
    if callable(samples):
        samples = [number for number, rollout in enumerate(rollouts) if rollout is not None and samples(rollout)]
    chosen = wholes("samples", samples, 0, empty=True)
    if chosen and max(chosen) >= n:
        raise CorrSteerError(f"samples must lie in 0..{n - 1}, got {max(chosen)}")
    left_out = torch.ones(n, dtype=torch.bool, device="cpu")
    left_out[chosen] = False
    return left_out


def _checked(rewards: Mapping[str, Tensor], n: int) -> dict[str, Tensor]:
    """Rewards by name as float64 on the CPU."""
    if not isinstance(rewards, Mapping) or not rewards:
        raise CorrSteerError(f"rewards must be tensors by name, got {shown(rewards)}")
    found = {
        name: torch.as_tensor(values, dtype=torch.float64, device="cpu").detach() for name, values in rewards.items()
    }
    for name, values in found.items():
        if values.shape != (n,):
            raise CorrSteerError(f"rewards[{name!r}] must be [{n}], a number for each sample, got {list(values.shape)}")
        if bool(values.isinf().any()):
            raise CorrSteerError(f"rewards[{name!r}] must be finite, or NaN to leave a sample out, got infinite ones")
    return found
