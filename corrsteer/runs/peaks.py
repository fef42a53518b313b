"""The completions in which a feature is most and least active, and the token at which it peaks in each."""

from __future__ import annotations

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
from corrsteer.runs.run import Run
from corrsteer.sae.encoder import SparseEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Extreme:
    """A sample in which a feature is as active, or as little, as in few others.

    Attributes
    ----------
    sample : its number in the run.
    activation : pooled, as the run has it.
    rollout : its completion.
    peak : where the feature is largest; None where that was not looked for, or it is never active.
    """

    sample: int
    activation: float
    rollout: Rollout
    peak: Peak | None = None


@dataclass(frozen=True)
class Peak:
    """A token of a prompt and its completion, the text before and after it, and the feature's activation there."""

    before: str
    token: str
    after: str
    activation: float


def extremes(
    run: Run, layer: int, feature: int, k: int = 5, pool: str | None = None
) -> tuple[list[Extreme], list[Extreme]]:
    """The k samples in which a feature's pooled activation is highest, and the k others in which it is lowest.

    Raises
    ------
    CorrSteerError : for a layer or feature that the run has not, and where activations or rollouts were not kept.
    """
    k = whole("k", k, 1)
    if run.activations is None or not run.rollouts:
        raise CorrSteerError(
            "the run holds no activations of its samples; collect with keep_activations='always'"
        )
    if layer not in run.points:
        raise CorrSteerError(f"layer must be one of {', '.join(map(str, run.points))}, got {layer!r}")
    known = run.moments[layer][run.pool].d_sae
    if whole("feature", feature, 0) >= known:
        raise CorrSteerError(f"feature must lie in 0..{known - 1}, got {feature}")
    found = sorted(run.activations.of_feature(layer, pool or run.pool, feature), key=lambda one: (-one[1], one[0]))

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
    """The same with the token at which the feature peaks, of those that were pooled: each is read and encoded again."""
    positions, excluded = run.provenance["positions"], set(run.provenance["exclude_tokens"])
    rollouts = fill_in([one.rollout for one in found], tokenizer, stop_tokens(model, tokenizer))
    sequences = [(list(rollout.prompt_ids or ()), list(rollout.completion_ids or ())) for rollout in rollouts]
    reader = TeacherForcing(model, {layer: run.points[layer]}, positions=positions, exclude_tokens=excluded)
    peaks: dict[int, Peak] = {}
    for batch in reader.plan(sequences):
        x, cu_seqlens = reader.read([sequences[i] for i in batch]).packed(layer)
        z = ops.encode(x.to(encoder.device or x.device), encoder)[:, feature].float().cpu()
        for at, of_sample in zip(batch, z.split(cu_seqlens.diff().tolist())):
            best = int(of_sample.argmax())
            if float(of_sample[best]) > 0:
                peaks[at] = _peak(tokenizer, *sequences[at], positions, excluded, best, float(of_sample[best]))
    return [replace(one, peak=peaks.get(at)) for at, one in enumerate(found)]


def _peak(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    completion: Sequence[int],
    positions: str,
    excluded: set[int],
    kept: int,
    activation: float,
) -> Peak:
    """The token that was read at one of the kept steps."""
    ids, last = [*prompt, *completion], len(prompt) - 1
    places = [at for at in range(last) if positions == "all" and prompt[at] not in excluded]
    place = [*places, *range(last, last + max(len(completion), 1))][kept]
    parts = ids[:place], ids[place : place + 1], ids[place + 1 :]
    before, token, after = (str(tokenizer.decode(part)) for part in parts)
    return Peak(before, token, after, activation)
