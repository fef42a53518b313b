"""Every kernel once against the reference in float64, at sizes that divide nothing: python -m bench.checks

A minute on a GPU, before anything there is timed. It prints a line a check and exits with 1 where one does not hold;
memory checkers run it. Inputs are drawn on the CPU, so that they are the same everywhere.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import bench  # noqa: F401 (it finds the kernels of a checkout that is not installed)
from corrsteer import Moments, SparseEncoder, encode, encode_pool, encode_update, steer_add, update_moments, update_sums
from corrsteer.ops import reference, registry

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
BOUND = 2e-5  # of an activation, relative to the largest: what is accumulated in float32 loses no more
MOMENTS_BOUND = 1e-4  # of 16-bit operands, see docs/numerics.md
UNDECIDED = 1e-5  # of the largest preactivation: nearer to a jump than this, float32 decides
LENGTHS = {
    "T below a tile": (2, 0, 3),
    "ragged": (3, 1, 7, 0, 200, 2, 13, 5, 70),
    "one token a sample": (1,) * 33,
}
BEYOND = 2**31
LAST = 20  # rows that are compared, of sizes beyond


@dataclass(frozen=True)
class Check:
    """An operation on some inputs: `error(device, backend)` is its largest error, relative to the output's scale."""

    name: str
    operation: str
    dtype: torch.dtype
    bound: float
    error: Callable[[torch.device, str], float]
    activation: str | None = None
    precision: str | None = None
    backend: str | None = None  # the one that it is about, where that is not the one that is asked for
    gib: float = 0.0  # of GPU memory that it takes; 0 for next to none, and then it runs on a CPU too

    def planned(self, backend: str) -> dict[str, Any]:
        """Its record before it has run."""
        backend = self.backend or backend
        return {"name": f"{backend}: {self.name}", "operation": self.operation, "ours": backend}

    def skipped(self, device: torch.device, backend: str) -> str:
        """Why it cannot run on a device; empty where it can."""
        if device.type != "cuda" and (self.gib or self.backend == "cuda"):
            return "not on a CPU"
        call = registry.Call(self.operation, device, self.dtype, self.activation, self.precision)
        chosen = next(b for b in registry.registered() if b.name == (self.backend or backend))
        if not (verdict := registry.judge(chosen, call)).ok:
            return verdict.reason
        if self.gib and (free := torch.cuda.mem_get_info()[0] / 2**30) < self.gib:
            return f"it takes {self.gib:.0f} GiB of GPU memory, and {free:.0f} are free"
        return ""

    def run(self, device: torch.device, backend: str) -> dict[str, Any]:
        """`ok`, the error (None where a number is missing or not finite) and the bound."""
        error = self.error(device, self.backend or backend)
        return {"ok": error <= self.bound, "error": error if error < float("inf") else None, "bound": self.bound}


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def _normal(g: torch.Generator, *shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=g, dtype=dtype, device="cpu")


def off(got: Tensor, true: Tensor) -> float:
    """The largest difference, relative to the largest finite value; a NaN or an infinity must be where it belongs."""
    if got.shape != true.shape:
        return float("inf")
    if not true.numel():
        return 0.0
    got, true = got.double(), true.double()
    equal = (got == true) | (got.isnan() & true.isnan())
    scale = torch.where(true.isfinite(), true.abs(), 0.0).max().clamp(min=1e-300)
    apart = torch.where(equal, 0.0, (got - true).abs() / scale)
    return float(apart.nan_to_num(nan=torch.inf, posinf=torch.inf).max())


@dataclass(frozen=True, eq=False)
class Problem:
    x: Tensor  # [T, d_in]
    cu: Tensor
    encoder: SparseEncoder
    exact: SparseEncoder  # in float64

    def dense(self) -> Tensor:
        return reference.encode(self.x.double(), self.exact)


def draw(
    device: torch.device, activation: str, dtype: torch.dtype, precision: str, lengths: Sequence[int], d_in: int,
    d_sae: int = 131, misaligned: bool = False, bias: dict[int, float] | None = None,
) -> Problem:  # fmt: skip
    """Numbers of which float32 decides nothing: no preactivation is close to where its activation jumps.

    `misaligned` rows begin 2 bytes, or 4, after an address that 16 divides; `bias` is what some features have for one.
    """
    for seed in range(200):
        g = _seeded(seed)
        form = {"weight": _normal(g, d_sae, d_in) / d_in**0.5}
        form["bias"] = 0.3 * _normal(g, d_sae)
        if activation == "jumprelu":
            form["threshold"] = _normal(g, d_sae).abs()
        if activation == "gated":
            form["magnitude_scale"] = _normal(g, d_sae).exp()
            form["magnitude_bias"] = _normal(g, d_sae)
        whole = SparseEncoder(d_in, d_sae, activation, **form, k=5)
        x = _normal(g, sum(lengths), d_in).to(dtype)
        encoder = whole.to(precision=precision)
        exact = (whole if precision == "bf16x2" else encoder).to(dtype=torch.float64)
        if _decided(x, exact):
            break
    else:
        raise RuntimeError(f"no inputs found for {activation} of which float32 decides nothing")
    for feature, value in (bias or {}).items():
        for of in (encoder, exact):
            of.bias[feature] = value
    rows = torch.empty(x.numel() + 1, dtype=dtype, device=device)[int(misaligned) :][: x.numel()].view(x.shape)
    cu = torch.tensor([0, *lengths], dtype=torch.int64, device="cpu").cumsum(0).to(device, torch.int32)
    return Problem(rows.copy_(x), cu, encoder.to(device), exact.to(device))


def _decided(x: Tensor, exact: SparseEncoder) -> bool:
    p = reference.preactivation(x.double(), exact) + exact.bias
    margin = UNDECIDED * p.abs().max()
    if "topk" in exact.activation:
        ranks = (p.abs() if exact.activation == "abstopk" else p).topk(exact.k + 1, dim=-1).values
        return bool((ranks[:, -2] - ranks[:, -1] > margin).all())
    jump = {"jumprelu": exact.threshold, "gated": 0.0}.get(exact.activation)
    return jump is None or bool(((p - jump).abs() > margin).all())


def _rewards(n: int, labels: int, device: torch.device) -> Tensor:
    return _normal(_seeded(1), n, labels).to(device)


def _encode(device: torch.device, backend: str, problem: Problem) -> float:
    return off(encode(problem.x, problem.encoder, backend=backend), problem.dense())


def _pool(device: torch.device, backend: str, problem: Problem) -> float:
    z = problem.dense()
    got = encode_pool(problem.x, problem.cu, problem.encoder, "both", backend=backend)
    return max(off(mine, reference.pool(z, problem.cu, how)) for mine, how in zip(got, ("mean", "max")))


def _update(device: torch.device, backend: str, problem: Problem, pool: str) -> float:
    """Twice, as the second batch is merged with the first."""
    pools, y = (("mean", "max") if pool == "both" else (pool,)), _rewards(len(problem.cu) - 1, 3, device)
    mine, true = ([Moments(problem.encoder.d_sae, 3, device=device) for _ in pools] for _ in range(2))
    for rewards in (y, y.flip(0)):
        into = (mine[0], mine[1]) if pool == "both" else mine[0]
        encode_update(problem.x, problem.cu, rewards, problem.encoder, into, pool, backend=backend)
        reference.encode_update(problem.x.double(), problem.cu, rewards, problem.exact, tuple(true), pools)
    return max(_moments_off(a, b) for a, b in zip(mine, true))


def _moments_off(mine: Moments, true: Moments) -> float:
    return max(off(a, b) for a, b in zip(mine.state(), true.state()))


def _moments(device: torch.device, backend: str, dtype: torch.dtype, labels: int, step: int) -> float:
    z = _normal(_seeded(0), 37, 131 * step).relu().to(device, dtype)[:, ::step]
    mine, true = Moments(131, labels, device=device), Moments(131, labels, device=device)
    for rows in (slice(0, 30), slice(30, None)):
        y = _rewards(len(z[rows]), labels, device)
        update_moments(z[rows], y, mine, backend=backend)
        reference.update_moments(z[rows], y, true)
    return _moments_off(mine, true)


def _sums(device: torch.device, backend: str, powers: tuple[int, ...]) -> float:
    g = _seeded(0)
    z = _normal(g, 37, 131).relu().to(device)
    weights = _normal(g, 37, sum(powers), dtype=torch.float64).to(device)
    mine, true = (torch.ones(131, sum(powers), dtype=torch.float64, device=device) for _ in range(2))
    update_sums(z, weights, mine, powers, backend=backend)
    reference.update_sums(z, weights, true, powers)
    return off(mine, true)


def _steer(device: torch.device, backend: str, dtype: torch.dtype, d: int, misaligned: bool) -> float:
    g = _seeded(0)
    h = _normal(g, 3, 5, d).to(dtype)
    vectors = _normal(g, 2, d).to(device)
    row_vector = torch.tensor([1, -1, 0], dtype=torch.int32, device=device)
    positions = (_normal(g, 3, 5) < 0).to(device)
    mine = torch.empty(h.numel() + 1, dtype=dtype, device=device)[int(misaligned) :][: h.numel()].view(h.shape).copy_(h)
    true = mine.clone()
    reference.steer_add(true, vectors, row_vector, positions)
    return off(steer_add(mine, vectors, row_vector, positions, backend=backend), true)


def _encode_beyond(device: torch.device, backend: str, elements: int) -> float:
    """A result of more elements than 2^31."""
    d_sae = 131
    problem = draw(device, "jumprelu", BF16, "bf16", (LAST,), 16, d_sae)
    x = problem.x.repeat(elements // d_sae // LAST + 1, 1)
    return off(encode(x, problem.encoder, backend=backend)[-LAST:], problem.dense())


def _pool_beyond(device: torch.device, backend: str, elements: int) -> float:
    """Residuals of more elements than 2^31, in samples of which the last two are compared."""
    d_in, lengths = 2304, (LAST - 7, 7)
    problem = draw(device, "jumprelu", BF16, "bf16", lengths, d_in)
    times = elements // d_in // LAST + 1
    x, cu = problem.x.repeat(times, 1), problem.cu[1:].repeat(times)
    cu = torch.cat(
        [problem.cu[:1], cu + LAST * torch.arange(times, dtype=torch.int32, device=device).repeat_interleave(2)]
    ).int()
    got = encode_pool(x, cu, problem.encoder, "max", backend=backend)[-2:]
    return off(got, reference.pool(problem.dense(), problem.cu, "max"))


def _moments_beyond(device: torch.device, backend: str, elements: int) -> float:
    """Pooled activations of more elements than 2^31, of which the last features are compared."""
    n = 331
    d_sae, y = elements // n + LAST, _rewards(n, 1, device)
    z = torch.zeros(n, d_sae, dtype=F32, device=device)
    z[:, -LAST:] = _normal(_seeded(0), n, LAST).relu()
    mine, true = Moments(d_sae, device=device), Moments(LAST, device=device)
    update_moments(z, y, mine, backend=backend)
    reference.update_moments(z[:, -LAST:], y, true)
    last = [a[..., -LAST:] if a.dim() and a.shape[-1] == d_sae else a for a in mine.state()]
    return max(off(a, b) for a, b in zip(last, true.state()))


def _sums_beyond(device: torch.device, backend: str, elements: int) -> float:
    n = 331
    z = torch.zeros(n, elements // n + LAST, dtype=F32, device=device)
    z[:, -LAST:] = _normal(_seeded(0), n, LAST).relu()
    weights = _rewards(n, 2, device).double()
    mine, true = (torch.zeros(columns, 2, dtype=torch.float64, device=device) for columns in (z.shape[1], LAST))
    update_sums(z, weights, mine, backend=backend)
    reference.update_sums(z[:, -LAST:], weights, true, (2,))
    return off(mine[-LAST:], true)


def _steer_beyond(device: torch.device, backend: str, elements: int) -> float:
    d = 2304
    h = torch.zeros(2, elements // d // 2 + LAST, d, dtype=BF16, device=device)
    vectors = _normal(_seeded(0), 1, d).to(device)
    row_vector = torch.tensor([-1, 0], dtype=torch.int32, device=device)
    steer_add(h, vectors, row_vector, backend=backend)
    return max(off(h[1, -LAST:], vectors.to(BF16).expand(LAST, d)), off(h[0, -LAST:], torch.zeros_like(h[0, -LAST:])))


# Features whose activation is infinite, absent and lost, in every token of every sample.
EXTREME = {2: torch.inf, 77: -torch.inf, 130: torch.nan}


def checks(elements: int = BEYOND) -> list[Check]:
    """All of them, the most telling first; `elements` is how many count as too many for 32 bits."""

    def encoding(operation: str, run: Callable, form: tuple, sizes: str, d_in: int = 19, **more: Any) -> Check:
        activation, dtype, precision = form
        given = {name: more.pop(name) for name in ("misaligned", "bias") if name in more}
        words = [activation, precision, str(dtype).removeprefix("torch."), sizes, f"d_in {d_in}"]
        words += ["misaligned"] * ("misaligned" in given) + ["NaN and infinity"] * ("bias" in given)
        words += [f"pooled by {pool}" for pool in [more.get("pool")] if pool]
        bound = BOUND if precision != "bf16x2" else 1e-4
        if operation == "encode_update" and dtype != F32:
            bound = MOMENTS_BOUND

        def error(device: torch.device, backend: str) -> float:
            return run(device, backend, draw(device, *form, LENGTHS[sizes], d_in, **given), **more)

        return Check(f"{operation} {', '.join(words)}", operation, dtype, bound, error, activation, precision)

    usual, single, split = ("jumprelu", BF16, "bf16"), ("jumprelu", F32, "fp32"), ("jumprelu", BF16, "bf16x2")
    forms = (("gated", F16, "fp16"), ("topk", BF16, "bf16"), ("abstopk", F32, "fp32"), ("relu", F32, "fp32_ieee"))

    def moments(dtype: torch.dtype, labels: int, step: int) -> Check:
        name = f"update_moments R={labels}, {str(dtype).removeprefix('torch.')}{', strided' * (step > 1)}"
        return Check(name, "update_moments", dtype, 1e-5, lambda *at: _moments(*at, dtype, labels, step))

    def sums(powers: tuple[int, ...]) -> Check:
        bound = 1e-5 if sum(powers[:1]) > 256 else 1e-12  # more columns are a product of float32 accuracy
        return Check(f"update_sums powers {powers}", "update_sums", F32, bound, lambda *at: _sums(*at, powers))

    def steer(backend: str | None, dtype: torch.dtype, d: int, misaligned: bool) -> Check:
        name = f"steer_add {str(dtype).removeprefix('torch.')}, d {d}{', misaligned' * misaligned}"
        return Check(name, "steer_add", dtype, 1e-6, lambda *at: _steer(*at, dtype, d, misaligned), backend=backend)

    def beyond(operation: str, run: Callable, dtype: torch.dtype, bound: float, gib: float, backend: str | None = None):
        encoder = ("jumprelu", "bf16") if operation.startswith("encode") else (None, None)
        name = f"{operation} of more than 2^31 elements"
        return Check(name, operation, dtype, bound, lambda *at: run(*at, elements), *encoder, backend, gib)

    steered = [(F32, 19, False), (BF16, 19, False), (BF16, 2304, True), (F16, 2304, False)]
    return [
        encoding("encode_update", _update, usual, "ragged", 64, pool="mean"),
        encoding("encode_update", _update, usual, "T below a tile", pool="both"),
        encoding("encode_update", _update, usual, "one token a sample", 64, pool="mean"),
        encoding("encode_update", _update, single, "ragged", 64, pool="mean"),
        *[steer(backend, *of) for backend in (None, "cuda") for of in steered],
        moments(F32, 1, 1),
        moments(F16, 3, 2),
        sums((2, 1, 0, 1)),
        sums((300,)),
        encoding("encode_pool", _pool, usual, "ragged", 64),
        encoding("encode_pool", _pool, usual, "ragged", 64, misaligned=True),
        encoding("encode_pool", _pool, usual, "ragged", bias=EXTREME),
        encoding("encode_pool", _pool, single, "one token a sample", bias=EXTREME),
        encoding("encode_pool", _pool, split, "ragged", 64),
        encoding("encode", _encode, usual, "ragged", 64),
        encoding("encode", _encode, usual, "T below a tile"),
        *[encoding("encode_pool", _pool, form, "ragged") for form in forms],
        *[encoding("encode_update", _update, form, "ragged", pool="max") for form in forms[1:]],
        *[encoding("encode", _encode, form, "ragged") for form in forms],
        beyond("encode", _encode_beyond, BF16, BOUND, 14),
        beyond("encode_pool", _pool_beyond, BF16, BOUND, 8),
        beyond("update_moments", _moments_beyond, F32, 1e-5, 16),
        beyond("update_sums", _sums_beyond, F32, 1e-12, 12),
        beyond("steer_add", _steer_beyond, BF16, 1e-6, 8),
        beyond("steer_add", _steer_beyond, BF16, 1e-6, 8, "cuda"),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.checks", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="triton", choices=[b.name for b in registry.registered()])
    parser.add_argument("--small", action="store_true", help="without the sizes beyond 2^31 elements")
    options = parser.parse_args(arguments)
    device, good = torch.device(options.device), True
    for check in checks():
        said = check.planned(options.backend)["name"]
        if options.small and check.gib:
            continue
        if reason := check.skipped(device, options.backend):
            print(f"{said}: skipped, {reason}")
            continue
        found = check.run(device, options.backend)
        good &= found["ok"]
        print(f"{said}: {'ok' if found['ok'] else 'WRONG'}, error {found['error']}, bound {found['bound']}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
