"""A tiny random model of every causal language model that the installed transformers knows, and every multimodal one.

A configuration class is shrunk by the names that most of them share (`SMALL`); what else an architecture needs is in
`ALSO`. `problem_of` says why a tiny model could not be built or does not generate by itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

VOCABULARY, WIDTH, LAYERS, PAD = 61, 32, 4, 0
LARGEST = 8_000_000  # parameters; what has more was not shrunk, and would fill the memory

NAMES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
MULTIMODAL = tuple(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)

SMALL = (
    dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "lru_width"), WIDTH)
    | dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), LAYERS)
    | dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4)
    | dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "n_inner", "d_ff"), 64)
    | dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_target_positions", "max_seq_len"), 64)
    | dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4)
    | dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16)
    | dict.fromkeys(("sliding_window", "attention_window_size"), 5)  # shorter than the prompts, so that they matter
    | dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8)
    | dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_d_state", "state_size", "ssm_state_size"), 8)
    | dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8)
    | dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16)
    | dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8)
    | {
        "vocab_size": VOCABULARY,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "head_dim": 8,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 4,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "expand": 2,
        "layerdrop": 0.0,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": False,  # a random model with tied embeddings repeats its last token
        "initializer_range": 0.3,
        "is_decoder": True,
        "image_size": 28,
        "patch_size": 14,
    }
)
DROP = object()  # of ALSO: leave the configuration's own value
HYBRID = ["linear_attention", "full_attention"] * (LAYERS // 2)
MAMBA = ["mamba", "attention"] * (LAYERS // 2)
INKLING = {
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "sliding_window_size": 5, "d_rel": 4,
    "rel_extent": 16, "unpadded_vocab_size": VOCABULARY,
}  # fmt: skip
QWEN4 = {
    "hc_lowrank": 8, "ple_embed_dim": 8, "ngram_vocab_size_base": 97, "make_ngram_vocab_size_divisible_by": 1,
    "split_ngram_parts": 1, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4,
    "indexer_compress_ratio": 2,
}  # fmt: skip

ALSO: Mapping[str, dict] = {
    "bailing_hybrid": {"layer_types": HYBRID},
    "bamba": {"attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 4},
    "cwm": {"bos_token_id": 1, "eos_token_id": 2},
    "deepseek_v4": {"q_lora_rank": 16, "o_lora_rank": 16, "o_groups": 2, "index_n_heads": 2, "index_head_dim": 8},
    "dory": {"n_input_layers": 1, "n_output_layers": 1},
    "emu3": {"bos_token_id": 1, "eos_token_id": 2},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 5},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": MAMBA},
    "inkling2_text": INKLING,
    "inkling2_loop_text": INKLING,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4, "layer_types": HYBRID},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {
        "head_dim": 8, "qk_head_dim": 16, "ffn_hidden_size": 64, "expert_ffn_hidden_size": 16, "zero_expert_num": 2,
        "moe_topk": 2,
    },
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "modernbert-decoder": {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
    "mllama": {"text_config": {"bos_token_id": 1, "eos_token_id": 2}},
    "nemotron_h": {"initializer_range": 0.1},  # as its states would grow
    "qwen4_exp_text": QWEN4,
    "qwen4_exp": QWEN4,
    "reformer": {
        "is_decoder": True, "attn_layers": ["local", "lsh"] * 2, "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16], "attention_head_size": 8, "feed_forward_size": 32,
        "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "num_buckets": 2, "num_attention_heads": 4,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 11, "shape_vocab_size": 11, "pronunciation_embed_dim": 8, "shape_embed_dim": 8,
    },
    "xlstm": {"hidden_size": 128, "num_heads": 2},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "n_mamba_heads": 8, "mamba_d_state": 8, "chunk_size": 4},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def configuration(architecture: str, model_class: type, **overrides):
    """The configuration of a tiny model."""
    kind = CONFIG_MAPPING[architecture]
    text = kind.sub_configs.get("text_config")
    if text is not None and model_class.config_class is text:  # as AutoModelForCausalLM does
        kind = text
    default = kind()
    given = _shrunk(default) | ALSO.get(architecture, {}) | overrides
    return kind(**{name: value for name, value in given.items() if value is not DROP})


def _shrunk(config) -> dict:
    small = SMALL
    if "kv_lora_rank" in _names(config):  # latent attention: as many keys as queries, in heads of two parts
        small = {n: v for n, v in SMALL.items() if n != "head_dim"} | {"num_key_value_heads": 4}
    given = {name: value for name, value in small.items() if _settable(config, name)}
    for name in type(config).sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, transformers.PreTrainedConfig):
            given[name] = _shrunk(part)
    return given


def _names(config) -> set[str]:
    return {field.name for field in dataclasses.fields(config)} | set(config.attribute_map)


def _settable(config, name: str) -> bool:
    return name in _names(config) and not isinstance(getattr(type(config), name, None), property)


def build(architecture: str, multimodal: bool = False, **overrides):
    """A tiny model with random weights, the same every time; multimodal, with its towers."""
    names = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if multimodal else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    kind = getattr(transformers, names[architecture])
    config = configuration(architecture, kind, **overrides)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind(config).parameters())
    if size > LARGEST:
        raise ValueError(f"its tiny model has {size} parameters")
    torch.manual_seed(0)
    return kind(config).eval().requires_grad_(False)
