"""Places inside a decoder layer: what attention's last linear layer reads, and what the MLP reads."""

import architectures
import pytest
import torch
from tiny_models import ARCHITECTURES, INSIDE, PLACES, batch_of, build, generate, inside, prompts_of, tiny

from corrsteer.errors import CorrSteerError
from corrsteer.lm import hook_points
from corrsteer.lm.capture import Capture
from corrsteer.lm.hook_points import HookPoint
from corrsteer.lm.teacher_forcing import TeacherForcing

LAYER = 1
NORMS_BY_MEAN = ("gpt_neox", "gpt2")  # with LayerNorm
RMS = [architecture for architecture in ARCHITECTURES if architecture not in NORMS_BY_MEAN]


def part(model, architecture, kind):
    return inside(model, architecture, LAYER, kind)


def read_by(module, model, batch):
    """What a module reads in one pass."""
    seen = []
    handle = module.register_forward_pre_hook(lambda _module, args: seen.append(args[0].clone()))
    model(**batch)
    handle.remove()
    return seen[0]


def expected(model, architecture, kind, batch):
    read = read_by(part(model, architecture, kind), model, batch)
    if kind != "mlp_normalized":
        return read
    norm = part(model, architecture, kind)
    eps = getattr(norm, "variance_epsilon", None) or norm.eps
    return read / (read.square().mean(-1, keepdim=True) + eps).sqrt()


CASES = [(architecture, kind) for architecture in ARCHITECTURES for kind in ("z", "mlp_in")]
CASES += [(architecture, "mlp_normalized") for architecture in RMS]


@pytest.mark.parametrize("architecture, kind", CASES)
def test_what_is_captured_is_what_a_plain_hook_sees(architecture, kind):
    model, batch, seen = tiny(architecture), batch_of(prompts_of([3, 6])), []
    handle = hook_points.attach(model, HookPoint(LAYER, kind), lambda h: seen.append(h.clone()))
    model(**batch)
    handle.remove()
    wanted = expected(model, architecture, kind, batch)
    assert hook_points.width(model, HookPoint(LAYER, kind)) == wanted.shape[-1]
    torch.testing.assert_close(seen, [wanted], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("architecture, kind", CASES)
def test_what_was_captured_while_generating_is_read_again(architecture, kind):
    model, prompts = tiny(architecture), prompts_of([3, 6, 4])
    points = {"inside": HookPoint(LAYER, kind), "stream": HookPoint(LAYER)}
    with Capture(model, points, stop_tokens=[], max_new_tokens=4) as capture:
        completions = generate(model, prompts, 4, stopping_criteria=[capture.stopping_criterion]).tolist()
    again = TeacherForcing(model, points).read(list(zip(prompts, completions)))
    for key in points:
        x, cu_seqlens = capture.packed(key)
        assert cu_seqlens.tolist() == [0, 4, 8, 12]
        torch.testing.assert_close(again.packed(key)[0], x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_and_module_paths_mean_the_same_places(architecture):
    model, (layers, attention, mlp) = tiny(architecture), PLACES[architecture]
    projection, core, norm = INSIDE[architecture]
    for kind, name in hook_points.INSIDE.items():
        assert HookPoint.parse(f"blocks.2.{name}") == HookPoint(2, kind)
        assert str(HookPoint(2, kind)) == f"blocks.2.{name}"
    for path in (layers, layers.split(".")[-1]):  # of the model, and of its base model
        assert HookPoint.parse(f"{path}.2", model) == HookPoint.parse(f"{path}.2.output", model) == HookPoint(2)
        assert HookPoint.parse(f"{path}.2.input", model) == HookPoint(2, "resid_pre")
        assert HookPoint.parse(f"{path}.2.{projection}.input", model) == HookPoint(2, "z")
        assert HookPoint.parse(f"{path}.2.{core}.input", model) == HookPoint(2, "mlp_in")
        assert HookPoint.parse(f"{path}.2.{norm}.output", model) == HookPoint(2, "mlp_in")
        assert HookPoint.parse(f"{path}.2.{attention}.output", model) == HookPoint(2, "attn_out")
        assert HookPoint.parse(f"{path}.2.{mlp}", model) == HookPoint(2, "mlp_out")
    for wrong in (f"{layers}.2.{norm}.input", f"{layers}.2.{projection}.inputs", f"{layers}.2.nothing.input"):
        with pytest.raises(CorrSteerError, match="cannot be used"):
            HookPoint.parse(wrong, model)


@pytest.mark.parametrize("architecture", NORMS_BY_MEAN)
def test_what_a_layer_norm_makes_before_its_weight_is_no_place(architecture):
    with pytest.raises(CorrSteerError, match="ln2.hook_normalized does not exist.*use blocks.1.mlp.hook_in"):
        hook_points.attach(tiny(architecture), HookPoint(LAYER, "mlp_normalized"), print)


def test_a_norm_that_does_more_than_divide_is_told_by_its_output():
    model = build("llama")
    norm = part(model, "llama", "mlp_normalized")
    norm.forward = lambda h, forward=norm.forward: forward(h) + 0.1
    with pytest.raises(CorrSteerError, match="no norm that only divides by the root mean square"):
        hook_points.attach(model, HookPoint(LAYER, "mlp_normalized"), print)


def test_parts_that_were_replaced_are_found_anew():
    model, batch, seen = build("llama"), batch_of(prompts_of([4])), []
    point = HookPoint(LAYER, "z")
    assert hook_points.projection(model, point) is part(model, "llama", "z")
    old = part(model, "llama", "z")
    model.model.layers[LAYER].self_attn.o_proj = torch.nn.Linear(old.in_features, old.out_features, bias=False)
    handle = hook_points.attach(model, point, lambda h: seen.append(h.clone()))
    model(**batch)
    handle.remove()
    assert torch.equal(seen[0], read_by(part(model, "llama", "z"), model, batch))


@pytest.mark.parametrize(
    "architecture, projection, mlp",
    [
        ("bloom", "self_attention.dense", None),  # whose parts add the residual themselves
        ("gpt_neo", "attn.attention.out_proj", "mlp"),  # an attention in another
        ("xglm", "self_attn.out_proj", None),  # whose MLP is no module of its own
        ("mixtral", "self_attn.o_proj", "mlp"),
        ("falcon", "self_attention.dense", "mlp"),  # attention and MLP beside each other, after one norm
        ("deepseek_v3", "self_attn.o_proj", "mlp"),  # heads of another width than the stream's
    ],
)
def test_places_are_found_whatever_modules_lie_in_one_another(architecture, projection, mlp):
    model, batch = architectures.build(architecture), batch_of(prompts_of([3, 6]))
    layer = hook_points.decoder_layers(model)[1][LAYER]
    assert hook_points.projection(model, HookPoint(LAYER, "z")) is layer.get_submodule(projection)
    seen = []
    if mlp is None:
        with pytest.raises(CorrSteerError, match="no part of it is an MLP that adds to the residual stream"):
            hook_points.attach(model, HookPoint(LAYER, "mlp_in"), print)
        return
    handle = hook_points.attach(model, HookPoint(LAYER, "mlp_in"), lambda h: seen.append(h.clone()))
    model(**batch)
    handle.remove()
    torch.testing.assert_close(seen, [read_by(layer.get_submodule(mlp), model, batch)])


def test_what_only_reads_leaves_the_model_as_it_is():
    model, batch = tiny("llama"), batch_of(prompts_of([3, 6]))
    before = model(**batch).logits
    for kind in hook_points.READ_ONLY:
        handle = hook_points.attach(model, HookPoint(LAYER, kind), lambda h: h + 100)
        assert torch.equal(model(**batch).logits, before)
        handle.remove()
