"""SAEs as sparsify and dictionary_learning themselves save them, against their own encode."""

import json

import pytest
import torch

from bench import formats as written
from bench.formats import D_IN, D_SAE, DICTIONARIES, PUBLISHED, K, dictionary_learning_state
from corrsteer import SparseEncoder, encode

LIBRARIES = {"eai-sparsify": "sparsify", "dictionary-learning": "dictionary_learning"}
THEIRS = [pytest.param(key, id=" ".join(key)) for key, one in PUBLISHED.items() if one.library in LIBRARIES]


def tokens():
    return torch.randn(40, D_IN, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("key", THEIRS)
def test_features_are_those_of_the_library_as_far_as_the_dtype_goes(tmp_path, key):
    pytest.importorskip(LIBRARIES[PUBLISHED[key].library])
    found = written.errors(PUBLISHED[key], tmp_path, torch.float32)
    assert found["ours"] < 1e-6 and found["between"] < 1e-6
    found = written.errors(PUBLISHED[key], tmp_path, torch.bfloat16)
    assert found["ours"] < 1.1 * found["own"]


@torch.no_grad()
@pytest.mark.parametrize("transcode", [False, True])
@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_what_sparsify_saves_is_encoded_and_decoded_as_it_does(tmp_path, activation, transcode):
    sparsify = pytest.importorskip("sparsify")
    config = sparsify.SparseCoderConfig(activation=activation, num_latents=D_SAE, k=16, transcode=transcode)
    coder = sparsify.SparseCoder(D_IN, config)
    for parameter in coder.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) / 8)
    path = tmp_path / "layers.2.mlp"
    coder.save_to_disk(path)
    encoder, x = SparseEncoder.load(path), tokens()
    found = coder.encode(x)
    expected = torch.zeros_like(found.pre_acts).scatter_(-1, found.top_indices, found.top_acts)
    z = encode(x, encoder)
    torch.testing.assert_close(z, expected, rtol=1e-5, atol=1e-6)
    rows = encoder.decoder_rows(range(D_SAE))
    torch.testing.assert_close(z @ rows + coder.b_dec, coder.decode(found.top_acts, found.top_indices))


@torch.no_grad()
@pytest.mark.parametrize("kind", DICTIONARIES)
def test_what_dictionary_learning_saves_is_encoded_and_decoded_as_it_does(tmp_path, kind):
    pytest.importorskip("dictionary_learning")
    from dictionary_learning.utils import load_dictionary

    torch.save(dictionary_learning_state(kind), tmp_path / "ae.pt")
    trainer = {"dict_class": kind, "k": K, "layer": 1, "lm_name": "tiny", "submodule_name": "resid_post_layer_1"}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    dictionary, _ = load_dictionary(str(tmp_path), device="cpu")
    torch.save({name: tensor.cpu() for name, tensor in dictionary.state_dict().items()}, tmp_path / "ae.pt")
    encoder, x = SparseEncoder.load(tmp_path), tokens()
    z = encode(x, encoder)
    torch.testing.assert_close(z, dictionary.encode(x), rtol=1e-5, atol=1e-6)
    added = dictionary.decode(z) - dictionary.decode(torch.zeros(1, D_SAE))
    torch.testing.assert_close(z @ encoder.decoder_rows(range(D_SAE)), added, rtol=1e-4, atol=1e-5)
