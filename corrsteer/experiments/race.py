"""A race: many trials on the same samples, in rounds, of which those leave that cannot be the best.

A trial leaves when, on the samples that both have seen, it is worse than the leader or than no steering, by a test that
holds at every round at once. With differences d of rewards in a range of size `span`, known before the race (rewards
outside of it count as its end), and a bet of λ in (0, 1),

    W_n(λ) = Π (1 - λ d_i / span),   i = 1 ... n

is a nonnegative supermartingale as long as the trial's mean reward is no lower than the other's: each factor's mean is
at most 1. So is the mean W_n of W_n(λ) over a fixed set of bets, and by Ville's inequality it ever reaches 1 / δ with a
chance of at most δ, however many rounds there are and wherever one stops (testing by betting: Waudby-Smith & Ramdas,
"Estimating means of bounded random variables by betting", JRSS B 86, 2024; races with confidence bounds: Maron & Moore,
"Hoeffding races", NeurIPS 1993).

The union is over trials alone: a trial is compared with no more than all others, unsteered among them. So with
δ = α / (trials that can take part), the chance that a given trial ever leaves for one that is no better is at most α.
Samples have to be independent draws, such as a random part of a task with one sample a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from corrsteer.experiments.trials import Trial

BETS = np.arange(1, 20) / 20  # λ: from 0.05, for long races, to 0.95, for differences that are plain at once
FIRST = 16  # samples of the first round; each round doubles them

Run = Callable[[Sequence[Trial], range], list[list[float]]]  # rewards of each trial on samples in order


def log_wealth(differences: Sequence[float], span: float) -> float:
    """log W_n: what bets on a mean difference below 0 have made of 1.

    Parameters
    ----------
    differences : of rewards, each at most `span` in size.
    """
    if not len(differences):
        return 0.0
    logs = np.log1p(-np.outer(BETS, np.asarray(differences) / span)).sum(1)
    largest = float(logs.max())
    return largest + math.log(float(np.exp(logs - largest).mean()))


@dataclass(eq=False)
class Runner:
    """A trial in a race.

    Attributes
    ----------
    rewards : of the race's samples in order, as many as it has seen.
    left : why it left: `leader`, `unsteered` or `budget`; None while it runs.
    """

    trial: Trial
    rewards: list[float] = field(default_factory=list)
    left: str | None = None

    @property
    def n(self) -> int:
        """Samples seen."""
        return len(self.rewards)

    @property
    def score(self) -> float:
        """Mean reward of the samples seen; -inf before any."""
        return sum(self.rewards) / self.n if self.n else -math.inf

    def over(self, other: Runner, low: float = -math.inf, high: float = math.inf) -> list[float]:
        """Differences of rewards, brought into a range, from another's on the samples that both have seen."""

        def brought(reward: float) -> float:
            return min(max(reward, low), high)

        return [brought(mine) - brought(theirs) for mine, theirs in zip(self.rewards, other.rewards)]


class Race:
    """Trials that race on the same samples.

    Parameters
    ----------
    run : completes and grades samples under trials; gives the rewards of each.
    n : samples that there are.
    most : others that a trial can be compared with, besides no steering: those that enter later among them.
    alpha : the chance that a trial is dropped for one that is no better.
    reward_range : low and high, known without the race's samples.

    Attributes
    ----------
    unsteered : what no steering gives.
    runners : every trial that ever took part.
    """

    def __init__(
        self,
        run: Run,
        n: int,
        most: int,
        alpha: float,
        reward_range: tuple[float, float] = (0.0, 1.0),
        unsteered: Runner | None = None,
    ):
        self._run, self._n, self._range = run, n, reward_range
        self._threshold = math.log((most + 1) / alpha)
        self.unsteered: Runner = unsteered or Runner(Trial(name="unsteered"))
        self.runners: list[Runner] = []

    @property
    def running(self) -> list[Runner]:
        """Those that have not left."""
        return [runner for runner in self.runners if runner.left is None]

    @property
    def leader(self) -> Runner:
        """Who has the highest score of the samples that all who run have seen; unsteered, unless one is better."""
        running = [self.unsteered, *self.running]
        seen = min(runner.n for runner in running)
        return max(running, key=lambda runner: sum(runner.rewards[:seen]))

    def rounds(self) -> list[int]:
        """Samples seen at the end of each round."""
        ends = [min(FIRST, self._n)]
        while ends[-1] < self._n:
            ends.append(min(2 * ends[-1], self._n))
        return ends

    def cost(self, runners: Sequence[Runner], end: int) -> int:
        """Completions that it takes to bring these, and unsteered, to so many samples."""
        return sum(max(0, end - runner.n) for runner in [self.unsteered, *runners])

    def enter(self, trials: Sequence[Trial]) -> list[Runner]:
        """Let trials take part."""
        entered = [Runner(trial) for trial in trials]
        self.runners += entered
        return entered

    def bring(self, end: int) -> None:
        """Bring whoever runs, and unsteered, to so many samples."""
        behind: dict[int, list[Runner]] = {}
        for runner in [self.unsteered, *self.running]:
            if runner.n < end:
                behind.setdefault(runner.n, []).append(runner)
        for start, runners in behind.items():
            for runner, rewards in zip(runners, self._run([r.trial for r in runners], range(start, end))):
                runner.rewards += rewards

    def drop(self) -> None:
        """Have those leave that the bound says are worse than the leader, or than no steering."""
        leader, (low, high) = self.leader, self._range
        for runner in self.running:
            for other, why in ((self.unsteered, "unsteered"), (leader, "leader")):
                if runner is other:
                    continue
                differences = runner.over(other, low, high)
                if log_wealth(differences, high - low or 1.0) >= self._threshold:
                    runner.left = why
                    break

    def cut(self, budget: float, end: int) -> bool:
        """Have the lowest scores leave until bringing the others to so many samples costs no more than a budget.

        Returns
        -------
        Whether at least one can go on. If none can, all stay as they are, and the race is over.
        """
        lowest = sorted(reversed(self.running), key=lambda runner: runner.score)  # of equals, who entered last
        staying = next((lowest[at:] for at in range(len(lowest)) if self.cost(lowest[at:], end) <= budget), [])
        for runner in lowest[: len(lowest) - len(staying)] if staying else []:
            runner.left = "budget"
        return bool(staying)
