"""What is only true of the C++ kernels for CPUs; `test_operations.py` has what is true of every backend."""

import dataclasses
import gc
import logging
import threading

import pytest
import torch
from oracle import (
    assert_as_close_as_eager,
    assert_moments,
    assert_same_state,
    assert_summed,
    decided,
    pooled_bounds,
    true_moments,
)
from places import NATIVE, Place, everywhere, for_each
from problems import BF16, F16, F32, Case, cu, make, make_encoder, pooled, updated

from corrsteer import (
    BackendUnavailable,
    CorrSteerError,
    Moments,
    SparseEncoder,
    encode,
    encode_pool,
    update_moments,
    update_sums,
)
from corrsteer.ops import native_backend as native
from corrsteer.ops import registry
from corrsteer.ops.native_backend import _native
from corrsteer.sae import sources
from corrsteer.sae.encoder import _fold

CPU = torch.device("cpu")
REFERENCE = Place("reference", "cpu")
BEST = NATIVE[0]

# Tokens are taken at most 512 at a time, 256 where they are widened, in chunks of one size, and so are the samples that
# end among them.
LONG = {
    "cut": (700, 1, 0, 3, 900, 0, 2),
    "cut more than once": (5, 1700, 1),
    "ending where chunks do": (512, 0, 512, 256, 256),
    "one token more than a chunk": (257, 0, 1, 255),
    "one token each": (1,) * 1100,
    "more samples than a chunk has room for": (0,) * 700 + (3, 1) + (0,) * 600 + (520,),
}
CHUNKED = {
    f"{activation} {precision} of {str(dtype).removeprefix('torch.')}, {name}": Case(
        activation, precision, dtype, lengths, d_in=20, d_sae=53, norm=norm, seed=3
    )
    for (activation, precision, dtype, norm) in (
        ("jumprelu", "fp32", F32, "none"),
        ("gated", "bf16", BF16, "none"),
        ("relu", "bf16", F16, "layer_norm"),
        ("topk", "fp32", F32, "none"),
        ("abstopk", "bf16", BF16, "constant_norm_rescale"),
    )
    for name, lengths in LONG.items()
}


def problem_with_rewards(case, labels=1):
    problem = make(case)
    y = torch.randn(len(case.lengths), labels, generator=torch.Generator().manual_seed(1))
    return problem, y


# Chunks


@pytest.mark.usefixtures("poisoned")
@for_each(CHUNKED, places=NATIVE)
def test_samples_longer_than_a_chunk_and_chunks_full_of_samples_are_pooled_right(place, case):
    problem = make(case)
    eager = pooled(problem, REFERENCE)
    for how, mine, theirs in zip(case.pools, pooled(problem, place), eager):
        assert_as_close_as_eager(mine, *pooled_bounds(problem, how), theirs, of=f"the {how}")


@pytest.mark.usefixtures("poisoned")
@for_each({name: case for name, case in CHUNKED.items() if "F32" in name or "float32" in name}, places=NATIVE)
def test_moments_of_several_chunks_are_those_of_all_samples(place, case):
    problem, y = problem_with_rewards(case, labels=3)
    features = decided(problem)
    assert features.any()
    history = (true_moments(torch.rand(9, 53), torch.randn(9, 3)), true_moments(torch.rand(4, 53), torch.randn(4, 3)))
    truth, eager = (updated(p, y, REFERENCE, history) for p in (problem.but(encoder=problem.exact), problem))
    for got, true, theirs in zip(updated(problem, y, place, history), truth, eager):
        assert_moments(got, true, theirs, features)


@everywhere(NATIVE)
def test_update_moments_of_several_chunks_is_that_of_all_samples(place):
    z = torch.randn(1100, 67, generator=torch.Generator().manual_seed(0)).relu()
    z[:, 3], z[:, 4] = 0.1, 0
    y = torch.randn(1100, 2, generator=torch.Generator().manual_seed(1))
    got = Moments(67, 2)
    update_moments(z, y, got, backend=place.backend)
    assert_moments(got, true_moments(z, y))
    assert not got.correlation()[:, 3:5].any()  # constant features correlate with nothing


def assert_sums(z, weights, powers, place):
    before = torch.ones(z.shape[1], weights.shape[1], dtype=torch.float64)
    got = before.clone()
    update_sums(z, weights, got, powers, backend=place.backend)
    assert_summed(got, z, weights, before, powers, place)


@pytest.mark.usefixtures("poisoned")
@everywhere(NATIVE)
@pytest.mark.parametrize("n", (255, 256, 257, 511, 512, 513, 700))
def test_update_sums_of_several_chunks_are_those_of_all_samples(place, n):
    g = torch.Generator().manual_seed(n)
    z, weights = torch.randn(n, 67, generator=g), torch.randn(n, 20, generator=g).double()
    z[:, ::3] = z[:, ::3].relu()
    z[:, 4], z[:256, 5], z[256:, 6] = 0, 0, 0
    assert_sums(z, weights, (17, 0, 3), place)


@pytest.mark.usefixtures("poisoned")
@everywhere(NATIVE)
def test_update_sums_of_as_many_columns_and_features_as_registers_hold_or_not_quite(place):
    g = torch.Generator().manual_seed(0)
    for columns in (*range(1, 10), 15, 16, 17, 24, 31, 32, 33, 56, 57, 63, 64, 65, 129):
        z = torch.randn(3, 1 + columns % 50, generator=g).relu()
        assert_sums(z, torch.randn(3, columns, generator=g).double(), (columns // 2, columns - columns // 2), place)
    for features in (7, 8, 9, 23, 24, 25, 47, 48, 49, 97):
        assert_sums(torch.randn(3, features, generator=g), torch.randn(3, 2, generator=g).double(), (1, 1), place)


@everywhere(NATIVE)
@pytest.mark.parametrize("d_sae", (1, 7, 8, 9, 47, 48, 49, 97))
def test_sizes_around_those_of_panels_of_features(place, d_sae):
    for activation in ("relu", "topk"):
        problem, y = problem_with_rewards(Case(activation, lengths=(3, 9, 1), d_in=5, d_sae=d_sae, k=min(5, d_sae)))
        (truth, _), (got, _) = (updated(p, y, w) for p, w in ((problem.but(encoder=problem.exact), REFERENCE),
                                                              (problem, place)))  # fmt: skip
        assert_moments(got, truth, updated(problem, y, REFERENCE)[0], decided(problem))


# Threads


@everywhere(NATIVE)
@pytest.mark.parametrize("activation", ("jumprelu", "topk"))
def test_any_number_of_threads_gives_the_same_bits(place, activation):
    problem, y = problem_with_rewards(Case(activation, lengths=(700, 3, 40), d_sae=999))
    weights = torch.randn(743, 70, generator=torch.Generator().manual_seed(0)).double()

    def results():
        z = encode(problem.x, problem.encoder, backend=place.backend)
        sums = torch.zeros(999, 70, dtype=torch.float64)
        update_sums(z, weights, sums, (60, 10), backend=place.backend)
        return updated(problem, y, place), z, sums

    one = results()
    try:
        for threads in (2, 5):
            torch.set_num_threads(threads)
            several = results()
            assert torch.equal(several[1], one[1]) and torch.equal(several[2], one[2])
            for a, b in zip(several[0], one[0]):
                assert_same_state(a, b)
    finally:
        torch.set_num_threads(1)


def test_calls_from_several_threads_of_python_do_not_disturb_each_other():
    problems = [make(Case("jumprelu", lengths=(300, 5), d_sae=301, seed=seed)) for seed in range(4)]
    expected = [pooled(p, BEST) for p in problems]
    results = [[] for _ in problems]

    def work(at):
        torch.set_num_threads(2)
        results[at] += [pooled(problems[at], BEST) for _ in range(10)]

    workers = [threading.Thread(target=work, args=(at,)) for at in range(len(problems))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    torch.set_num_threads(1)
    for mine, those in zip(expected, results):
        assert len(those) == 10
        assert all(torch.equal(a, b) for one in those for a, b in zip(mine, one))


# Packed weights


@pytest.fixture
def packings(monkeypatch):
    """The instruction sets of the packings so far, one for each."""
    done = []
    original = _native.pack

    def pack(instruction_set, *rest):
        done.append(instruction_set)
        return original(instruction_set, *rest)

    monkeypatch.setattr(native._native, "pack", pack)
    return done


def test_a_weight_is_packed_once_for_every_encoder_that_has_it(packings):
    encoder, x = make_encoder("relu"), torch.randn(4, 19)
    for other in (encoder, dataclasses.replace(encoder), encoder.to("cpu")):
        encode(x, other, backend="native")
    assert len(packings) == 1
    run = torch.compile(lambda x: encode(x, encoder, backend="native"), fullgraph=True, backend="aot_eager")
    for _ in range(3):
        run(x)
    assert len(packings) == 1


def test_a_weight_that_is_changed_in_place_is_packed_again(packings):
    encoder, x = make_encoder("relu"), torch.randn(4, 19)
    before = encode(x, encoder, backend="native")
    encoder.weight.mul_(2)
    after = encode(x, encoder, backend="native")
    assert len(packings) == 2 and not torch.equal(before, after)
    torch.testing.assert_close(after, encode(x, encoder, backend="reference"))


def test_the_packed_copy_of_a_weight_that_is_gone_goes_when_the_next_one_is_packed():
    def use_another():
        encoder = SparseEncoder(3, 5, "relu", weight=torch.randn(5, 3), bias=torch.zeros(5))
        before = set(native._packed)
        encode(torch.randn(4, 3), encoder, backend="native")
        (key,) = set(native._packed) - before
        return key, encoder

    native._packed.clear()  # what is gone of other tests may have lain where these weights will
    first, encoder = use_another()
    second, other = use_another()
    assert {first, second} <= set(native._packed)
    del encoder
    gc.collect()
    use_another()
    assert first not in native._packed and second in native._packed and other is not None


@everywhere(NATIVE)
@pytest.mark.parametrize("dtype", (F32, F16, BF16), ids=str)
def test_a_weight_packed_for_one_instruction_set_serves_no_other(place, dtype, monkeypatch):
    encoder, x = make_encoder("relu", precision={F32: "fp32", F16: "fp16", BF16: "bf16"}[dtype]), torch.randn(9, 19)
    expected = encode(x, encoder, backend="reference")
    for other in (*NATIVE, place):
        monkeypatch.setenv(native.INSTRUCTION_SET, other.instruction_set)
        torch.testing.assert_close(encode(x, encoder, backend="native"), expected)


def test_a_weight_made_in_inference_mode_is_packed_once_and_again_if_it_is_changed(packings):
    with torch.inference_mode():
        encoder = SparseEncoder(3, 5, "relu", weight=torch.randn(5, 3), bias=torch.zeros(5))
        x = torch.randn(4, 3)
        for factor in (1, 2):
            encoder.weight.mul_(factor)
            for _ in range(2):
                torch.testing.assert_close(
                    encode(x, encoder, backend="native"), encode(x, encoder, backend="reference")
                )
    assert len(packings) == 2


def test_a_weight_at_the_address_of_another_one_is_not_taken_for_it(packings):
    array, x = torch.randn(5, 3).numpy(), torch.randn(4, 3)
    for factor in (1, 2):  # two tensors, of which torch does not know that they share memory
        array *= factor
        encoder = SparseEncoder(3, 5, "relu", weight=torch.from_numpy(array), bias=torch.zeros(5))
        torch.testing.assert_close(encode(x, encoder, backend="native"), encode(x, encoder, backend="reference"))
    assert len(packings) == 2


def test_results_are_on_the_cpu_whatever_torchs_default_device_is():
    encoder, x = make_encoder("relu"), torch.randn(4, 19)
    expected = pooled_of = None
    for device in ("cpu", "meta"):
        with torch.device(device):
            dense = encode(x, encoder, backend="native")
            pooled_of = encode_pool(x, LENGTHS, encoder, backend="native")
        expected = expected or (dense, pooled_of)
        assert torch.equal(dense, expected[0]) and torch.equal(pooled_of, expected[1])


def test_vectors_of_half_precision_are_widened():
    form = {
        "weight": torch.randn(5, 3).bfloat16(),
        "bias": torch.randn(5).bfloat16(),
        "threshold": torch.rand(5).half(),
    }
    encoder, x = SparseEncoder(3, 5, "jumprelu", **form), torch.randn(9, 3)
    assert encoder.bias.dtype == encoder.threshold.dtype == F32
    torch.testing.assert_close(encode(x, encoder, backend="native"), encode(x, encoder, backend="reference"))


@everywhere(NATIVE)
@pytest.mark.parametrize(("precision", "dtype"), (("fp32", F32), ("bf16", BF16)), ids=("fp32", "bf16"))
def test_layer_norm_is_as_good_as_eager_for_tokens_that_hardly_vary(place, precision, dtype):
    problem = make(Case("relu", precision, dtype, (3, 5, 2), d_in=256, norm="layer_norm"))
    for spread in (1e-1, 1e-2, 0.0):
        problem.x.copy_(1 + spread * make(problem.case).x)
        problem.x[4] = 1
        for how, mine, theirs in zip(("mean", "max"), pooled(problem, place), pooled(problem, REFERENCE)):
            assert_as_close_as_eager(mine, *pooled_bounds(problem, how), theirs, of=f"the {how}, spread {spread},")


@everywhere(NATIVE)
def test_subnormal_halves_survive_when_torch_flushes_subnormal_numbers(place):
    h = torch.tensor([[[3e-6, 6e-8, 1.0]]], dtype=F16)
    expected = h.clone()
    torch.set_flush_denormal(True)
    try:
        native.steer_add(h, torch.zeros(1, 3), torch.zeros(1, dtype=torch.int32), None)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(h, expected)


# What is chosen, and what is said where it cannot be


def test_on_a_cpu_it_is_chosen_by_itself_but_for_what_it_does_not_do():
    def chosen(operation, dtype=F32, activation="relu", precision="fp32"):
        return registry.choose(registry.Call(operation, CPU, dtype, activation, precision)).name

    assert {chosen(operation, dtype) for operation in registry.OPERATIONS for dtype in (F32, F16, BF16)} == {"native"}
    assert chosen("encode", activation="identity") == "reference"
    assert chosen("encode", dtype=torch.float64) == chosen("encode", precision="fp64") == "reference"
    with pytest.raises(BackendUnavailable, match="on cuda .*: its kernels run on CPUs"):
        registry.choose(registry.Call("encode", torch.device("cuda"), F32), "native")


def test_an_instruction_set_that_the_processor_lacks_is_refused(monkeypatch):
    monkeypatch.setenv(native.INSTRUCTION_SET, "amx")
    with pytest.raises(BackendUnavailable, match="must be one that this processor offers, .*portable, got 'amx'"):
        encode(torch.zeros(1, 19), make_encoder("relu"))


def test_without_the_extension_a_slower_backend_runs_and_a_warning_says_once_how_to_get_it(monkeypatch, caplog):
    monkeypatch.setattr(native, "_native", None)
    monkeypatch.setattr(native, "MISSING", "No module named 'corrsteer._native'", raising=False)
    for cached in (registry._find, registry._log_once):
        cached.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "corrsteer.ops.registry"):
            for _ in range(2):
                encode(torch.zeros(1, 19), make_encoder("relu"))
                encode(torch.zeros(1, 19, dtype=BF16), make_encoder("gated"))
        (record,) = caplog.records
        assert "native is missing" in record.getMessage() and "pip install --force-reinstall" in record.getMessage()
        with pytest.raises(
            BackendUnavailable, match="'native' cannot run .* could not be imported .*; install a C\\+\\+ compiler"
        ):
            encode(torch.zeros(1, 19), make_encoder("relu"), backend="native")
    finally:
        registry._find.cache_clear()


# The boundary: whatever it is given, it raises rather than reading what is not there


KEPT = []  # addresses alone keep nothing


def array(tensor):
    KEPT.append(tensor)
    return native._array(tensor)


def forged(tensor, *, address=None, shape=None, strides=None, dtype=None):
    return _native.Array(
        tensor.data_ptr() if address is None else address,
        tensor.shape if shape is None else shape,
        tensor.stride() if strides is None else strides,
        dtype or str(tensor.dtype).removeprefix("torch."),
    )


UNDEFINED = torch.tensor([0.0] * 66 + [torch.nan])
LENGTHS = cu([2, 2])
X, CU, Y = torch.zeros(5, 19), cu([2, 3]), torch.zeros(2, 1, dtype=torch.float64)
STATE = native._state(EMPTY := Moments(67))
HALF = {name: STATE[name] for name in ("count", "z_mean", "z_m2", "y_mean")}
POOLED, DENSE = torch.zeros(2, 67), torch.zeros(5, 67)
WEIGHTS, SUMS = torch.zeros(2, 4, dtype=torch.float64), torch.zeros(67, 4, dtype=torch.float64)


def an_encoder(form="relu", /, **changes):
    """The extension's own encoder, some of its arguments changed."""
    encoder = make_encoder(form)
    isa = native.instruction_set()
    given = dict(
        instruction_set=isa, d_in=19, d_sae=67, activation=form, input_norm="none", k=encoder.k,
        weight=array(native.packed_weight(encoder, isa)), bias=array(encoder.bias),
    )  # fmt: skip
    given |= {n: array(v) for n in ("threshold",) if (v := getattr(encoder, n)) is not None}
    KEPT.append(encoder)
    return _native.Encoder(**given | changes)


def pool_of(x=X, lengths=CU, out=POOLED, encoder=None, threads=1):
    x, lengths, out = (a if isinstance(a, _native.Array) else array(a) for a in (x, lengths, out))
    _native.encode_pool(encoder or an_encoder(), x, lengths, out, None, threads)


def sum_of(pooled=POOLED, weights=WEIGHTS, sums=SUMS, powers=(3, 1), isa="portable", threads=1):
    pooled, weights, sums = (a if isinstance(a, _native.Array) else array(a) for a in (pooled, weights, sums))
    _native.update_sums(isa, pooled, weights, sums, list(powers), threads)


def steer(h=(1, 2, 4), vectors=(3, 4), rows=(0,), positions=None, dtype=F32):
    tensors = torch.zeros(h, dtype=dtype), torch.zeros(vectors), torch.tensor(rows, dtype=torch.int32), positions
    _native.steer_add(*(None if tensor is None else array(tensor) for tensor in tensors))


HOSTILE = {
    "x of float64": (lambda: pool_of(X.double()), "x must be .* float32, bfloat16 or float16.* got .* float64"),
    "x of integers": (lambda: pool_of(X.int()), "x must be .* got .* int32"),
    "x of another width": (lambda: pool_of(X[:, :18].contiguous()), r"x must be \[-1, 19\]"),
    "x with gaps in its rows": (lambda: pool_of(torch.zeros(5, 38)[:, ::2]), "x must be contiguous"),
    "x of one dimension": (lambda: pool_of(X[0]), r"x must be \[-1, 19\]"),
    "x without memory": (lambda: pool_of(forged(X, address=0)), "address must be that of a tensor's memory"),
    "x between two elements": (lambda: pool_of(forged(X, address=X.data_ptr() + 2)), "multiple of the size"),
    "x of negative strides": (lambda: pool_of(forged(X, strides=(-19, 1))), "strides must not be negative"),
    "x of negative size": (lambda: pool_of(forged(X, shape=(-1, 19))), "shape must be that of a tensor"),
    "x of more than all memory": (lambda: pool_of(forged(X, shape=(2**62, 19))), "shape must be that of a tensor"),
    "x of too few strides": (lambda: pool_of(forged(X, strides=(19,))), "as many as there are dimensions"),
    "x of an unknown dtype": (lambda: pool_of(forged(X, dtype="complex64")), "dtype must be .* got complex64"),
    "cu_seqlens that decrease": (lambda: pool_of(lengths=cu([3, -1, 3]), out=torch.zeros(3, 67)), "never decrease"),
    "cu_seqlens that overrun": (lambda: pool_of(lengths=cu([2, 4])), "end at T=5"),
    "cu_seqlens that start late": (lambda: pool_of(lengths=CU + 1), "must start at 0"),
    "negative cu_seqlens": (lambda: pool_of(lengths=CU - 5), "must start at 0"),
    "no cu_seqlens": (lambda: pool_of(lengths=CU[:0]), "must start at 0"),
    "cu_seqlens of int64": (lambda: pool_of(lengths=CU.double()), r"cu_seqlens must be \[-1\] int32"),
    "cu_seqlens with gaps": (lambda: pool_of(lengths=CU.repeat_interleave(2)[::2]), "cu_seqlens must be contiguous"),
    "room for other samples": (lambda: pool_of(out=torch.zeros(1, 67)), r"mean must be \[2, 67\]"),
    "room with gaps": (lambda: pool_of(out=torch.zeros(2, 134)[:, :67]), "mean must be contiguous"),
    "nothing wanted": (
        lambda: _native.encode_pool(an_encoder(), array(X), array(CU), None, None, 1),
        "mean or maximum must be given",
    ),
    "no threads": (lambda: pool_of(threads=0), "threads must be at least 1, got 0"),
    "dense activations elsewhere": (
        lambda: _native.encode(an_encoder(), array(X), array(DENSE[:4]), 1),
        r"out must be \[5, 67\]",
    ),
    "rewards of float32": (
        lambda: _native.encode_update(an_encoder(), array(X), array(CU), array(Y.float()), {}, None, 1),
        "y must be .* float64",
    ),
    "rewards of other samples": (
        lambda: _native.encode_update(an_encoder(), array(X), array(CU), array(Y[:1]), {}, None, 1),
        r"y must be \[2, -1\]",
    ),
    "half a state": (
        lambda: _native.encode_update(an_encoder(), array(X), array(CU), array(Y), HALF, None, 1),
        "moments must have y_m2",
    ),
    "another SAE's state": (
        lambda: _native.encode_update(an_encoder(), array(X), array(CU), array(Y), native._state(Moments(66)), None, 1),
        r"moments.z_mean must be \[67\] float64",
    ),
    "another state's labels": (
        lambda: _native.update_moments("portable", array(POOLED), array(Y), native._state(Moments(67, 2)), 1),
        r"moments.y_mean must be \[1\] float64",
    ),
    "pooled of another width": (
        lambda: _native.update_moments("portable", array(POOLED), array(Y), native._state(Moments(66)), 1),
        r"pooled must be \[-1, 66\]",
    ),
    "pooled of float64": (lambda: sum_of(POOLED.double()), "pooled must be .* got .* float64"),
    "pooled of other features": (lambda: sum_of(POOLED[:, :66]), r"pooled must be \[-1, 67\]"),
    "pooled with gaps in its rows": (lambda: sum_of(torch.zeros(2, 134)[:, ::2]), "pooled must be contiguous"),
    "weights of other samples": (lambda: sum_of(POOLED[:1]), r"weights must be \[1, 4\] float64"),
    "weights of other columns": (lambda: sum_of(weights=WEIGHTS[:, :3]), r"weights must be \[2, 4\] float64"),
    "weights of float32": (lambda: sum_of(weights=WEIGHTS.float()), "weights must be .* float64 .*, got .* float32"),
    "weights with gaps": (lambda: sum_of(weights=WEIGHTS.repeat(1, 2)[:, :4]), "weights must be contiguous"),
    "sums of float32": (lambda: sum_of(sums=SUMS.float()), "sums must be .* float64 .*, got .* float32"),
    "sums of one dimension": (lambda: sum_of(sums=SUMS[:, 0]), r"sums must be \[-1, -1\]"),
    "sums with gaps in their rows": (lambda: sum_of(sums=SUMS.repeat(1, 2)[:, ::2]), "sums must be contiguous"),
    "sums that are the same elements twice": (
        lambda: sum_of(sums=SUMS[:1].expand(67, 4)), r"sums must not hold the same element twice, got strides \[0, 1\]"
    ),
    "sums whose rows overlap": (
        lambda: sum_of(sums=torch.zeros(70, dtype=torch.float64).as_strided((67, 4), (1, 1))),
        "sums must not hold the same element twice",
    ),
    "sums without memory": (lambda: sum_of(sums=forged(SUMS, address=0)), "address must be that of a tensor's memory"),
    "powers of fewer columns": (lambda: sum_of(powers=(3,)), r"powers must be .* add up to 4, got \[3\]"),
    "powers of more columns": (lambda: sum_of(powers=(3, 2)), r"powers must be .* add up to 4, got \[3, 2\]"),
    "no powers": (lambda: sum_of(powers=()), r"powers must be .* add up to 4, got \[\]"),
    "a negative number of columns": (lambda: sum_of(powers=(5, -1)), r"powers must be .* add up to 4, got \[5, -1\]"),
    "powers that add up when they overflow": (
        lambda: sum_of(powers=(2**63 - 1, 2**63 - 1, 6)), "powers must be .* add up to 4"
    ),
    "the least number of columns": (lambda: sum_of(powers=(-(2**63), 4)), "powers must be .* add up to 4"),
    "sums by no threads": (lambda: sum_of(threads=0), "threads must be at least 1, got 0"),
    "sums by an unknown instruction set": (lambda: sum_of(isa="amx"), "processor offers .* got amx"),
    "a NaN threshold": (
        lambda: an_encoder("jumprelu", threshold=array(UNDEFINED)),
        "threshold must not be NaN, got NaN for feature 66",
    ),
    "a threshold too short": (
        lambda: an_encoder("jumprelu", threshold=array(torch.zeros(66))), r"threshold must be \[67\]"
    ),
    "no threshold": (lambda: an_encoder("relu", activation="jumprelu"), "threshold must be given"),
    "no gate": (lambda: an_encoder("relu", activation="gated"), "magnitude_scale must be given"),
    "k of 0": (lambda: an_encoder("topk", k=0), r"k must lie in 1..d_sae=67, got 0"),
    "k beyond d_sae": (lambda: an_encoder("topk", k=68), r"k must lie in 1..d_sae=67, got 68"),
    "an unknown activation": (lambda: an_encoder("relu", activation="identity"), "activation must be .* got identity"),
    "an unknown norm": (lambda: an_encoder("relu", input_norm="batch"), "input_norm must be none, .* got batch"),
    "an unknown instruction set": (lambda: an_encoder("relu", instruction_set="amx"), "processor offers .* got amx"),
    "a weight that is not packed": (lambda: an_encoder("relu", weight=array(torch.zeros(67 * 19))), "weight must be"),
    "no features": (lambda: an_encoder("relu", d_sae=0), r"d_sae and d_in must lie in 1\.\.2147483647, got 0 and 19"),
    "a negative width": (lambda: an_encoder("relu", d_in=-1), r"d_sae and d_in must lie in .* got 67 and -1"),
    "a weight of integers to pack": (
        lambda: _native.pack("portable", array(torch.zeros(3, 4).int()), array(torch.zeros(99)), 1), "weight must be"
    ),
    "a weight to pack into too little": (
        lambda: _native.pack("portable", array(torch.zeros(67, 19)), array(torch.zeros(99)), 1), "packed must be"
    ),
    "a row's vector that does not exist": (lambda: steer(rows=(3,)), r"row_vector must lie in -1..2, got 3"),
    "a row's vector before the first": (lambda: steer(rows=(-2,)), r"row_vector must lie in -1..2, got -2"),
    "vectors of another width": (lambda: steer(vectors=(3, 5)), r"vectors must be \[-1, 4\]"),
    "residuals of two dimensions": (lambda: steer(h=(2, 4)), r"h must be \[-1, -1, -1\]"),
    "residuals that are the same element twice": (
        lambda: _native.steer_add(
            array(torch.zeros(1, 1, 4).expand(2, 1, 4)), array(torch.zeros(3, 4)), array(torch.zeros(2).int()), None
        ),
        "h must not hold the same element twice",
    ),
    "residuals of float64": (lambda: steer(dtype=torch.float64), "h must be .* got .* float64"),
    "rows of other samples": (lambda: steer(rows=(0, 0)), r"row_vector must be \[1\]"),
    "positions of other samples": (
        lambda: steer(positions=torch.ones(2, 2, dtype=torch.bool)), r"positions must be \[1, 2\]"
    ),
    "positions of numbers": (lambda: steer(positions=torch.ones(1, 2)), "positions must be .* bool"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_argument_is_refused_with_what_it_was_and_must_be(name):
    call, message = HOSTILE[name]
    with pytest.raises(ValueError, match=message):
        call()


@everywhere(NATIVE)
def test_no_tokens_are_no_reason_to_fail(place):
    encoder, x = make_encoder("gated"), torch.zeros(0, 19)
    assert encode_pool(x, cu([0, 0]), encoder, backend="native").tolist() == [[0.0] * 67] * 2
    assert encode_pool(x, cu([]), encoder, backend="native").shape == (0, 67)
    assert encode(x, encoder, backend="native").shape == (0, 67)
    moments = Moments(67)
    update_moments(torch.zeros(0, 67), torch.zeros(0), moments, backend="native")
    assert moments.n == 0


def test_a_threshold_that_is_nan_is_refused_wherever_it_comes_from():
    encoder = make_encoder("jumprelu")
    encoder.threshold[3] = torch.nan
    with pytest.raises(ValueError, match="threshold must not be NaN, got NaN for feature 3"):
        encode(torch.zeros(1, 19), encoder, backend="native")
    parameters = {"W_enc": torch.zeros(3, 4), "b_enc": torch.zeros(4), "threshold": torch.tensor([0, torch.nan, 1, 1])}
    config, decoder = {"architecture": "jumprelu"}, sources.open_decoder({"kind": "none"})
    with pytest.raises(CorrSteerError, match="threshold of this SAE must not be NaN, got NaN for 1 features, 1 among"):
        _fold(config, parameters, decoder, F32, "cpu", "this SAE")


def test_a_state_that_is_not_contiguous_is_refused_before_anything_is_changed():
    moments = Moments(67)
    moments.z_mean = torch.zeros(134, dtype=torch.float64)[::2]
    with pytest.raises(ValueError, match="moments.z_mean must be contiguous"):
        update_moments(torch.ones(2, 67), torch.ones(2), moments, backend="native")
    assert moments.n == 0
