"""`evaluate`: a task's score unsteered against steered, on the same prompts with the same decoding."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, overload

from torch import nn

from corrsteer.errors import CorrSteerError
from corrsteer.experiments.seen_samples import overlap_notes, repetition_notes
from corrsteer.experiments.trials import UNSTEERED, Trial, run_trials
from corrsteer.lm.decoding import Decoding
from corrsteer.rollouts.grading import Graded
from corrsteer.rollouts.journal import Journal
from corrsteer.stats.paired import difference, holm, mean, paired_p_value
from corrsteer.steering.steering import Steering
from corrsteer.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Interval = tuple[float, float] | None  # of 95 %; None where rewards give none, see `corrsteer.stats.paired`


@dataclass(frozen=True)
class CategoryEvaluation:
    """The samples of a category, unsteered against steered; each as in `Evaluation`."""

    n: int
    unsteered: float
    unsteered_interval: Interval
    steered: float
    steered_interval: Interval
    difference: float
    difference_interval: Interval


@dataclass(frozen=True)
class Evaluation:
    """Unsteered against steered.

    Attributes
    ----------
    n : samples.
    unsteered, steered : mean rewards.
    difference : the mean of steered less unsteered, sample by sample.
    unsteered_interval, steered_interval, difference_interval : their 95 % confidence intervals, see
        `corrsteer.stats.paired`; None where rewards give none.
    improved, worsened : samples whose reward rose, and fell.
    changed_equal : samples whose completion changed while the reward did not.
    side_effect_ratio : worsened / (improved + worsened); None where no reward changed.
    transitions : samples that were right and stayed right (`right_to_right`), and so on; right is a reward above 0.
    p_value : two-sided, of the difference: McNemar's exact test, or for rewards that are not all 0 or 1 a permutation
        test of the mean, see `paired_p_value`.
    p_holm : Holm's adjustment of it to all steerings that were evaluated together.
    unsteered_tokens_per_second, steered_tokens_per_second : generated tokens by the seconds that they took. Rows that
        were written in one batch share its time by their tokens, see `run_trials`.
    categories : the same of each category, where the task has any; their intervals are not adjusted to each other.
    examples : prompt, answer, category, both completions and rewards of every sample, and its change: `improved`,
        `worsened`, `changed_equal` or `none`.
    notes : what a user should know, such as samples that the steering was selected on, or that repeat a prompt.
    grader : what gave the rewards, as provenance has it; empty in results that are older than this field.
    """

    n: int
    unsteered: float
    unsteered_interval: Interval
    steered: float
    steered_interval: Interval
    difference: float
    difference_interval: Interval
    improved: int
    worsened: int
    changed_equal: int
    side_effect_ratio: float | None
    transitions: dict[str, int]
    p_value: float
    p_holm: float
    unsteered_tokens_per_second: float = field(compare=False)
    steered_tokens_per_second: float = field(compare=False)
    categories: dict[str, CategoryEvaluation]
    examples: list[dict[str, Any]] = field(repr=False)
    notes: list[str] = field(default_factory=list)
    grader: str = ""

    @classmethod
    def from_dict(cls, described: Mapping[str, Any]) -> Evaluation:
        """Of what `to_dict` gave, as JSON holds it."""
        categories = {
            name: CategoryEvaluation(**{**of_one, **_intervals(of_one)})
            for name, of_one in described["categories"].items()
        }
        return cls(**{**described, **_intervals(described), "categories": categories})

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
    journal: Journal | None = None,
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
    journal: Journal | None = None,
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
    journal: Journal | None = None,
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
    journal : as for `run_trials`.

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
    graded = run_trials(model, tokenizer, task, before + trials, decoding, journal=journal, progress=progress)
    plain, *steered = graded if unsteered is None else [unsteered, *graded]
    known = [*task.grading.notes, *repetition_notes(task)]
    evaluations = {
        name: _compare(task, plain, after, [*known, *([] if one is None else overlap_notes(task, one.provenance))])
        for (name, one), after in zip(named.items(), steered)
    }
    adjusted = holm([evaluation.p_value for evaluation in evaluations.values()])
    evaluations = {name: replace(evaluations[name], p_holm=p) for name, p in zip(evaluations, adjusted)}
    return evaluations if isinstance(steering, Mapping) else evaluations["steered"]


def _compare(task: Task, before: Graded, after: Graded, notes: list[str]) -> Evaluation:
    """What one steering changed, as if no other were evaluated with it."""
    examples = _examples(task, before, after)
    changes = Counter(example["change"] for example in examples)
    improved, worsened = changes["improved"], changes["worsened"]
    by_category: dict[str, list[dict[str, Any]]] = {}
    for example in examples:
        if "category" in example:
            by_category.setdefault(example["category"], []).append(example)
    p_value = paired_p_value(before.rewards, after.rewards)
    return Evaluation(
        **_means(examples),
        improved=improved,
        worsened=worsened,
        changed_equal=changes["changed_equal"],
        side_effect_ratio=worsened / (improved + worsened) if improved + worsened else None,
        transitions=_transitions(examples),
        p_value=p_value,
        p_holm=p_value,
        unsteered_tokens_per_second=before.tokens_per_second,
        steered_tokens_per_second=after.tokens_per_second,
        categories={name: CategoryEvaluation(**_means(of)) for name, of in sorted(by_category.items())},
        examples=examples,
        notes=notes,
        grader=task.grader_name,
    )


def _examples(task: Task, before: Graded, after: Graded) -> list[dict[str, Any]]:
    found = []
    rows = zip(task.examples, before.completions, after.completions, before.rewards, after.rewards)
    for example, plain, steered, reward_before, reward_after in rows:
        category = task.category(example)
        if reward_after == reward_before:
            change = "none" if plain == steered else "changed_equal"
        else:
            change = "improved" if reward_after > reward_before else "worsened"
        found.append({
            "prompt": example.prompt, "answer": example.answer, **({} if category is None else {"category": category}),
            "before": plain, "after": steered, "reward_before": reward_before, "reward_after": reward_after,
            "change": change,
        })  # fmt: skip
    return found


def _means(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Both means and their difference, each with its interval."""
    before, after = ([example[f"reward_{when}"] for example in examples] for when in ("before", "after"))
    found = {"unsteered": mean(before), "steered": mean(after), "difference": difference(before, after)}
    described: dict[str, Any] = {"n": len(examples)}
    for name, (value, low, high) in found.items():
        described |= {name: value, f"{name}_interval": None if math.isnan(low) else (low, high)}
    return described


def _intervals(described: Mapping[str, Any]) -> dict[str, Interval]:
    """Those of what `asdict` gave, which JSON holds as lists."""
    return {name: value and tuple(value) for name, value in described.items() if name.endswith("_interval")}


def _transitions(examples: list[dict[str, Any]]) -> dict[str, int]:
    kinds = Counter((example["reward_before"] > 0, example["reward_after"] > 0) for example in examples)
    words = {True: "right", False: "wrong"}
    return {f"{words[a]}_to_{words[b]}": kinds[a, b] for a in (True, False) for b in (True, False)}
