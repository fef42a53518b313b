"""Problems: what an operation is given, and what a place makes of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from memory import fenced
from places import Place
from torch import Tensor

from corrsteer import Moments, SparseEncoder, encode_pool, encode_update

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
ACTIVATIONS = ("relu", "jumprelu", "gated", "topk", "abstopk", "identity")


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


def fence_encoder(encoder: SparseEncoder) -> SparseEncoder:
    names = ("weight", "weight_low", "weight_sum", "bias", "threshold", "magnitude_scale", "magnitude_bias")
    parts = {name: getattr(encoder, name) for name in names}
    return dataclasses.replace(encoder, **{n: fenced(t) for n, t in parts.items() if t is not None})
