"""Transcoders, and SAEs on hook_z: collected where they read, steered where they write."""

import dataclasses

import pytest
import tiny_pipeline
import torch
from tiny_models import ARCHITECTURES, PLACES, build, inside

from corrsteer import CorrSteerError, Run, SparseEncoder, collect, select
from corrsteer.lm import hook_points
from corrsteer.lm.decoding import Decoding
from corrsteer.lm.hook_points import HookPoint
from corrsteer.lm.sublayer_inputs import rms_normalised
from corrsteer.ops import encode
from corrsteer.runs.placement import place, place_directions
from corrsteer.sae.sources import decoder_in_memory

SAE = pytest.importorskip("sae_lens", reason="what writes transcoders is SAELens").SAE

LAYER, D_SAE, N = 1, 40, 24
READS = {"transcoder": "mlp.hook_in", "skip_transcoder": "mlp.hook_in", "jumprelu_transcoder": "ln2.hook_normalized",
         "hook_z": "attn.hook_z"}  # fmt: skip


def even(completion, example):
    """A reward that every model gets sometimes."""
    return float(example.prompt[0] in "02468")


def lies(kind, d_in, d_out, directory):
    """What SAELens writes of a transcoder, or of an SAE on hook_z."""
    names = {"hook_name": f"blocks.{LAYER}.{READS[kind]}"}
    config = {"d_in": d_in, "d_sae": D_SAE, "apply_b_dec_to_input": False}
    if kind == "hook_z":
        config |= {"architecture": "standard", "reshape_activations": "hook_z"}
    else:
        config |= {"architecture": kind, "d_out": d_out}
        names["hook_name_out"] = f"blocks.{LAYER}.hook_mlp_out"
    sae = SAE.from_dict(config | {"metadata": names})
    with torch.no_grad():
        for at, parameter in enumerate(sae.parameters()):
            generator = torch.Generator().manual_seed(at)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    sae.save_model(directory)
    return sae


def read_by_hand(model, architecture, kind, prompt):
    """What an SAE of this kind reads at the last token of a prompt, `[d_in]`."""
    places = {"hook_z": "z", "jumprelu_transcoder": "mlp_normalized"}
    module, seen = inside(model, architecture, LAYER, places.get(kind, "mlp_in")), []
    handle = module.register_forward_pre_hook(lambda _module, args: seen.append(args[0][0, -1].clone()))
    model(prompt)
    handle.remove()
    if kind == "jumprelu_transcoder":
        return rms_normalised(seen[0], getattr(module, "variance_epsilon", None) or module.eps)
    return seen[0]


CASES = [(architecture, kind) for architecture in ARCHITECTURES for kind in READS
         if kind != "jumprelu_transcoder" or architecture not in ("gpt2", "gpt_neox")]  # fmt: skip


@pytest.mark.parametrize("architecture, kind", CASES)
def test_it_is_collected_where_it_reads_and_steered_where_it_writes(architecture, kind, tmp_path):
    model, tokenizer = build(architecture, vocab_size=len(tiny_pipeline.tokenizer())), tiny_pipeline.tokenizer()
    d, d_z = hook_points.width(model), hook_points.width(model, HookPoint(LAYER, "z"))
    sae = lies(kind, d_z if kind == "hook_z" else d, d, tmp_path / "sae")
    encoder, task = SparseEncoder.load(tmp_path / "sae"), tiny_pipeline.task(N, even)
    run = collect(
        model, tokenizer, {LAYER: encoder}, task, decoding=Decoding(max_new_tokens=1), permutations=0, progress=False
    )
    ids = [tokenizer(example.prompt, return_tensors="pt")["input_ids"] for example in task.examples]
    read = torch.stack([read_by_hand(model, architecture, kind, prompt) for prompt in ids])
    if kind == "hook_z":
        read = read.unflatten(-1, (4, -1))
    expected = sae.encode(read).mean(0).double()
    torch.testing.assert_close(run.moments[LAYER]["max"].z_mean, expected, rtol=1e-4, atol=1e-5)

    run.save(tmp_path / "run")
    run = Run.load(tmp_path / "run")
    writes = f"blocks.{LAYER}.{'attn.hook_z' if kind == 'hook_z' else 'hook_mlp_out'}"
    assert str(run.points[LAYER]) == f"blocks.{LAYER}.{READS[kind]}" and str(run.steering_point(LAYER)) == writes
    steering = select(run, "all", direction="both", positions="all")
    (feature,) = steering.features
    assert feature.hook_point == writes
    assert torch.equal(steering.directions[0], sae.W_dec[feature.index].detach())

    added = feature.coefficient * steering.directions[0]
    if kind == "hook_z":
        module = inside(model, architecture, LAYER, "z")
        handle = module.register_forward_pre_hook(lambda _module, args: (args[0] + added,))
    else:
        layers, _, mlp = PLACES[architecture]
        module = model.get_submodule(f"{layers}.{LAYER}.{mlp}")
        handle = module.register_forward_hook(lambda _module, _args, output: output + added)
    wanted = model(ids[0]).logits
    handle.remove()
    with steering.apply(model):
        torch.testing.assert_close(model(ids[0]).logits, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(ids[0]).logits, wanted, atol=1e-4)


def transcoder(d=128, **metadata):
    generator = torch.Generator().manual_seed(0)
    weight, W_dec = (torch.randn(D_SAE, d, generator=generator) for _ in range(2))
    described = {"architecture": "transcoder", "hook_name_out": "blocks.1.hook_mlp_out"} | metadata
    return SparseEncoder(
        d, D_SAE, "relu", weight=weight, bias=torch.zeros(D_SAE), hook_name="blocks.1.mlp.hook_in",
        decoder=decoder_in_memory(W_dec, divide_by_norm=False), metadata=described,
    )  # fmt: skip


def test_a_transcoder_that_does_not_say_where_it_writes_is_refused():
    model, encoders = tiny_pipeline.model(), {1: transcoder(hook_name_out=None)}
    points = place(model, encoders)
    with pytest.raises(CorrSteerError, match=r"encoders\[1\] is a transcoder that does not say where its decoder"):
        place_directions(model, encoders, points)


def test_an_sae_of_what_an_mlp_reads_is_refused_as_nothing_is_steered_there():
    model, encoders = tiny_pipeline.model(), {1: transcoder(architecture="standard")}
    with pytest.raises(CorrSteerError, match="blocks.1.mlp.hook_in can be captured, but not steered"):
        place_directions(model, encoders, place(model, encoders))


def test_module_paths_say_where_a_transcoder_reads_and_writes_and_an_offset_moves_both():
    model = tiny_pipeline.model()
    of_paths = dataclasses.replace(transcoder(hook_name_out="layers.1.mlp"), hook_name="layers.1.mlp.input")
    for encoder in (transcoder(), of_paths):
        for offset in (0, -1):
            points = place(model, {1: encoder}, offset)
            assert points == {1: HookPoint(1 + offset, "mlp_in")}
            writes = place_directions(model, {1: encoder}, points, offset)
            assert writes == {1: HookPoint(1 + offset, "mlp_out")}


def test_a_width_other_than_that_of_what_is_read_is_refused():
    model = build("gemma2", head_dim=16)
    encoder = dataclasses.replace(transcoder(32, architecture="standard"), hook_name="blocks.1.attn.hook_z")
    with pytest.raises(CorrSteerError, match="d_in=32, but the model's blocks.1.attn.hook_z is 64 wide"):
        place(model, {1: encoder})


def test_directions_of_different_widths_do_not_make_one_steering():
    tokenizer = tiny_pipeline.tokenizer()
    model = build("gemma2", head_dim=16, vocab_size=len(tokenizer))
    at_z = dataclasses.replace(transcoder(64, architecture="standard"), hook_name="blocks.1.attn.hook_z")
    of_stream = dataclasses.replace(transcoder(32, architecture="standard"), hook_name="blocks.2.hook_resid_post")
    decoding = Decoding(max_new_tokens=2)
    run = collect(
        model, tokenizer, {1: at_z, 2: of_stream}, tiny_pipeline.task(N, even), decoding=decoding, permutations=0,
        progress=False,
    )  # fmt: skip
    assert [run.residuals[layer]["mean"].d_sae for layer in (1, 2)] == [64, 32]
    x = torch.ones(1, 64)
    assert encode(x, at_z).shape == (1, D_SAE)
    with pytest.raises(CorrSteerError, match="of one width, got 64 of layer 1 feature .* and 32 of layer 2 feature"):
        select(run, "all", direction="both")
    assert len(select(run, "single", direction="both").features) == 1


def test_what_a_transcoder_reads_is_no_baseline_to_steer_along():
    from corrsteer.experiments.baselines import baselines

    model = tiny_pipeline.model()
    run = collect(
        model, tiny_pipeline.tokenizer(), {1: transcoder()}, tiny_pipeline.task(40, even),
        decoding=Decoding(max_new_tokens=2), permutations=0, progress=False,
    )  # fmt: skip
    steering = select(run, "single", direction="both")
    found = baselines(run, steering, encoders={1: transcoder()}, draws=1)
    assert "difference of means" not in found and "residual dimension" not in found
    assert found["random feature 1"][0].features[0].hook_point == "blocks.1.hook_mlp_out"
