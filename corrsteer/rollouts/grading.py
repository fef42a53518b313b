"""`grade`: completions of every example of a task, and their rewards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn
from tqdm.auto import tqdm

from corrsteer.lm.generation import Decoding, complete, plan_batches, tokenize
from corrsteer.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Graded:
    """Completions and their rewards, in the task's order."""

    completions: list[str]
    rewards: list[float]

    @property
    def score(self) -> float:
        """Mean reward."""
        return sum(self.rewards) / len(self.rewards)


def grade(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    decoding: Decoding | None = None,
    *,
    progress: bool = True,
) -> Graded:
    """Complete and grade every example, with the model as it is (inside `Steering.apply`, steered)."""
    decoding = decoding or Decoding()
    prompts = tokenize(model, tokenizer, task, decoding)
    completions, rewards = [""] * len(task), [0.0] * len(task)
    total = done = 0.0
    with tqdm(total=len(task), unit="sample", desc=f"grade {task.name}", disable=not progress) as bar:
        for number, batch in enumerate(plan_batches([len(p) for p in prompts], decoding)):
            texts = complete(model, tokenizer, [prompts[i] for i in batch], decoding, number)
            for i, text in zip(batch, texts):
                completions[i], rewards[i] = text, task.grade(text, task.examples[i])
                total += rewards[i]
            done += len(batch)
            bar.set_postfix_str(f"reward {total / done:.3f}", refresh=False)
            bar.update(len(batch))
    return Graded(completions, rewards)
