"""The published way of working, written anew from what it does, to be measured against.

Of the paper's released code: every SAE lies on the device in float32; a hook on each layer encodes the last position
of every pass, and a dense `[B, T, d_sae]` buffer of each layer grows by concatenation; pooled activations go to the
CPU in float64, layer by layer and batch by batch, into raw sums; steering encodes every step as well and multiplies a
one-hot `[B, 1, d_sae]` by the decoder; and pruning completes one prompt at a time.

Unlike it, hooks sit where the SAE was trained, and not one block early, so that the same features can be found.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bench import eager
from corrsteer import Decoding, Task
from corrsteer.lm.generation import stop_tokens, tokenize
from corrsteer.lm.hook_points import decoder_layers, input_device

BATCH = 8  # prompts


@dataclass(frozen=True)
class Sae:
    """A jumprelu SAE, or without a threshold a top-k one, all of it in float32.

    `W_enc: [d_in, d_sae]`, `W_dec: [d_sae, d_in]`, the others `[d_sae]`.
    """

    W_enc: Tensor
    b_enc: Tensor
    threshold: Tensor | None
    W_dec: Tensor
    k: int = 0

    @property
    def nbytes(self) -> int:
        parts = (self.W_enc, self.b_enc, self.threshold, self.W_dec)
        return sum(part.nbytes for part in parts if part is not None)


@dataclass(frozen=True)
class Chosen:
    """A feature that was selected, and what its direction is multiplied by."""

    layer: int
    index: int
    coefficient: float


@dataclass
class Sums:
    """Raw float64 sums on the CPU, each `[d_sae]`: of z, z², y z, and of z where y > 0."""

    z: Tensor
    zz: Tensor
    yz: Tensor
    positive: Tensor

    @classmethod
    def zeros(cls, d_sae: int) -> Sums:
        return cls(*(torch.zeros(d_sae, dtype=torch.float64, device="cpu") for _ in range(4)))

    def add(self, pooled: Tensor, y: Tensor) -> None:
        """Add pooled activations `[B, d_sae]` and rewards `y: [B]` float64."""
        z = pooled.to("cpu", torch.float64)
        self.z += z.sum(0)
        self.zz += z.square().sum(0)
        self.yz += y @ z
        self.positive += (y > 0).double() @ z


@dataclass
class Collected:
    """Sums of each layer, and the rewards and completions of every sample."""

    sums: dict[int, Sums]
    rewards: list[float] = field(default_factory=list)
    completions: list[str] = field(default_factory=list)

    def correlation(self, layer: int) -> Tensor:
        """Pearson's r of each feature, `[d_sae]` float64; 0 where either variance is."""
        of, y, n = self.sums[layer], torch.tensor(self.rewards, dtype=torch.float64, device="cpu"), len(self.rewards)
        covariance = n * of.yz - of.z * y.sum()
        variances = (n * of.zz - of.z.square()) * (n * y.square().sum() - y.sum() ** 2)
        return (covariance / variances.clamp(min=0).sqrt()).nan_to_num(0, 0, 0)

    def best(self) -> list[Chosen]:
        """The feature with the highest r of every layer but the first, with its mean where rewards are positive."""
        found, positive = [], sum(reward > 0 for reward in self.rewards)
        for layer in sorted(set(self.sums) - {0}):
            r, at = self.correlation(layer).max(0)
            if r > 0 and positive:
                found.append(Chosen(layer, int(at), float(self.sums[layer].positive[at]) / positive))
        return found


def encode(sae: Sae, x: Tensor) -> Tensor:
    """Dense activations, float32."""
    return eager.encode(x, sae.W_enc, sae.b_enc, sae.threshold, sae.k)


def append(buffer: Tensor | None, z: Tensor) -> Tensor:
    """A buffer `[B, T, d_sae]` with the activations of one more step, `[B, 1, d_sae]`."""
    return z if buffer is None else torch.cat([buffer, z], dim=1)


def pool(buffer: Tensor, kept: Sequence[int]) -> Tensor:
    """The maximum over the first `kept` steps of each row, `[B, d_sae]`."""
    steps = torch.arange(buffer.shape[1], dtype=torch.int64, device=buffer.device)
    keeps = steps < torch.tensor(kept, dtype=torch.int64, device=buffer.device)[:, None]
    return buffer.masked_fill(~keeps[:, :, None], 0).amax(1)  # activations are never negative


@contextlib.contextmanager
def at_last_position(
    model: Any, layers: Sequence[int], change: Callable[[int, Tensor], Tensor | None]
) -> Iterator[None]:
    """Call `change(layer, h [B, 1, d])` with the last position of each layer's output; what it returns is put there."""

    def hook(layer: int) -> Callable[..., None]:
        def read(_module: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            h = output[0] if isinstance(output, tuple) else output
            changed = change(layer, h[:, -1:])
            if changed is not None:
                h[:, -1:] = changed

        return read

    blocks = decoder_layers(model)[1]
    handles = [blocks[layer].register_forward_hook(hook(layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def complete(model: Any, tokenizer: Any, prompts: Sequence[list[int]], new_tokens: int) -> tuple[list[str], list[int]]:
    """Greedy completions of a batch, and how many of their steps are kept: up to the first stop token, one at least."""
    stops, device = stop_tokens(model, tokenizer), input_device(model)
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stops or [0])[0]
    width = max(map(len, prompts))
    padding = [width - len(prompt) for prompt in prompts]
    ids = [[filler] * n + list(prompt) for n, prompt in zip(padding, prompts)]
    mask = [[0] * n + [1] * len(prompt) for n, prompt in zip(padding, prompts)]
    out = model.generate(
        input_ids=torch.tensor(ids, dtype=torch.int64, device=device),
        attention_mask=torch.tensor(mask, dtype=torch.int64, device=device),
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=stops or None, pad_token_id=filler,
    )  # fmt: skip
    rows = out[:, width:].tolist()
    ends = [next((at for at, token in enumerate(row) if token in stops), len(row)) for row in rows]
    texts = tokenizer.batch_decode([row[:end] for row, end in zip(rows, ends)], skip_special_tokens=True)
    return texts, [max(1, end) for end in ends]


def collect(
    model: Any, tokenizer: Any, saes: Mapping[int, Sae], task: Task, new_tokens: int, batch: int = BATCH
) -> Collected:
    """Generate, grade, and add the pooled activations of every layer to its sums."""
    prompts = tokenize(model, tokenizer, task, Decoding(max_new_tokens=new_tokens))
    found = Collected({layer: Sums.zeros(len(sae.b_enc)) for layer, sae in saes.items()})
    for at in range(0, len(prompts), batch):
        buffers: dict[int, Tensor | None] = dict.fromkeys(saes)

        def record(layer: int, h: Tensor, buffers: dict[int, Tensor | None] = buffers) -> None:
            buffers[layer] = append(buffers[layer], encode(saes[layer], h))

        with at_last_position(model, list(saes), record):
            texts, kept = complete(model, tokenizer, prompts[at : at + batch], new_tokens)
        rewards = task.rewards(texts, task.examples[at : at + batch])
        y = torch.tensor(rewards, dtype=torch.float64, device="cpu")
        for layer, buffer in buffers.items():
            assert buffer is not None, "every completion has a pass"
            found.sums[layer].add(pool(buffer, kept), y)
        found.rewards += rewards
        found.completions += texts
    return found


@contextlib.contextmanager
def steered(model: Any, saes: Mapping[int, Sae], chosen: Sequence[Chosen]) -> Iterator[None]:
    """Add features of one or several layers at the last position of every pass."""
    at_layer = {one.layer: one for one in chosen}

    def add(layer: int, h: Tensor) -> Tensor:
        sae, one = saes[layer], at_layer[layer]
        encode(sae, h)  # which is computed at every step, though a fixed coefficient does not need it
        one_hot = torch.zeros(len(h), 1, len(sae.b_enc), dtype=torch.float32, device=h.device)
        one_hot[:, :, one.index] = one.coefficient
        return (h.float() + one_hot @ sae.W_dec).to(h.dtype)

    with at_last_position(model, list(at_layer), add):
        yield


def graded(
    model: Any, tokenizer: Any, task: Task, new_tokens: int, batch: int = BATCH
) -> tuple[list[str], list[float]]:
    """Completions and rewards of every example, with the model as it is."""
    prompts = tokenize(model, tokenizer, task, Decoding(max_new_tokens=new_tokens))
    texts = []
    for at in range(0, len(prompts), batch):
        texts += complete(model, tokenizer, prompts[at : at + batch], new_tokens)[0]
    return texts, task.rewards(texts, task.examples)


def prune(
    model: Any, tokenizer: Any, saes: Mapping[int, Sae], chosen: Sequence[Chosen], task: Task, new_tokens: int
) -> tuple[float, list[float]]:
    """The unsteered validation score, and that of each feature steered alone, one prompt at a time."""

    def score() -> float:
        rewards = graded(model, tokenizer, task, new_tokens, batch=1)[1]
        return sum(rewards) / len(rewards)

    unsteered, alone = score(), []
    for one in chosen:
        with steered(model, saes, [one]):
            alone.append(score())
    return unsteered, alone


def evaluate(
    model: Any, tokenizer: Any, saes: Mapping[int, Sae], chosen: Sequence[Chosen], task: Task, new_tokens: int
) -> tuple[tuple[list[str], list[float]], tuple[list[str], list[float]]]:
    """Completions and rewards, unsteered and steered by all features."""
    before = graded(model, tokenizer, task, new_tokens)
    with steered(model, saes, chosen):
        return before, graded(model, tokenizer, task, new_tokens)
