"""Decode steps of a random Llama, steered and not, timed on demand: the part of `bench.hooks` that runs once a version.

It imports nothing of `bench`, so that it can run in a checkout of another commit. Standard input has a setting as JSON
in its first line, and a number of a round in each of the others; each is answered with a line of JSON.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from corrsteer import Steering, apply_rows
from corrsteer.lm.passes import CACHES
from corrsteer.ops import registry

CPU = torch.device("cpu")
READ, VOCABULARY = 64, 1000  # tokens in the cache, and in the vocabulary, which is small, as it is no layer
WARM_UP, STEPS = 2, 8  # steps of a context in a round; the first one gathers what is added
STEERINGS = 10  # that rows choose from
Context = Callable[[], contextlib.AbstractContextManager[Any]]


class Steps:
    """A model in the midst of a generation, and the contexts in which its next token is decoded."""

    def __init__(self, hidden: int, layers: int, batch: int, threads: int):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
            num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, max_position_embeddings=2 * READ,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        self.model: Any = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
        vectors = 0.01 * torch.randn(STEERINGS, layers, hidden, dtype=torch.float32, device=CPU)
        names = [f"blocks.{layer}.hook_resid_post" for layer in range(layers)]
        steerings = [Steering.from_vectors(dict(zip(names, each))) for each in vectors]
        rows = [row % (STEERINGS + 1) - 1 for row in range(1, batch + 1)]  # one in eleven has none
        every_row = torch.cat([vectors, torch.zeros_like(vectors[:1])])[rows].transpose(0, 1)  # the last is that of -1
        self.contexts: dict[str, Context] = {
            "unsteered": contextlib.nullcontext,
            "torch's hooks": lambda: self.hooks(vectors[0]),
            "one vector": lambda: steerings[0].apply(self.model),
            "rows that differ": lambda: apply_rows(self.model, steerings, rows),
        }
        self.plain: dict[str, Context] = {
            "one vector": self.contexts["torch's hooks"],
            "rows that differ": lambda: self.hooks(every_row[:, :, None]),
        }
        ids = torch.randint(VOCABULARY, (batch, READ + 1), dtype=torch.int64, device=CPU)
        name = next(name for name in CACHES if name in inspect.signature(self.model.forward).parameters)
        read = self.model(ids[:, :READ], use_cache=True)
        self.inputs: dict[str, Any] = {
            "input_ids": ids[:, READ:], "attention_mask": torch.ones_like(ids), name: read.past_key_values,
        }  # fmt: skip
        self.cache: Any = read.past_key_values

    @contextlib.contextmanager
    def hooks(self, added: Tensor) -> Iterator[None]:
        """What is the least that steering can cost: a hook a layer that adds in place and does nothing else."""
        handles = [
            layer.register_forward_hook(lambda _module, _args, h, vector=vector: h.add_(vector))
            for layer, vector in zip(self.model.model.layers, added)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def logits(self) -> Tensor:
        logits = self.model(**self.inputs).logits
        self.cache.crop(-1)
        return logits

    def check(self) -> None:
        """Stop unless a steered step is that of plain hooks, to the bit."""
        unsteered = self.logits()
        for name, plain in self.plain.items():
            with plain():
                expected = self.logits()
            with self.contexts[name]():
                found = self.logits()
            if not torch.equal(found, expected) or torch.equal(found, unsteered):
                raise SystemExit(f"a step with {name} is not what plain hooks make of it")

    def round(self, number: int) -> dict[str, dict[str, float]]:
        """Of each context the seconds of a step, the median of some, and those to enter it; each goes first in turn."""
        names, found = list(self.contexts), {}
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            context, seconds = self.contexts[name](), []
            start = time.perf_counter()
            with context:
                entered = time.perf_counter() - start
                for _ in range(WARM_UP + STEPS):
                    start = time.perf_counter()
                    self.model(**self.inputs)
                    seconds.append(time.perf_counter() - start)
                    self.cache.crop(-1)
            found[name] = {"step": float(np.median(seconds[WARM_UP:])), "enter": entered}
        return found


def main() -> None:
    setting = json.loads(sys.stdin.readline())
    with torch.no_grad():
        steps = Steps(**setting)
        steps.check()
        call = registry.Call("steer_add", CPU, torch.float32)
        print(json.dumps({"steer_add": registry.choose(call).name}), flush=True)
        for line in sys.stdin:
            print(json.dumps(steps.round(int(line))), flush=True)


if __name__ == "__main__":
    main()
