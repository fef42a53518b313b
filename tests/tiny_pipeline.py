"""A tiny language model with a character tokenizer and SAEs, for tests of the whole pipeline."""

import functools
import random

import torch

from corrsteer import SparseEncoder, Task
from corrsteer.demo.train import build_model, build_tokenizer


@functools.cache
def tokenizer():
    return build_tokenizer()


def model(seed=0):
    """The demo's architecture, untrained, with weights large enough for its generations to vary."""
    torch.manual_seed(seed)
    untrained = build_model(tokenizer()).eval()
    with torch.no_grad():
        for parameter in untrained.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return untrained


def encoders(layers=(1, 2), d_sae=48, d_in=128, seed=0):
    """Random jumprelu encoders whose decoder rows come from memory, as an SAE in memory gives them."""
    from corrsteer.sae.sources import decoder_in_memory

    made = {}
    for layer in layers:
        g = torch.Generator().manual_seed(seed + layer)
        made[layer] = SparseEncoder(
            d_in, d_sae, "jumprelu",
            weight=torch.randn(d_sae, d_in, generator=g) / d_in**0.5,
            bias=0.1 * torch.randn(d_sae, generator=g),
            threshold=torch.rand(d_sae, generator=g),
            hook_name=f"blocks.{layer}.hook_resid_post",
            decoder=decoder_in_memory(torch.randn(d_sae, d_in, generator=g), divide_by_norm=True),
        )  # fmt: skip
    return made


def digits_up(completion, example):
    """A reward that an untrained model gets sometimes: its first character is an even digit."""
    return float(completion[:1] in set("02468"))


def task(n=40, grader=digits_up, seed=0):
    """Prompts of different lengths."""
    rng = random.Random(seed)
    rows = [
        {"prompt": "+".join(str(rng.randrange(10**k)) for k in (1, 1 + i % 4)) + "=", "answer": "1"} for i in range(n)
    ]
    return Task.from_rows(rows, grader=grader, name="untrained")
