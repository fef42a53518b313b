"""A folded model is one that `apply` steers at all positions, and its checkpoint needs no hook."""

import architectures
import pytest
import torch
from tiny_models import LAYERS, WIDTH, batch_of, build, generate, prompts_of, traces

from corrsteer import Steering
from corrsteer.errors import CorrSteerError
from corrsteer.lm.hook_points import KINDS, HookPoint

LENGTHS, N = (2, 7, 5), 6
PROMPTS = prompts_of(LENGTHS)
BATCH = batch_of(PROMPTS)
REAL = BATCH["attention_mask"].bool()
FOLDED = ("llama", "gpt2", "gpt_neox")


def steering_at(*points, seed=0, d=WIDTH):
    generator = torch.Generator().manual_seed(seed)
    return Steering.from_vectors({str(point): torch.randn(d, generator=generator) for point in points}, 2.5)


# three of these are one place: the end of layer 1's MLP
SEVERAL = steering_at(HookPoint(1), HookPoint(2, "resid_pre"), HookPoint(1, "mlp_out"), HookPoint(0, "attn_out"))


def of(model):
    """What a model gives: logits of tokens that are no padding, and greedy tokens."""
    with torch.no_grad():
        return model(**BATCH).logits[REAL], generate(model, PROMPTS, N).tolist()


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, model.config.to_dict(), traces(model)


def assert_same_state(got, expected):
    assert got[0].keys() == expected[0].keys() and got[1:] == expected[1:]
    assert all(torch.equal(tensor, expected[0][name]) for name, tensor in got[0].items())


@pytest.mark.parametrize("scale", [1.0, -0.5])
@pytest.mark.parametrize(
    "steering", [*(steering_at(HookPoint(1, kind)) for kind in KINDS), SEVERAL], ids=[*KINDS, "several"]
)
@pytest.mark.parametrize("architecture", FOLDED)
def test_a_folded_model_gives_what_apply_gives_and_so_does_its_checkpoint(architecture, steering, scale, tmp_path):
    model = build(architecture)
    with steering.apply(model, "all", scale):
        logits, tokens = of(model)
    assert tokens != of(model)[1]
    assert steering.fold_into(model, scale) is model
    model.save_pretrained(tmp_path)
    for folded in (model, type(model).from_pretrained(tmp_path).eval()):
        got = of(folded)
        torch.testing.assert_close(got[0], logits, rtol=1e-5, atol=1e-5 * logits.abs().max())
        assert got[1] == tokens


@pytest.mark.parametrize(
    ("point", "option", "given"),
    [
        (HookPoint(1), "mlp_bias", ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")),
        (HookPoint(1, "attn_out"), "attention_bias", tuple(f"self_attn.{name}_proj" for name in "qkvo")),
    ],
)
def test_an_option_gives_a_bias_to_all_that_it_governs_and_the_vector_to_one(point, option, given):
    model, steering = build("llama"), steering_at(point)
    before = set(model.state_dict())
    steering.fold_into(model)
    options = {name: getattr(model.config, name) for name in ("mlp_bias", "attention_bias")}
    assert options == {"mlp_bias": False, "attention_bias": False, option: True}
    biases = {name: model.get_parameter(name) for name in set(model.state_dict()) - before}
    assert set(biases) == {f"model.layers.{layer}.{name}.bias" for layer in range(LAYERS) for name in given}
    vector = biases.pop(f"model.layers.1.{given[-1]}.bias")
    assert torch.equal(vector, steering.vectors()[point]) and not any(bias.any() for bias in biases.values())


@pytest.mark.parametrize("architecture", FOLDED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bias_keeps_the_dtype_and_is_rounded_once(dtype, architecture):
    model, steering = build(architecture, dtype), steering_at(HookPoint(1, "mlp_out"))
    path = {"llama": "model.layers.1.mlp.down_proj", "gpt2": "transformer.h.1.mlp.c_proj"}
    linear = model.get_submodule(path.get(architecture, "gpt_neox.layers.1.mlp.dense_4h_to_h"))
    before = torch.zeros(WIDTH) if linear.bias is None else linear.bias.float()
    with steering.apply(model, "all"):
        logits, _ = of(model)
    steering.fold_into(model)
    assert torch.equal(linear.bias, (before + steering.vectors()[HookPoint(1, "mlp_out")]).to(dtype))
    rounding = 16 * torch.finfo(dtype).eps * logits.float().abs().max()
    torch.testing.assert_close(of(model)[0].float(), logits.float(), rtol=0, atol=float(rounding))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_what_was_folded_adds_up_and_is_taken_off_again():
    model, one, other = build("llama"), steering_at(HookPoint(1)), steering_at(HookPoint(1), HookPoint(2), seed=1)
    plain = of(model)
    with one.apply(model, "all"), other.apply(model, "all"):
        both, tokens = of(model)
    one.fold_into(model)
    with other.apply(model, "all"):  # a folded model is steered as any other
        torch.testing.assert_close(of(model)[0], both, rtol=1e-4, atol=1e-4)
        other.fold_into(model)  # what is applied is not taken for a part of the model
    assert of(model)[1] == tokens
    one.fold_into(model, -1.0)
    other.fold_into(model, -1.0)
    torch.testing.assert_close(of(model)[0], plain[0], rtol=1e-4, atol=1e-4)


def test_a_model_with_tied_embeddings_and_one_that_is_trained_keep_being_so(tmp_path):
    model = build("llama", tie_word_embeddings=True).requires_grad_(True)
    steering_at(HookPoint(1)).fold_into(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    expected = of(model)
    model.save_pretrained(tmp_path)
    got = of(type(model).from_pretrained(tmp_path).eval())
    assert torch.equal(got[0], expected[0]) and got[1] == expected[1]


def test_the_language_model_of_a_multimodal_one_is_folded_into(tmp_path):
    model = architectures.build("llava", multimodal=True)
    steering, ids = steering_at(HookPoint(1), d=architectures.WIDTH), torch.tensor([[5, 6, 7, 8]])
    with steering.apply(model, "all"):
        expected = model(input_ids=ids).logits
    steering.fold_into(model)
    assert model.config.text_config.mlp_bias
    model.save_pretrained(tmp_path)
    for folded in (model, type(model).from_pretrained(tmp_path).eval()):
        torch.testing.assert_close(folded(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_steering_of_nothing_changes_nothing():
    model = build("llama")
    before = state(model)
    assert Steering([], torch.zeros(0, WIDTH)).fold_into(model) is model
    assert_same_state(state(model), before)


# What is refused


REFUSED = {
    "a norm": ("gemma2", [HookPoint(1)], "what is added there is put out by Gemma2RMSNorm, and by no linear layer"),
    "no bias": ("qwen3", [HookPoint(1)], "model.layers.1.mlp.down_proj, as this linear layer has no bias, and Qwen3"),
    "no bias in attention": ("mistral", [HookPoint(2, "attn_out")], "o_proj, as this linear layer has no bias"),
    "nothing before": ("gpt2", [HookPoint(1), HookPoint(0, "resid_pre")], "resid_pre, as no layer comes before it"),
    "one of several": ("gemma3", [HookPoint(1), HookPoint(1, "attn_out")], "put out by Gemma3RMSNorm"),
    "no such layer": ("llama", [HookPoint(1), HookPoint(LAYERS)], "outside the model, whose layers are 0..2"),
}


@pytest.mark.parametrize(("architecture", "points", "message"), REFUSED.values(), ids=REFUSED)
def test_a_model_without_the_bias_is_refused_and_left_as_it_was(architecture, points, message):
    model = build(architecture)
    before = state(model)
    with pytest.raises(CorrSteerError, match=message):
        steering_at(*points).fold_into(model)
    assert_same_state(state(model), before)


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("mixtral", {}, "put out by MixtralSparseMoeBlock, and by no linear layer in it"),
        ("olmo2", {}, "put out by Olmo2RMSNorm, and by no linear layer in it"),
        ("internlm3", {}, "no option that gives it one"),  # it must have more of them
        ("granite", {"residual_multiplier": 0.5}, "no two parts of GraniteDecoderLayer put out what it adds"),
    ],
)
def test_experts_norms_scaled_sums_and_bound_options_are_refused_for_what_they_are(architecture, options, message):
    model = architectures.build(architecture, **options)
    with pytest.raises(CorrSteerError, match=message):
        steering_at(HookPoint(1), d=architectures.WIDTH).fold_into(model)


def test_what_float16_cannot_hold_is_refused_before_anything_changes():
    model = build("gpt2", torch.float16)
    before = state(model)
    with pytest.raises(CorrSteerError, match="scale must leave biases finite in torch.float16; take a smaller one"):
        steering_at(HookPoint(1)).fold_into(model, 1e5)
    with pytest.raises(CorrSteerError, match="scale must be a finite number, got nan"):
        steering_at(HookPoint(1)).fold_into(model, float("nan"))
    assert_same_state(state(model), before)


def test_layers_that_share_their_weights_are_refused():
    model = build("gpt2")
    model.transformer.h[2].mlp = model.transformer.h[1].mlp
    with pytest.raises(CorrSteerError, match="by no linear layer in it"):
        steering_at(HookPoint(1)).fold_into(model)


def test_an_adapter_is_to_be_merged_first():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["down_proj"], init_lora_weights=False)
    model, steering = peft.get_peft_model(build("llama"), config), steering_at(HookPoint(1))
    with pytest.raises(CorrSteerError, match="model must not be a PEFT model, .* merge_and_unload"):
        steering.fold_into(model)
    with steering.apply(model, "all"):
        expected = of(model)
    got = of(steering.fold_into(model.merge_and_unload()))
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-4)
    assert got[1] == expected[1]


def on_the_disk(model, folder):
    return pytest.importorskip("accelerate").disk_offload(model, folder)


def with_a_layer_on_the_disk(model, folder):
    places = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    places |= {"model.layers.0": "disk", "model.layers.1": "cpu", "model.layers.2": "cpu"}
    accelerate = pytest.importorskip("accelerate")
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder)


@pytest.mark.parametrize(
    ("architecture", "offload"), [("gpt2", on_the_disk), ("llama", on_the_disk), ("llama", with_a_layer_on_the_disk)]
)
def test_weights_that_are_kept_on_the_disk_are_refused(architecture, offload, tmp_path):
    model = offload(build(architecture), tmp_path)
    with pytest.raises(CorrSteerError, match="model must be in memory, but weights of it are offloaded"):
        steering_at(HookPoint(1)).fold_into(model)
