"""What is true of the Triton kernels alone: what they refuse, and on a GPU real sizes, graphs, memory and addresses.

Whatever is true of every backend is in `test_operations.py`.
"""

import itertools

import pytest
import torch
from memory import fenced, poison
from oracle import (
    MANY_COLUMNS,
    assert_as_close_as_eager,
    assert_moments,
    assert_same_state,
    decided,
    dense_bounds,
    eager_pool,
    pooled_bounds,
    tolerance_of_moments,
    true_moments,
)
from places import FLATTENED, PANELS, TRITON, Place, at, everywhere, for_each
from problems import ACTIVATIONS, BF16, F16, F32, Case, cu, double, make, make_encoder, pooled, updated

from corrsteer import (
    BackendUnavailable,
    Moments,
    SparseEncoder,
    encode,
    encode_pool,
    encode_update,
    steer_add,
    update_moments,
    update_sums,
)
from corrsteer.ops import registry
from corrsteer.ops.registry import OPERATIONS, Call
from corrsteer.sae.encoder import PRECISIONS

GPU = Place("triton", "cuda")
ALL_WAYS = (GPU, PANELS[1], FLATTENED[1])
on_gpu = everywhere((GPU,))


def triton_backend():
    return next(b for b in registry.registered() if b.name == "triton")


# What the backend does, and what it refuses


@everywhere(TRITON)
def test_triton_refuses_float64_and_what_has_no_product_and_runs_everything_else(place):
    dtypes = (F32, F16, BF16, torch.float64)
    for operation, activation, precision, dtype in itertools.product(OPERATIONS, ACTIVATIONS, PRECISIONS, dtypes):
        verdict = registry.judge(
            triton_backend(), Call(operation, torch.device(place.device), dtype, activation, precision)
        )
        refused = activation == "identity" or precision == "fp64" or dtype == torch.float64
        assert verdict.ok == (not refused), (operation, activation, precision, dtype)
        assert refused == bool(verdict.reason and verdict.fix) or place.device == "cpu"
    for operation, dtype in itertools.product(("update_moments", "update_sums", "steer_add"), dtypes):
        assert place.does(operation, dtype) == (dtype != torch.float64)


@everywhere(TRITON)
def test_a_refusal_says_which_call_it_was_and_what_to_use_instead(place):
    x, lengths = torch.zeros(4, 19, device=place.device), cu([4], place.device)
    with pytest.raises(BackendUnavailable, match="'triton' cannot run encode_pool .* do not compute identity; use "):
        encode_pool(x, lengths, SparseEncoder.identity(19), backend="triton")
    with pytest.raises(BackendUnavailable, match="kernels compute in float32; use float32, bfloat16 or float16"):
        encode(x.double(), make_encoder("relu", device=place.device), backend="triton")
    with pytest.raises(BackendUnavailable, match="in torch.float32 for relu .*fp64"):
        encode(x, double(make_encoder("relu", device=place.device)), backend="triton")


@everywhere((Place("triton", "cpu"),))
def test_the_interpreter_runs_what_asks_for_it_by_name_and_nothing_else(place, monkeypatch):
    for operation in OPERATIONS:
        call = Call(operation, torch.device("cpu"), F32, "relu", "fp32")
        assert registry.choose(call).name != "triton" and registry.choose(call, "triton").name == "triton"
    monkeypatch.delenv("TRITON_INTERPRET")
    verdict = registry.judge(triton_backend(), call)
    assert not verdict.ok and "need a GPU" in verdict.reason


@on_gpu
def test_on_a_gpu_the_kernels_are_chosen_without_being_asked_for(place):
    for operation in OPERATIONS:
        assert registry.choose(Call(operation, torch.device("cuda"), F32, "relu", "fp32")).name == "triton"
        assert registry.choose(Call(operation, torch.device("cuda"), F32, "identity")).name == "reference"


# Arguments whose values nobody checked, as on a GPU nobody does

UNCHECKED = {
    "an end beyond T": [0, 4, 60],
    "an end before T": [0, 3],
    "a start after 0": [2, 6, 40],
    "a start that decreases": [0, 30, 2, 40],
    "nothing but the largest number": [0, 2**31 - 1, 40],
}


@pytest.mark.parametrize(
    ("place", "name", "activation"),
    [
        at(p, n, a, id=f"{n}, {a}")
        for p in TRITON + PANELS + FLATTENED
        for n in UNCHECKED
        for a in ("jumprelu", "topk")
        if p.does("encode_pool", F32, a)
    ],
)
def test_cu_seqlens_that_make_no_sense_never_lead_outside_of_the_results(place, name, activation):
    lengths = torch.tensor(UNCHECKED[name], dtype=torch.int32, device=place.device)
    with poison():
        problem = make(Case(activation, *place.operands, lengths=(40,)), place.device)
        run = triton_backend().operations
        out = run["encode_pool"](problem.x, fenced(lengths), problem.encoder, ("mean", "max"))
        assert out.shape == (2, len(lengths) - 1, 37)
        state = Moments.from_state([fenced(t) for t in Moments(37, device=place.device).state()])
        y = fenced(torch.ones(len(lengths) - 1, 1, device=place.device))
        run["encode_update"](problem.x, fenced(lengths), y, problem.encoder, (state,), ("mean",))
        assert state.n == len(lengths) - 1


@everywhere(TRITON)
def test_a_row_whose_vector_does_not_exist_is_left_as_it_is(place):
    h = torch.zeros(4, 2, 9, device=place.device)
    rows = torch.tensor([0, 2, 1000, -5], dtype=torch.int32, device=place.device)
    triton_backend().operations["steer_add"](h, fenced(torch.ones(2, 9, device=place.device)), rows, None)
    assert bool((h[0] == 1).all()) and not h[1:].any()


@everywhere(TRITON)
@pytest.mark.parametrize("chunk", (1, 7, 16))
def test_the_k_largest_are_the_same_however_many_tokens_go_through_at_a_time(place, chunk, monkeypatch):
    from corrsteer.kernels import topk

    problem = make(Case("abstopk", "bf16", BF16, (3, 9, 8), d_in=24, d_sae=67), place.device)
    whole = encode(problem.x, problem.encoder, backend=place.backend)
    monkeypatch.setattr(topk, "MAX_TOKENS", chunk)
    parts = encode(problem.x, problem.encoder, backend=place.backend)
    assert_as_close_as_eager(parts, *dense_bounds(problem.x, problem.exact))
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6)


# That these tests can fail


def test_poison_fills_what_is_born_and_notices_what_is_written_beside_it():
    with poison():
        assert bool(torch.empty(3, 4).isnan().all()) and bool(torch.empty_like(torch.ones(2)).isnan().all())
        assert torch.empty(5, dtype=torch.int32).tolist() == [-7] * 5
    for at_, dtype in itertools.product((-1, 12), (F32, torch.int32)):
        with pytest.raises(AssertionError, match=r"memory beside a \[3, 4\] .* was written to"), poison():
            made = torch.empty((3, 4), dtype=dtype)
            made.as_strided((1,), (1,), made.storage_offset() + at_).zero_()


MISTAKES = {
    "accumulates in bfloat16": lambda z: z.bfloat16().float(),
    "forgets the last feature": lambda z: torch.cat([z[..., :-1], torch.zeros_like(z[..., -1:])], -1),
    "takes the sample before": lambda z: z.roll(1, -2),
    "leaves what it should have cleared": lambda z: torch.where(z == 0, torch.nan, z),
    "has a row too few": lambda z: z[:-1],
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_error_form_notices_a_backend_that_is_wrong(mistake):
    problem = make(Case("jumprelu", lengths=(1,) * 12))
    eager = pooled(problem, Place("reference", "cpu"))[0]
    low, high = pooled_bounds(problem, "mean")
    assert_as_close_as_eager(eager, low, high)
    with pytest.raises(AssertionError, match="off at a scale of"):
        assert_as_close_as_eager(MISTAKES[mistake](eager), low, high, eager)


# On a GPU: real sizes

T, D_IN, D_SAE = 4096, 2304, 16384


def real(activation="jumprelu", precision="bf16", dtype=BF16, mean=8, pool="both", tokens=None) -> Case:
    """T tokens in samples of `mean` tokens on average, drawn at random, or of one token each."""
    tokens = tokens or T
    lengths = torch.ones(tokens, dtype=torch.int64)
    if mean > 1:
        cuts = torch.randint(0, tokens + 1, (tokens // mean - 1,), generator=torch.Generator().manual_seed(mean))
        lengths = torch.cat([torch.tensor([0]), cuts.sort().values, torch.tensor([tokens])]).diff()
    return Case(activation, precision, dtype, tuple(lengths.tolist()), pool, D_IN, D_SAE, k=32)


def labels_of(problem, number=1):
    n = len(problem.case.lengths)
    return torch.randn(n, number, generator=torch.Generator().manual_seed(1)).to(problem.x.device)


PRECISIONS_OF_X = (("bf16", BF16), ("fp16", F16), ("bf16x2", BF16), ("fp32", F32), ("fp32_ieee", F32))
REAL_POOLS = {
    f"{activation}, {precision}, {mean} tokens a sample": real(activation, precision, dtype, mean)
    for row, activation in enumerate(("relu", "jumprelu", "gated", "topk", "abstopk"))
    for column, (precision, dtype) in enumerate(PRECISIONS_OF_X)
    for mean in ((1, 8, 64)[(row + column) % 3],)
}


@for_each(REAL_POOLS, places=ALL_WAYS)
def test_encode_pool_at_real_size_is_as_close_to_the_truth_as_eager_torch(place, case):
    problem = make(case, place.device)
    low, high = dense_bounds(problem.x, problem.exact)
    eager = pooled(problem, Place("reference", place.device))
    for how, mine, theirs in zip(case.pools, pooled(problem, place), eager):
        assert_as_close_as_eager(mine, *(eager_pool(z, case.lengths, how) for z in (low, high)), theirs, of=how)


@for_each({case.activation: case for case in (real("relu", "bf16x2"), real("abstopk"))}, "encode", (GPU,))
def test_dense_activations_at_real_size_are_as_close_to_the_truth_as_eager_torch(place, case):
    problem = make(case, place.device)
    eager = encode(problem.x, problem.encoder, backend="reference")
    mine = encode(problem.x, problem.encoder, backend=place.backend)
    assert_as_close_as_eager(mine, *dense_bounds(problem.x, problem.exact), eager)


REAL_UPDATES = {
    f"{case.activation} {case.precision} {case.pool}, {mean} tokens a sample, {labels} labels": (case, labels)
    for case, mean, labels in (
        (real(*form, mean, pool), mean, labels)
        for form, pool, mean, labels in (
            (("relu", "bf16", BF16), "mean", 1, 1),
            (("jumprelu", "bf16", BF16), "mean", 8, 1),
            (("gated", "bf16", BF16), "mean", 64, 1),
            (("jumprelu", "fp32", F32), "mean", 8, 1),
            (("relu", "bf16x2", BF16), "max", 64, 1),
            (("jumprelu", "bf16", BF16), "max", 1, 1),
            (("gated", "fp32", F32), "both", 8, 1),
            (("jumprelu", "bf16", BF16), "both", 1, 1),
            (("jumprelu", "bf16", BF16), "max", 8, 3),
            (("topk", "bf16", BF16), "mean", 8, 1),
        )
    )
}


@pytest.mark.parametrize(
    ("place", "case", "labels"),
    [
        at(p, case, labels, id=name)
        for p in ALL_WAYS
        for name, (case, labels) in REAL_UPDATES.items()
        if p.does("encode_update", case.dtype, case.activation, case.precision)
    ],
)
def test_encode_update_at_real_size_leaves_the_moments_of_all_samples(place, case, labels):
    problem = make(case, place.device)
    y, clear = labels_of(problem, labels), decided(problem)
    assert clear.float().mean() > 0.5
    low, _ = dense_bounds(problem.x, problem.exact)
    eager = updated(problem, y, Place("reference", place.device))
    for how, mine, theirs in zip(case.pools, updated(problem, y, place), eager):
        truth = true_moments(eager_pool(low, case.lengths, how), y)
        assert_moments(mine, truth, theirs, clear, tolerance_of_moments(case))
        torch.testing.assert_close(mine.correlation()[:, clear], truth.correlation()[:, clear], rtol=0, atol=1e-3)


@pytest.mark.parametrize(("place", "labels"), [at(GPU, n, id=str(n)) for n in (1, 5, 33)])
def test_update_moments_at_real_size_leaves_the_moments_of_all_samples(place, labels):
    g = torch.Generator().manual_seed(0)
    z = torch.randn(T, D_SAE, generator=g).sub_(1).relu_().to(place.device)
    y = torch.randn(T, labels, generator=g).to(place.device)
    eager, got = (Moments(D_SAE, labels, place.device) for _ in range(2))
    update_moments(z, y, eager, backend="reference")
    update_moments(z, y, got, backend=place.backend)
    assert_moments(got, true_moments(z, y), eager)


@pytest.mark.parametrize(("place", "columns"), [at(GPU, n, id=str(n)) for n in (20, 1000)])
def test_update_sums_at_real_size_adds_the_sums_of_all_samples(place, columns):
    g = torch.Generator().manual_seed(0)
    z = torch.randn(T, D_SAE, generator=g).sub_(1).relu_().to(place.device)
    w = torch.randn(T, columns + 3, generator=g).double().to(place.device)
    got, truth, scale = (torch.zeros(D_SAE, columns + 3, dtype=torch.float64, device=place.device) for _ in range(3))
    update_sums(z, w, got, (columns, 2, 1), backend=place.backend)
    update_sums(z, w, truth, (columns, 2, 1), backend="reference")
    update_sums(z, w.abs(), scale, (columns, 2, 1), backend="reference")  # z is not negative
    off = (got - truth).abs() / scale.clamp(min=1e-300)
    assert float(off[:, :columns].max()) <= (1e-5 if columns > MANY_COLUMNS else 1e-12)
    assert float(off[:, columns:].max()) <= 1e-12


@for_each({f"{c.activation} {c.pool}": c for c in (real(), real(pool="mean"), real("topk"))}, places=ALL_WAYS)
def test_at_real_size_the_same_inputs_give_the_same_bits_again(place, case):
    problem = make(case, place.device)
    first = pooled(problem, place)
    states = [updated(problem, labels_of(problem, labels), place) for labels in (1, 3)]
    for _ in range(5):
        for one, other in zip(first, pooled(problem, place)):
            assert torch.equal(one, other)
        for labels, before in zip((1, 3), states):
            for one, other in zip(before, updated(problem, labels_of(problem, labels), place)):
                assert_same_state(one, other)


GRAPHED = {f"{c.activation} {c.pool} {len(c.lengths)}": c for c in (real(), real(mean=1, pool="mean"), real("topk"))}


@pytest.mark.parametrize(
    ("place", "case", "labels"),
    [
        at(p, c, n, id=f"{name}, {n}")
        for p in ALL_WAYS
        for name, c in GRAPHED.items()
        for n in (1, 2)
        if p.does("encode_update", c.dtype, c.activation, c.precision)
    ],
)
def test_a_captured_cuda_graph_replays_on_whatever_its_inputs_then_hold(place, case, labels):
    problem = make(case, place.device)
    y, h = labels_of(problem, labels), torch.zeros(2, 5, 64, device=place.device, dtype=BF16)
    states = tuple(Moments(D_SAE, labels, place.device) for _ in case.pools)
    rows = torch.tensor([0, -1], dtype=torch.int32, device=place.device)
    vectors = torch.ones(1, 64, device=place.device)

    def everything(x, lengths, y, states, h):
        into = states if case.pool == "both" else states[0]
        encode_update(x, lengths, y, problem.encoder, into, case.pool, backend=place.backend)
        steer_add(h, vectors, rows, backend=place.backend)
        out = encode_pool(x, lengths, problem.encoder, case.pool, backend=place.backend)
        return out if case.pool == "both" else (out,)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and reads the launch configurations
        everything(problem.x, problem.cu, y, states, h)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything(problem.x, problem.cu, y, states, h)

    g = torch.Generator().manual_seed(99)
    lengths = list(case.lengths)
    lengths[: len(lengths) // 2] = reversed(lengths[: len(lengths) // 2])
    problem.x.copy_(torch.randn(problem.x.shape, generator=g))
    problem.cu.copy_(cu(lengths))
    y.copy_(torch.randn(y.shape, generator=g))
    for tensor in (h, *(t for state in states for t in state.state())):
        tensor.zero_()
    graph.replay()
    eager_states = tuple(Moments(D_SAE, labels, place.device) for _ in case.pools)
    eager_h = torch.zeros_like(h)
    for one, other in zip(captured, everything(problem.x, problem.cu, y, eager_states, eager_h)):
        assert torch.equal(one, other)
    for one, other in zip(states, eager_states):
        assert_same_state(one, other)
    assert torch.equal(h, eager_h) and bool(h[0].all())


@on_gpu
def test_a_compiled_program_that_uses_every_operation_gives_the_same_results(place):
    problem = make(real(), place.device)
    x, lengths, encoder, y = problem.x, problem.cu, problem.encoder, labels_of(problem)
    rows, vectors = torch.zeros(1, dtype=torch.int32, device=x.device), torch.ones(1, D_IN, device=x.device)

    def everything(x, lengths, y, moments):
        mean, maximum = encode_pool(x * 2, lengths, encoder, "both", backend=place.backend)
        encode_update(x * 2, lengths, y, encoder, moments, "max", backend=place.backend)
        h = steer_add((x * 2)[None], vectors, rows, backend=place.backend)
        return mean + 1, maximum, h, encode(x[:7] * 2, encoder, backend=place.backend).relu()

    moments, compiled_moments = (Moments(D_SAE, device=x.device) for _ in range(2))
    eager = everything(x, lengths, y, moments)
    compiled = torch.compile(everything, fullgraph=True)(x, lengths, y, compiled_moments)
    for one, other in zip(eager, compiled):
        assert torch.equal(one, other)
    assert_same_state(moments, compiled_moments)


MEMORY = {
    f"{activation} {pool}, {labels} labels, {tokens} tokens": (real(activation, pool=pool, tokens=tokens), labels)
    for activation, pool, labels, tokens in (
        ("jumprelu", "mean", 1, 4096),
        ("jumprelu", "max", 1, 4096),
        ("jumprelu", "both", 1, 32768),
        ("jumprelu", "mean", 3, 4096),
        ("jumprelu", "max", 3, 32768),
        ("topk", "mean", 1, 4096),
        ("topk", "max", 1, 32768),
    )
}


@pytest.mark.parametrize(("place", "case", "labels"), [at(GPU, *case, id=name) for name, case in MEMORY.items()])
def test_no_operation_that_pools_takes_2_percent_of_the_dense_activations_memory(place, case, labels):
    problem = make(case, place.device)
    y, states = labels_of(problem, labels), tuple(Moments(D_SAE, labels, place.device) for _ in case.pools)
    dense = len(problem.x) * D_SAE * 4

    def update():
        into = states if case.pool == "both" else states[0]
        encode_update(problem.x, problem.cu, y, problem.encoder, into, case.pool, backend=place.backend)

    def pool():
        return pooled(problem, place)

    for run in (update, pool):
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = run()
        torch.cuda.synchronize()
        results = sum(t.numel() * t.element_size() for t in out or ())
        beyond = torch.cuda.max_memory_allocated() - before - results
        assert beyond <= 0.02 * dense, f"{run.__name__} takes {beyond / dense:.2%}"


# On a GPU: addresses beyond 2^31. A kernel that gets one wrong may end the process' use of the GPU, so these are last.


def need(gibibytes):
    if torch.cuda.mem_get_info()[0] < gibibytes * 2**30:
        pytest.skip(f"it takes {gibibytes} GiB of GPU memory")


def some_features(encoder, features) -> SparseEncoder:
    parts = {name: getattr(encoder, name)[features] for name in ("weight", "bias", "threshold")}
    return SparseEncoder(encoder.d_in, len(features), "jumprelu", **parts)


def wide_encoder(d_in, d_sae, device) -> SparseEncoder:
    g = torch.Generator(device).manual_seed(0)
    weight = torch.randn(d_sae, d_in, generator=g, device=device, dtype=BF16).div_(d_in**0.5)
    bias, threshold = (torch.rand(d_sae, generator=g, device=device) for _ in range(2))
    return SparseEncoder(d_in, d_sae, "jumprelu", weight=weight, bias=bias, threshold=threshold)


@on_gpu
def test_weights_activations_and_pooled_rows_may_have_more_than_2_to_the_31_elements(place):
    need(32)
    d_sae, tokens = 1 << 20, 2100  # tokens · d_sae and d_sae · d_in are both beyond it
    encoder = wide_encoder(D_IN, d_sae, place.device)
    edge = 2**31 // D_IN
    features = [0, 1, edge - 1, edge, edge + 1, d_sae - 1]
    few = some_features(encoder, features)
    x = torch.randn(tokens, D_IN, generator=torch.Generator().manual_seed(1)).to(place.device, BF16)
    low, high = dense_bounds(x, double(few))
    eager = encode(x, few, backend="reference")
    for lengths in ((1,) * tokens, (tokens - 2, 0, 2)):
        got = encode_pool(x, cu(lengths, place.device), encoder, "max", backend=place.backend)[:, features]
        assert_as_close_as_eager(got, *(eager_pool(z, lengths, "max") for z in (low, high, eager)))
    got = encode(x, encoder, backend=place.backend)[:, features]
    assert_as_close_as_eager(got, low, high, eager)
    moments, y = Moments(d_sae, device=place.device), torch.randn(tokens, device=place.device)
    encode_update(x, cu((1,) * tokens, place.device), y, encoder, moments, "max", backend=place.backend)
    truth = true_moments(low, y)
    for name in ("z_mean", "z_m2", "cross", "group_sum"):
        mine, true = getattr(moments, name)[..., features], getattr(truth, name)
        assert_as_close_as_eager(mine, true, true, tolerance=5e-3, of=name)  # a jump may be decided either way


@on_gpu
def test_x_may_have_more_than_2_to_the_31_elements(place):
    need(16)
    tokens, length = 950_000, 100
    encoder = make_encoder("jumprelu", d_in=D_IN, d_sae=64, precision="bf16", device=place.device)
    x = torch.randn(
        tokens, D_IN, generator=torch.Generator(place.device).manual_seed(0), device=place.device, dtype=BF16
    )
    assert x.numel() > 2**31
    lengths = (length,) * (tokens // length)
    got = encode_pool(x, cu(lengths, place.device), encoder, "mean", backend=place.backend)
    dense = encode(x, encoder, backend=place.backend)
    edge = 2**31 // D_IN // length
    for sample in (0, edge - 1, edge, edge + 1, len(lengths) - 1):
        rows = slice(sample * length, (sample + 1) * length)
        low, high = dense_bounds(x[rows], double(encoder))
        assert_as_close_as_eager(dense[rows], low, high, encode(x[rows], encoder, backend="reference"))
        assert_as_close_as_eager(got[sample], low.mean(0), high.mean(0), tolerance=1e-4)


@on_gpu
def test_partial_results_of_a_long_sample_may_have_more_than_2_to_the_31_elements(place):
    need(48)
    from corrsteer.kernels import launch

    d_in, d_sae = 64, 1 << 20
    features = [0, 12345, d_sae - 1]
    config = launch.config(torch.device(place.device), "encode_pool", "native", 10**6, ("both",))
    # 130 chunks at least, and 18 float32 of each for every feature
    tokens = 130 * config["max_tiles_per_chunk"] * config["BT"]
    encoder = wide_encoder(d_in, d_sae, place.device)
    x = torch.randn(tokens, d_in, generator=torch.Generator().manual_seed(1)).to(place.device, BF16)
    lengths, y = (tokens - 3, 3), torch.tensor([1.0, -1.0], device=place.device)
    states = tuple(Moments(d_sae, device=place.device) for _ in range(2))
    encode_update(x, cu(lengths, place.device), y, encoder, states, "both", backend=place.backend)
    low, _ = dense_bounds(x, double(some_features(encoder, features)))
    for how, mine in zip(("mean", "max"), states):
        truth = true_moments(eager_pool(low, lengths, how), y)
        for name in ("z_mean", "z_m2", "cross", "group_sum"):
            got, true = getattr(mine, name)[..., features], getattr(truth, name)
            assert_as_close_as_eager(got, true, true, tolerance=1e-3, of=name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted here")
@pytest.mark.parametrize("lengths", [[2] * 512, [1] * 1024], ids=["pairs", "single tokens"])
def test_moments_of_long_chunks_of_sparse_and_of_shifted_activations_do_not_cancel(monkeypatch, lengths):
    from corrsteer.kernels import launch

    config = launch.config
    longer = {"max_tiles_per_chunk": 64}  # chunks of 1024 tokens, as on a GPU
    monkeypatch.setattr(launch, "config", lambda *a: config(*a) | longer)
    x = torch.randn(1024, 16, generator=torch.Generator().manual_seed(0))
    x[0] *= 20
    # the first eight features are sparse, the others lie 17 standard deviations from 0
    bias = torch.tensor([-1.0] * 8 + [10.0] * 8)
    encoder = SparseEncoder(16, 16, "relu", weight=torch.eye(16), bias=bias)
    y = torch.linspace(-1, 1, len(lengths))
    ours, truth = Moments(16), Moments(16)
    encode_update(x, cu(lengths), y, encoder, ours, "max", backend="triton")
    encode_update(x.double(), cu(lengths), y, double(encoder), truth, "max", backend="reference")
    torch.testing.assert_close(ours.z_m2, truth.z_m2, rtol=2e-5, atol=0)
    torch.testing.assert_close(ours.z_mean, truth.z_mean, rtol=1e-5, atol=0)
    error = (ours.correlation() - truth.correlation()).abs()
    assert error[:, :8].max() < 5e-6 and error[:, 8:].max() < 1e-4
