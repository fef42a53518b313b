"""Encoders that hold nothing but their packed weight."""

import gc
import pickle
import weakref

import pytest
import tiny_pipeline
import torch
from places import NATIVE, everywhere
from problems import cu, make_encoder

from corrsteer import BackendUnavailable, CorrSteerError, SparseEncoder, collect, pack
from corrsteer.cli import inputs
from corrsteer.lm.decoding import Decoding
from corrsteer.ops import Moments, encode, encode_pool, encode_update
from corrsteer.ops import native_backend as native

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "bf16x2": torch.bfloat16}
FORMS = [(activation, "fp32", "none") for activation in native.ENCODED]
FORMS += [("jumprelu", precision, "layer_norm") for precision in PRECISIONS]


@pytest.fixture(params=FORMS, ids=" ".join)
def encoder(request):
    if native._native is None:
        pytest.skip("the native backend is not built")
    activation, precision, norm = request.param
    return make_encoder(activation, precision=precision, norm=norm)


def tokens(encoder, dtype=None):
    x = torch.randn(30, encoder.d_in, generator=torch.Generator().manual_seed(2))
    return x.to(dtype or PRECISIONS[encoder.precision])


def test_results_are_equal_to_the_bit(encoder):
    packed, x, lengths = pack(encoder), tokens(encoder), cu([7, 0, 23])
    assert packed.weight is packed.weight_low is None and packed.precision == encoder.precision
    assert packed.device == torch.device("cpu") and packed.describe() == encoder.describe()
    assert torch.equal(encode(x, packed), encode(x, encoder))
    for mine, others in zip(encode_pool(x, lengths, packed, "both"), encode_pool(x, lengths, encoder, "both")):
        assert torch.equal(mine, others)
    states = []
    for one in (packed, encoder):
        states.append(Moments(encoder.d_sae))
        encode_update(x, lengths, torch.tensor([1.0, -1.0, 2.0]), one, states[-1], "max")
    assert all(torch.equal(a, b) for a, b in zip(*(state.state() for state in states)))


def test_the_weight_comes_back_to_the_bit(encoder):
    again = pack(encoder).unpacked()
    assert torch.equal(again.full_weight(), encoder.full_weight()) and again.packed_weight is None
    if encoder.precision != "bf16x2":  # of which both parts together are the weight
        assert torch.equal(again.weight, encoder.weight) and again.weight.dtype == encoder.weight.dtype
    x = tokens(encoder)
    for backend in ("native", "reference"):
        assert torch.equal(encode(x, again, backend=backend), encode(x, encoder, backend=backend))
    assert torch.equal(encode(x, pack(encoder), backend="reference"), encode(x, encoder, backend="reference"))
    assert encoder.unpacked() is encoder


def test_a_packed_encoder_is_compiled_pickled_and_packed_once(encoder):
    packed, x = pack(encoder), tokens(encoder)
    assert pack(packed) is packed
    expected = encode(x, encoder)
    assert torch.equal(encode(x, pickle.loads(pickle.dumps(packed))), expected)
    torch._dynamo.reset()  # there is a limit to recompiling
    run = torch.compile(lambda x: encode(x, packed), fullgraph=True, backend="aot_eager")
    assert torch.equal(run(x), expected)


@everywhere(NATIVE)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_that_was_packed_for_another_instruction_set_gives_what_that_one_gives(place, precision, monkeypatch):
    encoder = make_encoder("relu", precision=precision)
    packed, x = pack(encoder), tokens(encoder)
    for other in NATIVE:
        monkeypatch.setenv(native.INSTRUCTION_SET, other.instruction_set)
        assert torch.equal(encode(x, packed), encode(x, encoder))


def test_elsewhere_or_in_another_precision_it_is_unpacked():
    encoder = make_encoder("jumprelu")
    packed, x = pack(encoder), tokens(encoder)
    for same in (packed.to("cpu"), packed.to(), packed.to(precision="fp32"), packed.to("cpu", torch.float32)):
        assert same.packed_weight is not None and torch.equal(encode(x, same), encode(x, encoder))
    for other in (packed.to(precision="bf16"), packed.to(torch.bfloat16)):
        assert torch.equal(other.weight, encoder.to(torch.bfloat16).weight) and other.packed_weight is None
    assert packed.to("meta").weight.device.type == "meta"


def test_the_weight_is_let_go_where_nobody_else_holds_it():
    encoder = SparseEncoder(64, 128, "relu", weight=torch.randn(128, 64), bias=torch.zeros(128))
    gone = weakref.ref(encoder.weight)
    encoder = pack(encoder)
    gc.collect()
    assert gone() is None and encode(torch.ones(1, 64), encoder).shape == (1, 128)


def test_what_the_kernels_cannot_run_is_not_packed():
    identity = SparseEncoder.identity(5)
    assert pack(identity) is identity
    groups = SparseEncoder(4, 6, "groupmax", weight=torch.randn(6, 4), bias=torch.zeros(6), k=3)
    with pytest.raises(BackendUnavailable, match="its kernels do not compute groupmax"):
        pack(groups)
    with pytest.raises(BackendUnavailable, match="its kernels compute in float32"):
        pack(make_encoder("relu").to(torch.float64))
    with pytest.raises(CorrSteerError, match="encoder must be a SparseEncoder, got None"):
        pack(None)


def test_backends_that_read_rows_of_the_weight_refuse_it():
    packed = pack(make_encoder("relu"))
    with pytest.raises(CorrSteerError, match="encoder is packed, which backend 'triton' cannot read; use .*unpacked"):
        encode(torch.ones(2, packed.d_in), packed, backend="triton")


def test_a_packed_weight_that_does_not_fit_is_refused():
    packed = pack(make_encoder("relu"))
    for wrong in ({"d_in": packed.d_in + 1}, {"d_sae": 3 * packed.d_sae}, {"precision": ""}, {"precision": "int4"}):
        with pytest.raises(CorrSteerError, match="packed_weight must be the only weight|must be"):
            SparseEncoder(
                **{"d_in": packed.d_in, "d_sae": packed.d_sae, "activation": "relu", "precision": "fp32"} | wrong,
                packed_weight=packed.packed_weight, bias=torch.zeros(wrong.get("d_sae", packed.d_sae)),
            )  # fmt: skip


def test_the_command_line_packs_what_the_native_backend_reads():
    encoders = {1: make_encoder("jumprelu"), 2: SparseEncoder.identity(5)}
    model = tiny_pipeline.model()
    packed = inputs.pack_where_read(encoders, model, None)
    assert packed[1].packed_weight is not None and packed[2] is encoders[2]
    assert inputs.pack_where_read(encoders, model, "reference") == encoders
    assert inputs.pack_where_read(encoders, model.to("meta"), None) == encoders


def test_a_collection_with_packed_encoders_is_that_of_the_encoders_themselves():
    model, encoders = tiny_pipeline.model(), tiny_pipeline.encoders()
    runs = [
        collect(
            model, tiny_pipeline.tokenizer(), some, tiny_pipeline.task(24), decoding=Decoding(max_new_tokens=3),
            permutations=0, progress=False,
        )
        for some in (encoders, {layer: pack(encoder) for layer, encoder in encoders.items()})
    ]  # fmt: skip
    for layer in encoders:
        assert torch.equal(*(run.correlation(layer) for run in runs))
    assert runs[0].provenance["saes"] == runs[1].provenance["saes"]
