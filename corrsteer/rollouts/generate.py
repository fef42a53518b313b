"""`generate_rollouts`: complete a task's prompts, once or several times each, and grade what comes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from corrsteer.arguments import check_type
from corrsteer.compatibility import warn_once
from corrsteer.lm.decoding import Decoding
from corrsteer.lm.engine import engine_of
from corrsteer.rollouts.asked import Asked
from corrsteer.rollouts.rollout import Rollout
from corrsteer.rollouts.rollout_file import RolloutWriter, write_rollouts
from corrsteer.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    out : a file to write. Each batch is on the disk before it is given; after the last, the file is put in the task's
        order, samples of an example together.
    replace_out : whether a file that is there is replaced.

    Raises
    ------
    CorrSteerError : before anything is generated, for a task that does not fit the model, several samples of a greedy
        decoding, two examples of one source, and a file that is there or cannot be written.
    TaskError : for a grader that fails; the batches before are in the file.
    """
    warn_once()
    decoding = decoding or Decoding()
    check_type("task", task, Task, "a Task")
    asked = Asked(engine_of(model, tokenizer, decoding), task, samples_per_prompt)
    writer = None if out is None else RolloutWriter(out, replace=replace_out)

    def batches() -> Iterator[list[Rollout]]:
        engine, made = asked.engine, dict[int, Rollout]()
        total = 0.0
        try:
            with tqdm(total=len(asked), unit="sample", desc=f"rollouts {task.name}", disable=not progress) as bar:
                for batch in engine.plan([asked.prompt(i) for i in range(len(asked))]):
                    written = engine.complete([asked.prompt(i) for i in batch], [asked.key(i) for i in batch])
                    rewards: list[dict[str, float]] = [{} for _ in batch]
                    if task.grading:
                        rewards = task.grade([each.text for each in written], [asked.example(i) for i in batch])
                    fresh = {i: asked.rollout(i, each, given) for i, each, given in zip(batch, written, rewards)}
                    if writer:
                        writer.write(list(fresh.values()))
                    made |= fresh
                    if task.grading:
                        total += sum(next(iter(given.values())) for given in rewards)
                        bar.set_postfix_str(f"reward {total / len(made):.3f}", refresh=False)
                    bar.update(len(batch))
                    yield list(fresh.values())
        finally:
            if writer:
                writer.close()
        if writer:
            write_rollouts(writer.path, (made[i] for i in range(len(asked))))

    return batches()
