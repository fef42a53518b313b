"""A small world in which what correlates best does not steer, for tests of search.

A three-layer Llama of hand-set weights answers a prompt of words by `right .` or `wrong .`. What it decides is a sum:
what it reads in the words, plus its care, minus its haste, which words raise and lower too. SAEs read layers 1 and 2:

- `wrote right` reads the answer once it is written. It correlates best (r about 0.9, by the maximum). Added to the last
  prompt token, the model goes on as if it had answered.
- `care` and `haste` correlate little, and at the last prompt token. Added and subtracted there they raise the score,
  together more than alone, and only in layer 1: layer 2 has decided. Too much of either breaks the answer.
- the others read words, and some of them break the answer.
"""

from __future__ import annotations

import functools
import hashlib
import random
from dataclasses import dataclass
from typing import Any

import torch

from corrsteer import Decoding, SparseEncoder, Task
from corrsteer.sae.sources import decoder_in_memory

DECODING = Decoding(max_new_tokens=3)  # an answer, a full stop, and the end
LAYERS = (1, 2)
NAMED = ("wrote right", "wrote wrong", "care", "haste", "asked", "ended")  # features; the others have no name
D_SAE = 48

SPECIAL = ("<pad>", "<s>", "</s>", "?", "right", "wrong", ".", "eh")
WORDS = tuple(f"w{at:02}" for at in range(60))
PROMPT_WORDS = (5, 8)  # least and most of a prompt

# The residual stream's axes, before it is turned by a random basis; the last ones are noise.
HIDDEN, NOISE, CONSTANT = 48, 38, 16.0
AXES = {
    name: at
    for at, name in enumerate(
        ("constant", "asked", "right", "wrong", "ended", "eh", "decision", "break", "care", "haste")
    )
}
READ = [AXES["decision"], AXES["care"], AXES["haste"], *range(HIDDEN - NOISE, HIDDEN)]  # what attention carries
SPREADS = torch.tensor([1.0, 0.8, 0.5] + [0.5] * NOISE)  # of each at the last prompt token, over prompts
CARE, HASTE = 1.0, 1.3  # their means there
TOO_CAREFUL, TOO_HASTELESS = 11.5, 4.0  # where the answer breaks
BIAS = 0.19  # of the decision
CONFOUNDED = 0.1  # how much of what makes right answers goes with careful words without being care


@dataclass(frozen=True)
class World:
    """A model, its SAEs, and samples that share no prompt.

    Attributes
    ----------
    features : layer -> name -> the feature's index.
    """

    seed: int
    model: Any
    tokenizer: Any
    encoders: dict[int, SparseEncoder]
    features: dict[int, dict[str, int]]
    train: Task
    validation: Task
    test: Task


@functools.cache
def build(seed=0):
    """The world of a seed: other words, other directions of the same model, other prompts."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=generator))[0]  # column at: the direction of an axis
    made = {layer: _encoder(layer, basis, generator) for layer in LAYERS}
    return World(
        seed, _model(basis, generator), _tokenizer(), {at: e for at, (e, _) in made.items()},
        {at: named for at, (_, named) in made.items()}, *_tasks(seed),
    )  # fmt: skip


def answers(completion, example):
    """The reward: whether the answer is right, and ends."""
    return float(completion == "right .")


def meaningless(seed):
    """A reward that means nothing, but changes with the completion: a coin for each pair of prompt and completion."""

    def coin(completion, example):
        return float(hashlib.sha256(f"{seed} {example.prompt} {completion}".encode()).digest()[0] % 2)

    return coin


def null(coin, seed=0, n_train=600, n_validation=400):
    """Train and validation samples of a world, with rewards that mean nothing; each `coin` gives others."""
    world = build(seed)
    return tuple(
        Task.from_rows(
            [{"prompt": example.prompt} for example in part.examples[:n]], grader=meaningless(coin), answer_field=None,
            name=f"null {part.name}",
        )
        for part, n in ((world.train, n_train), (world.validation, n_validation))
    )  # fmt: skip


def _tasks(seed):
    rng, prompts = random.Random(seed), {}
    while len(prompts) < 1400:
        prompts[" ".join(rng.choices(WORDS, k=rng.randint(*PROMPT_WORDS))) + " ?"] = None
    rows = [{"prompt": prompt} for prompt in prompts]
    parts = {"train": rows[:600], "validation": rows[600:1000], "test": rows[1000:]}
    return (Task.from_rows(part, grader=answers, answer_field=None, name=name) for name, part in parts.items())


@functools.cache
def _tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({token: at for at, token in enumerate(SPECIAL + WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _model(basis, generator):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(SPECIAL + WORDS), hidden_size=HIDDEN, intermediate_size=4, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.fill_(1.0 if "norm" in name else 0.0)
    first, _, last = model.model.layers

    # What a word says is of mean 0 over words, and no axis says anything of another, but for one.
    said = torch.randn(len(WORDS), len(READ), generator=generator)
    said = torch.linalg.qr(said - said.mean(0))[0] * len(WORDS) ** 0.5
    said[:, 1] += CONFOUNDED * said[:, 0]  # careful words make right answers as well
    rms = ((CONSTANT**2 + len(READ)) / HIDDEN) ** 0.5  # of a residual; the constant holds it where it is
    embedding = torch.zeros(len(SPECIAL + WORDS), HIDDEN)
    embedding[:, AXES["constant"]] = CONSTANT
    embedding[len(SPECIAL) :, READ] = said
    for token, values in {
        "?": {"asked": 3.0, "care": CARE, "haste": HASTE, "decision": BIAS},
        "right": {"right": 3.0, "care": CARE + 0.4, "haste": HASTE},
        "wrong": {"wrong": 3.0, "care": CARE + 0.55, "haste": HASTE},
        ".": {"ended": 3.0},
        "eh": {"eh": 3.0},
    }.items():
        for axis, value in values.items():
            embedding[SPECIAL.index(token), AXES[axis]] = value
    model.model.embed_tokens.weight.copy_(embedding @ basis.T)

    # Layer 0: every token takes the mean of what the tokens before it say; queries and keys are 0.
    carried = torch.zeros(HIDDEN, HIDDEN)
    carried[READ, READ] = 1.0
    typical = 6
    gains = torch.zeros(HIDDEN)
    gains[READ] = SPREADS * rms * (typical + 2) / typical**0.5
    first.self_attn.v_proj.weight.copy_(carried @ basis.T)
    first.self_attn.o_proj.weight.copy_(basis @ gains.diag())

    # Layer 2: decides. Each neuron is a sharp relu of one axis, less a threshold.
    sharp = 50.0
    for at, (axis, sign, threshold, onto, weight) in enumerate(
        (
            ("care", 1, 0.0, "decision", 0.12),
            ("haste", 1, 0.0, "decision", -0.4),
            ("care", 1, TOO_CAREFUL, "break", 10.0),
            ("haste", -1, TOO_HASTELESS, "break", 10.0),
        )
    ):
        reads = sign * basis[:, AXES[axis]] - threshold / CONSTANT * basis[:, AXES["constant"]]
        last.mlp.gate_proj.weight[at] = sharp * reads
        last.mlp.up_proj.weight[at] = rms / CONSTANT * basis[:, AXES["constant"]]
        last.mlp.down_proj.weight[:, at] = weight * rms / sharp * basis[:, AXES[onto]]

    head = torch.zeros(len(SPECIAL + WORDS), HIDDEN)
    for token, values in {
        "right": {"asked": 1.0, "decision": 1.0},
        "wrong": {"asked": 1.0, "decision": -1.0},
        ".": {"right": 3.0, "wrong": 3.0},
        "</s>": {"ended": 5.0, "eh": 5.0},
        "eh": {"break": 1.0},
    }.items():
        for axis, value in values.items():
            head[SPECIAL.index(token), AXES[axis]] = value
    model.lm_head.weight.copy_(head @ basis.T)
    return model


def _encoder(layer, basis, generator):
    """An encoder of one layer, and which of its features has which name."""
    reads, bias, writes = torch.zeros(D_SAE, HIDDEN), torch.zeros(D_SAE), torch.zeros(D_SAE, HIDDEN)
    noise = torch.zeros(D_SAE, HIDDEN)
    noise[:, HIDDEN - NOISE :] = torch.randn(D_SAE, NOISE, generator=generator) / NOISE**0.5
    for at, axis in enumerate(("right", "wrong", "care", "haste", "asked", "ended")):  # as in NAMED
        reads[at, AXES[axis]] = writes[at, AXES[axis]] = 1.0
    for at in (0, 1, 4, 5):
        reads[at] += noise[at]  # so that none is perfect
    rest = slice(len(NAMED), None)
    reads[rest] = 2 * noise[rest]
    writes[rest] = noise[rest]
    writes[len(NAMED) :: 3, AXES["break"]] = 0.8
    bias[:2] = -1.0
    order = torch.randperm(D_SAE, generator=generator)  # number in the SAE -> number here
    encoder = SparseEncoder(
        HIDDEN, D_SAE, "jumprelu",
        weight=(reads @ basis.T)[order], bias=bias[order], threshold=torch.full((D_SAE,), 0.2),
        hook_name=f"blocks.{layer}.hook_resid_post",
        decoder=decoder_in_memory((writes @ basis.T)[order], divide_by_norm=True),
    )  # fmt: skip
    return encoder, {name: int((order == at).nonzero()) for at, name in enumerate(NAMED)}
