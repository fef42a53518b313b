"""`generate_rollouts`: complete a task's prompts, once or several times each, and grade what comes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from corrsteer.arguments import check_type, whole
from corrsteer.compatibility import warn_once
from corrsteer.errors import CorrSteerError
from corrsteer.lm.decoding import Decoding
from corrsteer.lm.engine import engine_of
from corrsteer.lm.sampling import sample_keys
from corrsteer.rollouts.rollout import Rollout
from corrsteer.rollouts.rollout_file import RolloutWriter, write_rollouts
from corrsteer.tasks import Example, Task

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
    k = check_samples(samples_per_prompt, decoding)
    engine = engine_of(model, tokenizer, decoding)
    n, ids = len(task), _ids(task, k)
    prompts = engine.tokenize(task)
    writer = None if out is None else RolloutWriter(out, replace=replace_out)

    def batches() -> Iterator[list[Rollout]]:
        # Sample by sample, so that what one draws is the same however many follow.
        keys = sample_keys(prompts * k)
        made: dict[int, Rollout] = {}
        of_all = {"model": engine.model_name, "engine": engine.engine, "decoding": _settings(decoding)}
        total = 0.0
        try:
            with tqdm(total=len(keys), unit="sample", desc=f"rollouts {task.name}", disable=not progress) as bar:
                for batch in engine.plan(prompts * k):
                    examples = [task.examples[at % n] for at in batch]
                    written = engine.complete([prompts[at % n] for at in batch], [keys[at] for at in batch])
                    texts = [each.text for each in written]
                    rewards = task.grade(texts, examples) if task.grading else [{} for _ in batch]
                    fresh = {
                        at: Rollout(
                            id=ids[at], sample=at // n, source=ids[at],
                            prompt=_prompt(task, example), prompt_ids=tuple(prompts[at % n]),
                            completion=each.text, completion_ids=each.ids, finish=each.finish, rewards=given,
                            answer=example.answer, meta=example.fields, **of_all,
                        )
                        for at, example, each, given in zip(batch, examples, written, rewards)
                    }  # fmt: skip
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
            write_rollouts(writer.path, (made[sample * n + i] for i in range(n) for sample in range(k)))

    return batches()


def check_samples(samples_per_prompt: int, decoding: Decoding) -> int:
    """How many completions of each prompt; refused where they would all be the same."""
    k = whole("samples_per_prompt", samples_per_prompt, 1)
    if k > 1 and decoding.temperature == 0:
        raise CorrSteerError(
            f"samples_per_prompt must be 1 at temperature 0, as greedy completions of a prompt are all the same, got "
            f"{k}; set a temperature above 0, such as 1"
        )
    return k


def _ids(task: Task, samples: int) -> list[str]:
    """Ids of the first sample of every example, then of the second, and so on."""
    sources = [example.source for example in task.examples]
    if len(set(sources)) < len(sources):
        twice = next(source for source in sources if sources.count(source) > 1)
        raise CorrSteerError(f"every example of a task must have a source of its own, got {twice!r} twice")
    return [source + (f"#{sample}" if sample else "") for sample in range(samples) for source in sources]


def _prompt(task: Task, example: Example) -> str | tuple[dict[str, Any], ...]:
    if not task.chat:
        return example.prompt
    opening = [] if task.system is None else [{"role": "system", "content": task.system}]
    return (*opening, {"role": "user", "content": example.prompt})


def _settings(decoding: Decoding) -> dict[str, Any]:
    """What decides which tokens come out; the rest of a decoding is how it is computed."""
    return {name: getattr(decoding, name) for name in ("max_new_tokens", "temperature", "top_p", "seed")}
