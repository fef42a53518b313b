"""`evaluate`: a task's score unsteered against steered, on the same prompts with the same decoding."""

from __future__ import annotations

import contextlib
import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from corrsteer.arguments import check_type, whole
from corrsteer.experiments.seen_samples import overlap_notes
from corrsteer.lm.generation import Decoding
from corrsteer.rollouts.grading import Graded, grade
from corrsteer.steering.steering import Steering, check_application
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


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    steering: Steering | None,
    *,
    positions: str = "generated",
    scale: float = 1.0,
    decoding: Decoding | None = None,
    unsteered: Graded | None = None,
    progress: bool = True,
) -> Evaluation:
    """Score a task unsteered and steered.

    Parameters
    ----------
    model, tokenizer, task : what is evaluated, on samples that nothing was selected on.
    steering : None, or one without features, steers nothing.
    positions, scale : as for `Steering.apply`.
    decoding : the same for both.
    unsteered : what `grade` gave for the same task and decoding, to save doing it again.

    Raises
    ------
    CorrSteerError : where `unsteered` is of another task, grader or decoding, among others.
    """
    scale = check_application(positions, scale)
    decoding = decoding or Decoding()
    if steering is not None:
        check_type("steering", steering, Steering, "a Steering")
    if unsteered is not None:
        unsteered.check(task, decoding)
    before = unsteered or grade(model, tokenizer, task, decoding, progress=progress)
    steered = steering.apply(model, positions, scale) if steering is not None else contextlib.nullcontext()
    with steered:
        after = grade(model, tokenizer, task, decoding, progress=progress)
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
        notes=[] if steering is None else overlap_notes(task, steering.provenance),
    )


def mcnemar(improved: int, worsened: int) -> float:
    """Exact two-sided p-value of McNemar's test: a fair coin's chance of a split at least as uneven."""
    improved, worsened = whole("improved", improved, 0), whole("worsened", worsened, 0)
    n, least = improved + worsened, min(improved, worsened)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(least + 1)) / 2**n)
