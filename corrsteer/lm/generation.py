"""Completions of tokenised prompts, batch by batch: greedy, or sampled by sample.

What the prompts of a batch begin with is read once, and rows whose completion has ended leave the batch.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from corrsteer.arguments import check_type, shown
from corrsteer.errors import CorrSteerError
from corrsteer.lm import hook_points, own_passes, prefill
from corrsteer.lm.batches import PASS, common_prefix, plan_batches, worth_sharing
from corrsteer.lm.capture import Capture
from corrsteer.lm.decoding import Decoding
from corrsteer.lm.first_token import FirstTokenAmong, label_tokens
from corrsteer.lm.generation_settings import settings
from corrsteer.lm.prefill import Begun, Cache, Prompts, Reuse
from corrsteer.lm.sampling import Sampler
from corrsteer.tasks import Task

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

Within = Callable[[Sequence[int]], AbstractContextManager[Any]]  # what `generate` runs in, given the rows that are left

Finish = Literal["stop", "length"]

ENDED = 0.25  # share of a batch's rows that have to have ended before it is cut down to the others


def tokenize(model: nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task, decoding: Decoding) -> list[list[int]]:
    """Token ids of every prompt.

    Raises
    ------
    CorrSteerError : for an empty task, a prompt of no tokens, or one too long for the model's context; and for labels
        of `first_token_among` that are no tokens.
    """
    hook_points.check_generates(model)
    context = getattr(hook_points.text_config(model), "max_position_embeddings", None)
    vocabulary = getattr(hook_points.embeddings(model), "num_embeddings", None)
    return tokenize_prompts(tokenizer, task, decoding, vocabulary=vocabulary, context=context)


def tokenize_prompts(
    tokenizer: PreTrainedTokenizerBase, task: Task, decoding: Decoding, *, vocabulary: int | None, context: int | None
) -> list[list[int]]:
    """The same for a model of so many tokens and so long a context; None where that is not known."""
    check_type("task", task, Task, "a Task")
    check_type("decoding", decoding, Decoding, "a Decoding")
    if not callable(tokenizer):
        raise CorrSteerError(f"tokenizer must be a Hugging Face tokenizer, got {shown(tokenizer)}")
    if len(task) == 0:
        raise CorrSteerError(f"task {task.name!r} is empty; it must have at least one example")
    if decoding.first_token_among is not None:
        label_tokens(tokenizer, decoding.first_token_among)  # before anything is generated
    # A chat template writes its own special tokens.
    ids = tokenizer(task.prompts(tokenizer), add_special_tokens=not task.chat)["input_ids"]
    for example, tokens in zip(task.examples, ids):
        if not tokens:
            raise CorrSteerError(f"{example.source}: the prompt has no tokens; give it some text")
        if vocabulary and max(tokens) >= vocabulary:
            raise CorrSteerError(
                f"{example.source}: the tokenizer gives token {max(tokens)}, but the model knows {vocabulary}; use the "
                f"tokenizer that belongs to the model"
            )
        if context and len(tokens) + decoding.max_new_tokens > context:
            raise CorrSteerError(
                f"{example.source}: the prompt has {len(tokens)} tokens, which with max_new_tokens="
                f"{decoding.max_new_tokens} is more than the model's context of {context}; shorten either"
            )
    return ids


def stop_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that end a completion: the model's own, or else the tokenizer's."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    if ids is None:
        ids: Any = tokenizer.eos_token_id
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


class Completion(NamedTuple):
    """What was written.

    Attributes
    ----------
    text, ids : up to and without the first stop token, as text without special tokens and as tokens.
    tokens : how many were generated, with one that ended it.
    finish : `stop` where a stop token ended it, `length` where the most new tokens did.
    """

    text: str
    tokens: int
    ids: tuple[int, ...]
    finish: Finish


def completions(
    tokenizer: PreTrainedTokenizerBase, written: Sequence[Sequence[int]], stops: Sequence[int]
) -> list[Completion]:
    """Completions of the tokens that were generated, which may go on after a stop token."""
    ends = [_end(tokens, stops) for tokens in written]
    ids = [tuple(tokens[:end]) for tokens, end in zip(written, ends)]
    texts = tokenizer.batch_decode([list(tokens) for tokens in ids], skip_special_tokens=True)
    stopped = [end < len(tokens) for tokens, end in zip(written, ends)]
    return [
        Completion(text, len(tokens) + ended, tokens, "stop" if ended else "length")
        for text, tokens, ended in zip(texts, ids, stopped)
    ]


def _end(tokens: Sequence[int], stops: Sequence[int]) -> int:
    """Where a completion ends: before its first stop token."""
    return next((at for at, token in enumerate(tokens) if token in stops), len(tokens))


@dataclass(frozen=True)
class Generator:
    """Completes prompts of tokens with a model."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    decoding: Decoding

    def tokenize(self, task: Task) -> list[list[int]]:
        """Token ids of every prompt, see `tokenize`."""
        return tokenize(self.model, self.tokenizer, task, self.decoding)

    @property
    def engine(self) -> str:
        """What generates, and its version."""
        import transformers

        return f"transformers {transformers.__version__}"

    @property
    def model_name(self) -> str | None:
        """The model's name, or where it was read from; None where it was made in memory."""
        config: Any = self.model.config
        return config._name_or_path or None

    @functools.cached_property
    def stops(self) -> list[int]:
        """Token ids that end a completion."""
        return stop_tokens(self.model, self.tokenizer)

    @functools.cached_property
    def reuse(self) -> Reuse:
        """What the model's cache can be used for again."""
        return prefill.reuse(self.model, self._settings)

    def plan(self, prompts: Sequence[list[int]], *, share: bool = True) -> list[list[int]]:
        """Batches of prompts, as indices; `share`, whether what those of a batch begin with may be read once."""
        batches = plan_batches(prompts, self.decoding, share=share)
        shares = share and any(self._prefix([prompts[i] for i in batch]) for batch in batches)
        return batches if shares or not share else plan_batches(prompts, self.decoding, share=False)

    @torch.inference_mode()
    def complete(
        self,
        prompts: Sequence[list[int]],
        keys: Sequence[int],
        *,
        share: bool = True,
        criteria: Sequence[Any] = (),
        within: Within | None = None,
        capture: Capture | None = None,
    ) -> list[Completion]:
        """Completions of a batch of prompts, cut before their first stop token.

        Parameters
        ----------
        prompts : token ids of each.
        keys : of their samples, see `sample_keys`.
        share : whether what they begin with may be read once.
        criteria : further stopping criteria; with any, the batch is kept whole, as they see its rows.
        within : what `generate` runs in.
        capture : one that is entered, and sees the tokens of these prompts; it goes along as the batch is cut down.
        """
        batch = self._pad(prompts)
        cache = self._read_prefix(batch, self._prefix(prompts)) if share else None
        if cache is None and self._may_reserve(batch.width):
            cache = prefill.empty_cache(self.model, self._room(batch))
        return self.finish(Begun(batch, cache), keys, within, criteria, capture)

    @torch.inference_mode()
    def read(self, prompts: Sequence[list[int]]) -> Begun:
        """Read all but the last token of each prompt of a batch; where one has no other, nothing."""
        batch = self._pad(prompts)
        if min(map(len, prompts)) == 1:  # a row of padding alone
            return Begun(batch)
        first = batch.begin(batch.width - 1)
        prefix = min(self._prefix(prompts), first.width)
        cache = self._read_prefix(batch, prefix)
        if prefix < first.width:
            with own_passes.prompts_of_width(batch.width):
                cache = prefill.read(self.model, first, self._settings, cache)
        return Begun(batch, cache).reserve(self._room(batch))

    @torch.inference_mode()
    def finish(
        self,
        begun: Begun,
        keys: Sequence[int],
        within: Within | None = None,
        criteria: Sequence[Any] = (),
        capture: Capture | None = None,
    ) -> list[Completion]:
        """Completions of prompts that have been begun to be read, which this goes on with; otherwise as `complete`."""
        batch, cache = begun.prompts, begun.cache
        width = batch.width
        within = within or (lambda rows: contextlib.nullcontext())
        written: list[list[int]] = [[] for _ in keys]
        rows, left = list(range(len(keys))), self.decoding.max_new_tokens
        cuts = not criteria and left > 1 and bool(self.stops) and self.reuse.rows
        while rows and left:
            config = copy.copy(self._settings)
            config.max_new_tokens, config.return_dict_in_generate = left, cuts
            stopping = [*criteria, _Enough(self.stops, batch.width, left)] if cuts else list(criteria)
            if capture is not None:
                stopping.append(capture.stopping_criterion)
            processors: list[Any] = [FirstTokenAmong(self._first_tokens, width)] if self._first_tokens else []
            if self.decoding.temperature > 0:
                processors.append(Sampler(self.decoding, [keys[row] for row in rows], width))
            generator: Any = self.model
            with own_passes.prompts_of_width(width), within(rows):
                output = generator.generate(
                    input_ids=batch.ids, attention_mask=batch.mask, generation_config=config,
                    logits_processor=processors, stopping_criteria=stopping,
                    **({} if cache is None else {cache.name: cache.value}),
                )  # fmt: skip
            ids: Tensor = output.sequences if cuts else output
            for row, tokens in zip(rows, ids[:, batch.width :].tolist()):
                written[row] += tokens
            left -= ids.shape[1] - batch.width
            alive = [at for at, row in enumerate(rows) if not self._ended(written[row])]
            if not cuts or not alive or not left:
                break
            kept = torch.tensor(alive, dtype=torch.int64, device=ids.device)
            cache = Cache.of(output)
            cache.keep(kept)
            batch = batch.grown(ids).rows(kept)
            rows = [rows[at] for at in alive]
            if capture is not None:
                capture.keep_rows(rows)
        return completions(self.tokenizer, written, self.stops)

    def _ended(self, tokens: Sequence[int]) -> bool:
        return _end(tokens, self.stops) < len(tokens)

    @functools.cached_property
    def _first_tokens(self) -> list[int]:
        labels = self.decoding.first_token_among
        return [] if labels is None else label_tokens(self.tokenizer, labels)

    @functools.cached_property
    def _settings(self) -> GenerationConfig:
        return settings(
            self.model, max_new_tokens=self.decoding.max_new_tokens, stop_tokens=self.stops, pad_token=self._pad_token
        )

    @property
    def _pad_token(self) -> int:
        token: Any = self.tokenizer.pad_token_id
        return token if token is not None else self.stops[0] if self.stops else 0

    def _pad(self, prompts: Sequence[list[int]]) -> Prompts:
        return Prompts.pad(prompts, self._pad_token, hook_points.input_device(self.model))

    def _prefix(self, prompts: Sequence[list[int]]) -> int:
        """How many tokens that prompts begin with to read once."""
        prefix = common_prefix(prompts)
        return prefix if worth_sharing(prefix, len(prompts)) and self.reuse.prefix else 0

    def _read_prefix(self, batch: Prompts, prefix: int) -> Cache | None:
        if not prefix:
            return None
        with own_passes.prompts_of_width(batch.width):
            return prefill.read_prefix(self.model, batch, prefix, self._room(batch), self._settings)

    def _room(self, batch: Prompts) -> int:
        """How many tokens of a batch are read in the end."""
        return batch.width + self.decoding.max_new_tokens - 1

    def _may_reserve(self, width: int) -> bool:
        """Whether a cache that keeps every token is one that the model takes, and keeps no more than its own would."""
        config, tokens = hook_points.text_config(self.model), width + self.decoding.max_new_tokens
        windows = [getattr(config, name, None) or tokens for name in ("sliding_window", "attention_chunk_size")]
        return self.decoding.max_new_tokens > 1 and min(windows) >= tokens and self.reuse.prefix


class _Enough:
    """A stopping criterion that ends a call of `generate` once it is worth going on without the rows that ended."""

    def __init__(self, stops: Sequence[int], width: int, left: int):
        self._stops, self._end = stops, width + left
        self._stop_ids: Tensor | None = None
        self._ended: Tensor

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        token = input_ids[:, -1]
        if self._stop_ids is None:
            self._stop_ids = torch.tensor(self._stops, dtype=torch.int64, device=token.device)
            self._ended = torch.zeros_like(token, dtype=torch.bool)
        self._ended |= torch.isin(token, self._stop_ids)
        ended, left = int(self._ended.sum()), self._end - input_ids.shape[1]
        enough = ended >= ENDED * len(token) and ended * left > PASS
        return torch.full_like(self._ended, enough)
