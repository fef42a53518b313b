"""Completions of a task's prompts: batches sorted by length under a token budget, greedy or sampled with a seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from corrsteer.arguments import LARGEST_SEED, check_type, number, shown, whole
from corrsteer.errors import CorrSteerError
from corrsteer.lm import hook_points
from corrsteer.lm.generation_settings import settings
from corrsteer.tasks import Task
from corrsteer.types import Device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Decoding:
    """How completions are generated.

    Attributes
    ----------
    max_new_tokens : longest completion, in tokens.
    temperature : 0 decodes greedily; otherwise tokens are sampled.
    top_p : nucleus that is sampled from.
    seed : of the sampling; the same seed, task and batches give the same completions.
    batch_tokens : a batch holds at most this many tokens, padding and completions counted in.
    batch_size : and at most this many prompts.
    """

    max_new_tokens: int = 32
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    batch_tokens: int = 16384
    batch_size: int = 256

    def __post_init__(self) -> None:
        checked: dict[str, float] = {
            name: whole(name, getattr(self, name), 1) for name in ("max_new_tokens", "batch_tokens", "batch_size")
        }
        checked["seed"] = whole("seed", self.seed, 0, LARGEST_SEED)
        checked["temperature"] = number("temperature", self.temperature, 0)
        checked["top_p"] = number("top_p", self.top_p, 0, 1)
        if checked["top_p"] == 0:
            raise CorrSteerError("top_p must be above 0 and at most 1, got 0")
        for name, value in checked.items():
            object.__setattr__(self, name, value)


def tokenize(model: nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task, decoding: Decoding) -> list[list[int]]:
    """Token ids of every prompt.

    Raises
    ------
    CorrSteerError : for an empty task, a prompt of no tokens, or one too long for the model's context.
    """
    hook_points.check_generates(model)
    check_type("task", task, Task, "a Task")
    check_type("decoding", decoding, Decoding, "a Decoding")
    if not callable(tokenizer):
        raise CorrSteerError(f"tokenizer must be a Hugging Face tokenizer, got {shown(tokenizer)}")
    if len(task) == 0:
        raise CorrSteerError(f"task {task.name!r} is empty; it must have at least one example")
    # A chat template writes its own special tokens.
    ids = tokenizer(task.prompts(tokenizer), add_special_tokens=not task.chat)["input_ids"]
    limit = getattr(hook_points.text_config(model), "max_position_embeddings", None)
    known = getattr(hook_points.embeddings(model), "num_embeddings", math.inf)
    for example, tokens in zip(task.examples, ids):
        if not tokens:
            raise CorrSteerError(f"{example.source}: the prompt has no tokens; give it some text")
        if max(tokens) >= known:
            raise CorrSteerError(
                f"{example.source}: the tokenizer gives token {max(tokens)}, but the model knows {known}; use the "
                f"tokenizer that belongs to the model"
            )
        if limit and len(tokens) + decoding.max_new_tokens > limit:
            raise CorrSteerError(
                f"{example.source}: the prompt has {len(tokens)} tokens, which with max_new_tokens="
                f"{decoding.max_new_tokens} is more than the model's context of {limit}; shorten either"
            )
    return ids


def plan_batches(lengths: Sequence[int], decoding: Decoding) -> list[list[int]]:
    """Which prompts go together: indices, longest first, so that a batch too large for the memory fails at once."""
    batches: list[list[int]] = []
    width = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rows = len(batches[-1]) + 1 if batches else 0
        if not batches or rows > decoding.batch_size or rows * width > decoding.batch_tokens:
            batches.append([])
            width = lengths[index] + decoding.max_new_tokens
        batches[-1].append(index)
    return batches


def stop_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that end a completion: the model's own, or else the tokenizer's."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    if ids is None:
        ids: Any = tokenizer.eos_token_id
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def pad_left(prompts: Sequence[Sequence[int]], pad: int, device: Device) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, `[B, S]` int64, padded on the left."""
    width = max(map(len, prompts))
    rows = [[pad] * (width - len(p)) + list(p) for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    return {
        "input_ids": torch.tensor(rows, dtype=torch.int64, device=device),
        "attention_mask": torch.tensor(mask, dtype=torch.int64, device=device),
    }


@torch.inference_mode()
def complete(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    batch: int = 0,
    criteria: Sequence[Any] = (),
) -> list[str]:
    """Completions of one batch of tokenised prompts, cut before their first stop token.

    `batch` is the batch's number, which a sampling seed depends on; `criteria` are further stopping criteria.
    """
    stops = stop_tokens(model, tokenizer)
    pad: Any = tokenizer.pad_token_id
    if pad is None:
        pad = stops[0] if stops else 0
    config = settings(
        model, max_new_tokens=decoding.max_new_tokens, temperature=decoding.temperature, top_p=decoding.top_p,
        stop_tokens=stops, pad_token=pad,
    )  # fmt: skip
    generator: Any = model
    inputs = pad_left(prompts, pad, hook_points.input_device(model))
    sampled = decoding.temperature > 0
    with torch.random.fork_rng(range(torch.cuda.device_count()), enabled=sampled):
        if sampled:
            torch.manual_seed(decoding.seed * 1_000_003 + batch)
        output = generator.generate(**inputs, generation_config=config, stopping_criteria=list(criteria))
    generated = output[:, inputs["input_ids"].shape[1] :].tolist()
    cut = [row[: next((i for i, t in enumerate(row) if t in stops), len(row))] for row in generated]
    return tokenizer.batch_decode(cut, skip_special_tokens=True)
