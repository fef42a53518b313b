"""`search`: of the features that correlation proposes, the steering that trials decide on.

Candidates race on validation samples, each at scales of a grid that grows; what survives is tried together with the
winner (greedy forward selection); and what wins is compared with no steering on validation samples that nothing was
chosen by.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from scipy.stats import norm
from torch import nn
from tqdm.auto import tqdm

from corrsteer.arguments import number, share, whole
from corrsteer.errors import CorrSteerError
from corrsteer.experiments.race import FIRST, Race, Runner
from corrsteer.experiments.scale_grid import LEAST, MOST, RATIO, at_an_end, highest_reward, next_scale
from corrsteer.experiments.seen_samples import SELECTED, overlap_notes, repetition_notes, validated
from corrsteer.experiments.trials import UNSTEERED, Trial, run_trials
from corrsteer.lm.decoding import Decoding
from corrsteer.rollouts.grading import Graded
from corrsteer.rollouts.journal import Journal
from corrsteer.stats.paired import difference, paired_p_value
from corrsteer.steering.features import Feature
from corrsteer.steering.steering import Steering
from corrsteer.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FINALISTS = 8  # that are tried together with the winner
SHARES = (1.0, 0.5)  # of its own best strength, at which a further feature is tried
TOGETHER = 0.2  # of a budget of completions, that is kept to try features together


@dataclass(frozen=True)
class SearchOptions:
    """How `select` searches.

    Attributes
    ----------
    candidates : features that are tried of each layer, pooling and sign, those that correlate best.
    most_features : that a steering may be of.
    alpha : the chance that a given trial is dropped for one that is no better, and the level of the confirmation.
    confirm : share of the validation prompts that the race never sees.
    completions : the most that may be generated, confirmation included; None for no limit. At the limit the trials of
        the lowest scores leave.
    minutes : the same in time, by the speed so far; the first round of all trials and the confirmation run in any case.
        What fits depends on the machine.
    seed : of the samples' order.
    """

    candidates: int = 3
    most_features: int = 3
    alpha: float = 0.05
    confirm: float = 0.5
    completions: int | None = None
    minutes: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            name: whole(name, getattr(self, name), 1) for name in ("candidates", "most_features")
        }
        checked |= {name: share(name, getattr(self, name)) for name in ("alpha", "confirm")}
        if self.completions is not None:
            checked["completions"] = whole("completions", self.completions, 1)
        if self.minutes is not None and not number("minutes", self.minutes) > 0:
            raise CorrSteerError(f"minutes must be above 0, got {self.minutes}")
        checked["seed"] = whole("seed", self.seed, 0)
        for name, value in checked.items():
            object.__setattr__(self, name, value)


def search(
    candidates: Sequence[Steering],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    validation: Task,
    positions: Sequence[str],
    scale: float,
    reward_range: tuple[float, float],
    decoding: Decoding,
    options: SearchOptions,
    progress: bool,
    journal: Journal | None = None,
) -> Steering:
    """The steering that does best on validation samples, and whether others confirm it.

    Parameters
    ----------
    candidates : a steering of one feature each, which share table, notes and provenance.
    positions, scale : positions to try each at; the middle of the scales to begin with.
    reward_range : low and high; rewards outside of it count as its end in the race.
    """
    racing, confirming, _ = validation.split(1 - options.confirm, options.confirm, 0, seed=options.seed)
    if min(len(racing), len(confirming)) < FIRST:
        raise CorrSteerError(
            f"validation must leave at least {FIRST} samples to search on and {FIRST} to confirm by, got "
            f"{len(racing)} and {len(confirming)}; give more, or another confirm"
        )
    found = _Search(
        candidates, model, tokenizer, racing, positions, scale, reward_range, decoding, options, journal
    )
    found.budget.reserved = 2 * len(confirming)
    with tqdm(unit="completion", desc=f"search {validation.name}", disable=not progress) as bar:
        found.bar = bar
        best = found.best()
        confirmation = None if best is None else _confirm(found, best, confirming)
    steering, first = candidates[0], found.described()
    if best is None or confirmation is None:
        plain = found.unsteered
        note = f"no trial did better than no steering on {plain.n} validation samples ({plain.score:.4f})"
    else:
        first["confirmation"], note = confirmation, _in_words(confirmation, options.alpha)
    chosen = Steering([], torch.zeros(0, 0, dtype=torch.float32, device="cpu")) if best is None else best
    notes = [note, *found.notes, *repetition_notes(validation), *steering.notes]
    notes += overlap_notes(validation, steering.provenance, (SELECTED,))
    provenance = validated(steering.provenance, validation)
    provenance |= {"search": first | {"completions": found.budget.spent}, "decoding": asdict(decoding)}
    return Steering(
        chosen.features, chosen.directions, steering.table, notes, provenance, chosen.positions, chosen.scale
    )


@dataclass
class _Budget:
    """What may still be generated, and what of it is reserved for later."""

    completions: int | None
    minutes: float | None
    reserved: int = 0
    spent: int = 0
    seconds: float = 0.0  # as completions were made in, so that a search that goes on decides as it did

    @property
    def left(self) -> float:
        """Completions that may be generated before what is reserved."""
        left = math.inf if self.completions is None else self.completions - self.spent
        if self.minutes is not None and self.spent:
            left = min(left, (60 * self.minutes - self.seconds) * self.spent / self.seconds)
        return left - self.reserved


class _Search:
    """A search under way."""

    def __init__(
        self,
        candidates: Sequence[Steering],
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        positions: Sequence[str],
        scale: float,
        reward_range: tuple[float, float],
        decoding: Decoding,
        options: SearchOptions,
        journal: Journal | None,
    ):
        self.candidates, self.task, self.options = candidates, task, options
        self.model, self.tokenizer, self.decoding, self.journal = model, tokenizer, decoding, journal
        self.budget = _Budget(options.completions, options.minutes)
        self.notes: list[str] = []
        self.bar: Any = None
        self._scales = [scale / RATIO, scale, scale * RATIO]
        self._kinds = [(at, where) for where in positions for at in range(len(candidates))]
        self._curves: dict[tuple[int, str], dict[float, Runner]] = {kind: {} for kind in self._kinds}
        self._rounds: list[dict[str, Any]] = []
        self._steps: list[dict[str, Any]] = []
        self._joint_trials = 0
        self._middle, self._range = scale, reward_range
        scales = math.log(MOST / LEAST, RATIO) + 1
        most = round(len(self._kinds) * scales)
        self._race = Race(self.complete, len(task), most, options.alpha, reward_range)

    @property
    def unsteered(self) -> Runner:
        """What no steering gives."""
        return self._race.unsteered

    def complete(self, trials: Sequence[Trial], samples: range) -> list[list[float]]:
        """Rewards of trials on samples in the order of the race."""
        part = replace(self.task, examples=self.task.examples[samples.start : samples.stop])
        return [graded.rewards for graded in self.grade(part, trials)]

    def grade(self, task: Task, trials: Sequence[Trial]) -> list[Graded]:
        """Completions of a task under trials."""
        graded = run_trials(
            self.model, self.tokenizer, task, trials, self.decoding, journal=self.journal, progress=False
        )
        self.budget.spent += len(task) * len(trials)
        shared = 1 if self.journal is None else self.journal.processes
        self.budget.seconds += sum(one.seconds + one.grading_seconds for one in graded) / shared
        self.bar.update(len(task) * len(trials))
        return graded

    def best(self) -> Steering | None:
        """The steering that wins; None where nothing does better than no steering."""
        race = self._race
        for kind in self._kinds:
            self._enter(kind, self._scales)
        least = race.cost(race.running, FIRST) + self.budget.reserved
        if least > (self.options.completions or math.inf):
            raise CorrSteerError(
                f"completions must be at least {least}, for {len(race.running)} trials of {FIRST} samples and "
                f"{self.budget.reserved} completions to confirm, got {self.options.completions}; raise it, or lower "
                f"candidates or confirm"
            )
        kept = TOGETHER * (self.options.completions or 0) if self.options.most_features > 1 else 0
        kept = min(round(kept), (self.options.completions or least) - least)
        self.budget.reserved += kept
        self._run(race)
        self.budget.reserved -= kept
        leader = race.leader
        if leader is race.unsteered:
            return None
        curve = self._curves[self._candidate(leader), leader.trial.positions]
        if at_an_end(leader.trial.scale, curve):
            self.notes.append(
                f"scale {leader.trial.scale:g} is an end of those tried, {', '.join(f'{scale:g}' for scale in curve)}, "
                f"so a better one may lie beyond it; search again with scale={leader.trial.scale:g}"
            )
        return self._joined(leader)

    def _enter(self, kind: tuple[int, str], scales: Sequence[float]) -> None:
        at, where = kind
        candidate = self.candidates[at]
        trials = [Trial(candidate, scale, where, candidate.features[0].name) for scale in scales]
        self._curves[kind] |= dict(zip(scales, self._race.enter(trials)))

    def _grow(self, end: int) -> bool:
        """Whether scales have been added, to curves whose best one is at an end."""
        grown, left, highest = False, self.budget.left, highest_reward(self._range)
        for kind, curve in self._curves.items():
            # A curve that was left behind is not what wins, and scores of fewer samples cannot be compared.
            scores = {scale: runner.score for scale, runner in curve.items() if runner.n == end}
            if not scores:
                continue
            scale = next_scale(scores, self.unsteered.score, highest, self._middle)
            if scale is not None and scale not in curve and end <= left:
                self._enter(kind, [scale])
                left -= end
                grown = True
        return grown

    def _run(self, race: Race) -> None:
        """Run a race, as far as the budget allows; in that of single features, curves grow."""
        for end in race.rounds():
            if not self._affords(race, end):
                break
            race.bring(end)
            while race is self._race and self._grow(end):
                race.bring(end)
            race.drop()
            if race is self._race:
                self._say(end)
            if len(race.running) < 2:
                break

    def _affords(self, race: Race, end: int) -> bool:
        """Whether the budget allows another round; where it does for some of the trials alone, the others leave."""
        before = len(race.running)
        goes_on = race.cut(self.budget.left, end)
        left = before - len(race.running) if goes_on else before
        if left:
            seen = max(runner.n for runner in race.runners)
            what = "the race" if race is self._race else "trying features together"
            self.notes.append(f"the budget ended {what} for {left} trial(s) at {seen} of {len(self.task)} samples")
        return goes_on

    def _joined(self, leader: Runner) -> Steering:
        """The leader with further features, as long as each gains more than the best of so many would by chance."""
        chosen, members = leader, [self._candidate(leader)]
        partners = self._partners(leader.trial.positions)
        while len(members) < self.options.most_features:
            trials = {
                self._together(chosen.trial, partner.trial, part): at
                for at, partner in partners.items()
                if at not in members
                for part in SHARES
            }
            # Whoever is chosen was so by these samples: a trial may be compared with whichever might have been.
            most = len(trials) * len(self._race.runners)
            race = Race(self.complete, len(self.task), most, self.options.alpha, self._range, self.unsteered)
            base = Runner(chosen.trial, list(chosen.rewards))
            race.runners.append(base)
            race.enter(list(trials))
            if trials:
                self._run(race)
            joint = [runner for runner in race.runners if runner.n and runner is not base]  # the budget may leave none
            self._joint_trials += len(joint)
            if not joint:
                break
            best = max(joint, key=lambda runner: (runner.left is None, runner.score))
            mean, error = _gain(best, base)
            kept = best.left is None and mean > norm.isf(self.options.alpha / len(joint)) * error
            added = _steering_of(best.trial).features[-1]
            self._steps.append(
                {"feature": _named(added), "trials": len(joint), "score": best.score, "n": best.n, "gain": mean,
                 "error": error, "kept": kept}
            )  # fmt: skip
            if not kept:
                break
            chosen, members = best, [*members, trials[best.trial]]
        return replace(_steering_of(chosen.trial), positions=chosen.trial.positions, scale=chosen.trial.scale)

    def _candidate(self, runner: Runner) -> int:
        return next(at for (at, _), curve in self._curves.items() if runner in curve.values())

    def _partners(self, where: str) -> dict[int, Runner]:
        """The best few candidates, each at its best, of those that beat no steering by more than a standard error.

        Those that left for the leader are among them: what is not the best alone may add to it.
        """
        best: dict[int, tuple[float, Runner]] = {}
        for (at, positions), curve in self._curves.items():
            for runner in curve.values():
                if positions == where and runner.left in (None, "leader"):
                    mean, error = _gain(runner, self.unsteered)
                    best[at] = max(best.get(at, (0.0, runner)), (mean - error, runner), key=lambda one: one[0])
        ranked = sorted(best.items(), key=lambda item: -item[1][0])
        return {at: runner for at, (gain, runner) in ranked[: FINALISTS + 1] if gain > 0}

    @staticmethod
    def _together(chosen: Trial, partner: Trial, part: float) -> Trial:
        """A trial of both, at the chosen one's scale, so that the other's coefficient makes up the difference."""
        first, second = _steering_of(chosen), _steering_of(partner)
        (feature,) = second.features
        features = [*first.features, feature.scaled(part * partner.scale / chosen.scale)]
        both = Steering(features, torch.cat([first.directions, second.directions]))
        return Trial(both, chosen.scale, chosen.positions, f"{chosen.name} and {feature.name}")

    def _say(self, end: int) -> None:
        race = self._race
        left = [sum(runner.left == why for runner in race.runners) for why in ("unsteered", "leader", "budget")]
        leader = race.leader
        self._rounds.append(
            {"samples": end, "entered": len(race.runners), "running": len(race.running),
             **dict(zip(("worse_than_unsteered", "worse_than_leader", "over_budget"), left)),
             "unsteered": race.unsteered.score, "leader": leader.score}
        )  # fmt: skip
        self.bar.set_postfix_str(f"{len(race.running)} trials, {leader.trial.name} {leader.score:.3f}", refresh=False)

    def described(self) -> dict[str, Any]:
        """What a search did, for JSON."""
        scales = sorted({scale for curve in self._curves.values() for scale in curve}, key=abs)
        grid = len(self._kinds) * len(scales) + 1 + self._joint_trials
        # In full: the same trials on all samples; the grid: all candidates at all scales that any of them came to.
        finalists = [kind for kind, curve in self._curves.items() if any(r.left is None for r in curve.values())]
        finalists.sort(key=lambda kind: -max(r.score for r in self._curves[kind].values() if r.left is None))
        return {
            "options": asdict(self.options),
            "candidates": len(self.candidates),
            "samples": len(self.task),
            "unsteered": self.unsteered.score,
            "trials": len(self._race.runners) + self._joint_trials,
            "in_full": (len(self._race.runners) + 1 + self._joint_trials) * len(self.task),
            "grid": {"scales": scales, "completions": grid * len(self.task)},
            "rounds": self._rounds,
            "finalists": [
                {
                    "feature": _named(self.candidates[at].features[0]),
                    "positions": where,
                    "curve": [
                        {"scale": scale, "score": runner.score, "n": runner.n, "left": runner.left}
                        for scale, runner in sorted(self._curves[at, where].items(), key=lambda item: abs(item[0]))
                    ],
                }
                for at, where in finalists
            ],
            "joined": self._steps,
            "confirmation": None,
        }


def _gain(runner: Runner, other: Runner) -> tuple[float, float]:
    """The mean difference of rewards from another's, and its standard error."""
    differences = runner.over(other)
    return statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


def _steering_of(trial: Trial) -> Steering:
    assert trial.steering is not None, "only no steering has none"
    return trial.steering


def _named(feature: Feature) -> dict[str, Any]:
    """What tells a feature from others."""
    return {name: getattr(feature, name) for name in ("layer", "index", "coefficient")}


def _confirm(found: _Search, best: Steering, task: Task) -> dict[str, Any]:
    """No steering against the best one, on samples that it was not chosen by."""
    before, after = (graded.rewards for graded in found.grade(task, [UNSTEERED, Trial(best)]))
    change, low, high = difference(before, after)
    improved, worsened = (sum(a > b for a, b in pairs) for pairs in (zip(after, before), zip(before, after)))
    p = paired_p_value(before, after)
    return {
        "n": len(task),
        "unsteered": statistics.fmean(before),
        "steered": statistics.fmean(after),
        "difference": change,
        "low": None if math.isnan(low) else low,
        "high": None if math.isnan(high) else high,
        "improved": improved,
        "worsened": worsened,
        "p_value": p,
        "confirmed": change > 0 and p <= found.options.alpha,
    }


def _in_words(confirmation: dict[str, Any], alpha: float) -> str:
    c = confirmation
    verdict = "confirmed" if c["confirmed"] else "not confirmed"
    better = "" if c["confirmed"] else f", so that chance could explain it at alpha {alpha:g}"
    if c["difference"] <= 0:
        better = ", so that it is no better than no steering"
    interval = "" if c["low"] is None else f"95 % interval {c['low']:+.4f} to {c['high']:+.4f}; "
    return (
        f"{verdict}: on {c['n']} validation samples that the search had not seen, {c['steered']:.4f} steered against "
        f"{c['unsteered']:.4f} unsteered, a difference of {c['difference']:+.4f} ({interval}p "
        f"{c['p_value']:.3g}){better}"
    )
