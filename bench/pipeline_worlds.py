"""What whole jobs are measured on: language models with random SAEs on all layers, and samples to grade."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import published
from bench.published import Sae
from corrsteer import CorrSteerError, Run, SparseEncoder, Steering, Task
from corrsteer.sae.sources import decoder_in_memory
from corrsteer.tasks import Example

SMOLLM2, GEMMA = "SmolLM2-135M-Instruct", "Gemma 2 2B, random"
SHAPE = (30, 576)  # layers and width of the former
SPREAD = 2.576  # standard deviations above the mean, where 0.5 % of a normal distribution lies
CALIBRATION = (16, 8)  # prompts and new tokens that thresholds are set by


def first_word_bit(completion: str, example: Example) -> float:
    """A reward that takes no sense to earn: a bit of the prompt and the completion's first word, 1 in half of cases.

    Of the first word alone, as what rounding changes comes later mostly; of the prompt, as many begin alike.
    """
    words = completion.split()
    return float(zlib.crc32(f"{example.prompt}\n{words[0]}".encode()) & 1) if words else 0.0


@dataclass
class World:
    """A language model with SAEs on all layers, and samples."""

    model: Any
    tokenizer: Any
    encoders: dict[int, SparseEncoder]
    saes: dict[int, Sae]  # the same, as the published way holds them
    train: Task
    validation: Task
    test: Task
    runs: dict[int, tuple[Run, Steering]] = field(default_factory=dict)  # by new tokens

    @property
    def encoder_bytes(self) -> int:
        """What our encoders hold."""
        parts = ("weight", "weight_low", "bias", "threshold")
        tensors = [getattr(encoder, part) for encoder in self.encoders.values() for part in parts]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def chat_tasks(samples: Sequence[int]) -> list[Task]:
    """Lists for a chat model to go on with, none of them twice: it begins in many ways, and writes for long."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(0).shuffle(pairs)
    prompts = iter([f"What comes after {a}, {b}? Go on with the list." for a, b in pairs])
    return _tasks(samples, prompts, chat=True)


def random_tasks(samples: Sequence[int], vocabulary: int, lengths: tuple[int, int]) -> list[Task]:
    """Prompts of random tokens."""
    rng = random.Random(0)

    def prompts() -> Iterator[str]:
        while True:
            yield " ".join(str(rng.randrange(3, vocabulary)) for _ in range(rng.randint(*lengths)))

    return _tasks(samples, prompts(), chat=False)


def _tasks(samples: Sequence[int], prompts: Iterator[str], chat: bool) -> list[Task]:
    return [
        Task.from_rows(
            [{"prompt": next(prompts)} for _ in range(n)],
            grader=first_word_bit, answer_field=None, chat=chat, name=name,
        )
        for name, n in zip(("train", "validation", "test"), samples)
    ]  # fmt: skip


def random_model(name: str, toy: bool, dtype: torch.dtype, device: torch.device) -> Any:
    """A model with random weights, made on the device: of Gemma 2 2B's shape, or a toy of an architecture."""
    from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

    torch.manual_seed(0)
    small = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    }  # fmt: skip
    own = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    if name == GEMMA:  # whose defaults are those of Gemma 2 2B
        size = small | {"query_pre_attn_scalar": 16, "initializer_range": 0.3} if toy else {}
        config = Gemma2Config(**size, **own)
    else:
        config = LlamaConfig(**small, **own, initializer_range=0.3)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    return model.requires_grad_(False)


@torch.no_grad()
def random_saes(
    model: Any, tokenizer: Any, task: Task, d_sae: int, precision: str, device: torch.device
) -> tuple[dict[int, SparseEncoder], dict[int, Sae]]:
    """SAEs on all layers with random directions, of which each token has about 0.5 % active; ours and published.

    Decoder directions are the encoder's. Ours lie on the CPU, in place of the disk that they are read from otherwise.
    """
    prompts, new = CALIBRATION
    layers = range(model.config.num_hidden_layers)
    seen: dict[int, list[Tensor]] = {layer: [] for layer in layers}

    def look(layer: int, h: Tensor) -> None:
        seen[layer].append(h[:, -1].float())

    with published.at_last_position(model, layers, look):
        published.graded(model, tokenizer, task.take(prompts), new, batch=prompts)
    generator = torch.Generator(device).manual_seed(1)
    encoders, saes = {}, {}
    for layer in layers:
        x = torch.cat(seen.pop(layer))
        d_in = x.shape[1]
        weight = torch.randn(d_sae, d_in, generator=generator, dtype=torch.float32, device=device) / d_in**0.5
        p = x @ weight.T
        bias, threshold = -p.mean(0), SPREAD * p.std(0)
        directions = weight / weight.norm(dim=1, keepdim=True)
        saes[layer] = Sae(weight.T.contiguous(), bias, threshold, directions)
        encoders[layer] = SparseEncoder(
            d_in, d_sae, "jumprelu", weight=weight, bias=bias, threshold=threshold,
            hook_name=f"blocks.{layer}.hook_resid_post", decoder=decoder_in_memory(directions.cpu(), False),
        ).to(precision=precision)  # fmt: skip
    return encoders, saes


def chat_model(folder: Path, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval().requires_grad_(False)
    shape = (model.config.num_hidden_layers, model.config.hidden_size)
    if shape != SHAPE:
        raise CorrSteerError(
            f"--model must be a folder with {SMOLLM2}, of 30 layers of width 576, got {shape[0]} of width {shape[1]}"
        )
    return model, AutoTokenizer.from_pretrained(folder)
