"""`run_trials`: many steerings over one task, in as few passes of the language model as they need.

With `positions="generated"` nothing before the last prompt token depends on the steering. So prompts are read once up
to there, and what was read is given to a row of each trial; rows of different trials are written in the same batches.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from corrsteer.arguments import check_type
from corrsteer.compatibility import warn_once
from corrsteer.errors import CorrSteerError
from corrsteer.lm.decoding import Decoding
from corrsteer.lm.generation import Completion, Generator, Within, tokenize
from corrsteer.lm.hook_points import HookPoint
from corrsteer.lm.prefill import Begun
from corrsteer.lm.sampling import sample_keys
from corrsteer.rollouts.grading import Graded
from corrsteer.rollouts.rollout import by_name
from corrsteer.steering.hooks import add_vectors
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
    kinds = _kinds(model, trials)
    prompts = tokenize(model, tokenizer, task, decoding)
    results = _Results(task, decoding, trials)
    generator, keys = Generator(model, tokenizer, decoding), sample_keys(prompts)
    with tqdm(total=len(task) * len(trials), unit="completion", desc=task.name, disable=not progress) as bar:
        for batch in generator.plan(prompts, share=any(kind.positions == "generated" for kind in kinds)):
            for kind in kinds:
                rows = [_Row(trial, vector, sample) for trial, vector in kind.trials.items() for sample in batch]
                for written in _complete(generator, kind, batch, rows, prompts, keys):
                    results.add(written)
                    bar.set_postfix_str(results.leader(), refresh=False)
                    bar.update(len(written))
    return results.graded()


@dataclass
class _Kind:
    """Trials that steer the same positions.

    Attributes
    ----------
    trials : their numbers, and which of the vectors each adds; -1 for none.
    vectors : hook point -> `[V, d]` float32.
    """

    positions: str
    trials: dict[int, int]
    vectors: dict[HookPoint, Tensor]


def _kinds(model: nn.Module, trials: Sequence[Trial]) -> list[_Kind]:
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
        kinds.append(_Kind(positions, rows, vectors))
    return kinds


class _Written(NamedTuple):
    """What was written in a row, and its share of the time."""

    row: _Row
    completion: Completion
    seconds: float


class _Row(NamedTuple):
    """A sample of a trial, and which vector the trial adds."""

    trial: int
    vector: int
    sample: int


def _complete(
    generator: Generator,
    kind: _Kind,
    batch: list[int],
    rows: list[_Row],
    prompts: Sequence[list[int]],
    keys: Sequence[int],
) -> Iterator[list[_Written]]:
    """Complete rows whose samples are those of a batch, some at a time."""
    most = generator.decoding.rows(max(len(prompts[i]) for i in batch))
    shares = kind.positions == "generated"
    reads = shares and len(kind.trials) > 1 and generator.reuse.rows
    started = time.perf_counter()
    begun = generator.read([prompts[i] for i in batch]) if reads else None
    if begun is not None and torch.accelerator.is_available():
        torch.accelerator.synchronize()  # otherwise the rows that are written first would pay for all
    reading = (time.perf_counter() - started) / len(rows)
    if begun is not None:
        most = min(most, begun.most_rows(generator.decoding), _most_trials(generator, begun) * len(batch))
    places = {sample: at for at, sample in enumerate(batch)}
    for at in range(0, len(rows), most):
        some = rows[at : at + most]
        samples, within = [row.sample for row in some], _within(generator.model, kind, some)
        drawn = [keys[i] for i in samples]
        started = time.perf_counter()
        if begun is not None:
            written = generator.finish(begun.rows([places[i] for i in samples]), drawn, within)
        else:
            written = generator.complete([prompts[i] for i in samples], drawn, share=shares, within=within)
        writing = (time.perf_counter() - started) / sum(completion.tokens for completion in written)
        yield [_Written(row, each, reading + writing * each.tokens) for row, each in zip(some, written)]


def _most_trials(generator: Generator, begun: Begun) -> int:
    """How many trials share batches: with more than one, what was read is copied for each, and weights read less often.

    One trial of all rows shares what was read with the next, without a copy.
    """
    weights = sum(parameter.nbytes for parameter in generator.model.parameters())
    copied = 2 * begun.nbytes  # read and written
    return 1 if copied > weights * generator.decoding.max_new_tokens else generator.decoding.batch_size


def _within(model: nn.Module, kind: _Kind, rows: list[_Row]) -> Within:
    def steered(left: Sequence[int]) -> contextlib.AbstractContextManager[Any]:
        """Only what these rows add, where it is not nothing."""
        vectors = [rows[at].vector for at in left]
        used = sorted({vector for vector in vectors if vector >= 0})
        tables = {point: table[used] for point, table in kind.vectors.items() if bool(table[used].any())}
        if not tables:
            return contextlib.nullcontext()
        if used == sorted(set(vectors)) and len(used) == 1:
            return add_vectors(model, tables, None, kind.positions)
        places = {vector: at for at, vector in enumerate(used)}
        chosen = [places.get(vector, -1) for vector in vectors]
        return add_vectors(model, tables, torch.tensor(chosen, dtype=torch.int32, device="cpu"), kind.positions)

    return steered


class _Results:
    """What trials gave so far."""

    def __init__(self, task: Task, decoding: Decoding, trials: Sequence[Trial]):
        self._task, self._decoding, self._trials = task, decoding, trials
        self._completions = [[""] * len(task) for _ in trials]
        self._rewards = [[dict[str, float]()] * len(task) for _ in trials]
        self._tokens, self._seconds = [0] * len(trials), [0.0] * len(trials)
        self._sums, self._counts = [0.0] * len(trials), [0] * len(trials)

    def add(self, written: Sequence[_Written]) -> None:
        """Grade completions that were written together."""
        examples = [self._task.examples[each.row.sample] for each in written]
        rewards = self._task.grade([each.completion.text for each in written], examples)
        for (row, completion, seconds), given in zip(written, rewards):
            self._completions[row.trial][row.sample], self._rewards[row.trial][row.sample] = completion.text, given
            self._tokens[row.trial] += completion.tokens
            self._seconds[row.trial] += seconds
            self._sums[row.trial] += next(iter(given.values()))
            self._counts[row.trial] += 1

    def leader(self) -> str:
        """The trial with the highest mean reward so far."""
        means = {number: total / n for number, (total, n) in enumerate(zip(self._sums, self._counts)) if n}
        best = max(means, key=lambda number: means[number])
        return f"{self._trials[best].name or f'trial {best}'} {means[best]:.3f}"

    def graded(self) -> list[Graded]:
        """All of them."""
        identity = self._task.identity
        found = zip(self._completions, self._rewards, self._tokens, self._seconds)
        return [Graded(c, by_name(r), identity, self._decoding, tokens, seconds) for c, r, tokens, seconds in found]
