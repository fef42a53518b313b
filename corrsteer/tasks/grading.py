"""`Grading`: the graders of a task by name, and the rewards by name that they give a batch of completions."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from numbers import Real
from typing import Any, TypeVar

from corrsteer.tasks import graders
from corrsteer.tasks.examples import Example
from corrsteer.tasks.graders import TaskError, one_line

Reward = float | Mapping[str, float]
Grader = Callable[[str, Example], Reward]
BatchGrader = Callable[[Sequence[str], Sequence[Example]], Sequence[Reward]]
AnyGrader = str | Grader | BatchGrader
GraderSpec = AnyGrader | Mapping[str, AnyGrader] | None

F = TypeVar("F", bound=Callable[..., Any])

UNNAMED = "reward"  # what the reward of a grader is called that was given without a name
_MARK = "_corrsteer_grades_batches"


def batched(grader: F) -> F:
    """Mark a grader that takes a batch: ``(completions, examples)`` in, a sequence of as many rewards out.

    For graders with a model of their own. It stands on a function, or on the ``__call__`` of a class.
    """
    setattr(grader, _MARK, True)
    return grader


@dataclass(frozen=True)
class _Named:
    """One grader.

    Attributes
    ----------
    name, label : what its reward is called, and what provenance calls the grader itself.
    needs_answer : whether every example must have an answer.
    gives_numbers : whether it is known to return no rewards by name.
    takes_batch : whether it is `batched`.
    """

    name: str
    label: str
    grade: Callable[..., Any]
    needs_answer: bool
    gives_numbers: bool
    takes_batch: bool


@dataclass(frozen=True)
class Grading:
    """A task's graders, and which of their rewards comes first.

    A grader that returns one number gives the reward of its name. One that returns several by name gives those, after
    its own name if it has one: ``quality`` returning ``{"style": 1}`` gives ``quality.style``. The rewards that a
    grader gave the first example are those that it must give every other one, here and in all parts of the task.

    Attributes
    ----------
    default : the reward that comes first; None for the first grader's first.
    """

    graders: tuple[_Named, ...]
    default: str | None = None
    _given: dict[str, tuple[str, ...]] = field(default_factory=dict, repr=False, compare=False)  # what each gave first

    @classmethod
    def of(cls, grader: GraderSpec, label: str | None = None) -> Grading:
        """Graders from what `Task.from_rows` takes; ``label`` is what provenance calls a single one.

        Raises
        ------
        TaskError : for what is no grader, or no name of one.
        """
        if grader is None:
            return cls(())
        if not isinstance(grader, Mapping):
            return cls((_named(UNNAMED, grader, label),))
        if not grader:
            raise TaskError("grader must have at least one grader by name, got an empty mapping; None is for no grader")
        return cls(tuple(_named(_checked_name(name), one) for name, one in grader.items()))

    def __bool__(self) -> bool:
        return bool(self.graders)

    def __str__(self) -> str:
        """What provenance records."""
        if not self.graders:
            return "none"
        if len(self.graders) == 1 and self.graders[0].name == UNNAMED:
            return self.graders[0].label
        return ", ".join(f"{grader.name}={grader.label}" for grader in self.graders)

    @property
    def source(self) -> str | None:
        """A hash of the graders' source, as far as that can be read: a function's name may stay while it changes."""
        found = [source for grader in self.graders if (source := _source(grader.grade))]
        return blake2b("".join(found).encode(), digest_size=8).hexdigest() if found else None

    @property
    def needs_answer(self) -> str | None:
        """The label of a grader that needs an answer, if there is one."""
        return next((grader.label for grader in self.graders if grader.needs_answer), None)

    @property
    def notes(self) -> list[str]:
        """What a reader of rewards should know of who gave them."""
        return [
            f"graded by {grader.label}, which needs no model and stands in for {graders.STAND_INS[grader.label]}"
            for grader in self.graders
            if grader.label in graders.STAND_INS
        ]

    def check_answer(self, answer: str | tuple[str, ...]) -> None:
        """Raise TaskError if a grader could never match this answer, or would match anything."""
        for grader in self.graders:
            graders.check_answer(grader.label, answer)
            getattr(grader.grade, "check_answer", _any_answer)(answer)
            if _rewards_refusal(grader):
                graders.check_refusal(answer, shared=any(map(_may_read_answer, self.graders)))

    def rewarded_by(self, name: str) -> Grading:
        """The same with another reward first.

        Raises
        ------
        TaskError : where none of the graders gives it, as far as that is known before they are called.
        """
        if not any(self._may_give(grader, name) for grader in self.graders):
            raise TaskError(f"reward must be one of those that the task's graders give, {self._names()}, got {name!r}")
        return replace(self, default=name)

    def grade(self, completions: Sequence[str], examples: Sequence[Example]) -> list[dict[str, float]]:
        """Rewards by name of each completion, in the same order for all; see `Task.grade`."""
        if len(completions) != len(examples):
            raise TaskError(f"completions must be as many as examples, got {len(completions)} and {len(examples)}")
        if not self.graders:
            raise TaskError("the task has no grader, so its completions have no rewards; give it one: grader=...")
        rewards: list[dict[str, float]] = [{} for _ in completions]
        for grader in self.graders:
            for at, returned in enumerate(_returned(grader, completions, examples)):
                given = self._rewards(grader, returned, examples[at])
                if twice := given.keys() & rewards[at].keys():
                    raise TaskError(f"two graders give the reward {sorted(twice)[0]!r}; give one of them another name")
                rewards[at] |= given
        return rewards if self.default is None else [_first(self.default, each) for each in rewards]

    def _may_give(self, grader: _Named, name: str) -> bool:
        """Whether a reward is a grader's, as far as that is known."""
        if grader.name in self._given or grader.gives_numbers:
            return name in self._given.get(grader.name, (grader.name,))
        return grader.name == UNNAMED or name == grader.name or name.startswith(f"{grader.name}.")

    def _names(self) -> str:
        names = (name for grader in self.graders for name in self._given.get(grader.name, (grader.name,)))
        return ", ".join(names) or "none"

    def _rewards(self, grader: _Named, returned: Any, example: Example) -> dict[str, float]:
        if isinstance(returned, Mapping):
            prefix = "" if grader.name == UNNAMED else f"{grader.name}."
            found = {f"{prefix}{_key(grader, key, example)}": value for key, value in returned.items()}
            if not found:
                raise TaskError(
                    f"{example.source}: grader {grader.label} must return at least one reward, got an empty mapping"
                )
        else:
            found = {grader.name: returned}
        names = self._given.setdefault(grader.name, tuple(found))
        if set(names) != set(found):
            raise TaskError(
                f"{example.source}: grader {grader.label} must return the same rewards for every example, got "
                f"{', '.join(found)} after {', '.join(names)}"
            )
        return {name: _finite(grader, found[name], example) for name in names}


def _named(name: str, grader: AnyGrader, label: str | None = None) -> _Named:
    known_as, grade, needs_answer = graders.resolve(grader)
    needs_answer = needs_answer or bool(getattr(grade, "needs_answer", False))
    gives_numbers = isinstance(grader, str) and graders.gives_number(grader)
    return _Named(name, label or known_as, grade, needs_answer, gives_numbers, _takes_batch(grade))


def _rewards_refusal(grader: _Named) -> bool:
    return grader.grade is graders.refusal_phrases or getattr(grader.grade, "rewards_refusal", False)


def _may_read_answer(grader: _Named) -> bool:
    return not _rewards_refusal(grader) and graders.may_read_answer(grader.label)


def _any_answer(answer: str | tuple[str, ...]) -> None:
    """What a grader thinks of an answer that says nothing of answers."""


def _source(grade: Callable[..., Any]) -> str | None:
    function: Any = inspect.unwrap(grade.func if isinstance(grade, functools.partial) else grade)
    try:
        return inspect.getsource(function if hasattr(function, "__qualname__") else type(function))
    except (OSError, TypeError):  # typed at a prompt, or compiled
        return None


def _checked_name(name: Any) -> str:
    if not isinstance(name, str) or not name.strip():
        raise TaskError(f"the name of a grader must be text that is not empty, got {name!r:.40}")
    return name


def _takes_batch(grade: Any) -> bool:
    while isinstance(grade, functools.partial):
        grade = grade.func
    return getattr(grade, _MARK, False) or getattr(getattr(grade, "__call__", None), _MARK, False)  # noqa: B004


def _returned(grader: _Named, completions: Sequence[str], examples: Sequence[Example]) -> list[Any]:
    """What a grader returns of each."""
    if not grader.takes_batch:
        return [_of_one(grader, completion, example) for completion, example in zip(completions, examples)]
    if not examples:
        return []
    where = examples[0].source + (f" and {len(examples) - 1} more" if len(examples) > 1 else "")
    try:
        returned: Any = grader.grade(completions, examples)
        returned = returned.tolist() if hasattr(returned, "tolist") else list(returned)  # arrays of NumPy and torch
    except Exception as error:  # a user's grader may raise anything
        raise TaskError(f"{where}: grader {grader.label} failed: {one_line(error)}") from error
    if not isinstance(returned, list) or len(returned) != len(examples):
        got = len(returned) if isinstance(returned, list) else repr(returned)
        raise TaskError(
            f"{where}: grader {grader.label} takes a batch, and must return a reward for each of its {len(examples)} "
            f"completions, got {got}"
        )
    return returned


def _of_one(grader: _Named, completion: str, example: Example) -> Any:
    try:
        return grader.grade(completion, example)
    except Exception as error:  # a user's grader may raise anything
        raise TaskError(f"{example.source}: grader {grader.label} failed: {one_line(error)}") from error


def _key(grader: _Named, key: Any, example: Example) -> str:
    if not isinstance(key, str) or not key:
        raise TaskError(
            f"{example.source}: grader {grader.label} must name its rewards by text that is not empty, got {key!r:.40}"
        )
    return key


def _finite(grader: _Named, value: Any, example: Example) -> float:
    try:
        value = value.item() if hasattr(value, "item") else value  # numpy and torch scalars
        if isinstance(value, Real) and math.isfinite(value):
            return float(value)
    except Exception as error:  # a tensor of several numbers, say, or an int that no float holds
        raise TaskError(f"{example.source}: grader {grader.label} failed: {one_line(error)}") from error
    raise TaskError(f"{example.source}: grader {grader.label} must return a finite number, got {value!r:.80}")


def _first(name: str, rewards: dict[str, float]) -> dict[str, float]:
    if name not in rewards:
        raise TaskError(f"reward must be one of those that the task's graders give, {', '.join(rewards)}, got {name!r}")
    return {name: rewards[name], **rewards}
