"""`run_trials`: many steerings over one task, in as few passes of the language model as they need.

With `positions="generated"` nothing before the last prompt token depends on the steering. So prompts are read once up
to there, and what was read is given to a row of each trial; rows of different trials are written in the same batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

import torch
from torch import nn
from tqdm.auto import tqdm

from corrsteer.arguments import check_type
from corrsteer.compatibility import warn_once
from corrsteer.errors import CorrSteerError
from corrsteer.experiments.shared_trials import complete_shared
from corrsteer.experiments.trial_batches import GradedRow, Kind, Part, Samples, complete
from corrsteer.files import to_json
from corrsteer.lm.decoding import Decoding
from corrsteer.lm.generation import Generator, tokenize
from corrsteer.lm.sampling import sample_keys
from corrsteer.rollouts.grading import Graded
from corrsteer.rollouts.journal import Journal
from corrsteer.rollouts.rollout import by_name
from corrsteer.steering.steering import Steering, stack
from corrsteer.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


NOTHING = Steering([], torch.zeros(0, 0, dtype=torch.float32, device="cpu"))


@dataclass(frozen=True, eq=False, init=False)
class Trial:
    """A way to steer that is to be tried.

    Attributes
    ----------
    steering : None, or one without features, steers nothing.
    scale, positions : as for `Steering.apply`; where they are not given, the steering's own.
    name : what to call it where the trials' progress is shown.
    """

    steering: Steering | None
    scale: float
    positions: str
    name: str

    def __init__(
        self,
        steering: Steering | None = None,
        scale: float | None = None,
        positions: str | None = None,
        name: str = "",
    ):
        if steering is not None:
            check_type("steering", steering, Steering, "a Steering")
        positions, scale = (steering or NOTHING).applied_as(positions, scale)
        for field, value in (("steering", steering), ("scale", scale), ("positions", positions), ("name", name)):
            object.__setattr__(self, field, value)

    @property
    def steers(self) -> bool:
        """Whether anything is added."""
        return self.steering is not None and bool(self.steering.features) and self.scale != 0


UNSTEERED = Trial(name="unsteered")


def run_trials(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    trials: Sequence[Trial],
    decoding: Decoding | None = None,
    *,
    journal: Journal | None = None,
    progress: bool = True,
) -> list[Graded]:
    """Complete and grade every example of a task under each trial.

    A row's completion is that of the same row under `Steering.apply` alone, up to what batches round differently.
    Trials that sample are paired: the same sample draws by the same noise in each.

    Parameters
    ----------
    model, tokenizer, task : what is tried, and on which examples.
    trials : one or more.
    decoding : the same for all.
    journal : where graded completions are kept, batch by batch. What is there is not made again, if all calls with the
        journal are the same in the same order; processes that `torchrun` launches share the batches among them.

    Returns
    -------
    Graded completions of each trial, in the task's order. Their seconds add up to those of all: rows that are written
    in one batch share its time by their tokens, whatever their trials, and the time of what is read for several
    batches is shared by all their rows alike.

    Raises
    ------
    CorrSteerError : before anything is generated, where a steering does not fit the model, among others.
    """
    warn_once()
    decoding = decoding or Decoding()
    trials = list(trials)
    for trial in trials:
        check_type("each of trials", trial, Trial, "a Trial")
    if not trials:
        raise CorrSteerError("trials must be one or more, got none")
    kinds = kinds_of(model, trials)
    prompts = tokenize(model, tokenizer, task, decoding)
    results = _Results(task, decoding, trials)
    samples = Samples(Generator(model, tokenizer, decoding), task, prompts, sample_keys(prompts))
    batches = samples.generator.plan(prompts, share=any(kind.positions == "generated" for kind in kinds))
    parts = [Part(samples, kind, batch) for batch in batches for kind in kinds]
    completed = complete(parts) if journal is None else complete_shared(parts, journal, _digest(trials, task, decoding))
    with tqdm(total=len(task) * len(trials), unit="completion", desc=task.name, disable=not progress) as bar:
        for graded in completed:
            results.add(graded)
            bar.set_postfix_str(results.leader(), refresh=False)
            bar.update(len(graded))
    return results.graded()


def kinds_of(model: nn.Module, trials: Sequence[Trial]) -> list[Kind]:
    """The trials by the positions that they steer; those that steer nothing are steered at none."""
    numbers: dict[str, list[int]] = {}
    for number, trial in enumerate(trials):
        numbers.setdefault(trial.positions if trial.steers else "generated", []).append(number)
    kinds = []
    for positions, members in numbers.items():
        steering = [number for number in members if trials[number].steers]
        stacked = [(trial.steering, trial.scale) for trial in (trials[n] for n in steering) if trial.steering]
        vectors = stack(model, [steering for steering, _ in stacked], [scale for _, scale in stacked])
        rows = {number: steering.index(number) if number in steering else -1 for number in members}
        kinds.append(Kind(positions, rows, vectors))
    return kinds


def _digest(trials: Sequence[Trial], task: Task, decoding: Decoding) -> str:
    """What tells a call from others."""
    digest = blake2b(to_json([asdict(task.identity), asdict(decoding)]).encode(), digest_size=16)
    for trial in trials:
        digest.update(to_json([trial.scale, trial.positions, (trial.steering or NOTHING).digest]).encode())
    return digest.hexdigest()


class _Results:
    """What trials gave so far."""

    def __init__(self, task: Task, decoding: Decoding, trials: Sequence[Trial]):
        self._task, self._decoding, self._trials = task, decoding, trials
        self._completions = [[""] * len(task) for _ in trials]
        self._rewards = [[dict[str, float]()] * len(task) for _ in trials]
        self._tokens = [0] * len(trials)
        self._seconds, self._grading = [0.0] * len(trials), [0.0] * len(trials)
        self._sums, self._counts = [0.0] * len(trials), [0] * len(trials)

    def add(self, graded: Sequence[GradedRow]) -> None:
        """Take in completions that were graded together."""
        for row in graded:
            self._completions[row.trial][row.sample], self._rewards[row.trial][row.sample] = row.text, row.rewards
            self._tokens[row.trial] += row.tokens
            self._seconds[row.trial] += row.seconds
            self._grading[row.trial] += row.grading_seconds
            self._sums[row.trial] += next(iter(row.rewards.values()))
            self._counts[row.trial] += 1

    def leader(self) -> str:
        """The trial with the highest mean reward so far."""
        means = {number: total / n for number, (total, n) in enumerate(zip(self._sums, self._counts)) if n}
        best = max(means, key=lambda number: means[number])
        return f"{self._trials[best].name or f'trial {best}'} {means[best]:.3f}"

    def graded(self) -> list[Graded]:
        """All of them."""
        identity = self._task.identity
        found = zip(self._completions, self._rewards, self._tokens, self._seconds, self._grading)
        return [
            Graded(texts, by_name(rewards), identity, self._decoding, tokens, seconds, grading)
            for texts, rewards, tokens, seconds, grading in found
        ]
