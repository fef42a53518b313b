"""Completions are those of a `Decoding`, whatever a model's own generation configuration says."""

import copy

import pytest
import tiny_pipeline
import torch
from transformers import GenerationConfig

from corrsteer import CorrSteerError, Decoding
from corrsteer.lm import generation_settings
from corrsteer.lm.generation import Generator, tokenize
from corrsteer.lm.sampling import sample_keys

GREEDY, SAMPLED = Decoding(max_new_tokens=4), Decoding(max_new_tokens=4, temperature=1.0, seed=3)


@pytest.fixture(scope="module")
def model():
    return tiny_pipeline.model()


def completions(model, decoding, **own):
    """Of a task's prompts, by a model with these in its generation configuration."""
    model, task = copy.copy(model), tiny_pipeline.task(12)
    model.generation_config = copy.deepcopy(model.generation_config)
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    tokenizer = tiny_pipeline.tokenizer()
    prompts = tokenize(model, tokenizer, task, decoding)
    return Generator(model, tokenizer, decoding).complete(prompts, sample_keys(prompts))


SET = {
    "num_return_sequences": 2,
    "num_beams": 3,
    "repetition_penalty": 1.8,
    "encoder_repetition_penalty": 1.8,
    "no_repeat_ngram_size": 1,
    "min_length": 30,
    "guidance_scale": 2.0,
    "renormalize_logits": True,
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_hidden_states": True,
    "do_sample": True,
    "temperature": 3.0,
    "top_k": 2,
    "top_p": 0.3,
    "min_p": 0.5,
    "typical_p": 0.2,
    "epsilon_cutoff": 0.2,
    "eta_cutoff": 0.2,
    "top_h": 0.5,
    "max_length": 3,
    "max_new_tokens": 1,
    "token_healing": True,
    "remove_invalid_values": True,
}
REFUSED = {
    "stop_strings": ["4"],
    "max_time": 0.001,
    "min_new_tokens": 3,
    "bad_words_ids": [[5]],
    "sequence_bias": {(5,): -10.0},
    "suppress_tokens": [5, 6],
    "begin_suppress_tokens": [5],
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 5,
    "exponential_decay_length_penalty": (2, 1.5),
    "prompt_lookup_num_tokens": 2,
    "assistant_early_exit": 1,
    "penalty_alpha": 0.6,
    "num_beam_groups": 2,
}


@pytest.mark.parametrize("decoding", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", SET)
def test_a_setting_of_the_models_own_changes_no_completion(model, name, decoding):
    plain = completions(model, decoding)
    assert completions(model, decoding, **{name: SET[name]}) == plain and len(plain) == 12


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_of_the_models_own_that_cannot_be_undone_is_refused(model, name):
    with pytest.raises(CorrSteerError, match=rf"model.generation_config.{name} must be None, .* set it to None"):
        completions(model, GREEDY, **{name: REFUSED[name]})


@pytest.mark.parametrize("name", ["num_beam_groups", "diversity_penalty", "min_new_tokens", "suppress_tokens"])
def test_a_setting_that_does_nothing_is_not_refused(model, name):
    value = generation_settings.HARMLESS[name][0]
    assert completions(model, GREEDY, **{name: value}) == completions(model, GREEDY)


def test_every_setting_of_the_installed_transformers_is_set_refused_or_known_to_change_no_token():
    set_here = {"max_new_tokens", "do_sample", "eos_token_id", "pad_token_id"}
    sampling = {"temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"}
    elsewhere = {
        "max_length",  # max_new_tokens comes before it
        "use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "low_memory",
        "compile_config", "disable_compile", "continuous_batching_config",  # how it is computed
        "early_stopping", "length_penalty",  # of beams
        "bos_token_id", "decoder_start_token_id",  # of a generation without a prompt
        "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
        "max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight",
        "speculation_type",  # of assistants, which are not given
        "transformers_version", "return_legacy_cache",
    }  # fmt: skip
    known = set(generation_settings.NEUTRAL) | set(generation_settings.REFUSED) | set_here | sampling | elsewhere
    assert {name for name in vars(GenerationConfig()) if not name.startswith("_")} <= known


def test_tokens_are_the_models_own_whatever_the_default_dtype(model):
    plain = completions(model, GREEDY)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert completions(model, GREEDY) == plain
    finally:
        torch.set_default_dtype(torch.float32)
