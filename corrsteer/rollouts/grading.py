"""`grade`: completions of every example of a task, and their rewards."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn
from tqdm.auto import tqdm

from corrsteer.compatibility import warn_once
from corrsteer.errors import CorrSteerError
from corrsteer.lm.decoding import Decoding
from corrsteer.lm.generation import Generator, tokenize
from corrsteer.lm.sampling import sample_keys
from corrsteer.rollouts.rollout import by_name
from corrsteer.tasks import Task
from corrsteer.tasks.identity import TaskIdentity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Graded:
    """Completions and their rewards, in the task's order.

    Attributes
    ----------
    task, decoding : what was graded, and how it was generated.
    rewards_by_name : a list for each reward that the graders give; the first is the default.
    tokens : generated in all, with those that ended a completion.
    seconds : that generating them took, prompts read and texts decoded, but not graded.
    grading_seconds : that grading them took.
    """

    completions: list[str]
    rewards_by_name: dict[str, list[float]]
    task: TaskIdentity
    decoding: Decoding
    tokens: int
    seconds: float = field(compare=False)
    grading_seconds: float = field(default=0.0, compare=False)

    @property
    def rewards(self) -> list[float]:
        """The default reward of each."""
        return next(iter(self.rewards_by_name.values()))

    @property
    def score(self) -> float:
        """Mean reward."""
        return sum(self.rewards) / len(self.rewards)

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens a second, of all rows of a batch together."""
        return self.tokens / self.seconds

    def check(self, task: Task, decoding: Decoding) -> None:
        """Raise unless this is of the task, generated like that."""
        mine, theirs = self.task, task.identity
        differs = [
            f"{words} is {getattr(mine, name)}, not {getattr(theirs, name)}"
            for name, words in (("grader", "grader"), ("reward", "reward"), ("samples", "number of samples"))
            if getattr(mine, name) != getattr(theirs, name)
        ]
        if mine.samples == theirs.samples and mine.fingerprint != theirs.fingerprint:
            differs.append(f"prompts or answers are those of {mine}, not {theirs}")
        differs += [
            f"{name} is {getattr(self.decoding, name)}, not {getattr(decoding, name)}"
            for name in ("max_new_tokens", "temperature", "top_p", "seed", "first_token_among")  # which decide tokens
            if getattr(self.decoding, name) != getattr(decoding, name)
        ]
        if differs:
            raise CorrSteerError(
                f"unsteered must be graded on the same task with the same decoding, but its {', its '.join(differs)}; "
                f"grade this task"
            )


def grade(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    decoding: Decoding | None = None,
    *,
    progress: bool = True,
) -> Graded:
    """Complete and grade every example, with the model as it is (inside `Steering.apply`, steered)."""
    warn_once()
    decoding = decoding or Decoding()
    prompts = tokenize(model, tokenizer, task, decoding)
    generator, keys = Generator(model, tokenizer, decoding), sample_keys(prompts)
    completions, rewards = [""] * len(task), [dict[str, float]()] * len(task)
    total = done = seconds = grading = 0.0
    tokens = 0
    with tqdm(total=len(task), unit="sample", desc=f"grade {task.name}", disable=not progress) as bar:
        for batch in generator.plan(prompts):
            started = time.perf_counter()
            written = generator.complete([prompts[i] for i in batch], [keys[i] for i in batch])
            seconds += time.perf_counter() - started
            started = time.perf_counter()
            graded = task.grade([each.text for each in written], [task.examples[i] for i in batch])
            grading += time.perf_counter() - started
            for i, each, given in zip(batch, written, graded):
                completions[i], rewards[i] = each.text, given
                total += next(iter(given.values()))
                tokens += each.tokens
            done += len(batch)
            bar.set_postfix_str(f"reward {total / done:.3f}", refresh=False)
            bar.update(len(batch))
    return Graded(completions, by_name(rewards), task.identity, decoding, tokens, seconds, grading)
