"""Where an operation runs, what it is given, what is true of it, and how far from the truth it may be.

A backend's error may be at most eager torch's own, plus `TOLERANCE` of the output's scale.

- The truth is the reference in float64, of the operands as they are given: x in its own dtype, and the weights that
  the encoder holds. For the precision bf16x2 it is of the float32 weights that were split, so that what the split
  loses counts.
- Eager torch is the `reference` backend, which widens the same operands to float32. Products of two 16-bit numbers
  are exact in float32, so whoever accumulates in float32 loses no more in bfloat16 than in float32, and the tolerance
  is 1e-5 for every dtype. That is 100 and 1000 times less than what is promised of float16 and bfloat16, within which
  a backend could round its accumulator to 16 bits without being noticed. The reference itself gets no allowance.
- Moments of 16-bit operands are allowed 1e-4: on tensor cores a backend may sum activations as pairs of bfloat16,
  which keep 16 of their bits, and second moments double that error.
- Where an activation jumps (a threshold, a gate, the k-th largest), the last bit of float32 decides on which side it
  falls. The truth is then an interval: `dense_bounds` gives the activations with every undecided one off, and on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from corrsteer import Moments, SparseEncoder, backends, encode_pool, encode_update, native_backend, reference
from corrsteer.backends import Call

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
ACTIVATIONS = ("relu", "jumprelu", "gated", "topk", "abstopk", "identity")
TOLERANCE = 1e-5
MANY_COLUMNS = 256  # of update_sums, above which Triton's kernels multiply in float32
UNDECIDED = 1e-5  # of the largest |W x + b|: nearer to a jump than this, float32 decides


def tolerance_of_moments(case: Case) -> float:
    return 1e-4 if case.precision in ("bf16", "fp16") and case.dtype in (F16, BF16) else TOLERANCE


class Place(NamedTuple):
    """A backend and the device it runs on; where it has code for several instruction sets, which of them."""

    backend: str
    device: str
    instruction_set: str = ""

    def __str__(self):
        return "/".join(filter(None, self))

    def does(self, operation: str, dtype=F32, activation=None, precision=None) -> bool:
        """Whether its verifier says so; where there is no GPU to ask about, yes, as the test will be skipped."""
        if self.device == "cuda" and not torch.cuda.is_available():
            return True
        backend = next(b for b in backends.registered() if b.name == self.backend)
        return backends.judge(backend, Call(operation, torch.device(self.device), dtype, activation, precision)).ok


REFERENCE = (Place("reference", "cpu"), Place("reference", "cuda"))
TRITON = (Place("triton", "cpu"), Place("triton", "cuda"))
INSTRUCTION_SETS = native_backend._native.instruction_sets() if native_backend._native else ("none",)
NATIVE = tuple(Place("native", "cpu", name) for name in INSTRUCTION_SETS)
CUDA = (Place("cuda", "cuda"),)  # it steers, and does nothing else
PLACES = REFERENCE + NATIVE + TRITON
ON_GPU = (Place("reference", "cuda"), Place("triton", "cuda"))


def at(place: Place, *values, id: str = ""):
    """A test's parameters at a place: marked `gpu` where it needs one, skipped where it cannot run."""
    marks = [pytest.mark.gpu] if place.device == "cuda" else []
    if place.device == "cuda" and not torch.cuda.is_available():
        marks += [pytest.mark.skip(reason="there is no CUDA GPU")]
    elif not place.does("steer_add"):
        marks += [pytest.mark.skip(reason=f"{place} cannot run here; corrsteer doctor says why")]
    return pytest.param(place, *values, marks=marks, id=f"{place} {id}".strip())


def everywhere(places=PLACES):
    """Parametrise a test over places."""
    return pytest.mark.parametrize("place", [at(place) for place in places])


def for_each(cases: dict[str, Case], operation: str = "encode_pool", places=PLACES):
    """Parametrise a test over places and cases, without what a place's backend says it does not do."""
    return pytest.mark.parametrize(
        ("place", "case"),
        [
            at(place, case, id=name)
            for place in places
            for name, case in cases.items()
            if not place.does("steer_add") or place.does(operation, case.dtype, case.activation, case.precision)
        ],
    )


@dataclass(frozen=True)
class Case:
    """What an encoding operation is given, but for the numbers."""

    activation: str = "relu"
    precision: str = "fp32"
    dtype: torch.dtype = F32  # of x
    lengths: tuple[int, ...] = (3, 1, 7, 2, 13, 5)
    pool: str = "both"
    d_in: int = 19
    d_sae: int = 37
    norm: str = "none"
    k: int = 5
    seed: int = 0

    def but(self, **changes) -> Case:
        return dataclasses.replace(self, **changes)

    @property
    def pools(self) -> tuple[str, ...]:
        return ("mean", "max") if self.pool == "both" else (self.pool,)


@dataclass(frozen=True, eq=False)
class Problem:
    """A case's numbers: `x: [T, d_in]`, `cu: [N + 1]`, the encoder, and the float64 encoder that the truth is of."""

    case: Case
    x: Tensor
    cu: Tensor
    encoder: SparseEncoder
    exact: SparseEncoder

    def but(self, **changes) -> Problem:
        return dataclasses.replace(self, **changes)


def make(case: Case, device="cpu") -> Problem:
    """The numbers of a case: the same on every device."""
    encoder, exact = make_encoders(
        case.activation, case.d_in, case.d_sae, case.precision, case.norm, case.k, case.seed, device
    )
    x = torch.randn(sum(case.lengths), case.d_in, generator=torch.Generator().manual_seed(case.seed + 1))
    return Problem(case, fenced(x.to(device, case.dtype)), fenced(cu(case.lengths, device)), encoder, exact)


def make_encoders(activation, d_in=19, d_sae=67, precision="fp32", norm="none", k=5, seed=0, device="cpu"):
    """An encoder, and the float64 one that is its truth."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g)

    if activation == "identity":
        return SparseEncoder.identity(d_in), SparseEncoder.identity(d_in)
    form = {"weight": rand(d_sae, d_in) / d_in**0.5, "bias": 0.3 * rand(d_sae)}
    if activation == "jumprelu":
        form["threshold"] = rand(d_sae).abs()
    if activation == "gated":
        form |= {"magnitude_scale": rand(d_sae).exp(), "magnitude_bias": rand(d_sae)}
    whole = SparseEncoder(d_in, d_sae, activation, **form, k=min(k, d_sae), input_norm=norm).to(device)
    encoder = whole.to(precision=precision)
    return fence_encoder(encoder), double(whole if precision == "bf16x2" else encoder)


def make_encoder(activation, **form) -> SparseEncoder:
    return make_encoders(activation, **form)[0]


def double(encoder: SparseEncoder) -> SparseEncoder:
    """The same encoder in float64, which makes the reference compute the truth."""
    if encoder.activation == "identity":
        return encoder
    wide = encoder.to(dtype=torch.float64)
    for name in ("bias", "threshold", "magnitude_scale", "magnitude_bias"):
        if getattr(wide, name) is not None:
            object.__setattr__(wide, name, getattr(wide, name).double())
    return wide


def cu(lengths, device="cpu") -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def pooled(problem: Problem, place: Place, pool: str | None = None) -> tuple[Tensor, ...]:
    """`encode_pool` as a place does it: one result for each pooling."""
    pool = pool or problem.case.pool
    out = encode_pool(problem.x, problem.cu, problem.encoder, pool, backend=place.backend)
    return out if pool == "both" else (out,)


def updated(problem: Problem, y: Tensor, place: Place, history: tuple[Moments, ...] = ()) -> tuple[Moments, ...]:
    """`encode_update` as a place does it, of copies of `history`: one Moments for each pooling."""
    labels = 1 if y.dim() == 1 else y.shape[1]
    empty = [Moments(problem.encoder.d_sae, labels)] * len(problem.case.pools)
    states = tuple(Moments.from_state([fenced(t) for t in m.to(place.device).state()]) for m in history or empty)
    into = states if problem.case.pool == "both" else states[0]
    encode_update(problem.x, problem.cu, y, problem.encoder, into, problem.case.pool, backend=place.backend)
    return states


# The truth.


def _jumps(x: Tensor, exact: SparseEncoder) -> tuple[Tensor, Tensor, Tensor]:
    """`[T, d_sae]` each: what is activated where it is on, whether float32 decides if it is, and W x + b."""
    product = reference.preactivation(x.double(), exact)
    p = product + exact.bias
    margin = UNDECIDED * p.abs().max() if p.numel() else 0.0
    if exact.activation == "jumprelu":
        return p.relu(), (p - exact.threshold.relu()).abs() <= margin, p
    if exact.activation == "gated":
        magnitude = product * exact.magnitude_scale + exact.magnitude_bias
        return magnitude.relu(), p.abs() <= margin, torch.where(magnitude.abs() < p.abs(), magnitude, p)
    if "topk" in exact.activation and exact.k < exact.d_sae:
        rank = p.abs() if exact.activation == "abstopk" else p
        ranks = rank.topk(exact.k + 1, dim=-1).values
        last, next_best = ranks[:, -2:-1], ranks[:, -1:]
        undecided = torch.where(rank >= last, rank - next_best <= margin, last - rank <= margin)
        return p if exact.activation == "abstopk" else p.relu(), undecided, p
    return p, torch.zeros_like(p, dtype=torch.bool), p


def dense_bounds(x: Tensor, exact: SparseEncoder) -> tuple[Tensor, Tensor]:
    """Activations `[T, d_sae]` float64 with every undecided one as low, and as high, as it can be."""
    if exact.activation == "identity":
        return x.double(), x.double()
    z = reference.encode(x.double(), exact)
    value, undecided, _ = _jumps(x, exact)
    return torch.where(undecided, value.clamp(max=0), z), torch.where(undecided, value.clamp(min=0), z)


def pooled_bounds(problem: Problem, how: str) -> tuple[Tensor, Tensor]:
    low, high = dense_bounds(problem.x, problem.exact)
    return tuple(eager_pool(z, problem.cu.diff().tolist(), how) for z in (low, high))


def eager_pool(z: Tensor, lengths, how: str) -> Tensor:
    """The definition once more, sample by sample."""
    out = z.new_zeros(len(lengths), z.shape[1])
    start = 0
    for j, n in enumerate(lengths):
        if n:
            part = z[start : start + n]
            out[j] = part.mean(0) if how == "mean" else part.amax(0)
        start += n
    return out


def decided(problem: Problem) -> Tensor:
    """`[d_sae]` bool: features of which float32 decides nothing, neither a jump nor whether one is active."""
    if problem.encoder.activation == "identity" or len(problem.x) == 0:
        return torch.ones(problem.encoder.d_sae, dtype=torch.bool, device=problem.x.device)
    _, undecided, p = _jumps(problem.x, problem.exact)
    return ~(undecided | (p.abs() <= UNDECIDED * p.abs().max())).any(0)


def true_moments(z: Tensor, y: Tensor) -> Moments:
    """Moments of pooled `z: [N, d_sae]` and rewards `[N]` or `[N, R]`: their definitions, over all samples."""
    z, y = z.double(), (y[:, None] if y.dim() == 1 else y).double()
    moments = Moments(z.shape[1], y.shape[1], z.device)
    if len(z) == 0:
        return moments
    moments.count.fill_(len(z))
    moments.z_mean[:], moments.y_mean[:] = z.mean(0), y.mean(0)
    z_dev, y_dev = z - z.mean(0), y - y.mean(0)
    moments.z_m2[:], moments.y_m2[:] = z_dev.square().sum(0), y_dev.square().sum(0)
    moments.n_positive[:], moments.n_active[:] = (y > 0).sum(0), (z > 0).sum(0)
    for r in range(y.shape[1]):
        moments.cross[r] = (y_dev[:, r, None] * z_dev).sum(0)
        for group, members in enumerate((y[:, r] > 0, y[:, r] <= 0)):
            moments.group_sum[group, r] = z[members].sum(0)
            moments.group_active_sum[group, r] = z[members].clamp(min=0).sum(0)
            moments.group_active_count[group, r] = (z[members] > 0).sum(0)
    return moments


# Errors.


def error(got: Tensor, low: Tensor, high: Tensor) -> float:
    """How far `got` is outside of `[low, high]` anywhere; infinite where it is NaN or of another shape."""
    if got.shape != low.shape:
        return float("inf")
    outside = torch.maximum(low - got, got - high)
    return float(outside.nan_to_num(nan=float("inf")).clamp(min=0).max()) if got.numel() else 0.0


def assert_as_close_as_eager(got, low, high, eager=None, tolerance=TOLERANCE, of=""):
    """`got` is no further from the truth than `eager` torch (None for no allowance), plus a tolerance."""
    scale = float(torch.maximum(low.abs(), high.abs()).max()) if low.numel() else 0.0
    allowed = tolerance * scale + (0.0 if eager is None else error(eager, low, high))
    found = error(got, low, high)
    assert found <= allowed, f"{of} is {found:.3g} off at a scale of {scale:.3g}, where {allowed:.3g} is allowed"


def assert_moments(got: Moments, truth: Moments, eager: Moments | None = None, features=..., tolerance=TOLERANCE):
    """Every array in the error form, but for what is exact: counts, and the rewards' own moments in float64."""
    for name, mine, true in zip(Moments.STATE, got.state(), truth.state()):
        assert mine.dtype == torch.float64
        theirs = None if eager is None else getattr(eager, name)
        if truth.d_sae in true.shape[-1:] and name not in ("y_mean", "y_m2", "n_positive"):
            mine, true = mine[..., features], true[..., features]
            theirs = None if theirs is None else theirs[..., features]
        if name in ("count", "n_positive", "n_active", "group_active_count"):
            assert torch.equal(mine, true), name
        elif name in ("y_mean", "y_m2"):
            assert_as_close_as_eager(mine, true, true, None, 1e-12, name)
        else:
            assert_as_close_as_eager(mine, true, true, theirs, tolerance, name)


def assert_summed(got: Tensor, z: Tensor, weights: Tensor, before: Tensor, powers: tuple[int, ...], place: Place):
    """`got` is what `update_sums` has to make of `before`; errors are relative to what the absolute values sum to."""
    exponents = torch.repeat_interleave(torch.arange(1, len(powers) + 1), torch.tensor(powers, dtype=torch.int64))
    terms = weights.cpu()[:, None] * z.cpu().double()[:, :, None].pow(exponents)  # [N, D, C]
    truth, scale = before.cpu() + terms.sum(0), before.cpu().abs() + terms.abs().sum(0)
    tolerance = torch.full_like(scale, 1e-12)
    if place.backend == "triton" and sum(powers[:1]) > MANY_COLUMNS:  # a product of float32 accuracy
        tolerance[:, : powers[0]] = TOLERANCE
    assert got.dtype == torch.float64 and got.shape == truth.shape
    off = ((got.cpu() - truth).abs() / (tolerance * scale).clamp(min=1e-300)).nan_to_num(nan=torch.inf)
    assert not bool((off > 1).any()), f"{int((off > 1).sum())} sums are off, one by {float(off.max()):.3g} tolerances"


def assert_same_state(one: Moments, other: Moments):
    for name, a, b in zip(Moments.STATE, one.state(), other.state()):
        assert torch.equal(a, b), name


# Memory that shows what is not written, and what is written or read beside it.

# Elements on either side, so that the addresses stay multiples of what a GPU's copy engine wants; none where an address
# sanitizer watches, which knows where memory ends better than any margin.
MARGIN = 0 if "CORRSTEER_EXTENSIONS" in os.environ else 64
NO_INDEX = -7  # what integers are born with: wrong wherever it is used, and near enough not to end the process
_empty, _empty_like = torch.empty, torch.empty_like
_watched: list[tuple[Tensor, Tensor]] = []  # what has been born within `poison`, and the memory around it


def _poison_of(dtype: torch.dtype):
    if dtype.is_floating_point:
        return float("nan")
    return NO_INDEX if dtype.is_signed else True if dtype == torch.bool else 256 + NO_INDEX


def _born(shape, dtype, device) -> Tensor:
    count = torch.Size(shape).numel()
    around = _empty(count + 2 * MARGIN, dtype=dtype, device=device).fill_(_poison_of(dtype))
    inside = around[MARGIN : MARGIN + count].view(shape)
    _watched.append((inside, around))
    return inside


def fenced(tensor: Tensor) -> Tensor:
    """A copy with poison around it, which whoever reads beyond its ends will read."""
    return _born(tensor.shape, tensor.dtype, tensor.device).copy_(tensor)


def fence_encoder(encoder: SparseEncoder) -> SparseEncoder:
    names = ("weight", "weight_low", "weight_sum", "bias", "threshold", "magnitude_scale", "magnitude_bias")
    parts = {name: getattr(encoder, name) for name in names}
    return dataclasses.replace(encoder, **{n: fenced(t) for n, t in parts.items() if t is not None})


@contextlib.contextmanager
def poison():
    """Within, `torch.empty` and `torch.empty_like` give poison between margins; at the end these must be untouched."""

    def empty(*size, dtype=None, device=None, **_):
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        return _born(shape, dtype or torch.get_default_dtype(), device or "cpu")

    def empty_like(tensor, *, dtype=None, device=None, **_):
        return _born(tensor.shape, dtype or tensor.dtype, device or tensor.device)

    _watched.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        patch.setattr(torch, "empty_like", empty_like)
        yield
    for inside, around in _watched:
        for margin in (around[:MARGIN], around[MARGIN + inside.numel() :]):
            intact = margin.isnan() if margin.dtype.is_floating_point else margin == _poison_of(margin.dtype)
            assert bool(intact.all()), f"memory beside a {list(inside.shape)} {inside.dtype} was written to"
    _watched.clear()
