"""Steerings that others made become ones that can be applied and saved like any other."""

import pickle

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import WIDTH, batch_of, prompts_of, tiny

from corrsteer import CorrSteerError, Steering, import_steering

BATCH = batch_of(prompts_of((5, 7, 3)))
VECTORS = {layer: torch.randn(WIDTH, generator=torch.Generator().manual_seed(layer)) for layer in (1, 2)}
MEANT = Steering.from_vectors({f"blocks.{layer}.hook_resid_post": vector for layer, vector in VECTORS.items()})
STACK = torch.stack([torch.zeros(WIDTH), VECTORS[1], VECTORS[2]])
FORMS = {
    "by number": VECTORS,
    "by name": {f"layer_{layer}": vector for layer, vector in VECTORS.items()},
    "by module": {f"model.layers.{layer}": vector for layer, vector in VECTORS.items()},
    "by hook point": {f"blocks.{layer}.hook_resid_post": vector for layer, vector in VECTORS.items()},
    "with leading dimensions": {str(layer): vector[None, None] for layer, vector in VECTORS.items()},
    "in bfloat16": {layer: vector.bfloat16() for layer, vector in VECTORS.items()},
    "a stack": STACK,
    "of steering-vectors": {"layer_activations": VECTORS, "layer_type": "decoder_block"},
}


def logits(model, steering):
    with torch.no_grad(), steering.apply(model):
        return model(**BATCH).logits


@pytest.mark.parametrize("form", FORMS)
def test_tensors_by_layer_become_a_steering_of_every_token(form, tmp_path):
    torch.save(FORMS[form], tmp_path / "v.pt")
    steering = import_steering(tmp_path / "v.pt")
    assert steering.positions == "all" and steering.notes == ["imported from v.pt, tensors"]
    assert [(f.hook_point, f.layer, f.index) for f in steering.features] == [
        (f.hook_point, None, None) for f in MEANT.features
    ]
    expected = MEANT.directions.bfloat16().float() if form == "in bfloat16" else MEANT.directions
    assert torch.equal(steering.directions, expected)
    steering.save(tmp_path / "s.safetensors")
    assert Steering.load(tmp_path / "s.safetensors", tiny("llama")).digest == steering.digest


def test_safetensors_are_read_as_well_and_numbers_may_stand_for_other_places(tmp_path):
    save_file({str(layer): vector for layer, vector in VECTORS.items()}, tmp_path / "v.safetensors")
    steering = import_steering(tmp_path / "v.safetensors", kind="resid_pre")
    assert [f.hook_point for f in steering.features] == ["blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"]


def test_a_single_vector_is_of_the_layer_that_is_given(tmp_path):
    torch.save(VECTORS[2], tmp_path / "v.pt")
    steering = import_steering(tmp_path / "v.pt", layer=2)
    assert [f.hook_point for f in steering.features] == ["blocks.2.hook_resid_post"]
    with pytest.raises(CorrSteerError, match="layer must be given, as .* holds a single vector"):
        import_steering(tmp_path / "v.pt")
    torch.save(VECTORS, tmp_path / "v.pt")
    with pytest.raises(CorrSteerError, match="layer must be left out"):
        import_steering(tmp_path / "v.pt", layer=2)


@pytest.mark.parametrize("suffix", (".pt", ".safetensors"))
def test_what_stands_alone_in_a_file_is_a_stack_or_one_vector_whatever_it_is_called(suffix, tmp_path):
    def write(tensor):
        path = tmp_path / f"v{suffix}"
        save_file({"vector": tensor}, path) if suffix == ".safetensors" else torch.save({"vector": tensor}, path)
        return path

    assert import_steering(write(STACK)).digest == MEANT.digest
    for one in (VECTORS[2], VECTORS[2][None]):
        assert [f.hook_point for f in import_steering(write(one), layer=2).features] == ["blocks.2.hook_resid_post"]
        with pytest.raises(CorrSteerError, match="layer must be given"):
            import_steering(write(one))


@pytest.mark.parametrize(
    "holds, reason",
    [
        ({"layer_1": VECTORS[1], "1": VECTORS[1]}, "has two vectors for blocks.1.hook_resid_post"),
        ({"mlp_of_1": VECTORS[1], "1": VECTORS[1]}, "names 'mlp_of_1', which is neither a layer"),
        ({-1: VECTORS[1], 1: VECTORS[1]}, "names -1, which is neither a layer"),
        ({1: torch.ones(2, WIDTH)}, r"vector of real numbers \[d\] for each layer, got torch.float32 \[2, 32\] for 1"),
        ({1: torch.ones(WIDTH, dtype=torch.int64)}, "got torch.int64"),
        ({1: torch.tensor(3.0)}, r"got torch.float32 \[\] for 1"),
        ({1: "far"}, "got str for 1"),
        ({1: torch.ones(4), 2: torch.ones(5)}, "one or more of one d"),
        ({1: torch.full((WIDTH,), torch.nan)}, "must hold finite numbers"),
        ({1: torch.zeros(WIDTH)}, "a vector that is not all zeros"),
        ({}, "a vector that is not all zeros"),
        (torch.zeros(3, WIDTH), "a vector that is not all zeros"),
        (torch.ones(2, 3, WIDTH), r"a stack \[layers, d\] or one vector \[d\], got a tensor \[2, 3, 32\]"),
        ([1, 2], "got a list"),
        ({"layer_activations": VECTORS, "layer_type": "mlp"}, "layer_type 'decoder_block', got 'mlp'"),
    ],
)
def test_what_is_no_vector_for_each_layer_is_refused(holds, reason, tmp_path):
    torch.save(holds, tmp_path / "v.pt")
    with pytest.raises(CorrSteerError, match=reason):
        import_steering(tmp_path / "v.pt")


class Anything:
    """Stands for an object of a class that unpickling would have to import."""


def test_nothing_is_unpickled(tmp_path):
    torch.save(Anything(), tmp_path / "v.pt")
    with pytest.raises(CorrSteerError, match="only unpickling reads, and that can run any code"):
        import_steering(tmp_path / "v.pt")
    (tmp_path / "v.pt").write_bytes(pickle.dumps(Anything()))
    with pytest.raises(CorrSteerError, match="only unpickling reads|is damaged"):
        import_steering(tmp_path / "v.pt")


@pytest.mark.parametrize("suffix", (".pt", ".safetensors", ".json"))
@pytest.mark.parametrize("contents", (b"", b"nothing of the kind", b"{}", b"[1]"))
def test_files_that_are_damaged_are_refused_by_name(suffix, contents, tmp_path):
    (tmp_path / f"v{suffix}").write_bytes(contents)
    with pytest.raises(CorrSteerError, match=f"v{suffix}"):
        import_steering(tmp_path / f"v{suffix}")


def test_what_does_not_lie_there_or_ends_otherwise_is_refused(tmp_path):
    with pytest.raises(CorrSteerError, match="there is no file at"):
        import_steering(tmp_path / "v.pt")
    (tmp_path / "v.npz").touch()
    with pytest.raises(CorrSteerError, match="path must end with one of .gguf, .json"):
        import_steering(tmp_path / "v.npz")
    with pytest.raises(CorrSteerError, match="kind must be one of resid_pre"):
        import_steering(tmp_path / "v.npz", kind="z")
    (tmp_path / "v.json").touch()
    with pytest.raises(CorrSteerError, match="layer and kind must be left out"):
        import_steering(tmp_path / "v.json", layer=1)


def test_an_imported_steering_steers_as_one_of_the_same_vectors_does(tmp_path):
    torch.save(VECTORS, tmp_path / "v.pt")
    expected = MEANT.apply(tiny("llama"), "all")
    with torch.no_grad(), expected:
        same = tiny("llama")(**BATCH).logits
    assert torch.equal(logits(tiny("llama"), import_steering(tmp_path / "v.pt")), same)
