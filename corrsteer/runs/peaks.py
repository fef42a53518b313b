"""The completions in which a feature is most and least active, and the token at which it peaks in each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import nn

from corrsteer import ops
from corrsteer.arguments import whole
from corrsteer.errors import CorrSteerError
from corrsteer.lm.generation import stop_tokens
from corrsteer.lm.teacher_forcing import TeacherForcing
from corrsteer.rollouts.rollout import Rollout
from corrsteer.rollouts.tokens import fill_in
from corrsteer.runs.pooling import LAST_PROMPT
from corrsteer.runs.run import Run
from corrsteer.sae.encoder import SparseEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"  # what tokens decode to that end within a character


@dataclass(frozen=True)
class Extreme:
    """A sample in which a feature is as active, or as little, as in few others.

    Attributes
    ----------
    sample : its number in the run.
    activation : pooled, as the run has it.
    rollout : its completion.
    peak : where the feature is largest; None where that was not looked for, or it is never active.
    tokens : the text of the prompt and the completion in pieces, and the feature's activation at each; None at tokens
        that the run's pooling is not over. Empty where that was not looked for. Tokens that end within a character are
        one piece with those that end it, and its activation is the largest of theirs.
    """

    sample: int
    activation: float
    rollout: Rollout
    peak: Peak | None = None
    tokens: tuple[tuple[str, float | None], ...] = ()


@dataclass(frozen=True)
class Peak:
    """A token of a prompt and its completion, the text before and after it, and the feature's activation there."""

    before: str
    token: str
    after: str
    activation: float


def extremes(run: Run, layer: int, feature: int, k: int = 5) -> tuple[list[Extreme], list[Extreme]]:
    """The k samples in which a feature is most active, by the run's pooling, and the k others in which it is least.

    Raises
    ------
    CorrSteerError : for a layer or feature that the run has not, and where activations or rollouts were not kept.
    """
    k = whole("k", k, 1)
    if run.activations is None or not run.rollouts:
        raise CorrSteerError("the run holds no activations of its samples; collect with keep_activations='always'")
    if layer not in run.points:
        raise CorrSteerError(f"layer must be one of {', '.join(map(str, run.points))}, got {layer!r}")
    known = run.moments[layer][run.pool].d_sae
    if whole("feature", feature, 0) >= known:
        raise CorrSteerError(f"feature must lie in 0..{known - 1}, got {feature}")
    there = [
        rollout is not None and not math.isnan(y) for rollout, y in zip(run.rollouts, run.rewards.tolist())
    ]  # of all that were collected, those that are looked at
    of_all = run.activations.of_feature(layer, run.pool, feature)
    found = sorted((one for one in of_all if there[one[0]]), key=lambda one: (-one[1], one[0]))

    def of(chosen: Sequence[tuple[int, float]]) -> list[Extreme]:
        rollouts = [(sample, value, run.rollouts[sample]) for sample, value in chosen]
        return [Extreme(sample, value, rollout) for sample, value, rollout in rollouts if rollout is not None]

    return of(found[:k]), of(sorted(found[k:], key=lambda one: (one[1], one[0]))[:k])


def with_peaks(
    run: Run,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoder: SparseEncoder,
    layer: int,
    feature: int,
    found: Sequence[Extreme],
) -> list[Extreme]:
    """The same with the feature's activation at each token, and the one at which it peaks, of those that the run's
    pooling is over: each is read and encoded again."""
    positions, excluded = run.provenance["positions"], set(run.provenance["exclude_tokens"])
    rollouts = fill_in([one.rollout for one in found], tokenizer, stop_tokens(model, tokenizer))
    sequences = [(list(rollout.prompt_ids or ()), list(rollout.completion_ids or ())) for rollout in rollouts]
    reader = TeacherForcing(model, {layer: run.points[layer]}, positions=positions, exclude_tokens=excluded)
    peaks: dict[int, Peak] = {}
    tokens: dict[int, tuple[tuple[str, float | None], ...]] = {}
    for batch in reader.plan(sequences):
        residuals = reader.read([sequences[i] for i in batch])
        x, cu_seqlens = residuals.packed(layer)
        if run.pool == LAST_PROMPT:
            x = residuals.last_prompt(layer)
        z = ops.encode(x.to(encoder.device or x.device), encoder)[:, feature].float().cpu()
        each = [1] * len(batch) if run.pool == LAST_PROMPT else cu_seqlens.diff().tolist()
        for at, of_sample in zip(batch, z.split(each)):
            best = int(of_sample.argmax())
            prompt, completion = sequences[at]
            places = [len(prompt) - 1] if run.pool == LAST_PROMPT else _kept(prompt, completion, positions, excluded)
            tokens[at] = _pieces(tokenizer, [*prompt, *completion], dict(zip(places, of_sample.tolist())))
            if float(of_sample[best]) > 0:
                peaks[at] = _peak(tokenizer, [*prompt, *completion], places[best], float(of_sample[best]))
    return [replace(one, peak=peaks.get(at), tokens=tokens[at]) for at, one in enumerate(found)]


def _kept(prompt: Sequence[int], completion: Sequence[int], positions: str, excluded: set[int]) -> list[int]:
    """Places of the tokens that were read at the kept steps, see `TeacherForcing`."""
    last = len(prompt) - 1
    places = [at for at in range(last) if positions == "all" and prompt[at] not in excluded]
    return [*places, *range(last, last + max(len(completion), 1))]


def _peak(tokenizer: PreTrainedTokenizerBase, ids: list[int], place: int, activation: float) -> Peak:
    """The token at a place."""
    parts = ids[:place], ids[place : place + 1], ids[place + 1 :]
    before, token, after = (str(tokenizer.decode(part)) for part in parts)
    return Peak(before, token, after, activation)


def _pieces(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], activations: dict[int, float]
) -> tuple[tuple[str, float | None], ...]:
    """The text in pieces of whole characters, see `Extreme.tokens`."""
    found: list[tuple[str, float | None]] = []
    start = 0
    for end in range(1, len(ids) + 1):
        # beside the token before it, as some tokenizers leave out the space that a text begins with
        known = str(tokenizer.decode(ids[max(start - 1, 0) : start]))
        text = str(tokenizer.decode(ids[max(start - 1, 0) : end]))[len(known) :]
        if text.endswith(REPLACEMENT) and end < len(ids):
            continue
        found.append((text, max((activations[at] for at in range(start, end) if at in activations), default=None)))
        start = end
    return tuple(found)
