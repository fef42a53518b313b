"""What tells a task from another, and a sample that was seen before from one that was not."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from corrsteer.tasks.examples import Example

# Of a prompt's hash. 48 bits are 8 characters in base64, so that 100 000 prompts take 0.8 MB; that one of 1000 other
# prompts is taken for one of them has a chance of 4e-7.
HASH_BYTES = 6


@dataclass(frozen=True)
class TaskIdentity:
    """A task as its results remember it.

    Attributes
    ----------
    name, part : as in `Task`.
    grader : the names of its graders.
    reward : the default reward, where another than the first was asked for.
    samples : how many.
    fingerprint : of all prompts and answers in their order, and of how prompts are wrapped.
    """

    name: str
    part: str
    grader: str
    reward: str | None
    samples: int
    fingerprint: str

    def __str__(self) -> str:
        return f"{self.name!r} ({self.part})"


def fingerprint(examples: Iterable[Example], chat: bool, system: str | None) -> str:
    """A hash of what a task asks and what it accepts."""
    digest = blake2b(repr((chat, system)).encode(), digest_size=16)
    for example in examples:
        digest.update(repr((example.prompt, example.answer)).encode())
    return digest.hexdigest()


def pack_prompts(prompts: Iterable[str]) -> str:
    """The hashes of distinct prompts, sorted, 8 characters each."""
    return base64.b64encode(b"".join(sorted(set(map(_hash, prompts))))).decode()


def count_seen(prompts: Iterable[str], records: Iterable[Mapping[str, Any]]) -> int:
    """How many of the prompts are in any of these records of samples, see `Task.samples`."""
    seen: set[bytes] = set()
    for record in records:
        packed = base64.b64decode(record["prompt_hashes"])
        seen.update(packed[at : at + HASH_BYTES] for at in range(0, len(packed), HASH_BYTES))
    return sum(_hash(prompt) in seen for prompt in prompts)


def _hash(prompt: str) -> bytes:
    return blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=HASH_BYTES).digest()
