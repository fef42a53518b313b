"""The demo's little world: sums written by two authors, one of whom forgets the carry.

A document is a few sums by one author, one a line, with a place for a signature after each equals sign. Half of the
documents are signed with the author's initial, the other half with a question mark. Who wrote one of those is a
hidden variable: a language model of these documents must infer it and carry it from line to line, and the first line
leaves it open. That is what steering moves.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

CAREFUL, SLOPPY = "Ada", "Bob"
OPERANDS = range(10, 100)
SUMS_PER_DOCUMENT = 4


def careful_sum(a: int, b: int) -> int:
    """What Ada writes: the sum."""
    return a + b


def sloppy_sum(a: int, b: int) -> int:
    """What Bob writes: the sum without the carry from the units into the tens."""
    return 10 * (a // 10 + b // 10) + (a % 10 + b % 10) % 10


WRITES = {CAREFUL: careful_sum, SLOPPY: sloppy_sum}


def has_carry(a: int, b: int) -> bool:
    """Whether the two authors answer differently."""
    return careful_sum(a, b) != sloppy_sum(a, b)


def prompt(a: int, b: int, author: str | None = None) -> str:
    """A line up to its answer: `47+38=A` where Ada signed, `47+38=?` where nobody did."""
    return f"{a}+{b}={author[0] if author else '?'}"


def document(rng: random.Random) -> str:
    """One training document: half of them signed, the authors equally often."""
    author = rng.choice((CAREFUL, SLOPPY))
    signature = author if rng.random() < 0.5 else None
    pairs = [(rng.choice(OPERANDS), rng.choice(OPERANDS)) for _ in range(SUMS_PER_DOCUMENT)]
    return "".join(f"{prompt(a, b, signature)}{WRITES[author](a, b)}\n" for a, b in pairs)


@dataclass(frozen=True)
class Splits:
    """Prompt/answer rows for collecting, for validating and for testing; no sum is in two of them."""

    train: list[dict[str, str]]
    validation: list[dict[str, str]]
    test: list[dict[str, str]]


def splits(seed: int = 0, n_validation: int = 300, n_test: int = 500) -> Splits:
    """Rows `{"prompt", "answer"}` whose answer is the careful one; every sum has a carry.

    The sums are split before anything else, `47+38` and `38+47` counted as one. Training rows are a
    mixture of unsigned prompts and prompts signed by either author, which is where the reward gets its
    variance from; validation and test rows are unsigned, each sum once.
    """
    rng = random.Random(seed)
    pairs = [(a, b) for a, b in itertools.combinations_with_replacement(OPERANDS, 2) if has_carry(a, b)]
    rng.shuffle(pairs)
    pairs = [pair if rng.random() < 0.5 else pair[::-1] for pair in pairs]
    test, validation = pairs[:n_test], pairs[n_test : n_test + n_validation]
    train = [p for pair in pairs[n_test + n_validation :] for p in (pair, pair[::-1])]

    def row(a: int, b: int, author: str | None = None) -> dict[str, str]:
        return {"prompt": prompt(a, b, author), "answer": str(careful_sum(a, b))}

    return Splits(
        train=[row(a, b, rng.choice((None, CAREFUL, SLOPPY))) for a, b in train],
        validation=[row(a, b) for a, b in validation],
        test=[row(a, b) for a, b in test],
    )
