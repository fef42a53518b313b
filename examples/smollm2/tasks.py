"""Tasks whose answers can be checked, made by seeded generators.

A generator gives groups of rows. Rows of a group share what they ask about, such as a word or a pair of numbers, and
come to lie in one part, so that no part can be answered by what another showed.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from corrsteer import CorrSteerError, Task
from corrsteer.arguments import whole
from examples.smollm2 import words

Row = dict[str, Any]
PARTS = ("train", "validation", "test")
SIZES = (600, 160, 300)  # prompts of each part; of a kind that has fewer in all, shares in the same proportion


@dataclass(frozen=True)
class Kind:
    """A kind of task: how its rows are made, what grades them, and how many tokens an answer takes."""

    groups: Callable[[], list[list[Row]]]
    grader: str
    new_tokens: int
    about: str
    category: str | None = None


def sums() -> list[list[Row]]:
    """Sums of two numbers up to 40, in either order."""
    return [
        [
            {"prompt": f"What is {x}+{y}? Answer with the number only.", "answer": x + y}
            for x, y in sorted({(a, b), (b, a)})
        ]
        for a, b in itertools.combinations_with_replacement(range(2, 41), 2)
    ]


def opposites() -> list[list[Row]]:
    """The opposite of a word, asked for in two ways. A word may be one of several pairs."""
    answers: dict[str, set[str]] = {}
    for word, other in words.OPPOSITES.items():
        answers.setdefault(word, set()).add(other)
        answers.setdefault(other, set()).add(word)
    asked = ("What is the opposite of {}? Answer with one word.", "Answer with one word: the opposite of {} is")
    return [
        [{"prompt": ask.format(word), "answer": sorted(right)} for ask in asked]
        for word, right in sorted(answers.items())
    ]


def plurals() -> list[list[Row]]:
    """The plural of a word, asked for in two ways."""
    asked = ("What is the plural of {}? Answer with one word.", "Answer with one word: the plural of {} is")
    return [[{"prompt": ask.format(word), "answer": plural} for ask in asked] for word, plural in words.PLURALS.items()]


def sizes() -> list[list[Row]]:
    """Whether one thing is larger than another, or comes before it; as often yes as no."""
    groups = []
    for small, large in itertools.combinations(range(len(words.SIZES)), 2):
        for a, b in itertools.product(words.SIZES[small], words.SIZES[large]):
            groups.append(_yes_and_no("Is {} larger than {}? Answer yes or no.", b, a, "size"))
    for kind, ordered in words.ORDERS.items():
        for first, second in itertools.combinations(ordered, 2):
            ask = f"Does the {kind} {{}} come before the {kind} {{}}? Answer yes or no."
            groups.append(_yes_and_no(ask, first, second, kind))
    return groups


def _yes_and_no(ask: str, a: str, b: str, category: str) -> list[Row]:
    return [
        {"prompt": ask.format(a, b), "answer": "yes", "category": category},
        {"prompt": ask.format(b, a), "answer": "no", "category": category},
    ]


def one_word() -> list[list[Row]]:
    """Anything of a kind, in one word without a full stop."""
    asked = ("Name {}. Answer with one word.", "Name {}. Answer with one word and no full stop.")
    return [
        [{"prompt": ask.format(f"{kind} {which}".strip())} for ask in asked]
        for kind, which in itertools.product(words.KINDS, words.WHICH)
    ]


def refusal() -> list[list[Row]]:
    """Requests to refuse, and such that only sound like them."""
    asked = ("{}", "Please tell me. {}", "I have a question. {}", "My friend wants to know this. {}", "{} Be brief.")
    return [
        [
            {"prompt": ask.format(request), "answer": answer, "category": category}
            for ask in asked
            for request, answer, category in ((harmless, "no", "harmless"), (harmful, "yes", "harmful"))
        ]
        for harmless, harmful in words.REQUESTS
    ]


def translation() -> list[list[Row]]:
    """A word in a language asked for, unless it is the English one. A word's languages lie in one part."""
    asked = ('How do you say "{0}" in {1}? Answer with one word, in {1}.', 'What is the {1} word for "{0}"?')
    return [
        [
            {"prompt": ask.format(english, language), "answer": answer, "category": language}
            for ask in asked
            for language, answer in zip(words.LANGUAGES, answers)
            if answer.casefold() != english.casefold()
        ]
        for english, *answers in words.TRANSLATIONS
    ]


MINE = "examples.smollm2.graders"
KINDS = {
    "sizes": Kind(sizes, f"{MINE}:first_word", 2, "yes or no: which is larger, which comes before", "category"),
    "one-word": Kind(one_word, f"{MINE}:one_bare_word", 6, "anything of a kind, in one word without a full stop"),
    "refusal": Kind(refusal, f"{MINE}:refuses", 12, "refusing what is harmful, and only that", "category"),
    "sums": Kind(sums, "number", 12, "the sum of two numbers"),
    "opposites": Kind(opposites, f"{MINE}:has_word", 10, "the opposite of a word"),
    "translation": Kind(translation, f"{MINE}:has_word", 10, "a word in French, Spanish or German", "category"),
    "plurals": Kind(plurals, f"{MINE}:has_word", 8, "the plural of a word"),
}


def parts(name: str, sizes: tuple[int, int, int] = SIZES, seed: int = 0) -> tuple[Task, Task, Task]:
    """The train, validation and test part of a kind, which share no group; of each at most so many prompts.

    Which part a group is in does not depend on `sizes`.

    Raises
    ------
    CorrSteerError : for a kind that there is not.
    """
    if name not in KINDS:
        raise CorrSteerError(f"the kind of task must be one of {', '.join(KINDS)}, got {name!r}")
    kind, seed = KINDS[name], whole("seed", seed, 0)
    groups, rng = kind.groups(), random.Random(f"{name} {seed}")
    rng.shuffle(groups)
    share = min(1.0, sum(map(len, groups)) / sum(SIZES))
    found = []
    for part, most, size in zip(PARTS, SIZES, sizes):
        rows: list[Row] = []
        while groups and len(rows) < round(share * most):
            rows += groups.pop()
        rng.shuffle(rows)
        rows = rows[: min(size, round(share * most))]
        task = Task.from_rows(rows, kind.grader, name, chat=True, category_field=kind.category, source=f"{name}/{part}")
        found.append(replace(task, part=part))
    return found[0], found[1], found[2]
