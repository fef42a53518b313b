"""`evaluate`: a task's score unsteered against steered, on the same prompts with the same decoding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, overload

from torch import nn

from corrsteer.errors import CorrSteerError
from corrsteer.experiments.seen_samples import overlap_notes
from corrsteer.experiments.trials import UNSTEERED, Trial, run_trials
from corrsteer.lm.decoding import Decoding
from corrsteer.rollouts.grading import Graded
from corrsteer.stats.paired import mcnemar
from corrsteer.steering.steering import Steering
from corrsteer.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Evaluation:
    """Unsteered against steered.

    Attributes
    ----------
    n : samples.
    unsteered, steered : mean rewards.
    improved, worsened : samples whose reward rose, and fell.
    changed_equal : samples whose completion changed while the reward did not.
    side_effect_ratio : worsened / (improved + worsened); None where no reward changed.
    p_value : exact two-sided McNemar test of improved against worsened (for rewards that are not 0 or 1, the
        sign test, which is the same computation).
    examples : prompt, answer, both completions and rewards of every sample.
    notes : what a user should know, such as samples that the steering was selected on.
    """

    n: int
    unsteered: float
    steered: float
    improved: int
    worsened: int
    changed_equal: int
    side_effect_ratio: float | None
    p_value: float
    examples: list[dict[str, Any]] = field(repr=False)
    notes: list[str] = field(default_factory=list)

    def to_dict(self, examples: bool = True) -> dict[str, Any]:
        """For JSON."""
        described = asdict(self)
        return described if examples else {k: v for k, v in described.items() if k != "examples"}


@overload
def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    steering: Steering | None,
    *,
    positions: str | None = None,
    scale: float | None = None,
    decoding: Decoding | None = None,
    unsteered: Graded | None = None,
    progress: bool = True,
) -> Evaluation: ...


@overload
def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    steering: Mapping[str, Steering | None],
    *,
    positions: str | None = None,
    scale: float | None = None,
    decoding: Decoding | None = None,
    unsteered: Graded | None = None,
    progress: bool = True,
) -> dict[str, Evaluation]: ...


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    steering: Steering | Mapping[str, Steering | None] | None,
    *,
    positions: str | None = None,
    scale: float | None = None,
    decoding: Decoding | None = None,
    unsteered: Graded | None = None,
    progress: bool = True,
) -> Evaluation | dict[str, Evaluation]:
    """Score a task unsteered and steered.

    Parameters
    ----------
    model, tokenizer, task : what is evaluated, on samples that nothing was selected on.
    steering : None, or one without features, steers nothing. Of several, by name, each is compared with the same
        unsteered completions; what they share is computed once, see `run_trials`.
    positions, scale : of all, as for `Steering.apply`; by default each steering's own.
    decoding : the same for all.
    unsteered : what `grade` gave for the same task and decoding, to save doing it again.

    Returns
    -------
    An evaluation; of several steerings, one by each name.

    Raises
    ------
    CorrSteerError : where `unsteered` is of another task, grader or decoding, among others.
    """
    decoding = decoding or Decoding()
    named: dict[str, Steering | None] = dict(steering) if isinstance(steering, Mapping) else {"steered": steering}
    if not named:
        raise CorrSteerError("steering must be one or more, got an empty mapping")
    trials = [Trial(one, scale, positions, name) for name, one in named.items()]
    if unsteered is not None:
        unsteered.check(task, decoding)
    before = [] if unsteered is not None else [UNSTEERED]
    graded = run_trials(model, tokenizer, task, before + trials, decoding, progress=progress)
    plain, *steered = graded if unsteered is None else [unsteered, *graded]
    evaluations = {
        name: _compare(task, plain, after, [] if one is None else overlap_notes(task, one.provenance))
        for (name, one), after in zip(named.items(), steered)
    }
    return evaluations if isinstance(steering, Mapping) else evaluations["steered"]


def _compare(task: Task, before: Graded, after: Graded, notes: list[str]) -> Evaluation:
    changes = [a - b for a, b in zip(after.rewards, before.rewards)]
    improved, worsened = sum(c > 0 for c in changes), sum(c < 0 for c in changes)
    rows = zip(task.examples, before.completions, after.completions, before.rewards, after.rewards)
    return Evaluation(
        n=len(task),
        unsteered=before.score,
        steered=after.score,
        improved=improved,
        worsened=worsened,
        changed_equal=sum(
            a == b and s != t
            for a, b, s, t in zip(before.rewards, after.rewards, before.completions, after.completions)
        ),
        side_effect_ratio=worsened / (improved + worsened) if improved + worsened else None,
        p_value=mcnemar(improved, worsened),
        examples=[
            {"prompt": e.prompt, "answer": e.answer, "before": s, "after": t, "reward_before": a, "reward_after": b}
            for e, s, t, a, b in rows
        ],
        notes=notes,
    )
