"""Tiny randomly initialised Hugging Face models, one per architecture that hook points have to fit.

`PLACES` says in plain module names where each kind of hook point sits, independently of `corrsteer.lm.hook_points`.
"""

import functools

import torch
import transformers

VOCABULARY, WIDTH, LAYERS, PAD = 61, 32, 3, 0

# Attention windows are shorter than the tests' sequences, so that they matter.
WINDOW = {"sliding_window": 5}
ALTERNATING = WINDOW | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,  # a random model with tied embeddings repeats its last token
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,
}
GROUPED = COMMON | {"num_key_value_heads": 2, "head_dim": 8}
GPT2 = {
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": 64,
}

# architecture -> configuration, model, its arguments
MODELS = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", GROUPED),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", GROUPED | ALTERNATING | {"query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", GROUPED | ALTERNATING | {"query_pre_attn_scalar": 8}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", GROUPED),
    "mistral": ("MistralConfig", "MistralForCausalLM", GROUPED | WINDOW),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", COMMON),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        GPT2 | {k: v for k, v in COMMON.items() if not k.startswith(("hidden", "num", "inter", "max"))},
    ),
}
ARCHITECTURES = tuple(MODELS)

# architecture -> list of decoder layers, what in a layer writes its attention's share, and what its MLP's
PLACES = {
    "llama": ("model.layers", "self_attn", "mlp"),
    "gemma2": ("model.layers", "post_attention_layernorm", "post_feedforward_layernorm"),
    "gemma3": ("model.layers", "post_attention_layernorm", "post_feedforward_layernorm"),
    "qwen3": ("model.layers", "self_attn", "mlp"),
    "mistral": ("model.layers", "self_attn", "mlp"),
    "gpt_neox": ("gpt_neox.layers", "attention", "mlp"),
    "gpt2": ("transformer.h", "attn", "mlp"),
}


# architecture -> in a layer, the attention's last linear layer, the MLP, and the norm before it
INSIDE = {
    **dict.fromkeys(("llama", "qwen3", "mistral"), ("self_attn.o_proj", "mlp", "post_attention_layernorm")),
    **dict.fromkeys(("gemma2", "gemma3"), ("self_attn.o_proj", "mlp", "pre_feedforward_layernorm")),
    "gpt_neox": ("attention.dense", "mlp", "post_attention_layernorm"),
    "gpt2": ("attn.c_proj", "mlp", "ln_2"),
}


def build(architecture, dtype=torch.float32, **more):
    """A new model; the same architecture has the same weights every time."""
    config, model, arguments = MODELS[architecture]
    torch.manual_seed(sum(map(ord, architecture)))
    model = getattr(transformers, model)(getattr(transformers, config)(**arguments | more)).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.dim() == 1:  # norms and biases, which start out equal in every layer
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype)


@functools.cache
def tiny(architecture, dtype=torch.float32):
    """The model that tests share, and leave as they found it."""
    return build(architecture, dtype)


def place(model, architecture, point):
    """The module of a hook point, and whether it is the module's input."""
    layers, attention, mlp = PLACES[architecture]
    layer = model.get_submodule(f"{layers}.{point.layer}")
    if point.kind in ("resid_pre", "resid_post"):
        return layer, point.kind == "resid_pre"
    return getattr(layer, attention if point.kind == "attn_out" else mlp), False


def inside(model, architecture, layer, kind):
    """The module that reads what `z`, `mlp_in` or `mlp_normalized` of a layer is, or is made of."""
    name = dict(zip(("z", "mlp_in", "mlp_normalized"), INSIDE[architecture]))[kind]
    return model.get_submodule(f"{PLACES[architecture][0]}.{layer}.{name}")


def hook(model, architecture, point, function):
    """A plain torch hook at a hook point; what `function` returns, unless None, replaces the residual."""
    module, at_input = place(model, architecture, point)
    if at_input:

        def before(_module, args):
            changed = function(args[0])
            return None if changed is None else (changed, *args[1:])

        return module.register_forward_pre_hook(before)

    def after(_module, _args, output):
        if isinstance(output, tuple):
            changed = function(output[0])
            return None if changed is None else (changed, *output[1:])
        return function(output)

    return module.register_forward_hook(after)


def prompts_of(lengths, seed=0):
    """Random prompts as lists of token ids, none of them the padding's."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def batch_of(prompts, side="left"):
    """`input_ids` and `attention_mask` of prompts padded on a side."""
    width = max(map(len, prompts))

    def pad(row, filler):
        padding = [filler] * (width - len(row))
        return padding + row if side == "left" else row + padding

    return {
        "input_ids": torch.tensor([pad(p, PAD) for p in prompts]),
        "attention_mask": torch.tensor([pad([1] * len(p), 0) for p in prompts]),
    }


def generate(model, prompts, n, **options):
    """The tokens that greedy decoding adds to left-padded prompts, `[B, up to n]`."""
    batch = batch_of(prompts)
    output = model.generate(**batch, max_new_tokens=n, do_sample=False, **options)
    return output[:, batch["input_ids"].shape[1] :]


def traces(model):
    """What a hook or a shadowed method would change in a model; equal before and after a context that cleans up."""
    hooks = {
        name: [list(getattr(module, kind)) for kind in ("_forward_hooks", "_forward_pre_hooks")]
        + [list(module._forward_hooks_with_kwargs), list(module._forward_pre_hooks_with_kwargs)]
        for name, module in model.named_modules()
    }
    return hooks, {name: id(value) for name, value in vars(model).items()}
