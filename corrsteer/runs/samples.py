"""`Samples`: what a collection is of, completions that are to be generated or that exist."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from corrsteer.arguments import check_type
from corrsteer.errors import CorrSteerError
from corrsteer.lm import hook_points
from corrsteer.lm.decoding import Decoding
from corrsteer.lm.generation import Generator, stop_tokens
from corrsteer.lm.hook_points import HookPoint
from corrsteer.lm.teacher_forcing import TeacherForcing
from corrsteer.rollouts.generate import Asked
from corrsteer.rollouts.regrading import task_of
from corrsteer.rollouts.rollout import Rollout
from corrsteer.rollouts.rollout_file import alike
from corrsteer.rollouts.tokens import check_tokens, fill_in, mismatched
from corrsteer.runs.options import Options
from corrsteer.runs.sources import Generated, Given, Source
from corrsteer.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Samples:
    """What a collection is of.

    Attributes
    ----------
    task : with an example for each sample, and the graders; without any, rollouts hold rewards.
    source : of completions and residuals.
    lengths : tokens of each, as far as they are known.
    groups : which prompt each is of; empty where no prompt has several.
    notes, provenance : what a run says of them.
    """

    task: Task
    source: Source
    lengths: list[int]
    groups: list[int]
    notes: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.lengths)

    def grade(self, rollouts: Sequence[Rollout], which: Sequence[int]) -> list[dict[str, float]]:
        """Rewards by name of some samples' rollouts."""
        if not self.task.grading:
            return [dict(rollout.rewards) for rollout in rollouts]
        return self.task.grade([each.completion or "" for each in rollouts], [self.task.examples[i] for i in which])

    def origin(self, sample: int) -> str:
        """What errors call a sample."""
        return self.task.examples[sample].source


def generated(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task | None,
    decoding: Decoding,
    samples_per_prompt: int,
    points: dict[int, HookPoint],
    options: Options,
) -> Samples:
    """Samples whose completions are to be generated."""
    if task is None:
        raise CorrSteerError("task must be a Task, got None; give one, or rollouts to collect from")
    check_type("task", task, Task, "a Task")
    if not task.grading:
        raise CorrSteerError(
            f"task must have a grader, as activations are correlated with rewards, got {task.name!r} without; give it "
            f"one: task.graded_by(...)"
        )
    generator = Generator(model, tokenizer, decoding)
    asked = Asked(generator, task, samples_per_prompt)
    source = Generated(asked, generator, points, options)
    every = replace(task, examples=tuple(asked.example(i) for i in range(len(asked))))
    prompts = [asked.prompt(i) for i in range(len(asked))]
    provenance = {"engine": [asked.engine.engine], "samples_per_prompt": samples_per_prompt}
    return Samples(every, source, [len(prompt) for prompt in prompts], _groups(prompts, options), [], provenance)


def given(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rollouts: Iterable[Rollout],
    task: Task | None,
    decoding: Decoding,
    points: dict[int, HookPoint],
    options: Options,
) -> Samples:
    """Samples whose completions exist."""
    rollouts = alike(rollouts)
    if task is None:
        task = task_of(rollouts, grader=None)
    check_type("task", task, Task, "a Task")
    if len(task) != len(rollouts):
        raise CorrSteerError(
            f"task must have an example for each of the rollouts, {len(rollouts)}, got {len(task)}; make it of them: "
            f"task_of(rollouts, grader)"
        )
    for example, rollout in zip(task.examples, rollouts):
        if rollout.prompt is not None and rollout.prompt_text != example.prompt:
            raise CorrSteerError(
                f"task must have the examples of the rollouts in their order, but the prompt of {example.source} is "
                f"not that of {rollout.where}; make it of them: task_of(rollouts, grader)"
            )
    if not task.grading and (without := [rollout.id for rollout in rollouts if not rollout.rewards]):
        raise CorrSteerError(
            f"rollouts must hold rewards, or the task a grader, but {len(without)} of {len(rollouts)} have none, such "
            f"as {without[0]!r}; give a grader"
        )
    vocabulary = getattr(hook_points.embeddings(model), "num_embeddings", 1 << 62)
    context = getattr(hook_points.text_config(model), "max_position_embeddings", None)
    rollouts = fill_in(rollouts, tokenizer, stop_tokens(model, tokenizer))
    check_tokens(rollouts, vocabulary, context)
    differ = mismatched(rollouts, tokenizer)
    reader = TeacherForcing(
        model, points, positions=options.positions, exclude_tokens=options.exclude_tokens,
        batch_tokens=decoding.batch_tokens, buffer_bytes=options.buffer_bytes,
    )  # fmt: skip
    sequences = [(list(rollout.prompt_ids or ()), list(rollout.completion_ids or ())) for rollout in rollouts]
    notes = []
    if differ:
        notes.append(
            f"the tokens of {len(differ)} of {len(rollouts)} completions do not decode to their text, such as that of "
            f"{differ[0]!r}: what is read of them is not quite what was written"
        )
    return Samples(
        task,
        Given(reader, rollouts, sequences),
        [len(prompt) + len(completion) for prompt, completion in sequences],
        _groups([prompt for prompt, _ in sequences], options),
        notes,
        {"engine": sorted({rollout.engine or "unknown" for rollout in rollouts}), "decoding": decoding_of(rollouts)},
    )


def decoding_of(rollouts: Sequence[Rollout]) -> dict[str, Any] | None:
    """How rollouts were generated; None where that is not known, or not the same for all."""
    first = rollouts[0].decoding
    return first if all(rollout.decoding == first for rollout in rollouts) else None


def _groups(prompts: Sequence[Sequence[int]], options: Options) -> list[int]:
    """Which prompt each sample is of; none where every prompt has one sample."""
    numbers: dict[tuple[int, ...], int] = {}
    groups = [numbers.setdefault(tuple(prompt), len(numbers)) for prompt in prompts]
    if len(numbers) < len(groups):
        return groups
    if options.within_prompt:
        raise CorrSteerError(
            f"within_prompt must be False where every prompt has one sample, got {len(groups)} samples of as many "
            f"prompts; take several samples of each"
        )
    return []
