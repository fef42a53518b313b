"""SAEs that were trained on TransformerLens models with `center_writing_weights`, on the same model of Hugging Face."""

import copy
import json

import pytest
import torch
from test_encoder import TOLERANCE, assert_as_exact_as_sae_lens, make_sae

from corrsteer import CorrSteerError, SparseEncoder, encode
from corrsteer.sae import sources

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:sae_lens")  # at every such SAE
transformers = pytest.importorskip("transformers")
transformer_lens = pytest.importorskip("transformer_lens")

D_MODEL = 24  # as wide as the SAEs of test_encoder
KWARGS = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
HOOKS = [f"blocks.1.hook_{name}" for name in ("resid_pre", "resid_post", "attn_out", "mlp_out")]


@pytest.fixture(scope="module")
def models():
    """A tiny GPT-2 as Hugging Face has it and as TransformerLens does, with writing weights centred."""
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    torch.manual_seed(0)
    sizes = {"n_positions": 32, "n_embd": D_MODEL, "n_layer": 3, "n_head": 2, "vocab_size": 50}
    plain = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():  # no part is trivial, and none has mean 0
            parameter.copy_((0.4 * torch.randn_like(parameter) + 0.3) if "ln" not in name else 1 + parameter / 3)
    config = transformer_lens.HookedTransformerConfig(
        n_layers=3, d_model=D_MODEL, n_ctx=32, d_head=D_MODEL // 2, n_heads=2, d_mlp=4 * D_MODEL, d_vocab=50,
        act_fn="gelu_new", normalization_type="LN", eps=plain.config.layer_norm_epsilon, seed=0, device="cpu",
    )  # fmt: skip
    centred = transformer_lens.HookedTransformer(config)
    centred.load_and_process_state_dict(
        convert_gpt2_weights(plain, config),
        fold_ln=False, center_writing_weights=True, center_unembed=False, fold_value_biases=False,
    )  # fmt: skip
    return plain, centred


@pytest.fixture(scope="module")
def prompts():
    return torch.randint(50, (2, 20), generator=torch.Generator().manual_seed(1))


def made(hook, kind="standard", dtype=torch.float32, **settings):
    metadata = {"hook_name": hook, "model_name": "gpt2-small", **KWARGS}
    return make_sae(kind, dtype, metadata=metadata, **settings)


@torch.no_grad()
def residuals(models, prompts, hook):
    """At a hook point: of the plain model, and of TransformerLens'."""
    plain, centred = models
    block, caught = plain.transformer.h[1], []
    if hook.endswith("resid_pre"):
        handle = block.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    else:
        module = {"resid_post": block, "attn_out": block.attn, "mlp_out": block.mlp}[hook.split("hook_")[1]]
        handle = module.register_forward_hook(
            lambda module, args, out: caught.append(out if isinstance(out, torch.Tensor) else out[0])
        )
    plain(prompts)
    handle.remove()
    return caught[0], centred.run_with_cache(prompts)[1][hook]


@pytest.mark.parametrize("way", ("from memory", "from a directory", "from a release"))
@pytest.mark.parametrize("subtracts", (False, True), ids=("as it is", "less b_dec"))
@pytest.mark.parametrize("hook", HOOKS)
@torch.no_grad()
def test_activations_on_the_plain_model_are_those_of_sae_lens_on_the_model_it_was_trained_on(
    models, prompts, tmp_path, monkeypatch, hook, subtracts, way
):
    sae = made(hook, apply_b_dec_to_input=subtracts)
    sae.save_model(tmp_path)
    monkeypatch.setattr(sources, "load_pretrained", lambda release, sae_id: sae)
    encoder = {
        "from memory": lambda: SparseEncoder.from_sae_lens(sae),
        "from a directory": lambda: SparseEncoder.load(tmp_path),
        "from a release": lambda: SparseEncoder.from_pretrained("gpt2-small-res-jb", hook),
    }[way]()
    plain, centred = residuals(models, prompts, hook)
    assert (
        float(plain.mean(-1).abs().mean()) > 0.1 * float(plain.std(-1).mean())
        and float(centred.mean(-1).abs().max()) < 1e-4
    )
    expected = sae.encode(centred)
    assert 0.2 < float((expected > 0).float().mean()) < 0.8
    torch.testing.assert_close(encode(plain, encoder), expected, rtol=0, atol=3e-5 * float(expected.max()))


@pytest.mark.parametrize("kind", ("standard", "jumprelu", "gated", "topk rescaled"))
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("mean", (0.0, 0.5))
@torch.no_grad()
def test_activations_are_those_of_sae_lens_on_tokens_less_their_mean(kind, dtype, mean):
    sae = made(HOOKS[0], kind, dtype, apply_b_dec_to_input=kind != "gated")
    x = torch.randn(40, D_MODEL, generator=torch.Generator().manual_seed(2))
    x = (x + mean).to(dtype)
    centred = CentredFirst(sae)
    assert_as_exact_as_sae_lens(SparseEncoder.from_sae_lens(sae), centred, x)


class CentredFirst:
    """An SAE that takes the mean off its tokens, in float64, before it does anything else."""

    def __init__(self, sae):
        self.sae = sae

    def __getattr__(self, name):
        return getattr(self.__dict__["sae"], name)

    def __deepcopy__(self, memo):
        return CentredFirst(copy.deepcopy(self.sae, memo))

    def to(self, dtype):
        return CentredFirst(self.sae.to(dtype))

    def process_sae_in(self, x):
        return self.sae.process_sae_in(less_mean(x))

    def encode(self, x):
        return self.sae.encode(less_mean(x))


def less_mean(x):
    return (x.double() - x.double().mean(-1, keepdim=True)).to(x.dtype)


@pytest.mark.parametrize(
    "settings",
    (
        {"hook_name": "blocks.1.attn.hook_z"},
        {"hook_name": "blocks.1.mlp.hook_post"},
        {"model_name": "google/gemma-2-2b"},
        {"hook_name": "blocks.1.ln2.hook_normalized"},
        {"model_from_pretrained_kwargs": {"center_writing_weights": False, "fold_ln": True, "center_unembed": True}},
        {"model_from_pretrained_kwargs": {}},
    ),
    ids=str,
)
def test_what_does_not_read_a_centred_stream_is_read_as_it_is(settings):
    plain = make_sae("standard", metadata={"hook_name": HOOKS[0]})
    metadata = {"hook_name": HOOKS[0], **KWARGS, **settings}
    sae = make_sae("standard", metadata=metadata)
    weight = SparseEncoder.from_sae_lens(plain).weight
    assert torch.equal(SparseEncoder.from_sae_lens(sae).weight, weight)


@torch.no_grad()
def test_a_directory_from_before_sae_lens_6_that_says_so_is_read_centred(tmp_path):
    sae = made(HOOKS[0], apply_b_dec_to_input=True)
    sae.save_model(tmp_path)
    old = {"d_in": D_MODEL, "d_sae": sae.cfg.d_sae, "dtype": "float32", "device": "cpu", "hook_point": HOOKS[0]}
    (tmp_path / "cfg.json").write_text(json.dumps(old | KWARGS))
    x = torch.randn(40, D_MODEL, generator=torch.Generator().manual_seed(2)) + 0.5
    assert_as_exact_as_sae_lens(SparseEncoder.load(tmp_path), CentredFirst(sae), x)


def test_layer_norm_takes_the_mean_off_by_itself_and_a_norm_that_needs_it_is_refused():
    weight = SparseEncoder.from_sae_lens(make_sae("standard", normalize_activations="layer_norm")).weight
    assert torch.equal(SparseEncoder.from_sae_lens(made(HOOKS[0], normalize_activations="layer_norm")).weight, weight)
    with pytest.raises(CorrSteerError, match="must be none or layer_norm for a model loaded with center_writing"):
        SparseEncoder.from_sae_lens(made(HOOKS[0], normalize_activations="constant_norm_rescale"))
