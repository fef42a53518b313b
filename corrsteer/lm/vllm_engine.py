"""Generation by vLLM, offline. It is imported where it is asked for, and nowhere else."""

from __future__ import annotations

import importlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from corrsteer.errors import CorrSteerError
from corrsteer.lm.decoding import Decoding
from corrsteer.lm.first_token import label_tokens
from corrsteer.lm.generation import Completion, completions, tokenize_prompts
from corrsteer.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class VllmGenerator:
    """Completes prompts of tokens with a `vllm.LLM`.

    Greedy completions are those of the model as vLLM computes it, which rounds differently from transformers. Sampled
    ones are drawn by vLLM's own generator, seeded by the sample: the same for the same sample of the same run, and
    other ones than transformers draws.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    decoding: Decoding

    @property
    def engine(self) -> str:
        """What generates, and its version."""
        return f"vllm {_vllm().__version__}"

    @property
    def model_name(self) -> str | None:
        """The model's name, or where it was read from."""
        return str(self.model.model_config.model)

    @property
    def stops(self) -> list[int]:
        """Token ids that end a completion: the model's own, or else the tokenizer's."""
        ids: Any = (self.model.model_config.try_get_generation_config() or {}).get("eos_token_id")
        if ids is None:
            ids = self.tokenizer.eos_token_id
        return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)

    def tokenize(self, task: Task) -> list[list[int]]:
        """Token ids of every prompt, see `corrsteer.lm.generation.tokenize`."""
        config = self.model.model_config
        return tokenize_prompts(
            self.tokenizer, task, self.decoding, vocabulary=config.get_vocab_size(), context=config.max_model_len
        )

    def plan(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """Batches of prompts, as indices, in their order: vLLM sees to the rest."""
        size = self.decoding.batch_size
        return [list(range(at, min(at + size, len(prompts)))) for at in range(0, len(prompts), size)]

    def complete(self, prompts: Sequence[list[int]], keys: Sequence[int]) -> list[Completion]:
        """Completions of a batch of prompts, cut before their first stop token.

        Parameters
        ----------
        prompts : token ids of each.
        keys : of their samples, see `corrsteer.lm.sampling.sample_keys`.
        """
        decoding, stops = self.decoding, self.stops
        # Its own handling of the end is left out, so that these stop tokens, and no others, end a completion.
        settings: dict[str, Any] = {
            "max_tokens": decoding.max_new_tokens, "temperature": decoding.temperature, "ignore_eos": True,
            "stop_token_ids": stops, "detokenize": False,
        }  # fmt: skip
        if decoding.temperature > 0:
            settings["top_p"] = decoding.top_p
        if decoding.first_token_among is not None:
            settings["allowed_token_ids"] = self._allowed(decoding.first_token_among)
        outputs = self.model.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            [_vllm().SamplingParams(**settings, seed=request_seed(decoding.seed, key)) for key in keys],
            use_tqdm=False,
        )
        return completions(self.tokenizer, [list(output.outputs[0].token_ids) for output in outputs], stops)

    def _allowed(self, labels: Sequence[str]) -> list[int]:
        if self.decoding.max_new_tokens > 1:  # vLLM restricts all tokens or none
            raise CorrSteerError(
                f"max_new_tokens must be 1 with first_token_among and a vllm.LLM, got {self.decoding.max_new_tokens}; "
                f"use a Hugging Face model for longer completions"
            )
        return label_tokens(self.tokenizer, labels)


def request_seed(seed: int, key: int) -> int:
    """A sample's own seed, of 63 bits, as vLLM's are signed."""
    digest = blake2b(struct.pack("<QQ", seed, key), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def load_vllm(model: str, **options: Any) -> Any:
    """A `vllm.LLM` of a model on the hub or in a directory.

    Parameters
    ----------
    options : of `vllm.LLM`.

    Raises
    ------
    CorrSteerError : where vLLM is not installed, or cannot load the model.
    """
    try:
        vllm = _vllm()
    except ImportError as error:
        raise CorrSteerError(
            f"engine vllm needs vLLM, which cannot be imported ({error}): pip install 'corrsteer[vllm]', or for a "
            f"machine without a GPU see docs/howto/rollouts.md"
        ) from None
    try:
        return vllm.LLM(model=model, **options)
    except Exception as error:  # it raises as it likes
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CorrSteerError(f"model {model!r} cannot be loaded by vLLM: {reason}") from error


def _vllm() -> Any:
    return importlib.import_module("vllm")
