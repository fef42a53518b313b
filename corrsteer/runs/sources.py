"""Where a collection's completions and residuals come from: generated and captured, or read as they exist."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from corrsteer.lm.capture import Capture, Sink
from corrsteer.lm.generation import Generator
from corrsteer.lm.hook_points import HookPoint
from corrsteer.lm.teacher_forcing import TeacherForcing
from corrsteer.rollouts.generate import Asked
from corrsteer.rollouts.rollout import Rollout
from corrsteer.runs.options import Options


class Residuals(Protocol):
    """The residuals of a batch's kept steps."""

    def packed(self, key: Hashable) -> tuple[Tensor, Tensor]:
        """Of a hook point what no sink took: `x [T, d]` and `cu_seqlens [B + 1]` int32."""
        ...

    def last_prompt(self, key: Hashable) -> Tensor:
        """Of last prompt tokens, `[B, d]`."""
        ...


class Source(Protocol):
    """Completions of samples that are known by their numbers, and what the model had in mind."""

    def plan(self, samples: Sequence[int]) -> list[list[int]]:
        """Batches of some samples, as places among them."""
        ...

    def read(self, samples: Sequence[int], sink: Sink) -> tuple[list[Rollout], Residuals]:
        """Rollouts of a batch, and its residuals but for what goes to the sink."""
        ...


@dataclass(frozen=True)
class Generated:
    """Completions are generated, and captured meanwhile.

    Attributes
    ----------
    asked : of a `Generator`.
    points : layer -> hook point.
    """

    asked: Asked
    generator: Generator
    points: dict[int, HookPoint]
    options: Options

    def plan(self, samples: Sequence[int]) -> list[list[int]]:
        return self.generator.plan([self.asked.prompt(i) for i in samples], share=self._shares)

    def read(self, samples: Sequence[int], sink: Sink) -> tuple[list[Rollout], Residuals]:
        generator = self.generator
        with Capture(
            generator.model,
            self.points,
            stop_tokens=generator.stops,
            positions=self.options.positions,
            max_new_tokens=generator.decoding.max_new_tokens,
            exclude_tokens=self.options.exclude_tokens,
            buffer_bytes=self.options.buffer_bytes,
            sink=sink,
        ) as capture:
            completions = generator.complete(
                [self.asked.prompt(i) for i in samples], [self.asked.key(i) for i in samples],
                share=self._shares, capture=capture,
            )  # fmt: skip
        return [self.asked.rollout(i, completion) for i, completion in zip(samples, completions)], capture

    @property
    def _shares(self) -> bool:
        """Whether what prompts begin with may be read once: not where it is captured of each."""
        return self.options.positions == "generated"


@dataclass(frozen=True)
class Given:
    """Completions exist, and are read by teacher forcing.

    Attributes
    ----------
    sequences : token ids of prompt and completion, of all samples.
    """

    reader: TeacherForcing
    rollouts: Sequence[Rollout]
    sequences: list[tuple[list[int], list[int]]]

    def plan(self, samples: Sequence[int]) -> list[list[int]]:
        return self.reader.plan([self.sequences[i] for i in samples])

    def read(self, samples: Sequence[int], sink: Sink) -> tuple[list[Rollout], Residuals]:
        residuals = self.reader.read([self.sequences[i] for i in samples], sink)
        return [self.rollouts[i] for i in samples], residuals
