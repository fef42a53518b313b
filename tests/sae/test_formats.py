"""SAEs in every format, from tiny files in the layouts they are published in."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bench import formats as written
from bench.formats import D_IN, D_SAE, LLAMA_SCALE, PUBLISHED, K, weights
from corrsteer import CorrSteerError, SparseEncoder, encode
from corrsteer.cli import inputs
from corrsteer.sae import sources
from corrsteer.sae.formats import FORMATS, recognise, stores

W = {name: tensor.double() for name, tensor in weights().items()}
CASES = [pytest.param(key, id=" ".join(key)) for key in PUBLISHED]


@pytest.fixture
def lies(tmp_path):
    """Where an SAE of a format lies, once it was written there."""

    def write(key):
        path = tmp_path / PUBLISHED[key].path
        PUBLISHED[key].write(path)
        return path

    return write


def tokens():
    return torch.randn(40, D_IN, generator=torch.Generator().manual_seed(7))


# What each format's features are, written out


def p(x, subtracts=False):
    return (x - W["b_dec"] * subtracts) @ W["W_enc"] + W["b_enc"]


def jump(p, threshold):
    return p.relu() * (p > threshold)


def top(p, k):
    values, places = p.relu().topk(k, dim=-1)
    return torch.zeros_like(p).scatter(-1, places, values)


def largest_of_groups(p, groups):
    grouped = p.relu().unflatten(-1, (groups, -1))
    return (grouped * (grouped == grouped.amax(-1, keepdim=True))).flatten(-2)


def gated(x):
    product = (x - W["b_dec"]) @ W["W_enc"]
    return (product * W["r_mag"].exp() + W["b_mag"]).relu() * (product + W["b_gate"] > 0)


def llama_scope(x):
    stored = (W["W_enc"].T / LLAMA_SCALE).bfloat16().double().T
    return jump((LLAMA_SCALE * x) @ stored + W["b_enc"].bfloat16().double(), 0.2 * LLAMA_SCALE)


NORMS = W["W_dec"].norm(dim=1)
DEFINITIONS = {
    ("sae_lens", "gated"): gated,
    ("gemma_scope", "SAE"): lambda x: jump(p(x), W["threshold"]),
    ("gemma_scope", "transcoder"): lambda x: jump(p(x), W["threshold"]),
    ("gemma_scope_2", "SAE"): lambda x: jump(p(x), W["threshold"]),
    ("gemma_scope_2", "skip transcoder"): lambda x: jump(p(x), W["threshold"]),
    ("llama_scope", "SAE"): llama_scope,
    ("qwen_scope", "topk"): lambda x: top(p(x), 50),
    ("sparsify", "topk"): lambda x: top(p(x, True), K),
    ("sparsify", "topk transcoder"): lambda x: top(p(x), K),
    ("sparsify", "groupmax"): lambda x: largest_of_groups(p(x, True), 16),
    ("sparsify", "groupmax transcoder"): lambda x: largest_of_groups(p(x), 16),
    ("dictionary_learning", "AutoEncoder"): lambda x: p(x, True).relu() * NORMS,
    ("dictionary_learning", "AutoEncoderNew"): lambda x: p(x).relu(),
    ("dictionary_learning", "GatedAutoEncoder"): gated,
    ("dictionary_learning", "AutoEncoderTopK"): lambda x: top(p(x, True), K),
    ("dictionary_learning", "BatchTopKSAE"): lambda x: jump(p(x, True), 0.4),
    ("dictionary_learning", "MatryoshkaBatchTopKSAE"): lambda x: jump(p(x, True), 0.4),
    ("dictionary_learning", "JumpReluAutoEncoder"): lambda x: jump(p(x), W["threshold"]),
}
HOOKS = {
    ("sae_lens", "gated"): ("blocks.3.hook_resid_post", None),
    ("gemma_scope", "SAE"): ("blocks.20.hook_resid_post", None),
    ("gemma_scope", "transcoder"): ("blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out"),
    ("gemma_scope_2", "SAE"): ("blocks.13.hook_resid_post", None),
    ("gemma_scope_2", "skip transcoder"): ("blocks.13.mlp.hook_in", "blocks.13.hook_mlp_out"),
    ("llama_scope", "SAE"): ("blocks.20.hook_resid_post", None),
    ("qwen_scope", "topk"): ("blocks.1.hook_resid_post", None),
    ("sparsify", "topk"): ("layers.4", None),
    ("sparsify", "topk transcoder"): ("layers.4.mlp.input", "layers.4.mlp"),
    ("sparsify", "groupmax"): ("layers.4", None),
    ("sparsify", "groupmax transcoder"): ("layers.4.mlp.input", "layers.4.mlp"),
} | {("dictionary_learning", kind): ("blocks.8.hook_resid_post", None) for kind in written.DICTIONARIES}  # fmt: skip


def test_every_format_is_written_and_defined_here():
    assert {name for name, _ in PUBLISHED} == FORMATS.keys()
    assert PUBLISHED.keys() == DEFINITIONS.keys() == HOOKS.keys()


@pytest.mark.parametrize("key", CASES)
def test_features_are_those_that_the_format_defines(lies, key):
    path = lies(key)
    assert recognise(path).name == key[0]
    encoder, x = SparseEncoder.load(path, dtype=torch.float32), tokens()
    expected = DEFINITIONS[key](x.double())
    assert 0.01 < (expected != 0).double().mean() < 0.95
    torch.testing.assert_close(encode(x, encoder).double(), expected, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(
        encode(x.double(), SparseEncoder.load(path, dtype=torch.float64)), expected, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("key", CASES)
def test_an_encoder_says_where_its_sae_reads_and_writes(lies, key):
    encoder = SparseEncoder.load(lies(key))
    assert (encoder.hook_name, encoder.metadata.get("hook_name_out")) == HOOKS[key]


@pytest.mark.parametrize("key", CASES)
def test_a_decoder_row_is_found_again_from_anywhere_and_without_the_others(lies, key, monkeypatch):
    path = lies(key)
    monkeypatch.chdir(path.parent)
    encoder = SparseEncoder.load(path.name if key[0] != "qwen_scope" else path)
    source = json.loads(json.dumps(encoder.decoder.source))
    assert (source["directory"], source["format"]) == (str(path), key[0])
    monkeypatch.chdir("/")
    for store in (stores.Safetensors, stores.Npz):
        monkeypatch.setattr(store, "read", lambda *_: pytest.fail("read whole"))
    expected = W["W_dec"]
    if key[0] == "llama_scope":
        expected = expected.bfloat16().double() / LLAMA_SCALE
    if key[1] == "AutoEncoder":
        expected = expected / NORMS[:, None]
    for rows in (encoder.decoder_rows([5, 0, D_SAE - 1]), sources.open_decoder(source).rows([5, 0, D_SAE - 1])):
        torch.testing.assert_close(rows, expected[[5, 0, D_SAE - 1]].float(), rtol=1e-6, atol=1e-6)
    assert encoder.decoder_rows([]).shape == (0, D_IN)


@pytest.mark.parametrize("key", [param for param in CASES if PUBLISHED[param.values[0]].library == "sae-lens"])
def test_features_are_those_of_sae_lens(tmp_path, key):
    pytest.importorskip("sae_lens", reason="what is compared against is SAELens")
    found = written.errors(PUBLISHED[key], tmp_path, torch.float32)
    assert found["ours"] < 1e-6 and found["between"] < 1e-6
    found = written.errors(PUBLISHED[key], tmp_path, torch.bfloat16)
    assert found["ours"] < 1.1 * found["own"]


@pytest.mark.parametrize(
    "key, hook_name",
    [
        (("gemma_scope", "transcoder"), "blocks.0.ln2.hook_normalized"),
        # SAELens calls it blocks.13.hook_mlp_in, which for TransformerLens comes before the norm
        (("gemma_scope_2", "skip transcoder"), "model.layers.13.pre_feedforward_layernorm.output"),
    ],
    ids=str,
)
def test_a_transcoder_by_its_release_reads_and_writes_where_its_files_say(tmp_path, key, hook_name):
    pytest.importorskip("sae_lens", reason="what loads releases is SAELens")
    PUBLISHED[key].write(tmp_path / PUBLISHED[key].path)
    release = {"gemma_scope": ("gemma-scope-2b-pt-transcoders", "layer_0/width_16k/average_l0_76"),
               "gemma_scope_2": ("gemma-scope-2-1b-pt-transcoders", "transcoder/layer_13_width_16k_l0_big_affine")}
    with written.hub(tmp_path / "hub"):
        encoder = SparseEncoder.from_pretrained(*release[key[0]])
    assert (encoder.hook_name, encoder.metadata["hook_name_out"]) == (hook_name, HOOKS[key][1])


def test_a_weight_is_in_the_dtype_of_its_file_unless_it_is_scaled(lies):
    path = lies(("sparsify", "topk"))
    tensors = {"encoder.weight": W["W_enc"].T, "encoder.bias": W["b_enc"], "W_dec": W["W_dec"], "b_dec": W["b_dec"]}
    save_file({name: tensor.bfloat16().contiguous() for name, tensor in tensors.items()}, path / "sae.safetensors")
    assert SparseEncoder.load(path).weight.dtype == torch.bfloat16
    assert SparseEncoder.load(lies(("llama_scope", "SAE"))).weight.dtype == torch.float32


def test_a_transcoder_of_llama_scope_reads_by_one_scale_and_writes_by_another(lies):
    path = lies(LLAMA)
    plain = SparseEncoder.load(path)
    norms = {"in": D_IN**0.5 / LLAMA_SCALE, "out": 3.390625}
    places = {"hook_point_in": "blocks.8.ln2.hook_normalized", "hook_point_out": "blocks.8.hook_mlp_out"}
    change("hyperparams.json", **places, dataset_average_activation_norm=norms, act_fn="jumprelu")(path)
    encoder = SparseEncoder.load(path)
    assert encoder.metadata["architecture"] == "jumprelu_transcoder"
    assert (encoder.hook_name, encoder.metadata["hook_name_out"]) == tuple(places.values())
    assert torch.equal(encode(tokens(), encoder), encode(tokens(), plain))
    rows = W["W_dec"].bfloat16().double()[[3, 9]] * 3.390625 / D_IN**0.5
    torch.testing.assert_close(encoder.decoder_rows([3, 9]), rows.float())


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("order", ["C", "F"])
def test_rows_of_numpys_archive_are_read_however_it_is_packed(tmp_path, order, compressed):
    matrix = np.asarray(W["W_dec"].numpy(), order=order)
    (np.savez_compressed if compressed else np.savez)(tmp_path / "a.npz", W_dec=matrix)
    found = stores.Npz(tmp_path / "a.npz").rows("W_dec", [9, 2, 2])
    assert torch.equal(found, W["W_dec"][[9, 2, 2]])


# What is refused


class Runs:
    """Unpickled, it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("key", [("qwen_scope", "topk"), ("dictionary_learning", "AutoEncoderTopK")])
def test_a_file_that_would_run_code_is_refused_and_runs_none(lies, tmp_path, key):
    path = lies(key)
    file = path if path.is_file() else path / "ae.pt"
    torch.save({"W_enc": Runs(tmp_path / "ran")}, file)
    with pytest.raises(CorrSteerError, match=f"{file} holds more than tensors, which only unpickling reads"):
        SparseEncoder.load(path)
    file.write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    with pytest.raises(CorrSteerError, match=f"{file} "):
        SparseEncoder.load(path)
    assert not (tmp_path / "ran").exists()


def test_an_archive_of_objects_is_refused_and_runs_nothing(lies, tmp_path):
    path = lies(("gemma_scope", "SAE"))
    objects = np.array([Runs(tmp_path / "ran")], dtype=object)
    arrays = dict(np.load(path / "params.npz")) | {"W_enc": objects}
    np.savez(path / "params.npz", allow_pickle=True, **arrays)
    with pytest.raises(CorrSteerError, match="params.npz is damaged .*allow_pickle"):
        SparseEncoder.load(path)
    assert not (tmp_path / "ran").exists()


def change(name, **values):
    def write(path):
        found = json.loads((path / name).read_text())
        for key, value in values.items():
            inside, _, last = key.rpartition("__")
            (found[inside] if inside else found)[last] = value
        (path / name).write_text(json.dumps(found))

    return write


def cut(name):
    def write(path):
        file = path / name if path.is_dir() else path
        file.write_bytes(file.read_bytes()[:-200])

    return write


def lacking(name, key):
    def write(path):
        state = torch.load(path / name, weights_only=True)
        del state[key]
        torch.save(state, path / name)

    return write


SPARSIFY, GATED = ("sparsify", "topk"), ("dictionary_learning", "GatedAutoEncoder")
GEMMA, GEMMA_2, LLAMA = ("gemma_scope", "SAE"), ("gemma_scope_2", "SAE"), ("llama_scope", "SAE")


@pytest.mark.parametrize(
    "key, damage, message",
    [
        (GEMMA, cut("params.npz"), "params.npz is damaged"),
        (GEMMA_2, cut("params.safetensors"), "params.safetensors is damaged"),
        (GEMMA_2, change("config.json", architecture="topk"), "architecture of .* must be 'jump_relu', got 'topk'"),
        (GEMMA_2, change("config.json", hf_hook_point_in=None), "config.json has no hf_hook_point_in"),
        (LLAMA, change("hyperparams.json", dataset_average_activation_norm=None), "has no dataset_average_activation"),
        (LLAMA, change("hyperparams.json", jump_relu_threshold="0.2"), "jump_relu_threshold of .* got '0.2'"),
        (LLAMA, change("hyperparams.json", dataset_average_activation_norm={"in": 0}), "must be above 0, got 0"),
        (LLAMA, change("hyperparams.json", act_fn="topk"), "act_fn of .* must be 'jumprelu', got 'topk'"),
        (("qwen_scope", "topk"), cut(""), "layer1.sae.pt is damaged"),
        (SPARSIFY, change("cfg.json", activation="relu"), "activation of .*cfg.json must be topk or groupmax"),
        (SPARSIFY, change("cfg.json", signed=True), "signed activations"),
        (SPARSIFY, change("cfg.json", k=None), "cfg.json has no k"),
        (SPARSIFY, change("cfg.json", activation="groupmax", k=7), "k must divide d_sae=512 for groupmax, got 7"),
        (GATED, cut("ae.pt"), "ae.pt is damaged"),
        (GATED, lacking("ae.pt", "gate_bias"), "ae.pt lacks gate_bias, which a gated SAE has"),
        (GATED, change("config.json", trainer={"dict_class": "IdentityDict"}), "dict_class of .* got 'IdentityDict'"),
        (GATED, change("config.json", buffer__io="in"), "io in .* must be 'out'.* got 'in'"),
    ],
)
def test_a_damaged_sae_is_refused_with_what_is_wrong_and_where(lies, key, damage, message):
    path = lies(key)
    SparseEncoder.load(path)
    damage(path)
    with pytest.raises(CorrSteerError, match=message) as refused:
        SparseEncoder.load(path)
    assert str(path) in str(refused.value) or "groupmax" in message
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("key", [GEMMA, ("qwen_scope", "topk"), SPARSIFY])
def test_a_file_that_does_not_say_what_it_was_trained_on_is_refused_where_its_path_does_not_either(
    lies, tmp_path, key
):
    path = lies(key)
    moved = tmp_path / ("layer1.sae.pt" if path.is_file() else "mine")
    shutil.move(path, moved)
    with pytest.raises(CorrSteerError, match=f"{moved}.*named"):
        SparseEncoder.load(moved)


def test_a_scaling_factor_of_gemma_scope_is_refused_unless_it_does_nothing(lies):
    path = lies(GEMMA)
    arrays = dict(np.load(path / "params.npz"))
    np.savez(path / "params.npz", scaling_factor=np.ones(D_SAE, np.float32), **arrays)
    assert SparseEncoder.load(path).d_sae == D_SAE
    np.savez(path / "params.npz", scaling_factor=np.full(D_SAE, 2, np.float32), **arrays)
    with pytest.raises(CorrSteerError, match="params.npz holds a scaling_factor other than 1"):
        SparseEncoder.load(path)


def test_an_sae_of_the_embeddings_is_refused(tmp_path):
    path = tmp_path / "gemma-scope-2b-pt-res" / "embedding" / "width_4k"
    written.write_gemma_scope(path)
    with pytest.raises(CorrSteerError, match="does not say where it was trained"):
        SparseEncoder.load(path)


def test_a_folder_of_one_layers_file_is_taken_and_one_of_several_is_refused(lies):
    path = lies(("qwen_scope", "topk"))
    assert SparseEncoder.load(path.parent).hook_name == "blocks.1.hook_resid_post"
    shutil.copy(path, path.with_name("layer2.sae.pt"))
    with pytest.raises(CorrSteerError, match="holds SAEs of 2 layers; give the file of one, such as .*layer1.sae.pt"):
        SparseEncoder.load(path.parent)


def test_a_path_without_an_sae_or_with_two_is_refused_with_what_could_lie_there(lies, tmp_path):
    with pytest.raises(CorrSteerError, match="there is no SAE directory at .*nothing"):
        SparseEncoder.load(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorrSteerError, match="must hold one of sae_weights.safetensors, params.npz, .*ae.pt"):
        SparseEncoder.load(tmp_path / "empty")
    path = lies(SPARSIFY)
    PUBLISHED[GATED].write(path)
    with pytest.raises(CorrSteerError, match="files of sparsify and dictionary_learning; keep each"):
        SparseEncoder.load(path)
    with pytest.raises(CorrSteerError, match="path must be a path, got None"):
        SparseEncoder.load(None)


@pytest.mark.parametrize("key", CASES)
def test_the_command_line_takes_every_format_and_tells_a_wrong_layer_before_a_model_is_loaded(lies, key):
    path = str(lies(key))
    named = HOOKS[key][0].split(".")[1]
    inputs.check_saes({int(named): path})
    encoders = inputs.load_encoders({int(named): path}, None)
    assert encoders[int(named)].d_sae == D_SAE
    recorded = {"saes": {named: {"source": json.loads(json.dumps(encoders[int(named)].decoder.source))}}}
    again = inputs.recorded_encoders(recorded, None)[int(named)]
    assert torch.equal(again.weight, encoders[int(named)].weight) and again.metadata == encoders[int(named)].metadata
    if HOOKS[key][0].startswith("blocks"):
        with pytest.raises(CorrSteerError, match=f"trained at blocks.{named}.*; give it as {named}={path}"):
            inputs.check_saes({99: path})


def test_the_command_line_says_which_source_is_damaged_before_a_model_is_loaded(lies):
    path = lies(SPARSIFY)
    (path / "cfg.json").write_text("{")
    with pytest.raises(CorrSteerError, match=f"{path}/cfg.json is not JSON"):
        inputs.check_saes({4: str(path)})
