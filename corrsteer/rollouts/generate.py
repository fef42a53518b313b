"""`generate_rollouts`: complete a task's prompts, once or several times each, and grade what comes."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from corrsteer import processes
from corrsteer.arguments import as_path, check_type
from corrsteer.compatibility import warn_once
from corrsteer.errors import CorrSteerError
from corrsteer.lm.decoding import Decoding
from corrsteer.lm.engine import engine_of
from corrsteer.lm.identity import computed_on, described
from corrsteer.rollouts.asked import Asked
from corrsteer.rollouts.journal import Journal, begun_in, beside
from corrsteer.rollouts.rollout import Rollout, RolloutError
from corrsteer.rollouts.rollout_file import read_rollouts, write_rollouts
from corrsteer.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log: logging.Logger = logging.getLogger(__name__)


def generate_rollouts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    decoding: Decoding | None = None,
    *,
    samples_per_prompt: int = 1,
    out: str | os.PathLike[str] | None = None,
    replace_out: bool = False,
    progress: bool = True,
) -> Iterator[list[Rollout]]:
    """Complete every example, grade the completions, and give them batch by batch.

    What a sample draws depends on the decoding's seed, its prompt and its number alone: not on its batch, on how many
    samples are asked for, or on the process. Nothing is generated before the first batch is asked for.

    Parameters
    ----------
    model : a Hugging Face causal language model, as it is (inside `Steering.apply`, steered), or a `vllm.LLM`.
    task : without a grader, the rollouts have no rewards.
    samples_per_prompt : completions of each example. The first has the example's `source` as its id, others that and
        `#1`, `#2`, and so on.
    out : a file to write, in the task's order, samples of an example together. Until then each batch is on the disk
        before it is given, in a folder beside it: the same call goes on with what is there, see `Journal`. Processes
        that `torchrun` launches share the batches among them, and each is given all.
    replace_out : whether a file that is there is replaced, and what was begun is begun anew.

    Raises
    ------
    CorrSteerError : before anything is generated, for a task that does not fit the model, several samples of a greedy
        decoding, two examples of one source, and a file that is there and holds others, or cannot be written.
    JobDiffers : where other rollouts were begun; the message lists each difference.
    TaskError : for a grader that fails; the batches before are kept.
    """
    warn_once()
    decoding = decoding or Decoding()
    check_type("task", task, Task, "a Task")
    asked = Asked(engine_of(model, tokenizer, decoding), task, samples_per_prompt)
    path = None if out is None else as_path("out", out)
    if path is not None and path.exists() and not (replace_out or begun_in(beside(path))):
        return iter([_those_there(path, asked)])
    batches = asked.engine.plan([asked.prompt(i) for i in range(len(asked))])
    if path is None:
        made = (_make(asked, batch) for batch in batches)
    else:
        made = _kept(asked, batches, path, model, replace_out)
    return _shown(made, asked, progress)


def _make(asked: Asked, batch: list[int]) -> list[Rollout]:
    """Rollouts of a batch, by their numbers."""
    written = asked.engine.complete([asked.prompt(i) for i in batch], [asked.key(i) for i in batch])
    rewards: list[dict[str, float]] = [{} for _ in batch]
    if asked.task.grading:
        rewards = asked.task.grade([each.text for each in written], [asked.example(i) for i in batch])
    return [asked.rollout(i, each, given) for i, each, given in zip(batch, written, rewards)]


def _kept(
    asked: Asked, batches: Sequence[list[int]], path: Path, model: Any, anew: bool
) -> Iterator[list[Rollout]]:
    """The same of all batches, in a journal until they are in the file."""
    begun = {
        "model": described(model) | {"name": asked.engine.model_name, "engine": asked.engine.engine},
        "task": asdict(asked.task.identity),
        "decoding": asdict(asked.engine.decoding),
        "samples_per_prompt": asked.k,
    }
    made_with = computed_on(model) | {"graders of source": asked.task.grading.source}
    with Journal(beside(path), begun, made_with=made_with, anew=anew) as journal:
        if path.exists() and not (anew or journal.resumed):  # other processes have finished meanwhile
            known = _those_there(path, asked)
            journal.leave()
            yield known
            return
        names = {f"batch_{number}": batch for number, batch in enumerate(batches)}
        found: dict[int, Rollout] = {}
        for name in journal.share(names, lambda name: "".join(r.to_line() for r in _make(asked, names[name]))):
            rollouts = read_rollouts(journal.path(name))
            found |= zip(names[name], rollouts)
            yield rollouts
        journal.settle(lambda: write_rollouts(path, (found[i] for i in range(len(asked)))))


def _those_there(path: Path, asked: Asked) -> list[Rollout]:
    """The rollouts of a file, which must be those that are asked for."""
    like = asked.like
    with contextlib.suppress(RolloutError):
        known = read_rollouts(path)
        if [rollout.id for rollout in known] == [asked.name(i) for i in range(len(asked))] and all(
            rollout.prompt_ids == tuple(asked.prompt(i)) and all(getattr(rollout, name) == like[name] for name in like)
            for i, rollout in enumerate(known)
        ):
            log.info("%s holds all that is asked for", path)
            return known
    raise CorrSteerError(f"out {path} is already there, with others; give another path, or have it replaced")


def _shown(batches: Iterable[list[Rollout]], asked: Asked, progress: bool) -> Iterator[list[Rollout]]:
    """The same with a progress bar."""
    n, total, shown = 0, 0.0, progress and processes.rank() == 0
    with tqdm(total=len(asked), unit="sample", desc=f"rollouts {asked.task.name}", disable=not shown) as bar:
        for rollouts in batches:
            n += len(rollouts)
            if asked.task.grading:
                total += sum(next(iter(rollout.rewards.values())) for rollout in rollouts)
                bar.set_postfix_str(f"reward {total / n:.3f}", refresh=False)
            bar.update(len(rollouts))
            yield rollouts
