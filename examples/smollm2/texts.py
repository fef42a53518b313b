"""What the SAEs are trained on: texts that the model writes itself, as no data set comes with it."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

from corrsteer import Decoding, Rollout, Task, generate_rollouts

ASKS = (
    "Write a short paragraph about {}.", "Explain {} to a child.", "Tell a short story about {}.",
    "List five facts about {}.", "Write a dialogue between two friends about {}.", "What is the history of {}?",
    "Give me some advice about {}.", "Write a short poem about {}.", "What do people get wrong about {}?",
    "Write a question about {} and answer it.", "Write an angry letter about {}.", "Describe {} in simple words.",
    "Write two sentences about {} in Spanish.", "Write two sentences about {} in French.",
    "Write a JSON object that describes {}.", "Is there anything dangerous about {}?",
)  # fmt: skip
TOPICS = (
    "bread", "the sea", "bicycles", "winter", "mathematics", "cats", "the moon", "cooking rice", "trains", "old age",
    "football", "gardens", "money", "bees", "chess", "rivers", "music", "the heart", "volcanoes", "school",
    "computers", "sleep", "honesty", "wolves", "coffee", "bridges", "languages", "medicine", "deserts", "painting",
    "friendship", "steam engines", "salt", "birds", "the Roman Empire", "electricity", "rain", "dancing", "glass",
    "elections", "fire", "whales", "clocks", "farming", "fear", "gold", "paper", "kitchen knives", "mountains",
    "marriage", "stars", "soap", "horses", "law", "apples", "prime numbers", "shoes", "forests", "exams", "islands",
)  # fmt: skip


def prompts(n: int, seed: int = 0) -> list[str]:
    """`n` requests in random order, each at most once."""
    asked = [ask.format(topic) for ask, topic in itertools.product(ASKS, TOPICS)]
    random.Random(seed).shuffle(asked)
    return asked[:n]


def write_texts(
    model: Any, tokenizer: Any, path: Path, n: int, new_tokens: int, seed: int = 0, progress: bool = True
) -> list[Rollout]:
    """Completions of `n` requests at temperature 1, which are kept in a file: the same call goes on with it."""
    task = Task.from_rows([{"prompt": prompt} for prompt in prompts(n, seed)], grader=None, name="texts", chat=True)
    decoding = Decoding(max_new_tokens=new_tokens, temperature=1.0, seed=seed, batch_size=64)
    batches = generate_rollouts(model, tokenizer, task, decoding, out=path, progress=progress)
    return [text for batch in batches for text in batch]
