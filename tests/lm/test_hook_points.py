import copy
import threading
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from architectures import build as build_any
from tiny_models import ARCHITECTURES, COMMON, LAYERS, PLACES, batch_of, build, hook, prompts_of, tiny, traces
from torch import nn

from corrsteer.errors import CorrSteerError
from corrsteer.lm import hook_points, sublayers
from corrsteer.lm.hook_points import KINDS, HookPoint

POINTS = [HookPoint(layer, kind) for layer in range(LAYERS) for kind in KINDS]
FINAL_NORM = {"gpt_neox": "gpt_neox.final_layer_norm", "gpt2": "transformer.ln_f"}


def observed(model, points, batch):
    """What `attach` shows of each hook point in one forward pass, and the pass's output."""
    seen = {}
    handles = [
        hook_points.attach(model, point, lambda h, point=point: seen.update({point: h.clone()})) for point in points
    ]
    output = model(**batch, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    return seen, output


@pytest.fixture
def batch():
    return batch_of(prompts_of([3, 6]))


# Names


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [0, 1, 25])
def test_a_name_of_transformer_lens_is_read_and_written_back(layer, kind):
    name = f"blocks.{layer}.hook_{kind}"
    assert HookPoint.parse(name) == HookPoint(layer, kind)
    assert str(HookPoint.parse(name)) == name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_module_path_names_the_output_of_its_layer_attention_or_mlp(architecture):
    model, (layers, attention, mlp) = tiny(architecture), PLACES[architecture]
    assert HookPoint.parse(f"{layers}.1", model) == HookPoint(1, "resid_post")
    assert HookPoint.parse(f"{layers}.2.{attention}", model) == HookPoint(2, "attn_out")
    assert HookPoint.parse(f"{layers}.0.{mlp}", model) == HookPoint(0, "mlp_out")


@pytest.mark.parametrize("name", ["self_attn", "mlp"])
@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
def test_a_sublayer_whose_output_is_normalised_before_it_is_added_is_no_hook_point(architecture, name):
    with pytest.raises(CorrSteerError, match="cannot be used"):
        HookPoint.parse(f"model.layers.1.{name}", tiny(architecture))


@pytest.mark.parametrize(
    "name",
    [
        "blocks.1.hook_z",
        "blocks.1.hook_resid_mid",
        "blocks.-1.hook_resid_post",
        "blocks.1.hook_resid_post.extra",
        "blocks.hook_resid_post",
        "model.layers.1.input_layernorm",
        "model.layers",
        "lm_head",
        "",
    ],
)
def test_an_unknown_name_is_refused_with_the_kinds_that_are_allowed(name):
    with pytest.raises(CorrSteerError) as error:
        HookPoint.parse(name, tiny("llama"))
    assert repr(name) in str(error.value)
    assert all(kind in str(error.value) for kind in KINDS)


def test_a_module_path_of_a_peft_model_is_that_of_the_model_inside_too():
    adapted = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    for path in ("model.layers.1", "base_model.model.model.layers.1"):
        assert HookPoint.parse(path, adapted) == HookPoint(1)
        assert HookPoint.parse(f"{path}.mlp", adapted) == HookPoint(1, "mlp_out")


def test_a_module_path_without_the_model_is_refused():
    with pytest.raises(CorrSteerError, match="'model.layers.1' cannot be used"):
        HookPoint.parse("model.layers.1")


def test_an_offset_moves_to_another_layer_and_keeps_the_kind():
    assert HookPoint(3, "mlp_out").offset(-1) == HookPoint(2, "mlp_out")


# Layers that are not there


@pytest.mark.parametrize("layer", [-1, LAYERS, 99])
def test_a_layer_outside_the_model_is_refused_with_the_layers_it_has(layer):
    with pytest.raises(CorrSteerError, match=rf"outside the model, whose layers are 0\.\.{LAYERS - 1}"):
        hook_points.attach(tiny("llama"), HookPoint(layer), print)


@pytest.mark.parametrize("name", ["model.layers.3", "model.layers.3.mlp"])
def test_a_module_path_outside_the_model_is_refused_with_the_layers_it_has(name):
    with pytest.raises(CorrSteerError, match=rf"outside the model, whose layers are 0\.\.{LAYERS - 1}"):
        HookPoint.parse(name, tiny("llama"))


@pytest.mark.parametrize("config", [None, SimpleNamespace(n_layer=3)])
def test_a_model_without_a_hugging_face_configuration_is_refused(config):
    model = nn.Linear(2, 2)
    if config:
        model.config = config
    with pytest.raises(CorrSteerError, match="must be a Hugging Face causal language model, got Linear"):
        hook_points.attach(model, HookPoint(0), print)


def test_a_model_without_a_list_of_decoder_layers_is_refused():
    model = nn.Linear(2, 2)
    model.config = tiny("llama").config
    with pytest.raises(CorrSteerError, match=f"exactly one list of {LAYERS} decoder layers, found lists none"):
        hook_points.attach(model, HookPoint(0), print)


def test_a_model_with_two_lists_of_decoder_layers_is_refused_with_both():
    model = nn.Module()
    model.config = tiny("llama").config
    model.first, model.second = (nn.ModuleList(TupleLayer() for _ in range(LAYERS)) for _ in range(2))
    with pytest.raises(CorrSteerError, match=r"found lists first \(3\), second \(3\)"):
        hook_points.attach(model, HookPoint(0), print)


@pytest.mark.parametrize("kind", ["attn_out", "mlp_out"])
def test_a_sublayer_is_refused_where_no_part_puts_out_what_the_layer_adds(kind):
    model = build_any("granite", residual_multiplier=0.5)
    with pytest.raises(CorrSteerError, match=f"blocks.1.hook_{kind} does not exist: no two parts of GraniteDecoder"):
        hook_points.attach(model, HookPoint(1, kind), print)
    hook_points.attach(model, HookPoint(1), print).remove()


def test_a_sublayer_is_found_in_training_as_it_is_otherwise_and_draws_no_random_numbers():
    model = build_any("biogpt")  # whose dropout is between a part and the residual stream
    model.train()
    model.biogpt.layers[0].eval()
    before, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    hook_points.attach(model, HookPoint(1, "mlp_out"), print).remove()
    assert torch.equal(torch.get_rng_state(), before) and [module.training for module in model.modules()] == modes


def test_a_sublayer_that_is_replaced_is_found_anew(batch):
    model, calls = build("llama"), []
    for _ in range(2):
        handle = hook_points.attach(model, HookPoint(1, "mlp_out"), lambda h: calls.append(h.clone()))
        model(**batch)
        handle.remove()
        model.model.layers[1].mlp = copy.deepcopy(model.model.layers[1].mlp)
    assert len(calls) == 2 and torch.equal(*calls)


def test_sublayers_that_add_nothing_yet_are_told_apart():
    model = build("llama")
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_(), layer.mlp.down_proj.weight.zero_()
    for kind, part in (("attn_out", "self_attn"), ("mlp_out", "mlp")):
        assert HookPoint.parse(f"model.layers.1.{part}", model) == HookPoint(1, kind)


def test_a_sublayer_is_found_while_other_threads_run_the_model_and_look_for_it_too(batch):
    model, done, errors = build("llama"), threading.Event(), []

    def run():
        while not done.is_set():
            model(**batch)

    def look():
        try:
            for _ in range(20):
                sublayers._known.pop(model, None)
                hook_points.attach(model, HookPoint(1, "mlp_out"), lambda h: None).remove()
        except CorrSteerError as error:
            errors.append(error)

    running, looking = ([threading.Thread(target=function) for _ in range(2)] for function in (run, look))
    for thread in running + looking:
        thread.start()
    for thread in looking:
        thread.join()
    done.set()
    for thread in running:
        thread.join()
    assert not errors


def test_a_sublayer_of_a_model_that_cannot_run_is_refused():
    model = build("llama")
    del model.model.layers[1].mlp
    with pytest.raises(CorrSteerError, match="found by a pass of the model, which failed with .*no attribute 'mlp'"):
        hook_points.attach(model, HookPoint(1, "mlp_out"), print)


def test_the_decoder_is_found_beside_a_vision_tower_of_as_many_layers():
    text = COMMON | {"num_key_value_heads": 2, "head_dim": 8}
    vision = {key: COMMON[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    config = transformers.Gemma3Config(
        text_config=text | {"pad_token_id": 0, "vocab_size": 70},
        vision_config=vision | {"intermediate_size": 32, "image_size": 28, "patch_size": 14},
        image_token_index=69,
        mm_tokens_per_image=4,
    )
    with torch.device("meta"):
        model = transformers.Gemma3ForConditionalGeneration(config)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == LAYERS]
    path, layers = hook_points.decoder_layers(model)
    assert len(lists) == 2 and path == "model.language_model.layers"
    assert HookPoint.parse("model.language_model.layers.1", model) == HookPoint(1)
    assert hook_points.width(model) == COMMON["hidden_size"] and len(layers) == LAYERS


# What is observed


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_residual_before_and_after_each_layer_is_that_of_the_hidden_states(architecture, batch):
    model = tiny(architecture)
    seen, output = observed(model, POINTS, batch)
    states = output.hidden_states
    for layer in range(LAYERS):
        torch.testing.assert_close(seen[HookPoint(layer, "resid_pre")], states[layer], rtol=0, atol=0)
    for layer in range(LAYERS - 1):
        torch.testing.assert_close(seen[HookPoint(layer)], states[layer + 1], rtol=0, atol=0)
    # The last of the hidden states comes after the final norm.
    norm = model.get_submodule(FINAL_NORM.get(architecture, "model.norm"))
    torch.testing.assert_close(norm(seen[HookPoint(LAYERS - 1)]), states[-1], rtol=0, atol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_layer_adds_what_its_attention_and_its_mlp_put_out(architecture, batch):
    seen, _ = observed(tiny(architecture), POINTS, batch)
    for layer in range(LAYERS):
        before, after, mlp, attention = (
            seen[HookPoint(layer, kind)] for kind in ("resid_pre", "resid_post", "mlp_out", "attn_out")
        )
        assert mlp.abs().max() > 0.1 and attention.abs().max() > 0.1
        torch.testing.assert_close(before + attention + mlp, after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("point", POINTS, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_hook_point_is_where_its_module_is(architecture, point, batch):
    model, plain = tiny(architecture), []
    handle = hook(model, architecture, point, lambda h: plain.append(h.clone()))
    seen, _ = observed(model, [point], batch)
    handle.remove()
    assert torch.equal(seen[point], plain[0])


# What is replaced


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_the_function_returns_replaces_the_residual_until_it_is_removed(architecture, kind, batch):
    model, point = tiny(architecture), HookPoint(1, kind)
    plain, before = model(**batch).logits, traces(model)
    reference = hook(model, architecture, point, lambda h: h * 0.5 + 1)
    expected = model(**batch).logits
    reference.remove()

    handle = hook_points.attach(model, point, lambda h: h * 0.5 + 1)
    changed = model(**batch).logits
    handle.remove()

    assert torch.equal(changed, expected) and not torch.allclose(changed, plain, atol=0.1)
    assert torch.equal(model(**batch).logits, plain)
    assert traces(model) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_function_that_returns_none_leaves_the_residual(kind, batch):
    model, calls = tiny("gemma2"), []
    plain = model(**batch).logits
    handle = hook_points.attach(model, HookPoint(1, kind), calls.append)
    assert torch.equal(model(**batch).logits, plain) and len(calls) == 1
    handle.remove()


class TupleLayer(nn.Module):
    """A decoder layer as transformers 4 had them: attention, MLP and the layer itself return tuples."""

    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp = TupleOf(2.0), TupleOf(3.0)

    def forward(self, hidden_states, mask=None):
        attention, weights = self.self_attn(hidden_states)
        hidden_states = hidden_states + attention
        return hidden_states + self.mlp(hidden_states)[0], weights


class TupleOf(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor), requires_grad=False)

    def forward(self, x):
        return x * self.factor, "weights"


class TupleModel(nn.Module):
    def __init__(self, by_keyword):
        super().__init__()
        self.config, self.by_keyword = tiny("llama").config, by_keyword
        self.get_input_embeddings = tiny("llama").get_input_embeddings
        self.layers = nn.ModuleList(TupleLayer() for _ in range(LAYERS))

    def forward(self, input_ids):
        h, rest = input_ids[..., None].float(), []
        for layer in self.layers:
            h, extra = layer(hidden_states=h, mask="mask") if self.by_keyword else layer(h, "mask")
            rest.append(extra)
        return h, rest


@pytest.mark.parametrize("by_keyword", [False, True], ids=["by position", "by keyword"])
@pytest.mark.parametrize(
    ("kind", "expected"),
    # Each layer multiplies by (1 + 2)(1 + 3) = 12; layer 1 gets 12 and has one of its parts replaced by that part + 1.
    [("resid_pre", 13 * 12), ("resid_post", 145), ("attn_out", (12 + 25) * 4), ("mlp_out", 36 + 109)],
)
def test_in_a_layer_that_returns_a_tuple_only_its_first_entry_is_replaced(kind, expected, by_keyword):
    model, seen = TupleModel(by_keyword), []
    handle = hook_points.attach(model, HookPoint(1, kind), lambda h: (seen.append(h), h + 1)[1])
    out, rest = model(torch.ones(1, 1))
    handle.remove()
    assert isinstance(seen[0], torch.Tensor)
    assert out.item() == expected * 12 and rest == ["weights"] * LAYERS
