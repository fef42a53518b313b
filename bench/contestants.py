"""Who takes part in a case: ours, one or more backends, and what they are compared with.

The inputs of a case are drawn once, in as many sets as it takes to push each other out of the cache; round `i` uses
set `i`, and all contestants of a round use the same.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench import eager, ground_truth
from bench.resources import PANEL_BLOCKS
from bench.shapes import Case, lengths
from corrsteer import (
    Evidence,
    Moments,
    SparseEncoder,
    encode_pool,
    encode_update,
    steer_add,
    update_moments,
    update_sums,
)
from corrsteer.ops.operations import POOLS
from corrsteer.stats.resampling import label_orders

X_DTYPES = {"fp32": torch.float32, "fp32_ieee": torch.float32, "fp16": torch.float16}  # bfloat16 otherwise
WEIGHT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # that the precision rounds to; float32 otherwise


@dataclass
class Contestant:
    """`call(i)` runs it on set `i`; `check`, for ours, says whether it computes what it should; `holds`, in bytes, is
    a result that it keeps between calls; `fresh` is what a run on set 0 makes of new state, to compare bits."""

    call: Callable[[int], object]
    check: Callable[[], dict] | None = None
    holds: int = 0
    fresh: Callable[[], list[Tensor]] | None = None


Factories = dict[str, Callable[[], Contestant]]  # made one after the other, as one may find no memory


# Other ways of the triton backend to the same result than the one that ships: for each, what the launch configurations
# of `encode_pool` that go it say otherwise. One more entry here is one more contestant.
WAYS: dict[str, dict[str, Any]] = {
    "panels": PANEL_BLOCKS | {"BF16_SPLITS": 0, "way": "panels", "panel_features": 2048, "panel_tokens": 2048},
    "flattened": {"BF16_SPLITS": 0, "flatten": 1},
}


def ways_of(backend: str, case: Case) -> list[str]:
    """Names of our contestants on a backend: as it ships, and by each other way, which take 16-bit operands."""
    many = backend == "triton" and case.kind == "encode_update"
    many &= case.precision in ("bf16", "bf16x2", "fp16") and case.activation != "topk"
    single = case.precision != "bf16x2"  # flattened, ptxas would wait for each of its two products
    return [backend, *(f"{backend}, {way}" for way in WAYS if many and (single or way != "flattened"))]


@contextlib.contextmanager
def going(way: str) -> Iterator[None]:
    """Launches go `way` in here; as they ship where it is empty."""
    if not way:
        yield
        return
    from corrsteer.kernels import launch

    config = launch.config

    def forced(device: torch.device, kernel: str, *more: Any) -> dict[str, Any]:
        return config(device, kernel, *more) | (WAYS[way] if kernel == "encode_pool" else {})

    with patch.object(launch, "config", forced):
        yield


def contestants(case: Case, device: torch.device, backends: Iterable[str]) -> Factories:
    """The contestants of a case by name; ours have the name of their backend, and behind a comma of a way."""
    makers = {"update_moments": _update_moments, "update_sums": _update_sums}
    makers |= {"steer_add": _steer_add, "steer_host": _steer_add}
    return makers.get(case.kind, _encode_update)(case, device, tuple(backends))


@dataclass
class Inputs:
    x: Tensor  # [T, d_in]
    weight: Tensor  # [d_sae, d_in] float32
    encoder: SparseEncoder  # with the weight in the case's precision


def _encode_update(case: Case, device: torch.device, backends: tuple[str, ...]) -> Factories:
    g = torch.Generator(device).manual_seed(0)
    dtype = X_DTYPES.get(case.precision, torch.bfloat16)
    bias = 0.1 * torch.randn(case.d_sae, generator=g, dtype=torch.float32, device=device)
    # Preactivations are about standard normal, so that one or two in a hundred features are active.
    threshold = (
        2 + 0.5 * torch.rand(case.d_sae, generator=g, dtype=torch.float32, device=device)
        if case.activation == "jumprelu"
        else None
    )

    def encoder_of(weight: Tensor) -> SparseEncoder:
        form = {"weight": weight, "bias": bias, "threshold": threshold, "k": case.k}
        return SparseEncoder(case.d_in, case.d_sae, case.activation, **form)

    def draw() -> Inputs:
        x = torch.randn(case.tokens, case.d_in, generator=g, dtype=torch.float32, device=device).to(dtype)
        weight = torch.randn(case.d_sae, case.d_in, generator=g, dtype=torch.float32, device=device) / case.d_in**0.5
        return Inputs(x, weight, encoder_of(weight).to(precision=case.precision))

    sets = [draw()]
    if case.kind == "encode_update":  # the others are about the host, and a graph has its one set
        each = (sets[0].x.numel() + sets[0].weight.numel()) * dtype.itemsize
        sets += [draw() for _ in range(_sets(device, each) - 1)]
    sizes = torch.tensor(lengths(case.tokens, case.steps), dtype=torch.int64, device=device)
    cu_seqlens = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]).int()
    sample = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int64, device=device), sizes)
    labels = 1 if case.kind == "permutations" else case.labels
    y = _rewards(len(sizes), labels, g)
    pools = POOLS[case.pool]

    def states() -> tuple[Moments, ...]:
        return tuple(Moments(case.d_sae, labels, device=device) for _ in pools)

    def update(at: int, backend: str, into: tuple[Moments, ...]) -> None:
        s, (name, _, way) = sets[at % len(sets)], backend.partition(", ")
        with going(way):
            encode_update(s.x, cu_seqlens, y, s.encoder, into if len(into) > 1 else into[0], case.pool, backend=name)

    def verdict(first: tuple[Moments, ...]) -> dict:
        rounded = sets[0].weight.to(WEIGHT_DTYPES.get(case.precision, torch.float32))
        exact, allowed = encoder_of(rounded), ground_truth.TOLERANCE[case.precision]
        checks = [ground_truth.check(sets[0].x, cu_seqlens, y, exact, m, how, allowed) for m, how in zip(first, pools)]
        return min(checks, key=lambda check: check["ok"])  # a wrong one, if there is one

    def ours(backend: str) -> Contestant:
        kept = states()

        def check() -> dict:
            first = states()
            update(0, backend, first)
            return verdict(first)

        def fresh() -> list[Tensor]:
            new = states()
            update(0, backend, new)
            return [array for moments in new for array in moments.state()]

        return Contestant(lambda at: update(at, backend, kept), check, fresh=fresh)

    def replayed(backend: str) -> Contestant:
        """Ours as a CUDA graph, of set 0."""
        kept = states()
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):  # what a first call sets up cannot be captured
            update(0, backend, kept)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            update(0, backend, kept)

        def check() -> dict:
            for array in (array for moments in kept for array in moments.state()):
                array.zero_()
            graph.replay()
            return verdict(kept)

        return Contestant(lambda at: graph.replay(), check)

    def matmul() -> Contestant:
        weights = [s.weight.to(dtype) for s in sets]
        out = torch.empty(case.tokens, case.d_sae, dtype=dtype, device=device)

        def call(at: int) -> None:
            torch.mm(sets[at % len(sets)].x, weights[at % len(sets)].T, out=out)

        return Contestant(call, holds=out.nbytes)

    def prepacked() -> Contestant:
        """oneDNN's product with its weight in the layout it likes best, as torch.compile calls it."""
        weights = [torch.ops.mkldnn._reorder_linear_weight(s.weight.to(dtype), case.tokens) for s in sets]
        product = torch.ops.mkldnn._linear_pointwise
        return Contestant(lambda at: product(sets[at % len(sets)].x, weights[at % len(sets)], None, "none", [], ""))

    def torch_alone(weight_dtype: torch.dtype) -> Contestant:
        encoders = [eager.encoder(s.weight.T.to(weight_dtype).contiguous(), bias, threshold, case.k) for s in sets]
        sums = _sums(case, device)

        def call(at: int) -> None:
            s = at % len(sets)
            eager.collect(encoders[s], sets[s].x, sizes, sample, y, sums, pools, eager.pool_segments)

        return Contestant(call)

    def compiled(pooling) -> Contestant:
        weights = [s.weight.T.to(dtype).contiguous() for s in sets]
        vectors = [None if v is None else v.to(dtype) for v in (bias, threshold)]
        sums = _sums(case, device)

        def collect(x, W_enc, sums):
            eager.collect(lambda x: eager.encode(x, W_enc, *vectors, case.k), x, sizes, sample, y, sums, pools, pooling)

        collect = torch.compile(collect, fullgraph=True, dynamic=False, mode=case.compiled)
        return Contestant(lambda at: collect(sets[at % len(sets)].x, weights[at % len(sets)], sums))

    def tested(backend: str) -> Contestant:
        """With evidence: what `collect` does of a block whose rewards are permuted."""
        (kept,), numbers = states(), itertools.count()
        evidence = Evidence(case.d_sae, permutations=case.labels, device=device)

        def add(at: int, to: Evidence) -> Tensor:
            s = sets[at % len(sets)]
            pooled = encode_pool(s.x, cu_seqlens, s.encoder, case.pool, backend=backend)
            update_moments(pooled, y, kept, backend=backend)
            to.update(pooled, y, next(numbers), backend=backend)
            return pooled

        def check() -> dict:
            first, features = Evidence(case.d_sae, permutations=case.labels, device=device), slice(0, 64)
            pooled = add(0, first)[:, features].double()
            alone = tuple(range(len(sizes)))  # each sample is a prompt of its own
            order = label_orders(first.seed, *first.blocks, case.labels, alone, within=False).to(device)
            u = y[:, 0].double() - first.origin[0]
            return ground_truth.check_close(first.columns("permuted", features), pooled.T @ u[order].T, 1e-5)

        return Contestant(lambda at: add(at, evidence), check, holds=evidence.nbytes)

    if case.kind == "permutations":
        alone = {f"encode_update, {backend}": lambda b=backend: Contestant(ours(b).call) for backend in backends}
        return {backend: lambda b=backend: tested(b) for backend in backends} | alone
    factories: Factories = {backend: lambda backend=backend: ours(backend) for backend in backends}
    if case.kind == "graph":
        return factories | {f"{b}, replayed": lambda b=b: replayed(b) for b in backends}
    factories["matmul"] = matmul
    if device.type == "cpu":
        factories["oneDNN, prepacked"] = prepacked
    factories["eager fp32"] = lambda: torch_alone(torch.float32)
    if dtype != torch.float32:  # whose residuals it would round
        factories["eager bf16"] = lambda: torch_alone(torch.bfloat16)
    if case.compiled:
        factories["compiled, segments"] = lambda: compiled(eager.pool_segments)
        factories["compiled, scatters"] = lambda: compiled(eager.pool_scatter)
    return factories


def _update_moments(case: Case, device: torch.device, backends: tuple[str, ...]) -> Factories:
    g = torch.Generator(device).manual_seed(0)
    shape = (case.tokens, case.d_sae)
    sets = [torch.randn(shape, generator=g, dtype=torch.float32, device=device).relu()]
    sets += [
        torch.randn(shape, generator=g, dtype=torch.float32, device=device).relu()
        for _ in range(_sets(device, sets[0].nbytes) - 1)
    ]
    y = _rewards(case.tokens, case.labels, g)

    def ours(backend: str) -> Contestant:
        def check() -> dict:
            first = Moments(case.d_sae, case.labels, device=device)
            update_moments(sets[0], y, first, backend=backend)
            return ground_truth.check_pooled(sets[0], y, first)

        kept = Moments(case.d_sae, case.labels, device=device)
        return Contestant(lambda at: update_moments(sets[at % len(sets)], y, kept, backend=backend), check)

    def raw_sums() -> Contestant:
        (sums,) = _sums(case, device)
        return Contestant(lambda at: eager.add_sums(sets[at % len(sets)], y, sums))

    factories: Factories = {b: lambda b=b: ours(b) for b in dict.fromkeys((*backends, "reference"))}
    return factories | {"raw sums": raw_sums}


def _update_sums(case: Case, device: torch.device, backends: tuple[str, ...]) -> Factories:
    g = torch.Generator(device).manual_seed(0)

    def draw() -> Tensor:  # of which, as of a SAE's, one or two in a hundred are active
        return (torch.randn(case.tokens, case.d_sae, generator=g, dtype=torch.float32, device=device) - 2.2).relu()

    sets = [draw()]
    sets += [draw() for _ in range(_sets(device, sets[0].nbytes) - 1)]
    weights = _rewards(case.tokens, case.labels, g).double()

    def zeros() -> Tensor:
        return torch.zeros(case.d_sae, case.labels, dtype=torch.float64, device=device)

    def ours(backend: str) -> Contestant:
        def check() -> dict:
            first, features = zeros(), ground_truth.some_features(case.d_sae).to(device)
            update_sums(sets[0], weights, first, backend=backend)
            return ground_truth.check_close(first[features], sets[0][:, features].double().T @ weights, 1e-5)

        kept = zeros()
        return Contestant(lambda at: update_sums(sets[at % len(sets)], weights, kept, backend=backend), check)

    def product() -> Contestant:
        kept = zeros()
        return Contestant(lambda at: kept.addmm_(sets[at % len(sets)].double().T, weights))

    return {backend: lambda backend=backend: ours(backend) for backend in backends} | {"float64 product": product}


def _steer_add(case: Case, device: torch.device, backends: tuple[str, ...]) -> Factories:
    dtype = X_DTYPES.get(case.precision, torch.bfloat16)
    h = torch.randn(case.tokens, 1, case.d_in, dtype=torch.float32, device=device).to(dtype)
    vectors = 1e-3 * torch.randn(1, case.d_in, dtype=torch.float32, device=device)
    row_vector = torch.zeros(case.tokens, dtype=torch.int32, device=device)

    def ours(backend: str) -> Contestant:
        def check() -> dict:
            steered = steer_add(h.clone(), 1000 * vectors, row_vector, backend=backend)
            return ground_truth.check_close(
                steered, h.double() + 1000 * vectors.double(), 4 * ground_truth.TOLERANCE[case.precision]
            )

        return Contestant(lambda at: steer_add(h, vectors, row_vector, backend=backend), check)

    def add() -> Contestant:
        v = vectors[0].to(dtype)
        return Contestant(lambda at: h.add_(v))

    return {backend: lambda backend=backend: ours(backend) for backend in backends} | {"h.add_(v)": add}


def _rewards(n: int, labels: int, g: torch.Generator) -> Tensor:
    """Binary rewards `[n, labels]` float32, both kinds in every column."""
    y = (torch.rand(n, labels, generator=g, dtype=torch.float32, device=g.device) < 0.5).float()
    y[0], y[-1] = 0, 1
    return y


def _sums(case: Case, device: torch.device) -> list[Tensor]:
    shape = (2 + case.labels, case.d_sae)
    return [torch.zeros(shape, dtype=torch.float64, device=device) for _ in POOLS[case.pool]]


def _sets(device: torch.device, bytes_each: int) -> int:
    """How many sets of inputs exceed the GPU's L2 cache four times over; one on a CPU."""
    if device.type != "cuda":
        return 1
    return max(1, -(-4 * torch.cuda.get_device_properties(device).L2_cache_size // bytes_each))
