"""What a collection takes, before anything of it is loaded: memory by what it is for, and room on the disk.

Sizes are those of the objects that a collection makes, which are made here on the meta device and take nothing. What
passes of the model and of encoders need while they run comes on top.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from corrsteer.arguments import number, whole
from corrsteer.errors import CorrSteerError
from corrsteer.lm import hook_points
from corrsteer.lm.capture import buffered_steps
from corrsteer.lm.decoding import Decoding
from corrsteer.lm.hook_points import HookPoint
from corrsteer.lm.meta_model import cache_bytes, weight_bytes
from corrsteer.ops import Moments, registry
from corrsteer.ops.rows import SparseRows, feature_dtype
from corrsteer.runs.keeper import BYTES
from corrsteer.runs.options import Options
from corrsteer.runs.placement import place
from corrsteer.runs.pooling import LAST_PROMPT, RESIDUAL_POOLINGS, row_bytes
from corrsteer.sae.encoder import SparseEncoder
from corrsteer.types import Device

LONGEST_PROMPT = 512  # tokens, where nothing is said of prompts
DENSITY = 0.02  # share of features that are active in a sample, where nothing is said of it


@dataclass(frozen=True)
class Memory:
    """Bytes by what they are for.

    Attributes
    ----------
    process : what every process holds that generates and encodes.
    folding : what one of them holds besides, which folds blocks into the run's statistics.
    disk : what lies in the run's directory in the end, without the completions.
    keeps_activations : whether pooled activations are kept to the end, so that statistics are made of them.
    """

    process: dict[str, int]
    folding: dict[str, int]
    disk: dict[str, int]
    keeps_activations: bool

    @property
    def each(self) -> int:
        """Of a process."""
        return sum(self.process.values())

    @property
    def alone(self) -> int:
        """Of the process that folds blocks, which is the only one where there are no others."""
        return self.each + sum(self.folding.values())

    def total(self, processes: int) -> int:
        """Of so many processes."""
        return (processes - 1) * self.each + self.alone

    @property
    def largest(self) -> str:
        """The largest part of `alone`."""
        parts = self.process | self.folding
        return max(parts, key=lambda name: parts[name])


def plan_memory(
    model: nn.Module,
    encoders: Mapping[int, SparseEncoder],
    options: Options,
    decoding: Decoding,
    *,
    samples: int,
    prompt_tokens: int | None = None,
    density: float = DENSITY,
    rewards: int = 1,
    packs: bool = False,
    device: Device = "cpu",
) -> Memory:
    """What `collect` takes with these arguments, at most: prompts may be of any lengths up to the longest.

    Parameters
    ----------
    model, encoders : on the meta device, see `model_without_weights` and `SparseEncoder.load`.
    options, decoding : of the collection.
    samples : completions in all.
    prompt_tokens : of the longest prompt; by default 512, or what the model's context has room for.
    density : share of an SAE's features that are active in a sample, once its tokens are pooled. It is an assumption,
        which a run's `Moments.frequency().mean()` replaces.
    rewards : that graders give a completion.
    packs : whether encoders give up their weights for the packed copies that a CPU's kernels read, see `ops.pack`, as
        the command line has them do.
    device : what encoders run on, of which it depends whether a backend holds a copy of their weights.

    Raises
    ------
    CorrSteerError : where encoders do not fit the model, prompts its context, or residuals `buffer_bytes`.
    """
    samples, rewards = whole("samples", samples, 1), whole("rewards", rewards, 1)
    density = number("density", density, 0, 1)
    points = place(model, encoders)
    options.check_encoders(encoders)
    most = min(options.block_size, samples)
    lengths = range(1, _longest(model, decoding, prompt_tokens) + 1)
    batches = [(min(most, decoding.rows(length)), length) for length in lengths]  # of prompts of one length each
    rows, tokens = max(
        ((rows, length + decoding.max_new_tokens - 1) for rows, length in batches), key=lambda b: b[0] * b[1]
    )
    buffers, in_parts = _captured(model, options, decoding, batches, points)
    held = {layer: _held(encoder, options, model, device) for layer, encoder in encoders.items()}
    over_steps = any(pool != LAST_PROMPT for pool in options.pools)
    process = {
        "model weights": sum(weight_bytes(model).values()),
        "encoders": sum(
            encoder.nbytes - (_weights(encoder) if packs and held[layer] else 0) for layer, encoder in encoders.items()
        ),
        "packed encoders": sum(held.values()),
        "key-value cache": cache_bytes(model, rows, tokens),
        "captured residuals": buffers,
        "a batch's samples": row_bytes(max(rows for rows, _ in batches), encoders.values(), options.pools),
        "pooled parts of a batch": sum(_running_pools(in_parts, e) for e in encoders.values()) if over_steps else 0,
    }
    stored, keeps = _stored(encoders, options, samples, density)
    evidence = sum(
        options.evidence(encoder, pool, "meta", streams=not keeps).nbytes
        for encoder in encoders.values()
        for pool in options.pools
    )
    moments = sum(
        Moments(width, rewards, device="meta").nbytes
        for encoder in encoders.values()
        for width in [encoder.d_sae] * len(options.pools) + [encoder.d_in] * len(RESIDUAL_POOLINGS)
    )
    folding = {
        "a block's samples": row_bytes(most, encoders.values(), options.pools),
        "moments": 2 * moments,  # those with a block and those without, until it is folded in
        "evidence": evidence,
    }
    disk = {"activations": stored if keeps else 0, "moments": moments, "evidence": evidence}
    return Memory(_present(process), _present(folding), _present(disk), keeps)


def _present(parts: dict[str, int]) -> dict[str, int]:
    return {name: nbytes for name, nbytes in parts.items() if nbytes}


def _longest(model: nn.Module, decoding: Decoding, prompt_tokens: int | None) -> int:
    """Tokens of the longest prompt, for which the model's context has room."""
    context = getattr(hook_points.text_config(model), "max_position_embeddings", None)
    room = LONGEST_PROMPT if context is None else context - decoding.max_new_tokens
    if room < 1 or (context is not None and prompt_tokens is not None and prompt_tokens > room):
        raise CorrSteerError(
            f"prompt_tokens must leave room for max_new_tokens={decoding.max_new_tokens} in the model's context of "
            f"{context}, got {prompt_tokens or LONGEST_PROMPT}; give shorter ones"
        )
    return min(LONGEST_PROMPT, room) if prompt_tokens is None else whole("prompt_tokens", prompt_tokens, 1)


def _captured(
    model: nn.Module,
    options: Options,
    decoding: Decoding,
    batches: list[tuple[int, int]],
    points: Mapping[int, HookPoint],
) -> tuple[int, int]:
    """What residuals take at most that are captured of batches (rows, tokens of a prompt), and the most rows of one
    whose residuals come in parts, as buffers have no room for all of them."""
    anyone: Any = model
    widths, dtype = sum(hook_points.width(model, point) for point in points.values()), anyone.dtype
    most = in_parts = 0
    for rows, length in batches:
        steps = decoding.max_new_tokens - 1 + (length if options.positions == "all" else 1)
        fits = steps == buffered_steps(steps, rows, widths, dtype, len(points), options.buffer_bytes)
        step = torch.empty(rows, widths, dtype=dtype, device="meta").nbytes
        most = max(most, step + min(step * steps, options.buffer_bytes))  # last prompt tokens lie beside the buffers
        in_parts = max(in_parts, 0 if fits else rows)
    return most, in_parts


def _running_pools(rows: int, encoder: SparseEncoder) -> int:
    """Mean and maximum of samples whose residuals come in parts."""
    return 2 * torch.empty(rows, encoder.d_sae, dtype=torch.float32, device="meta").nbytes


def _held(encoder: SparseEncoder, options: Options, model: nn.Module, device: Device) -> int:
    """What a backend holds of an encoder beside it, which is only where it runs on a CPU."""
    if torch.device(device).type != "cpu":
        return 0
    anyone: Any = model
    call = registry.Call("encode_pool", torch.device(device), anyone.dtype, encoder.activation, encoder.precision)
    return registry.choose(call, options.backend).held_bytes(encoder)


def _weights(encoder: SparseEncoder) -> int:
    """What an encoder has no more once it is packed."""
    return sum(part.nbytes for part in (encoder.weight, encoder.weight_low) if part is not None)


def _stored(
    encoders: Mapping[int, SparseEncoder], options: Options, samples: int, density: float
) -> tuple[int, bool]:
    """What pooled activations of all samples take as rows, and whether they are kept to the end."""
    full, rest = divmod(samples, options.block_size)
    blocks = [options.block_size] * full + [rest] * bool(rest)
    rows = {n: [_rows(n, encoder, density) for encoder in encoders.values()] for n in set(blocks)}
    sizes = {n: len(options.pools) * sum(of_layer.nbytes for of_layer in layers) for n, layers in rows.items()}
    stored = sum(sizes[n] for n in blocks)
    if not options.keeps(encoders) or options.keep_activations == "always":
        return stored, options.keeps(encoders)
    last = blocks[-1]  # for which there has to be room before it is known how much it takes
    active = len(options.pools) * sum(len(of_layer.values) for of_layer in rows[last])
    return stored, stored - sizes[last] + active * BYTES <= options.activation_bytes


def _rows(n: int, encoder: SparseEncoder, density: float) -> SparseRows:
    """Rows of n samples of a layer and pooling."""
    values = round((1 if encoder.activation == "identity" else density) * encoder.d_sae * n)
    return SparseRows(
        torch.empty(values, dtype=torch.float32, device="meta"),
        torch.empty(values, dtype=feature_dtype(encoder.d_sae), device="meta"),
        torch.empty(n + 1, dtype=torch.int64, device="meta"),
        encoder.d_sae,
    )
