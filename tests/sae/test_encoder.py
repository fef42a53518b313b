import copy
import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from corrsteer import CorrSteerError, SparseEncoder, encode
from corrsteer.sae import encoder as encoder_module
from corrsteer.sae import sources
from corrsteer.sae.formats import stores

SAE = pytest.importorskip("sae_lens", reason="what is compared against is SAELens").SAE

D_IN, D_SAE, D_OUT, T = 24, 67, 17, 40
HEADS = (3, 8)
KINDS = {
    "standard": {},
    "jumprelu": {},
    "gated": {},
    "topk": {"k": 50},  # of a token's highest, some are negative
    "topk rescaled": {"k": 9, "rescale_acts_by_decoder_norm": True},
    "abstopk": {"k": 9},
    "abstopk rescaled": {"k": 9, "rescale_acts_by_decoder_norm": True},
    "transcoder": {"d_out": D_OUT},
    "skip_transcoder": {"d_out": D_OUT},
    "jumprelu_transcoder": {"d_out": D_OUT},
    "jumprelu_skip_transcoder": {"d_out": D_OUT},
}
SAES = [kind for kind in KINDS if "transcoder" not in kind]  # transcoders do not subtract b_dec, nor reshape heads
SUBTRACTIONS = [(kind, subtracts) for kind in KINDS for subtracts in ((False, True) if kind in SAES else (False,))]
NORMS = ["none", "layer_norm", "constant_norm_rescale", "expected_average_only_in"]

# The numerical contract. In float64 both are the truth: what is left is the order of summation.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
# A pre-activation this near to where its feature is decided, relative to the token's largest, may fall on either side,
# and this share of all entries at most may lie so near: in float32 none.
UNDECIDED = {torch.float64: 0, torch.float32: 1e-7, torch.float16: 1e-3, torch.bfloat16: 1e-2}
FEW = {torch.float64: 0, torch.float32: 0, torch.float16: 0.005, torch.bfloat16: 0.03}


def make_sae(kind, dtype=torch.float32, seed=0, **settings):
    """An SAE none of whose parameters is trivial."""
    config = {"d_in": D_IN, "d_sae": D_SAE, "apply_b_dec_to_input": False, **KINDS[kind], **settings}
    config |= {"architecture": kind.split()[0], "dtype": str(dtype).removeprefix("torch.")}
    config.setdefault("metadata", {"hook_name": "blocks.3.hook_resid_post", "model_name": "tiny"})
    sae = SAE.from_dict(config)
    random = torch.Generator().manual_seed(seed)
    values = {
        "W_enc": lambda p: torch.randn(p.shape, generator=random) / D_IN**0.5 + 0.05,
        "W_dec": lambda p: torch.randn(p.shape, generator=random) * torch.rand(len(p), 1, generator=random).add(0.1),
        "W_skip": lambda p: torch.randn(p.shape, generator=random),
        "b_dec": lambda p: 0.5 * torch.randn(p.shape, generator=random) + 0.5,
        "threshold": lambda p: torch.rand(p.shape, generator=random) + 0.2,
        "r_mag": lambda p: 0.5 * torch.randn(p.shape, generator=random),
    }
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            bias = name in ("b_enc", "b_gate", "b_mag")
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random) if bias else values[name](parameter))
    return sae


def make_x(sae, seed=1):
    """Tokens `[T, d_in]`: ordinary, of large norm, with one massive dimension, off centre, tiny, near b_dec."""
    x = torch.randn(T, D_IN, generator=torch.Generator().manual_seed(seed))
    x[:4] *= 30
    x[4:6, 7] = 200
    x[6:8] += 30
    x[8:10] *= 0.01
    if sae.b_dec.shape == (D_IN,):
        x[10:12] = sae.b_dec.detach().float() + 0.1 * x[10:12]
    return x.to(sae.dtype)


def decide(sae, x):
    """What each feature's value is if it is active, and how far its pre-activation is from where that is decided."""
    x = sae.process_sae_in(x)
    product = x @ sae.W_enc
    if sae.cfg.architecture() == "gated":
        gate = product + sae.b_gate
        return (x @ (sae.W_enc * sae.r_mag.exp()) + sae.b_mag).relu(), gate.abs(), gate
    p = product + sae.b_enc
    if "jumprelu" in sae.cfg.architecture():
        return p.relu(), (p - sae.threshold).abs(), p
    if "topk" not in sae.cfg.architecture():
        return p.relu(), torch.full_like(p, torch.inf), p
    if sae.cfg.rescale_acts_by_decoder_norm:
        p = p * sae.W_dec.norm(dim=-1)
    signed = sae.cfg.architecture() == "abstopk"
    rank = p.abs() if signed else p
    ordered = rank.sort(dim=-1, descending=True).values
    last_in, first_out = ordered[..., sae.cfg.k - 1, None], ordered[..., sae.cfg.k, None]
    return p if signed else p.relu(), torch.where(rank >= last_in, rank - first_out, last_in - rank), p


@torch.no_grad()
def assert_as_exact_as_sae_lens(encoder, sae, x):
    """Our error from the truth in float64 is at most SAELens' own plus a tolerance, token by token.

    Where the truth is decided by less than rounding, either outcome is right, but a value between them is not. A
    decision that SAELens takes wrongly elsewhere is no licence for us to.
    """
    exact = copy.deepcopy(sae).to(torch.float64)
    truth, theirs, ours = exact.encode(x.double()), sae.encode(x).double(), encode(x, encoder)
    assert ours.dtype == (torch.float64 if sae.dtype == torch.float64 else torch.float32)
    assert theirs.isfinite().all() and 0.05 < (truth != 0).double().mean() < 0.95

    value, margin, p = decide(exact, x.double())
    open_ = margin <= UNDECIDED[sae.dtype] * p.abs().amax(-1, keepdim=True)
    assert open_.double().mean() <= FEW[sae.dtype]
    error = (ours - truth).abs()
    error = torch.where(open_, error.minimum((ours - (value - truth)).abs()), error)
    right = ~open_ & ((theirs != 0) == (truth != 0))
    allowed = ((theirs - truth).abs() * right).amax(-1, keepdim=True)
    allowed = allowed + TOLERANCE[sae.dtype] * truth.abs().amax(-1, keepdim=True)
    excess = (error - allowed).max().item()
    assert excess <= 0


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind, subtracts", SUBTRACTIONS)
def test_activations_are_those_of_sae_lens(kind, subtracts, norm, dtype):
    sae = make_sae(kind, dtype, apply_b_dec_to_input=subtracts, normalize_activations=norm)
    assert_as_exact_as_sae_lens(SparseEncoder.from_sae_lens(sae), sae, make_x(sae))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", ["jumprelu", "jumprelu_transcoder", "gated"])
@torch.no_grad()
def test_a_feature_is_inactive_at_its_very_threshold_and_active_above(kind, dtype):
    sae = make_sae(kind, dtype)
    sae.W_enc.zero_()
    bias, threshold = (sae.b_gate, 0) if kind == "gated" else (sae.b_enc, sae.threshold.clone())
    for excess in (0, 0.01):
        bias.copy_(bias * 0 + threshold + excess)
        if kind == "gated":
            sae.b_mag.fill_(1)
        x = make_x(sae)
        z = encode(x, SparseEncoder.from_sae_lens(sae))
        assert torch.equal(z > 0, torch.full_like(z, excess, dtype=torch.bool))
        assert torch.equal(z.to(dtype), sae.encode(x))


def on_transposed_view(sae):
    sae.W_enc = torch.nn.Parameter(sae.W_enc.detach().T.contiguous().T)
    assert not sae.W_enc.is_contiguous()


def with_one_threshold_for_all(sae):  # Llama Scope
    sae.threshold = torch.nn.Parameter(torch.tensor(0.7, dtype=sae.dtype))


def trained_on_whitened_activations(sae):
    sae.cfg.normalize_activations = "covariance_whitening"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "change",
    [on_transposed_view, with_one_threshold_for_all, trained_on_whitened_activations],
    ids=lambda f: f.__name__,
)
def test_an_unusual_sae_is_encoded_like_any_other(change, dtype):
    sae = make_sae("jumprelu", dtype, apply_b_dec_to_input=True)
    change(sae)
    encoder = SparseEncoder.from_sae_lens(sae)
    assert_as_exact_as_sae_lens(encoder, sae, make_x(sae))
    assert encoder.weight.is_contiguous() and encoder.threshold.shape == (D_SAE,)


@pytest.mark.parametrize("kind", SAES)
def test_an_sae_on_hook_z_takes_tokens_with_heads_and_without(kind):
    metadata = {"hook_name": "blocks.3.attn.hook_z"}
    sae = make_sae(
        kind,
        apply_b_dec_to_input=True,
        normalize_activations="layer_norm",
        reshape_activations="hook_z",
        metadata=metadata,
    )
    encoder, x = SparseEncoder.from_sae_lens(sae), make_x(sae)
    heads = x.reshape(4, T // 4, *HEADS)
    assert_as_exact_as_sae_lens(encoder, sae, heads)
    assert encode(heads, encoder).shape == (4, T // 4, D_SAE)
    assert torch.equal(encode(heads, encoder).flatten(0, 1), encode(x, encoder))


@pytest.mark.parametrize("shape", [(D_IN,), (0, D_IN), (2, 5, 4, D_IN)], ids=str)
def test_tokens_may_come_in_any_leading_shape(shape):
    encoder = SparseEncoder.from_sae_lens(make_sae("topk"))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    z = encode(x, encoder)
    assert z.shape == (*shape[:-1], D_SAE)
    torch.testing.assert_close(z.reshape(-1, D_SAE), encode(x.reshape(-1, D_IN), encoder))


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_float32_sae_takes_tokens_of_a_model_in_another_dtype(x_dtype):
    sae = make_sae("gated", apply_b_dec_to_input=True, normalize_activations="layer_norm")
    x = make_x(sae).to(x_dtype)
    assert_as_exact_as_sae_lens(SparseEncoder.from_sae_lens(sae), sae, x)


# Precisions


def test_a_precision_says_how_the_weight_is_held_and_the_rest_stays_float32():
    encoder = SparseEncoder.from_sae_lens(make_sae("jumprelu", normalize_activations="layer_norm"))
    assert (encoder.precision, encoder.to("cpu").precision) == ("fp32", "fp32")
    for precision, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32_ieee", torch.float32)):
        other = encoder.to(precision=precision)
        assert (other.precision, other.weight.dtype, other.weight_low) == (precision, dtype, None)
        assert {other.bias.dtype, other.threshold.dtype, other.weight_sum.dtype} == {torch.float32}
        torch.testing.assert_close(other.weight_sum, other.weight.double().sum(1).float())
    assert encoder.to(torch.bfloat16).precision == encoder.to(dtype=torch.bfloat16).precision == "bf16"


def test_two_bfloat16_hold_a_weight_to_sixteen_bits_and_can_be_put_together_again():
    encoder = SparseEncoder.from_sae_lens(make_sae("gated"))
    split = encoder.to(precision="bf16x2")
    assert split.weight.dtype == split.weight_low.dtype == torch.bfloat16
    error = (split.full_weight() - encoder.weight).abs() / encoder.weight.abs()
    assert 0 < error.max() <= 2**-16
    joined = split.to(precision="fp32")
    assert joined.weight_low is None and torch.equal(joined.weight, split.full_weight())
    assert_same(split.to("cpu"), split)


@pytest.mark.parametrize("precision", ["bf17", "fp16", "bf16x2"])
def test_a_precision_that_does_not_fit_the_weight_is_refused(precision):
    encoder = SparseEncoder.from_sae_lens(make_sae("jumprelu"))
    with pytest.raises(CorrSteerError, match=f"precision must be one of .* got '{precision}'"):
        dataclasses.replace(encoder, precision=precision)
    with pytest.raises(CorrSteerError, match="precision must be one of"):
        encoder.to(dtype=torch.bfloat16, precision="fp32")


# Where an SAE comes from

PARTS = ("weight", "weight_low", "weight_sum", "bias", "threshold", "magnitude_scale", "magnitude_bias")


def assert_same(encoder, other):
    """Equal in every bit, wherever the decoders lie."""
    for part in PARTS:
        a, b = getattr(encoder, part), getattr(other, part)
        assert (a is None) == (b is None), part
        assert a is None or (a.dtype == b.dtype and torch.equal(a, b)), part
    names = ("d_in", "d_sae", "activation", "k", "input_norm", "precision", "hook_name", "metadata")
    assert all(getattr(encoder, name) == getattr(other, name) for name in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_an_sae_in_memory_and_on_disk_make_the_same_encoder(tmp_path, kind, dtype):
    sae = make_sae(kind, dtype, apply_b_dec_to_input=kind in SAES, normalize_activations="layer_norm")
    sae.save_model(tmp_path)
    in_memory, on_disk = SparseEncoder.from_sae_lens(sae), SparseEncoder.load(tmp_path)
    assert_same(in_memory, on_disk)
    assert (on_disk.d_in, on_disk.d_sae, on_disk.weight.dtype) == (D_IN, D_SAE, dtype)
    features = [5, 0, D_SAE - 1, 5]
    assert torch.equal(in_memory.decoder_rows(features), on_disk.decoder_rows(features))


@pytest.mark.parametrize(
    "metadata, hook_name",
    [
        ({"hook_name": "blocks.3.hook_resid_post", "hf_hook_name": "model.layers.3"}, "blocks.3.hook_resid_post"),
        ({"hf_hook_name": "model.layers.3"}, "model.layers.3"),
        ({}, None),
    ],
)
def test_the_hook_point_and_metadata_are_those_the_sae_names(tmp_path, metadata, hook_name):
    sae = make_sae("standard", metadata=metadata | {"neuronpedia_id": "tiny/3"})
    sae.save_model(tmp_path)
    for encoder in (SparseEncoder.from_sae_lens(sae), SparseEncoder.load(tmp_path)):
        assert encoder.hook_name == hook_name
        assert encoder.metadata["neuronpedia_id"] == "tiny/3" and encoder.metadata["architecture"] == "standard"


OLD = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "torch.float32", "device": "cpu", "model_name": "tiny", "hook_layer": 3}
OLD |= {"context_size": 128, "dataset_path": "tiny/text", "finetuning_scaling_factor": False}
HOOK_Z = "blocks.3.attn.hook_z"
OLD_CONFIGS = {
    "standard": {"hook_point": "blocks.3.hook_resid_pre", "normalize_activations": True, "activation_fn_str": "relu"},
    "gated": {"architecture": "gated", "hook_name": HOOK_Z, "normalize_activations": "none"},
    "jumprelu": {"architecture": "jumprelu", "hook_name": "blocks.3.hook_resid_post", "apply_b_dec_to_input": False},
    "topk": {
        "architecture": "standard",
        "hook_name": "blocks.3.hook_mlp_out",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 9},
        "normalize_activations": "layer_norm",
    },
}


@pytest.mark.parametrize("kind", OLD_CONFIGS)
def test_a_configuration_from_before_sae_lens_6_is_read_as_sae_lens_reads_it(tmp_path, kind):
    make_sae(kind).save_model(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps(OLD | OLD_CONFIGS[kind]))
    sae, encoder = SAE.load_from_disk(tmp_path), SparseEncoder.load(tmp_path)
    assert sae.cfg.architecture() == kind and encoder.hook_name == sae.cfg.metadata.hook_name is not None
    x = make_x(sae)
    assert_as_exact_as_sae_lens(encoder, sae, x.unflatten(-1, HEADS) if encoder.hook_name == HOOK_Z else x)


def test_loading_an_sae_and_reading_its_decoder_import_neither_sae_lens_nor_transformers(tmp_path):
    make_sae("topk rescaled").save_model(tmp_path)
    program = (
        "import sys, torch; from corrsteer import SparseEncoder, encode; encoder = SparseEncoder.load(sys.argv[1]);"
        "encode(torch.ones(2, encoder.d_in), encoder); encoder.decoder_rows([3]); print(*sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
    modules = set(run.stdout.split())
    assert "corrsteer.sae.encoder" in modules and not modules & {"sae_lens", "transformer_lens", "transformers"}


@pytest.mark.parametrize("kind", ["standard", "gated", "topk rescaled"])
def test_only_the_decoder_rows_asked_for_are_read(tmp_path, monkeypatch, kind):
    make_sae(kind).save_model(tmp_path)
    whole, rows = [], []

    class Watched:
        def __init__(self, inner):
            self.inner = inner

        def __enter__(self):
            return Watched(self.inner.__enter__())

        def __exit__(self, *error):
            self.inner.__exit__(*error)

        def keys(self):
            return self.inner.keys()

        def get_tensor(self, name):
            whole.append(name)
            return self.inner.get_tensor(name)

        def get_slice(self, name):
            assert name == "W_dec"
            return Watched(self.inner.get_slice(name))

        def __getitem__(self, index):
            rows.extend(range(D_SAE)[index])
            return self.inner[index]

    safe_open = stores.safe_open
    monkeypatch.setattr(stores, "safe_open", lambda *a, **k: Watched(safe_open(*a, **k)))
    encoder = SparseEncoder.load(tmp_path)
    assert "W_enc" in whole and rows == []
    assert ("W_dec" in whole) == (kind == "topk rescaled")  # whose encoder needs the norms
    del whole[:]
    assert encoder.decoder_rows([41, 7]).shape == (2, D_IN)
    assert rows == [41, 7] and whole == []


@pytest.mark.parametrize("kind", ["standard", "jumprelu", "topk rescaled", "gated"])
def test_making_an_encoder_leaves_the_sae_as_it_was_and_takes_a_copy(kind):
    sae = make_sae(kind, apply_b_dec_to_input=True)
    x, config = make_x(sae), copy.deepcopy(sae.cfg.to_dict())
    before = {name: (p.detach().clone(), p.data_ptr(), p.requires_grad) for name, p in sae.named_parameters()}
    encoder = SparseEncoder.from_sae_lens(sae)
    z = encode(x, encoder)
    encoder.decoder_rows([0])
    assert sae.cfg.to_dict() == config and before.keys() == dict(sae.named_parameters()).keys()
    for name, parameter in sae.named_parameters():
        value, pointer, requires_grad = before[name]
        assert torch.equal(parameter, value), name
        assert (parameter.data_ptr(), parameter.requires_grad) == (pointer, requires_grad), name
    assert not z.requires_grad

    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.fill_(7)
    assert torch.equal(encode(x, encoder), z)


# The decoder


@pytest.mark.parametrize("where", ["memory", "directory", "reopened"])
@pytest.mark.parametrize("kind", KINDS)
def test_activation_times_decoder_row_is_what_a_feature_adds_to_the_reconstruction(tmp_path, monkeypatch, kind, where):
    sae = make_sae(kind)
    if where == "memory":
        rows = SparseEncoder.from_sae_lens(sae).decoder_rows(range(D_SAE))
    else:
        monkeypatch.chdir(tmp_path)
        sae.save_model("sae")
        encoder = SparseEncoder.load("sae")
        monkeypatch.chdir("/")  # rows are found again from anywhere, and from a run that was stored
        stored = json.dumps(encoder.decoder.source)
        decoder = encoder.decoder if where == "directory" else sources.open_decoder(json.loads(stored))
        rows = decoder.rows(list(range(D_SAE)))
    with torch.no_grad():
        added = sae.decode(2.5 * torch.eye(D_SAE)) - sae.decode(torch.zeros(1, D_SAE))
    torch.testing.assert_close(2.5 * rows, added, rtol=1e-5, atol=1e-5)
    assert rows.dtype == torch.float32 and not rows.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_decoder_rows_are_float32_whatever_the_sae_is(tmp_path, dtype):
    sae = make_sae("standard", dtype)
    sae.save_model(tmp_path)
    for encoder in (SparseEncoder.from_sae_lens(sae), SparseEncoder.load(tmp_path)):
        assert torch.equal(encoder.decoder_rows([3, 2]), sae.W_dec[[3, 2]].float())


@pytest.fixture(params=["memory", "directory", "identity"])
def any_encoder(request, tmp_path):
    if request.param == "identity":
        return SparseEncoder.identity(D_SAE)
    sae = make_sae("topk rescaled")
    sae.save_model(tmp_path)
    return SparseEncoder.from_sae_lens(sae) if request.param == "memory" else SparseEncoder.load(tmp_path)


def test_features_may_be_given_as_any_sequence_of_integers_or_none_at_all(any_encoder):
    rows = any_encoder.decoder_rows([3, 1])
    for features in (torch.tensor([3, 1]), (3, 1), torch.tensor([3, 1]).numpy()):
        assert torch.equal(any_encoder.decoder_rows(features), rows)
    assert any_encoder.decoder_rows([]).shape == (0, rows.shape[1])


def test_an_sae_configuration_is_read_alike_in_every_locale(tmp_path):
    directory = tmp_path
    make_sae("standard").save_model(directory)
    config = json.loads((directory / "cfg.json").read_bytes())
    config["metadata"]["note"] = "Gemma’s café"
    for text in (json.dumps(config, ensure_ascii=False).encode(), b"\xef\xbb\xbf" + json.dumps(config).encode()):
        (directory / "cfg.json").write_bytes(text)
        code = f"import corrsteer; print(ascii(corrsteer.SparseEncoder.load({str(directory)!r}).metadata['note']))"
        environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert done.stdout.strip() == ascii("Gemma’s café"), done.stderr
    (directory / "cfg.json").write_bytes(json.dumps(config, ensure_ascii=False).encode("cp1252"))
    with pytest.raises(CorrSteerError, match="cfg.json is not JSON .*utf-8.* save the SAE again"):
        SparseEncoder.load(directory)


@pytest.mark.parametrize("feature", [-1, D_SAE])
def test_a_feature_that_the_sae_does_not_have_is_refused(any_encoder, feature):
    with pytest.raises(CorrSteerError, match=rf"features must lie in 0..{D_SAE - 1}, got \[{feature}\]"):
        any_encoder.decoder_rows([2, feature])


@pytest.mark.parametrize("features", (None, 3, "gpt2", [None]), ids=str)
def test_features_that_are_no_sequence_of_numbers_are_refused(any_encoder, features):
    with pytest.raises(CorrSteerError, match="features must be a sequence of whole numbers.*, got"):
        any_encoder.decoder_rows(features)


def test_the_decoder_of_an_sae_in_memory_cannot_be_found_again_later():
    source = SparseEncoder.from_sae_lens(make_sae("standard")).decoder.source
    with pytest.raises(CorrSteerError, match="decoder rows cannot be read.*SparseEncoder.load or from_pretrained"):
        sources.open_decoder(json.loads(json.dumps(source))).rows([0])


def test_rows_of_a_decoder_whose_file_has_gone_say_which_file(tmp_path):
    make_sae("standard").save_model(tmp_path)
    encoder = SparseEncoder.load(tmp_path)
    (tmp_path / "sae_weights.safetensors").unlink()
    with pytest.raises(CorrSteerError, match=f"{tmp_path}.*has no sae_weights.safetensors"):
        encoder.decoder_rows([0])


# Other forms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_identity_encoder_has_residual_dimensions_as_features(dtype):
    encoder = SparseEncoder.identity(5, hook_name="model.layers.2")
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(encode(x, encoder), x.float())
    rows = sources.open_decoder(encoder.decoder.source).rows([4, 0])
    assert torch.equal(rows, torch.eye(5)[[4, 0]]) and torch.equal(rows, encoder.decoder_rows([4, 0]))
    assert (encoder.d_in, encoder.d_sae, encoder.hook_name, encoder.device) == (5, 5, "model.layers.2", None)
    with pytest.raises(CorrSteerError, match="d_in must be a whole number of at least 1, got 0"):
        SparseEncoder.identity(0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_dtype_applies_to_the_weight_alone(tmp_path, dtype):
    sae = make_sae("gated")
    sae.save_model(tmp_path)
    encoder = SparseEncoder.from_sae_lens(sae)
    moved = encoder.to(dtype)
    assert torch.equal(moved.weight, encoder.weight.to(dtype)) and encoder.weight.dtype == torch.float32
    assert_same(moved, encoder.to(dtype=dtype))
    assert_same(encoder.to("cpu"), encoder)
    for part in PARTS[1:]:
        a, b = getattr(moved, part), getattr(encoder, part)
        assert a is b is None or (a.dtype == torch.float32 and torch.equal(a, b)), part
    if dtype != torch.float64:  # where all parameters are
        assert_same(SparseEncoder.from_sae_lens(sae, dtype=dtype), moved)
        assert_same(SparseEncoder.load(tmp_path, dtype=dtype), moved)
    assert SparseEncoder.identity(3).to(dtype).weight is None


@pytest.mark.parametrize(
    "make", [SparseEncoder.from_sae_lens, lambda sae, dtype: SparseEncoder.from_sae_lens(sae).to(dtype)]
)
def test_a_dtype_that_is_not_a_float_is_refused(make):
    with pytest.raises(CorrSteerError, match="dtype must be float32, bfloat16 or float16, got torch.int8"):
        make(make_sae("standard"), dtype=torch.int8)


@pytest.mark.parametrize("rows", [1, 16, D_SAE])
def test_an_sae_folded_in_parts_is_the_one_folded_at_once(monkeypatch, rows):
    sae = make_sae("abstopk rescaled", apply_b_dec_to_input=True, normalize_activations="layer_norm")
    whole = SparseEncoder.from_sae_lens(sae)
    monkeypatch.setattr(encoder_module, "FOLD_ROWS", rows)
    parts = SparseEncoder.from_sae_lens(sae)
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(parts.bias, whole.bias, rtol=1e-6, atol=1e-6)


# What is refused


def remove(name):
    return lambda directory: (directory / name).unlink()


def truncate(directory):
    path = directory / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def write_config(content):
    return lambda directory: (directory / "cfg.json").write_bytes(content)


def set_config(**values):
    def change(directory):
        path = directory / "cfg.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


@pytest.mark.parametrize(
    "damage, message",
    [
        (remove("cfg.json"), "is not an SAE directory: it has no cfg.json"),
        (remove("sae_weights.safetensors"), "is not an SAE directory: it has no sae_weights.safetensors"),
        (truncate, "sae_weights.safetensors is damaged"),
        (write_config(b'{"d_in": '), "cfg.json is not JSON"),
        (write_config(b"\xff\xfe\x00"), "cfg.json is not JSON"),
        (write_config(b"[]"), "cfg.json must hold a JSON object, got list"),
        (write_config(b'{"architecture": "of_the_future"}'), "architecture 'of_the_future' in .*cfg.json is not one"),
        (set_config(architecture=None), "cfg.json names no architecture"),
        (set_config(dtype="int4"), "dtype in .*cfg.json must be one of .*, got 'int4'"),
        (set_config(normalize_activations="whim"), "normalize_activations of .*cfg.json must be one of .*, got 'whim'"),
        (set_config(k=0), f"k of .*cfg.json must lie in 1..d_sae={D_SAE}, got 0"),
        (set_config(k=D_SAE + 1), f"k of .*cfg.json must lie in 1..d_sae={D_SAE}, got {D_SAE + 1}"),
        (set_config(k=None), f"k of .*cfg.json must lie in 1..d_sae={D_SAE}, got 0"),
    ],
)
def test_a_damaged_directory_is_refused_with_what_is_wrong_and_where(tmp_path, damage, message):
    make_sae("topk").save_model(tmp_path)
    SparseEncoder.load(tmp_path)
    damage(tmp_path)
    with pytest.raises(CorrSteerError, match=message) as refused:
        SparseEncoder.load(tmp_path)
    assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "kind, name",
    [(kind, name) for kind in ("standard", "transcoder") for name in ("W_enc", "b_enc", "W_dec")]
    + [("standard", "b_dec"), ("jumprelu", "threshold"), ("jumprelu_transcoder", "threshold")]
    + [("gated", name) for name in ("b_gate", "b_mag", "r_mag")]
    + [("topk rescaled", "W_dec")],
)
def test_weights_that_lack_a_parameter_are_refused_by_its_name(tmp_path, kind, name):
    make_sae(kind, apply_b_dec_to_input=kind in SAES).save_model(tmp_path)
    path = tmp_path / "sae_weights.safetensors"
    save_file({key: tensor for key, tensor in load_file(path).items() if key != name}, path)
    with pytest.raises(CorrSteerError, match=f"{path} lacks {name}, which a {kind.split()[0]} SAE has"):
        SparseEncoder.load(tmp_path)


def test_a_file_in_place_of_a_directory_is_refused(tmp_path):
    make_sae("standard").save_model(tmp_path)
    with pytest.raises(CorrSteerError, match="sae_weights.safetensors is not an SAE directory"):
        SparseEncoder.load(tmp_path / "sae_weights.safetensors")


@pytest.mark.parametrize("source", ["memory", "directory"])
@pytest.mark.parametrize(
    "architecture, settings",
    [("temporal", {"d_sae": 64, "n_heads": 2, "bottleneck_factor": 4, "kval_topk": 4}), ("matching_pursuit", {})],
)
def test_an_architecture_that_is_not_per_token_is_refused_by_its_name(tmp_path, source, architecture, settings):
    sae = SAE.from_dict({"architecture": architecture, "d_in": D_IN, "d_sae": D_SAE, **settings})
    sae.save_model(tmp_path)
    with pytest.raises(CorrSteerError, match=f"architecture '{architecture}' of .* cannot be used"):
        SparseEncoder.from_sae_lens(sae) if source == "memory" else SparseEncoder.load(tmp_path)


def test_an_sae_in_memory_whose_k_is_out_of_range_is_refused():
    sae = make_sae("topk")
    sae.cfg.k = D_SAE + 1
    with pytest.raises(CorrSteerError, match=f"k of the SAE given must lie in 1..d_sae={D_SAE}, got {D_SAE + 1}"):
        SparseEncoder.from_sae_lens(sae)


def test_the_features_of_an_identity_are_the_dimensions_themselves():
    with pytest.raises(CorrSteerError, match="d_sae must be d_in=4 for activation 'identity', got 5"):
        SparseEncoder(4, 5, "identity")
