"""`collect`: generate, grade, and fold the activations of every kept step into moments and evidence, one per layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm

from corrsteer.arguments import check_type, whole
from corrsteer.compatibility import warn_once
from corrsteer.errors import CorrSteerError
from corrsteer.lm import hook_points
from corrsteer.lm.decoding import Decoding
from corrsteer.lm.generation import Generator, tokenize
from corrsteer.lm.sampling import sample_keys
from corrsteer.ops import Moments, registry
from corrsteer.runs.blocks import BlockCollector
from corrsteer.runs.excluded import excluded_tokens
from corrsteer.runs.options import Options
from corrsteer.runs.placement import place
from corrsteer.runs.pooling import RESIDUAL_POOLINGS
from corrsteer.runs.provenance import provenance
from corrsteer.runs.run import Run
from corrsteer.sae.encoder import SparseEncoder
from corrsteer.stats import stability
from corrsteer.stats.blocks import shuffled_blocks
from corrsteer.stats.evidence import Evidence
from corrsteer.tasks import Task
from corrsteer.types import Device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class CollectionStopped(CorrSteerError):
    """Collection could not go on; `run` holds everything up to there."""

    def __init__(self, message: str, run: Run):
        super().__init__(message, run)  # both, as unpickling makes it anew from them
        self.message = message
        self.run = run

    def __str__(self) -> str:
        return f"{self.message} (the {self.run.n} samples collected before are kept)" if self.run.n else self.message


def collect(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoders: Mapping[int, SparseEncoder],
    task: Task,
    *,
    pool: str = "max",
    coefficient_pool: str | None = None,
    positions: str = "generated",
    exclude_tokens: Collection[int] | None = None,
    decoding: Decoding | None = None,
    hook_offset: int = 0,
    permutations: int = 1000,
    bootstrap: int = 0,
    scores: Sequence[str] = ("pearson",),
    block_size: int = 512,
    shuffle_seed: int = 0,
    patience: int | None = None,
    patience_layers: Collection[int] | None = None,
    buffer_bytes: int = 1 << 30,
    statistics_bytes: int = 16 << 30,
    progress: bool = True,
    backend: str | None = None,
) -> Run:
    """Generate a completion for every example, grade it, and stream activations and rewards into statistics.

    Examples are taken in random order, in blocks. Within a block they are batched by length, and labels permuted.

    Parameters
    ----------
    model, tokenizer : a Hugging Face causal language model and its tokenizer.
    encoders : layer -> encoder. An encoder that does not say where it was trained reads the layer's output. Each is
        moved to its layer's device.
    task : prompts and their grader.
    pool : `max` or `mean` over a sample's kept steps, for the correlation; or `last_prompt`, the activation at the last
        prompt token alone, which is kept beside the others in any case.
    coefficient_pool : the same for the coefficient; by default `pool`.
    positions : `generated`, the kept steps of the generation, or `all`, the prompt as well.
    exclude_tokens : ids of prompt tokens that `all` leaves out; by default the BOS token and those that the encoders'
        metadata says they were trained without, see `excluded_tokens`. `()` keeps them. A prompt's last token is kept.
    decoding : how to generate.
    hook_offset : layers to add to every hook point. -1 reads each SAE one block early, as the paper's released code
        does; nothing else needs it.
    permutations : P, of the labels, for p-values, none of which is below 1 / (P + 1); 0, or at least 19. They take
        8 · P bytes a feature.
    bootstrap : replicates for bootstrap intervals, which take 24 bytes each a feature. Other intervals need none.
    scores : which scores to keep permutations of, and what that takes, see `Evidence`.
    block_size : examples in a block, whose pooled activations are kept until the last of them is graded: 4 bytes a
        feature, pooling and example. No batch is larger.
    shuffle_seed : of the examples' order, the permutations and the bootstrap.
    patience : stop early when for so many blocks no layer's best feature has changed, and their intervals lie above
        those of the next ones. P-values are of the samples collected, as if that many had been planned.
    patience_layers : the layers that `patience` looks at; by default all.
        `corrsteer.experiments.selection.selectable` gives those that `select` considers.
    buffer_bytes : memory for captured residuals. Past it they are encoded and pooled as they come; the result is
        the same.
    statistics_bytes : the most memory that evidence and a block's pooled activations and residuals may take, for all
        layers.
    backend : a backend's name; by default the fastest that can.

    Raises
    ------
    CorrSteerError : before anything is generated, where task, encoders and model do not fit together, or the
        statistics would not fit in `statistics_bytes`.
    CollectionStopped : for whatever goes wrong later, such as activations that are NaN or infinite, a grader that
        fails, or an interrupt from the keyboard; the batches collected before are in its `run`.
    """
    warn_once()
    decoding = decoding or Decoding()
    check_type("encoders", encoders, Mapping, "a mapping of layers to encoders, such as {20: encoder}")
    encoders = {whole("each layer of encoders", layer, 0): encoder for layer, encoder in encoders.items()}
    if positions != "all":
        if exclude_tokens:
            raise CorrSteerError(
                f"exclude_tokens must be left out unless positions is 'all', as they are of prompts, got positions "
                f"{positions!r}"
            )
        exclude_tokens = ()
    elif exclude_tokens is None:
        exclude_tokens = excluded_tokens(tokenizer, encoders.values())
    options = Options(
        pool=pool, coefficient_pool=pool if coefficient_pool is None else coefficient_pool, positions=positions,
        permutations=permutations, bootstrap=bootstrap, scores=scores, block_size=block_size,
        shuffle_seed=shuffle_seed, patience=patience, patience_layers=patience_layers, buffer_bytes=buffer_bytes,
        statistics_bytes=statistics_bytes, backend=backend, exclude_tokens=exclude_tokens,
    )  # fmt: skip
    hook_offset = whole("hook_offset", hook_offset)
    hook_points.check_generates(model)
    points = place(model, encoders, hook_offset)
    prompts = tokenize(model, tokenizer, task, decoding)
    devices = {layer: hook_points.device_of(model, point) for layer, point in points.items()}
    encoders = {layer: encoder.to(devices[layer]) for layer, encoder in encoders.items()}
    dtype: Any = model.dtype
    calls = [
        registry.Call("encode_pool", devices[layer], dtype, encoder.activation, encoder.precision)
        for layer, encoder in encoders.items()
    ]
    backends = sorted({registry.choose(call, backend).name for call in calls})
    options.check_encoders(encoders)
    run = Run(
        moments={
            layer: {name: Moments(encoder.d_sae, device=devices[layer]) for name in options.pools}
            for layer, encoder in encoders.items()
        },
        residuals={
            layer: {name: Moments(encoder.d_in, device=devices[layer]) for name in RESIDUAL_POOLINGS}
            for layer, encoder in encoders.items()
        },
        points=points,
        decoders={layer: encoder.decoder for layer, encoder in encoders.items()},
        rewards=torch.full((len(task),), torch.nan, dtype=torch.float64, device="cpu"),
        pool=options.pool,
        coefficient_pool=options.coefficient_pool,
        evidence=_allocate_evidence(encoders, devices, options, len(task)),
        provenance=provenance(model, task, encoders, positions, decoding, hook_offset)
        | {"exclude_tokens": list(options.exclude_tokens), "backends": backends}
        | {"block_size": options.block_size, "shuffle_seed": options.shuffle_seed},
    )
    blocks = shuffled_blocks([len(prompt) for prompt in prompts], options.block_size, options.shuffle_seed)
    generator = Generator(model, tokenizer, decoding)
    collector = BlockCollector(run, generator, encoders, task, prompts, sample_keys(prompts), options)
    with tqdm(total=len(task), unit="sample", desc=f"collect {task.name}", disable=not progress) as bar:
        try:
            for number, block in blocks.items():
                collector.collect(number, block, bar.update)
                if progress:
                    bar.set_postfix_str(_leader(run), refresh=False)
                if _stops_early(run, options, len(task)):
                    break
        except (Exception, KeyboardInterrupt) as error:  # a GPU out of memory, say: hours of work are in the run
            if isinstance(error, CorrSteerError):
                reason = str(error)
            else:
                reason = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
            _finish(run, task)
            raise CollectionStopped(reason, run) from error
    _finish(run, task)
    return run


def _allocate_evidence(
    encoders: Mapping[int, SparseEncoder], devices: Mapping[int, torch.device], options: Options, samples: int
) -> dict[int, dict[str, Evidence]]:
    """Evidence of every layer and pooling; refused before anything is generated where it would not fit."""

    def all_of(devices: Mapping[int, Device]) -> dict[int, dict[str, Evidence]]:
        return {
            layer: {pool: options.evidence(encoder, pool, devices[layer]) for pool in options.pools}
            for layer, encoder in encoders.items()
        }

    planned = all_of(dict.fromkeys(encoders, "meta"))
    kept = sum(evidence.nbytes for of_layer in planned.values() for evidence in of_layer.values())
    block = min(options.block_size, samples)
    held = sum(
        4 * block * (encoder.d_sae * len(options.pools) + encoder.d_in * len(RESIDUAL_POOLINGS))
        for encoder in encoders.values()
    )
    remedy = (
        f"evidence takes {kept / 2**30:.3g} GiB (8 bytes a feature, permutation and score, three times that a "
        f"bootstrap replicate), a block of {block} samples "
        f"{held / 2**30:.3g} GiB; take fewer permutations, replicates or scores, or a smaller block_size"
    )
    if kept + held > options.statistics_bytes:
        raise CorrSteerError(
            f"statistics_bytes must be at least {kept + held}, got {options.statistics_bytes}: {remedy}"
        )
    try:
        return all_of(devices)
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is one of the former
        raise CorrSteerError(f"there is no memory for the statistics ({type(error).__name__}): {remedy}") from error


def _stops_early(run: Run, options: Options, samples: int) -> bool:
    """Whether `patience` ends the collection here, which the run then notes."""
    layers = run.points if options.patience_layers is None else options.patience_layers
    if not options.patience or run.n == samples or not stability.stable(run.snapshots, options.patience, layers):
        return False
    run.notes.append(
        f"stopped after {run.n} of {samples} samples, as for {options.patience} blocks no layer's best "
        f"feature has changed, and its interval now lies above the next one's"
    )
    return True


def _leader(run: Run) -> str:
    best = max((float(r), layer, int(i)) for layer in run.moments for r, i in [run.correlation(layer).max(0)])
    mean = run.rewards.nanmean().item()
    return f"reward {mean:.3f}, top L{best[1]}/{best[2]} r={best[0]:.3f}"


def _finish(run: Run, task: Task) -> None:
    """Record which samples were seen, and note a reward that never varied."""
    run.provenance["samples"] = task.samples(run.rewards.isfinite().nonzero()[:, 0].tolist())
    if run.n and not bool(run.moments_of_rewards.label_varies().any()):
        run.notes.append(
            f"every one of the {run.n} rewards was {run.rewards.nanmean().item():g}, so nothing correlates with them "
            f"and no feature can be selected; use a task that the model solves sometimes"
        )
