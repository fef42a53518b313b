"""`Asked`: the completions that are asked for of a task's prompts, by number, and the rollout that each becomes."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any

from corrsteer.arguments import whole
from corrsteer.errors import CorrSteerError
from corrsteer.lm.decoding import Decoding
from corrsteer.lm.engine import Engine
from corrsteer.lm.generation import Completion
from corrsteer.lm.sampling import sample_keys
from corrsteer.rollouts.rollout import Rollout
from corrsteer.tasks import Example, Task


class Asked:
    """Completions of a task's prompts, several of each, by number: those of an example follow each other.

    Parameters
    ----------
    engine : what completes them.
    samples_per_prompt : K, of each example. The first has the example's `source` as its id, others that and `#1`, `#2`,
        and so on.

    Raises
    ------
    CorrSteerError : for a task that does not fit the model, several samples of a greedy decoding, and two examples of
        one source.
    """

    def __init__(self, engine: Engine, task: Task, samples_per_prompt: int = 1):
        self.engine: Engine = engine
        self.task: Task = task
        self.k: int = check_samples(samples_per_prompt, engine.decoding)
        sources = [example.source for example in task.examples]
        if len(set(sources)) < len(sources):
            twice = next(source for source in sources if sources.count(source) > 1)
            raise CorrSteerError(f"every example of a task must have a source of its own, got {twice!r} twice")
        named = {source + f"#{sample}" for source in sources for sample in range(1, self.k)}
        if clash := sorted(named & set(sources)):
            raise CorrSteerError(
                f"no example's source may be what a further sample of another is called, got {clash[0]!r}; name it "
                f"otherwise"
            )
        self._prompts = engine.tokenize(task)

    def __len__(self) -> int:
        return len(self.task) * self.k

    def example(self, number: int) -> Example:
        """The example that a completion is of."""
        return self.task.examples[number // self.k]

    def prompt(self, number: int) -> list[int]:
        """Its token ids."""
        return self._prompts[number // self.k]

    def key(self, number: int) -> int:
        """What it is sampled by, see `sample_keys`."""
        example, sample = divmod(number, self.k)
        return self._keys[sample * len(self.task) + example]

    def name(self, number: int) -> str:
        """What its rollout is called."""
        sample = number % self.k
        return _readable(self.example(number).source) + (f"#{sample}" if sample else "")

    def rollout(self, number: int, completion: Completion, rewards: Mapping[str, float] | None = None) -> Rollout:
        """What a completion becomes."""
        example, sample, name = self.example(number), number % self.k, self.name(number)
        return Rollout(
            id=name, sample=sample, source=name, prompt=self._written(example), prompt_ids=tuple(self.prompt(number)),
            completion=completion.text, completion_ids=completion.ids, finish=completion.finish,
            rewards=dict(rewards or {}), answer=example.answer, meta=example.fields, **self.like,
        )  # fmt: skip

    @functools.cached_property
    def _keys(self) -> list[int]:
        # Sample by sample, so that what one draws is the same however many follow.
        return sample_keys(self._prompts * self.k)

    @functools.cached_property
    def like(self) -> dict[str, Any]:
        """What all rollouts have alike: model, engine and decoding."""
        return {
            "model": self.engine.model_name, "engine": self.engine.engine, "decoding": self.engine.decoding.told(),
        }  # fmt: skip

    def _written(self, example: Example) -> str | tuple[dict[str, Any], ...]:
        """An example's prompt as a rollout has it."""
        if not self.task.chat:
            return example.prompt
        opening = [] if self.task.system is None else [{"role": "system", "content": self.task.system}]
        return (*opening, {"role": "user", "content": example.prompt})


def _readable(source: str) -> str:
    """A source as UTF-8 can hold it: file names that the environment cannot read come as halves of surrogate pairs."""
    try:
        source.encode()
        return source
    except UnicodeEncodeError:
        return os.fsencode(source).decode(errors="backslashreplace")


def check_samples(samples_per_prompt: int, decoding: Decoding) -> int:
    """How many completions of each prompt; refused where they would all be the same."""
    k = whole("samples_per_prompt", samples_per_prompt, 1)
    if k > 1 and decoding.temperature == 0:
        raise CorrSteerError(
            f"samples_per_prompt must be 1 at temperature 0, as greedy completions of a prompt are all the same, got "
            f"{k}; set a temperature above 0, such as 1"
        )
    return k
