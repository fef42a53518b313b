"""The oracle: what is true of a problem, and how far from the truth a result may be.

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

import torch
from places import Place
from problems import BF16, F16, Case, Problem
from torch import Tensor

from corrsteer import Moments, SparseEncoder
from corrsteer.ops import reference

TOLERANCE = 1e-5
MANY_COLUMNS = 256  # of update_sums, above which Triton's kernels multiply in float32
UNDECIDED = 1e-5  # of the largest |W x + b|: nearer to a jump than this, float32 decides


def tolerance_of_moments(case: Case) -> float:
    return 1e-4 if case.precision in ("bf16", "fp16") and case.dtype in (F16, BF16) else TOLERANCE


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
