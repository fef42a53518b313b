"""What `model.generate` is told, so that completions are those of a `Decoding` whatever a model's configuration says.

What is left None in a generation configuration, `generate` takes from the model's own. So everything that changes which
tokens come out, or in which form, is set here to what does nothing; what cannot be, is refused where a model has it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from corrsteer.errors import CorrSteerError

if TYPE_CHECKING:
    from transformers import GenerationConfig

NEUTRAL: dict[str, Any] = {
    "num_return_sequences": 1,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "guidance_scale": 1.0,
    "min_length": 0,
    "renormalize_logits": False,
    "remove_invalid_values": False,
    "token_healing": False,
    "use_mtp": False,
    "return_dict_in_generate": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_logits": False,
    "output_scores": False,
}
# For which there is no value that does nothing.
REFUSED = (
    "stop_strings", "max_time", "min_new_tokens", "bad_words_ids", "sequence_bias", "suppress_tokens",
    "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty",
    "watermarking_config", "prompt_lookup_num_tokens", "assistant_early_exit", "penalty_alpha", "dola_layers",
    "num_beam_groups", "diversity_penalty", "constraints", "force_words_ids",
)  # fmt: skip
HARMLESS: dict[str, tuple[Any, ...]] = {
    "num_beam_groups": (1,), "diversity_penalty": (0.0,), "min_new_tokens": (0,), "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],), "bad_words_ids": ([],),
}  # fmt: skip


def settings(model: nn.Module, *, max_new_tokens: int, stop_tokens: list[int], pad_token: int) -> GenerationConfig:
    """A configuration of greedy decoding in which nothing is left to the model's own that would change completions.

    Sampling is greedy too, of scores that noise was added to, see `Sampler`.

    Raises
    ------
    CorrSteerError : where the model's own sets what cannot be undone for a call.
    """
    from transformers import GenerationConfig

    own = getattr(model, "generation_config", None)
    for name in REFUSED:
        value = getattr(own, name, None)
        if value is not None and value not in HARMLESS.get(name, ()):
            raise CorrSteerError(
                f"model.generation_config.{name} must be None, as it changes completions and cannot be undone for one "
                f"call of generate, got {value!r}; set it to None"
            )
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=stop_tokens or None,
        pad_token_id=pad_token,
        **NEUTRAL,
    )
    # A quantised cache changes tokens, and a static one holds one batch; only where it is kept is left to the model.
    # "hybrid" is the only name that `generate` takes for its own default, and that can go with a cache that is given.
    cache = getattr(own, "cache_implementation", None)
    if cache is not None and "offloaded" not in cache:
        config.cache_implementation = "hybrid"
    return config
