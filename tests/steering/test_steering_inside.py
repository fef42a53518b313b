"""Steering along directions of SAEs on hook_z, and what cannot be steered."""

import contextlib

import pytest
import torch
from tiny_models import ARCHITECTURES, batch_of, build, inside, prompts_of, tiny

from corrsteer import Steering
from corrsteer.errors import CorrSteerError
from corrsteer.lm import hook_points
from corrsteer.lm.hook_points import HookPoint
from corrsteer.steering.steering import apply_rows

LAYER = 1
POINT = f"blocks.{LAYER}.attn.hook_z"
PROMPTS = prompts_of([3, 6, 4])


def direction(model, seed=5):
    d = hook_points.width(model, HookPoint(LAYER, "z"))
    return 0.5 * torch.randn(d, generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def by_hand(model, architecture, vectors, where="input"):
    """Add `vectors` [d] or [B, 1, d] to what the last linear layer of attention reads, or W_O d to what it puts out."""
    linear = inside(model, architecture, LAYER, "z")
    weight = linear.weight if isinstance(linear, torch.nn.Linear) else linear.weight.T
    if where == "input":
        handle = linear.register_forward_pre_hook(lambda _module, args: (args[0] + vectors,))
    else:
        handle = linear.register_forward_hook(lambda _module, _args, output: output + vectors @ weight.T)
    yield
    handle.remove()


def logits(model):
    """Of four greedy steps, `[B, 4, vocabulary]`."""
    steps = model.generate(
        **batch_of(PROMPTS), max_new_tokens=4, min_new_tokens=4, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return torch.stack(steps.logits, 1)


def assert_near(found, wanted, unsteered):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, unsteered, atol=1e-2)


@pytest.mark.parametrize("where", ["input", "output"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_direction_at_hook_z_goes_through_the_last_linear_layer_of_attention(architecture, where):
    model = tiny(architecture)
    d, unsteered = direction(model), logits(model)
    with by_hand(model, architecture, d, where):
        wanted = logits(model)
    with Steering.from_vectors({POINT: d}).apply(model, positions="all"):
        found = logits(model)
    assert_near(found, wanted, unsteered)
    assert torch.equal(logits(model), unsteered)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_rows_and_positions_are_told_apart_at_hook_z_as_elsewhere(architecture):
    model = tiny(architecture)
    first, second, unsteered = direction(model, 1), direction(model, 2), logits(model)
    steerings = [Steering.from_vectors({POINT: one}) for one in (first, second)]
    with by_hand(model, architecture, torch.stack([second, torch.zeros_like(first), first])[:, None]):
        wanted = logits(model)
    with apply_rows(model, steerings, [1, -1, 0], positions="all"):
        found = logits(model)
    assert_near(found[[0, 2]], wanted[[0, 2]], unsteered[[0, 2]])
    assert torch.equal(found[1], unsteered[1])

    steps = []  # the last prompt token and what is generated, of prompts that end in the last column

    def at_last(_module, args):
        h = args[0].clone()
        h[:, -1] += first
        steps.append(h.shape[1])
        return (h,)

    handle = inside(model, architecture, LAYER, "z").register_forward_pre_hook(at_last)
    wanted = logits(model)
    handle.remove()
    with steerings[0].apply(model, positions="generated"):
        assert_near(logits(model), wanted, unsteered)
    assert steps == [6, 1, 1, 1]


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt_neox"])
def test_installed_hooks_steer_at_hook_z(architecture):
    model = build(architecture)
    d, unsteered = direction(model), logits(model)
    with by_hand(model, architecture, d):
        wanted = logits(model)
    with Steering.from_vectors({POINT: d}).install(model, positions="all") as installed:
        assert_near(logits(model), wanted, unsteered)
        installed.set(None)
        assert torch.equal(logits(model), unsteered)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_neox", "gpt2"])
def test_a_steering_at_hook_z_is_folded_into_the_bias_of_that_layer(architecture):
    model = build(architecture)
    steering, unsteered = Steering.from_vectors({POINT: direction(model)}), logits(model)
    with steering.apply(model, positions="all"):
        wanted = logits(model)
    assert_near(logits(steering.fold_into(model)), wanted, unsteered)
    assert_near(logits(steering.fold_into(model, scale=-1.0)), unsteered, wanted)


def test_a_steering_at_hook_z_is_saved_and_read(tmp_path):
    model = tiny("llama")
    steering = Steering.from_vectors({POINT: direction(model)})
    steering.save(tmp_path / "s.safetensors")
    again = Steering.load(tmp_path / "s.safetensors", model)
    assert again.features == steering.features and torch.equal(again.directions, steering.directions)


def test_a_direction_of_another_width_or_at_a_place_that_is_only_read_is_refused():
    model = build("gemma2", head_dim=16)  # whose heads together are wider than the stream
    assert hook_points.width(model, HookPoint(LAYER, "z")) == 64 != hook_points.width(model)
    with pytest.raises(CorrSteerError, match=f"for {POINT} of width 32, but the model's is 64"):
        Steering.from_vectors({POINT: torch.ones(32)}).check(model)
    Steering.from_vectors({POINT: torch.ones(64)}).check(model)
    for name in ("mlp.hook_in", "ln2.hook_normalized"):
        read_only = Steering.from_vectors({f"blocks.1.{name}": torch.ones(32)})
        with pytest.raises(CorrSteerError, match=f"blocks.1.{name} can be captured, but not steered; steer where"):
            read_only.check(model)
        of_stream = Steering.from_vectors({"blocks.1.hook_resid_post": torch.ones(32)})
        with pytest.raises(CorrSteerError, match="can be captured, but not steered"):
            of_stream.install(model, points=[f"blocks.1.{name}"])
