"""Published SAEs, from tiny files in the layouts they are published in."""

import json
import sys

import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

from corrsteer import CorrSteerError, SparseEncoder, encode
from corrsteer.sae import sources

SAE = pytest.importorskip("sae_lens", reason="what is compared against is SAELens").SAE

D_IN, D_SAE = 24, 67
GEMMA_SCOPE = ("gemma-scope-2b-pt-res-canonical", "layer_20/width_16k/canonical")
LLAMA_SCOPE = ("llama_scope_lxr_8x", "l20r_8x")
OWN_REPOSITORY = ("someone/tiny-saes", "layer_3")
PUBLISHED = {
    GEMMA_SCOPE: ("blocks.20.hook_resid_post", "gemma-2-2b/20-gemmascope-res-16k"),
    LLAMA_SCOPE: ("blocks.20.hook_resid_post", "llama3.1-8b/20-llamascope-res-32k"),
    OWN_REPOSITORY: ("blocks.3.hook_mlp_out", None),
}


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def write_gemma_scope(hub):
    folder = hub / "google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"
    folder.mkdir(parents=True)
    arrays = {"W_enc": random(D_IN, D_SAE) / 5, "W_dec": random(D_SAE, D_IN), "b_enc": random(D_SAE)}
    arrays |= {"b_dec": random(D_IN), "threshold": random(D_SAE).abs()}
    np.savez(folder / "params.npz", **{name: array.numpy() for name, array in arrays.items()})


def write_llama_scope(hub):
    folder = hub / "fnlp/Llama3_1-8B-Base-LXR-8x/Llama3_1-8B-Base-L20R-8x"
    (folder / "checkpoints").mkdir(parents=True)
    settings = {"d_model": D_IN, "d_sae": D_SAE, "jump_relu_threshold": 0.5, "hook_point_in": PUBLISHED[LLAMA_SCOPE][0]}
    settings["dataset_average_activation_norm"] = {"in": 7.5}
    (folder / "hyperparams.json").write_text(json.dumps(settings))
    tensors = {"encoder.weight": random(D_SAE, D_IN) / 5, "decoder.weight": random(D_IN, D_SAE)}
    tensors |= {"encoder.bias": random(D_SAE), "decoder.bias": random(D_IN)}
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(tensors, folder / "checkpoints/final.safetensors")


def write_own_repository(hub):
    config = {"architecture": "topk", "d_in": D_IN, "d_sae": D_SAE, "k": 9, "rescale_acts_by_decoder_norm": True}
    sae = SAE.from_dict(config | {"metadata": {"hook_name": PUBLISHED[OWN_REPOSITORY][0]}})
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(random(*parameter.shape))
    sae.save_model(hub / "/".join(OWN_REPOSITORY))


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    """A hub that is a folder, `owner/name/path`."""

    def hf_hub_download(repo_id, filename, subfolder="", force_download=False):
        path = tmp_path / repo_id / subfolder / filename
        if not path.exists():
            raise LocalEntryNotFoundError(f"404: no {filename}\nin {repo_id}")
        return str(path)

    monkeypatch.setattr("sae_lens.loading.pretrained_sae_loaders.hf_hub_download", hf_hub_download)
    for write in (write_gemma_scope, write_llama_scope, write_own_repository):
        write(tmp_path)
    # SAELens knows Gemma Scope's shapes by heart; everything else it says about this SAE stays.
    from sae_lens.saes import sae as module

    overrides = module.get_config_overrides
    tiny = {"d_in": D_IN, "d_sae": D_SAE}
    monkeypatch.setattr(
        module, "get_config_overrides", lambda *names: overrides(*names) | (tiny if names == GEMMA_SCOPE else {})
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_sae_is_encoded_and_decoded_as_sae_lens_does(name):
    sae, encoder = SAE.from_pretrained(*name), SparseEncoder.from_pretrained(*name)
    hook_name, neuronpedia_id = PUBLISHED[name]
    assert encoder.hook_name == hook_name and encoder.metadata.get("neuronpedia_id") == neuronpedia_id
    assert (encoder.d_in, encoder.d_sae, encoder.weight.dtype) == (D_IN, D_SAE, torch.float32)
    x = random(40, D_IN)
    with torch.no_grad():
        expected = sae.encode(x)
        added = sae.decode(torch.eye(D_SAE)) - sae.decode(torch.zeros(1, D_SAE))
    assert 0.05 < (expected != 0).float().mean() < 0.95
    torch.testing.assert_close(encode(x, encoder), expected, rtol=1e-5, atol=1e-5)

    stored = json.loads(json.dumps(encoder.decoder.source))
    for rows in (encoder.decoder_rows([5, 0, 66]), sources.open_decoder(stored).rows([5, 0, 66])):
        torch.testing.assert_close(rows, added[[5, 0, 66]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_sae_in_bfloat16_keeps_its_bias_and_threshold_in_float32(name):
    whole, half = (SparseEncoder.from_pretrained(*name, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert half.weight.dtype == torch.bfloat16
    torch.testing.assert_close(half.weight.float(), whole.weight, rtol=2**-8, atol=0)
    assert half.threshold is whole.threshold is None or torch.equal(half.threshold, whole.threshold)
    if name != OWN_REPOSITORY:  # where b_dec is subtracted through the rounded weight
        assert torch.equal(half.bias, whole.bias)


@pytest.mark.parametrize(
    "release, sae_id, message",
    [
        ("someone/nothing", "layer_3", "404: no layer_3/cfg.json in someone/nothing"),
        (OWN_REPOSITORY[0], "layer_4", "404: no layer_4/cfg.json in someone/tiny-saes"),
    ],
)
def test_a_name_that_a_hub_repository_does_not_hold_is_refused_in_one_line(release, sae_id, message):
    with pytest.raises(CorrSteerError, match=f"release '{release}', sae_id '{sae_id}': {message}"):
        SparseEncoder.from_pretrained(release, sae_id)


CANONICAL = "layer_20/width_16k/canonical"
MISNAMED = {
    "a hub repository": (
        ("jbloom/GPT2-Small-SAEs-Reformatted", "blocks.8.hook_resid_pre"),
        "release must be the name of a release, got the hub repository 'jbloom/GPT2-Small-SAEs-Reformatted'; "
        "use gpt2-small-res-jb",
    ),
    "a hub repository of two releases": (
        ("google/gemma-scope-2b-pt-res", "layer_20"),
        "release must be the name of a release, got the hub repository 'google/gemma-scope-2b-pt-res'; "
        "use gemma-scope-2b-pt-res or gemma-scope-2b-pt-res-canonical",
    ),
    "a hub repository, one of whose releases has the sae": (
        ("google/gemma-scope-2b-pt-res", CANONICAL),
        "release must be the name of a release, got the hub repository 'google/gemma-scope-2b-pt-res'; "
        "use gemma-scope-2b-pt-res-canonical",
    ),
    "a release with a slip of the pen": (
        ("gemma-scope-2b-pt-res-cannonical", CANONICAL),
        "release must be one that SAELens lists, or a hub repository OWNER/NAME, got "
        "'gemma-scope-2b-pt-res-cannonical'; did you mean gemma-scope-2b-pt-res-canonical or ",
    ),
    "a release like no other": (("xyzzy", "a"), "OWNER/NAME, got 'xyzzy'; see https://"),
    "an id with a slip of the pen": (
        (GEMMA_SCOPE[0], "layer_20/width_16k/cannonical"),
        "sae_id must be one that release 'gemma-scope-2b-pt-res-canonical' has, got "
        "'layer_20/width_16k/cannonical'; did you mean layer_20/width_16k/canonical or ",
    ),
}


@pytest.mark.parametrize("name", MISNAMED)
def test_a_misnamed_sae_is_answered_with_the_names_it_may_mean_and_without_the_network(name, monkeypatch):
    from sae_lens.saes import sae as module

    monkeypatch.setattr(module.SAE, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    names, message = MISNAMED[name]
    with pytest.raises(CorrSteerError) as caught:
        SparseEncoder.from_pretrained(*names)
    assert message in str(caught.value), str(caught.value)


def test_without_sae_lens_a_published_sae_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(CorrSteerError, match="pip install sae-lens"):
        SparseEncoder.from_pretrained(*GEMMA_SCOPE)


@pytest.mark.parametrize("name", (LLAMA_SCOPE, OWN_REPOSITORY))
def test_a_published_sae_without_values_is_told_by_its_configuration_alone(name, tmp_path):
    loaded = SparseEncoder.from_pretrained(*name, dtype=torch.bfloat16)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    planned = SparseEncoder.from_pretrained(*name, dtype=torch.bfloat16, device="meta")
    assert planned.weight.is_meta and planned.bias.is_meta
    assert planned.nbytes == loaded.nbytes and planned.decoder.source == loaded.decoder.source
    assert planned.describe() == loaded.describe()


def test_gemma_scope_without_values_needs_no_network(monkeypatch):
    monkeypatch.setattr("sae_lens.loading.pretrained_sae_loaders.hf_hub_download", lambda *a, **k: pytest.fail("asked"))
    planned = SparseEncoder.from_pretrained(*GEMMA_SCOPE, device="meta")
    assert planned.describe() == "jumprelu 2304x16384 in fp32 at blocks.20.hook_resid_post"
    assert planned.nbytes == 4 * (2304 * 16384 + 2 * 16384)
