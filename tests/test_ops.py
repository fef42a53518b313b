"""Every backend against float64 truth, and what every operation does with bad arguments."""

import pytest
import torch

from corrsteer import (
    CorrSteerError,
    Moments,
    SparseEncoder,
    backends,
    encode,
    encode_pool,
    encode_update,
    reference,
    steer_add,
    update_moments,
)  # fmt: skip

ACTIVATIONS = ("relu", "jumprelu", "gated", "topk", "abstopk", "identity")
TOLERANCE = {
    torch.float32: 1e-5,
    torch.float16: 1e-3,
    torch.bfloat16: 1e-2,
}  # of the output's scale, beyond eager's error
SEGMENTS = {
    "one token each": [1] * 9,
    "one sample": [31],
    "ragged": [3, 1, 7, 2, 13, 5],
    "prime": [17, 19, 23],
    "empty at the edges": [0, 4, 0, 6, 0],
    "all empty": [0, 0],
}


def available(device="cpu", dtype=torch.float32):
    return [
        b.name
        for b in backends.registered()
        if b.verify(backends.Call("encode_pool", torch.device(device), dtype, "relu")).ok
    ]


def make_encoder(activation, d_in=19, d_sae=67, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g)

    if activation == "identity":
        return SparseEncoder.identity(d_in)
    form = {"weight": (rand(d_sae, d_in) / d_in**0.5).to(dtype), "bias": 0.3 * rand(d_sae)}
    if activation == "jumprelu":
        form["threshold"] = rand(d_sae).abs()
    if activation == "gated":
        form |= {"magnitude_scale": rand(d_sae).exp(), "magnitude_bias": rand(d_sae)}
    return SparseEncoder(d_in, d_sae, activation, k=5, **form)


def double(encoder):
    """The same encoder in float64, which makes the reference compute the truth."""
    wide = encoder.to(dtype=torch.float64)
    for name in ("bias", "threshold", "magnitude_scale", "magnitude_bias"):
        if getattr(wide, name) is not None:
            object.__setattr__(wide, name, getattr(wide, name).double())
    return wide


def cu(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def eager_pool(z, lengths, how):
    """The definition once more, sample by sample."""
    out = torch.zeros(len(lengths), z.shape[1], dtype=z.dtype)
    start = 0
    for j, n in enumerate(lengths):
        if n:
            part = z[start : start + n]
            out[j] = part.mean(0) if how == "mean" else part.amax(0)
        start += n
    return out


@pytest.mark.parametrize("backend", available())
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_encode_pool_is_as_close_to_the_truth_as_eager_torch_in_the_same_dtype(activation, segments, dtype, backend):
    lengths = SEGMENTS[segments]
    encoder = make_encoder(activation, dtype=dtype)
    x = torch.randn(sum(lengths), 19, generator=torch.Generator().manual_seed(1)).to(dtype)
    truth_z = reference.encode(x.double(), double(encoder)) if activation != "identity" else x.double()
    mean, maximum = encode_pool(x, cu(lengths), encoder, "both", backend=backend)
    for how, got in (("mean", mean), ("max", maximum)):
        truth = eager_pool(truth_z, lengths, how)
        assert got.dtype == torch.float32 and got.shape == (len(lengths), encoder.d_sae)
        assert (got - truth).abs().max() <= TOLERANCE[dtype] * truth.abs().max().clamp(min=1e-6)
        assert torch.equal(got, encode_pool(x, cu(lengths), encoder, how, backend=backend))


@pytest.mark.parametrize("backend", available())
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_maximum_over_negative_activations_is_negative_only_where_activations_can_be(activation, backend):
    encoder = make_encoder(activation)
    x = -torch.rand(6, 19, generator=torch.Generator().manual_seed(3)) - 0.1
    pooled = encode_pool(x, cu([2, 4]), encoder, "max", backend=backend)
    assert bool((pooled < 0).any()) == (activation in ("identity", "abstopk"))
    assert torch.equal(pooled, eager_pool(encode(x, encoder, backend=backend), [2, 4], "max"))


@pytest.mark.parametrize("pool", ("mean", "max", "both"))
@pytest.mark.parametrize("backend", available())
def test_encode_update_over_any_split_of_the_samples_merged_equals_one_call(backend, pool):
    encoder, lengths = make_encoder("jumprelu"), [3, 1, 7, 2, 13, 5, 1, 1]
    x = torch.randn(sum(lengths), 19, generator=torch.Generator().manual_seed(2))
    y = torch.randn(len(lengths), 2, generator=torch.Generator().manual_seed(3))

    def collect(part):
        states = (Moments(67, 2), Moments(67, 2)) if pool == "both" else Moments(67, 2)
        tokens = cu(lengths)
        rows = x[tokens[part.start] : tokens[part.stop]]
        encode_update(rows, cu(lengths[part]), y[part], encoder, states, pool, backend=backend)
        return states if pool == "both" else (states,)

    whole = collect(slice(0, len(lengths)))
    for at in range(1, len(lengths)):
        first, second = collect(slice(0, at)), collect(slice(at, len(lengths)))
        for one, two, all_ in zip(first, second, whole):
            one.merge(two)
            for merged, expected in zip(one.state(), all_.state()):
                # float32 products of other shapes round otherwise; the merge itself is exact to float64
                torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", available())
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_steer_add_adds_each_rows_vector_at_its_positions_and_touches_nothing_else(dtype, backend):
    h = torch.randn(4, 5, 9).to(dtype)
    vectors, rows = torch.randn(2, 9), torch.tensor([1, -1, 0, 1], dtype=torch.int32)
    positions = torch.rand(4, 5) > 0.5
    expected = h.clone()
    for b in range(4):
        for s in range(5):
            if rows[b] >= 0 and positions[b, s]:
                expected[b, s] = (h[b, s].float() + vectors[rows[b]]).to(dtype)
    same = h
    assert steer_add(h, vectors, rows, positions, backend=backend) is same
    assert torch.equal(h, expected)


@pytest.mark.parametrize("backend", available())
def test_steer_add_without_positions_steers_all_of_a_non_contiguous_residual(backend):
    h = torch.zeros(6, 3, 2).permute(2, 1, 0)
    steer_add(h, torch.ones(1, 6), torch.zeros(2, dtype=torch.int32), backend=backend)
    assert bool((h == 1).all())


def test_every_operation_compiles_without_a_graph_break_and_gives_the_same_result():
    encoder = make_encoder("jumprelu")
    x, lengths = torch.randn(12, 19), cu([5, 0, 7])
    y = torch.tensor([1.0, 0.0, 1.0])

    def everything(x, lengths, y, moments, pair):
        mean, maximum = encode_pool(x, lengths, encoder, "both")
        encode_update(x, lengths, y, encoder, moments, "max")
        encode_update(x, lengths, y, encoder, pair, "both")
        update_moments(mean, y, moments)
        h = torch.zeros(2, 3, 19)
        steer_add(h, torch.ones(1, 19), torch.tensor([0, -1], dtype=torch.int32))
        return encode(x, encoder), mean, maximum, encode_pool(x, lengths, encoder, "max"), h

    eager_state, compiled_state = [(Moments(67), (Moments(67), Moments(67))) for _ in range(2)]
    eager = everything(x, lengths, y, *eager_state)
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")(x, lengths, y, *compiled_state)
    for a, b in zip(eager, compiled):
        assert torch.equal(a, b)
    for a, b in zip((eager_state[0], *eager_state[1]), (compiled_state[0], *compiled_state[1])):
        assert all(torch.equal(s, t) for s, t in zip(a.state(), b.state()))
    assert eager_state[0].n == 6


def test_operators_pass_torchs_own_checks_of_their_schema_and_fake_implementation():
    encoder = make_encoder("gated")
    from corrsteer.ops import _flatten

    checks = ("test_schema", "test_faketensor")
    x, lengths, y = torch.randn(5, 19), cu([2, 3]), torch.ones(2, 1)
    call = torch.library.opcheck
    call(torch.ops.corrsteer.encode.default, (x, *_flatten(encoder), None), test_utils=checks)
    call(torch.ops.corrsteer.encode_pool.default, (x, lengths, *_flatten(encoder), "both", None), test_utils=checks)
    call(
        torch.ops.corrsteer.update_moments.default, (torch.ones(2, 67), y, Moments(67).state(), None), test_utils=checks
    )
    call(
        torch.ops.corrsteer.encode_update.default,
        (x, lengths, y, *_flatten(encoder), Moments(67).state(), "max", None),
        test_utils=checks,
    )
    h, rows = torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int32)
    call(torch.ops.corrsteer.steer_add.default, (h, torch.ones(1, 4), rows, None, None), test_utils=checks)


def test_no_operation_records_a_gradient_or_listens_to_autocast():
    encoder, moments, x = make_encoder("relu"), Moments(67), torch.randn(5, 19, requires_grad=True)
    encode_update(x, cu([2, 3]), torch.ones(2), encoder, moments)
    assert not any(tensor.requires_grad for tensor in (*moments.state(), encode(x, encoder)))
    expected = encode(x, encoder)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encode(x, encoder), expected)


def test_moments_made_in_inference_mode_can_be_updated_outside_of_it():
    with torch.inference_mode():
        moments = Moments(3)
    moments.update(torch.ones(2, 3), torch.ones(2))
    assert moments.n == 2


def test_encode_never_returns_its_argument():
    x = torch.randn(4, 19)
    assert encode(x, make_encoder("identity")).data_ptr() != x.data_ptr()


BAD_CALLS = {
    "x of another width": (lambda e, x, c: encode(x[:, :5], e), "x must have d_in=19"),
    "x of integers": (lambda e, x, c: encode(x.long(), e), "x must be float32"),
    "x not packed": (lambda e, x, c: encode_pool(x[None], c, e), r"x must be \[T, d_in=19\]"),
    "x elsewhere": (lambda e, x, c: encode(x.to("meta"), e), "x must be on cpu, got meta"),
    "int64 cu_seqlens": (lambda e, x, c: encode_pool(x, c.long(), e), "cu_seqlens must be .* int32"),
    "cu_seqlens that overrun": (lambda e, x, c: encode_pool(x[:4], c, e), r"end at T=4, got \[0, 2, 5\]"),
    "cu_seqlens that decrease": (
        lambda e, x, c: encode_pool(x, torch.tensor([0, 4, 2, 5], dtype=torch.int32), e),
        "never decrease",
    ),
    "cu_seqlens that start late": (
        lambda e, x, c: encode_pool(x, torch.tensor([1, 5], dtype=torch.int32), e),
        "must start at 0",
    ),
    "no cu_seqlens": (lambda e, x, c: encode_pool(x, c[:0], e), "cu_seqlens must be"),
    "unknown pool": (lambda e, x, c: encode_pool(x, c, e, "sum"), "pool must be one of mean, max, both, got 'sum'"),
    "y of another length": (lambda e, x, c: encode_update(x, c, torch.ones(3), e, Moments(67)), r"y must be \[N=2"),
    "a reward that is NaN": (
        lambda e, x, c: encode_update(x, c, torch.tensor([1.0, torch.nan]), e, Moments(67)),
        "y must be finite",
    ),
    "moments of another SAE": (lambda e, x, c: encode_update(x, c, torch.ones(2), e, Moments(5)), "encoder's d_sae=67"),
    "one moments for both": (
        lambda e, x, c: encode_update(x, c, torch.ones(2), e, (Moments(67),), "both"),
        "moments must be a pair",
    ),
    "pooled of another width": (
        lambda e, x, c: update_moments(torch.ones(2, 3), torch.ones(2), Moments(67)),
        "pooled must be",
    ),
    "a residual without rows": (
        lambda e, x, c: steer_add(x, torch.ones(1, 19), c),
        r"h must be \[B, S, d\]",
    ),
    "vectors of another width": (
        lambda e, x, c: steer_add(x[None], torch.ones(1, 4), torch.zeros(1, dtype=torch.int32)),
        "another width",
    ),
    "a row without its vector": (
        lambda e, x, c: steer_add(x[None], torch.ones(1, 19), torch.ones(1, dtype=torch.int32)),
        r"lie in -1..0",
    ),
    "int64 rows": (lambda e, x, c: steer_add(x[None], torch.ones(1, 19), torch.zeros(1).long()), "int32"),
    "positions of another shape": (
        lambda e, x, c: steer_add(
            x[None], torch.ones(1, 19), torch.zeros(1, dtype=torch.int32), torch.ones(1, 2, dtype=torch.bool)
        ),
        "positions must be",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_bad_argument_is_named_with_what_it_was_and_must_be(name):
    call, message = BAD_CALLS[name]
    with pytest.raises(CorrSteerError, match=message):
        call(make_encoder("relu"), torch.zeros(5, 19), cu([2, 3]))
