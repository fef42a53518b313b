"""`Engine`: what completes prompts, and how a model says which one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from corrsteer.arguments import check_type, shown
from corrsteer.errors import CorrSteerError
from corrsteer.lm.decoding import Decoding
from corrsteer.lm.generation import Completion, Generator
from corrsteer.lm.vllm_engine import VllmGenerator
from corrsteer.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Engine(Protocol):
    """Completes prompts of tokens, as a `Decoding` says. What a sample draws goes with its key alone."""

    @property
    def engine(self) -> str:
        """What generates, and its version."""
        ...

    @property
    def model_name(self) -> str | None:
        """The model's name, or where it was read from; None where it was made in memory."""
        ...

    @property
    def decoding(self) -> Decoding:
        """How completions are generated."""
        ...

    def tokenize(self, task: Task) -> list[list[int]]:
        """Token ids of every prompt of a task, as the model reads it."""
        ...

    def plan(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """Batches of prompts, as indices."""
        ...

    def complete(self, prompts: Sequence[list[int]], keys: Sequence[int]) -> list[Completion]:
        """Completions of a batch of prompts, in its order."""
        ...


def engine_of(model: Any, tokenizer: PreTrainedTokenizerBase, decoding: Decoding) -> Engine:
    """The engine of a Hugging Face model, or of a `vllm.LLM`.

    Raises
    ------
    CorrSteerError : for a model that is neither.
    """
    check_type("decoding", decoding, Decoding, "a Decoding")
    if isinstance(model, nn.Module):
        return Generator(model, tokenizer, decoding)
    if any(kind.__module__.partition(".")[0] == "vllm" for kind in type(model).__mro__):
        return VllmGenerator(model, tokenizer, decoding)
    raise CorrSteerError(f"model must be a Hugging Face model or a vllm.LLM, got {shown(model)}")
