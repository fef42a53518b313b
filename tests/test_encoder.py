import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import corrsteer.encoder
from corrsteer import CorrSteerError, SparseEncoder, encode, sae_files

SAE = pytest.importorskip("sae_lens").SAE

D_IN, D_SAE, D_OUT, T = 24, 67, 17, 40
HEADS = (3, 8)
KINDS = {
    "standard": {},
    "jumprelu": {},
    "gated": {},
    "topk": {"k": 9},
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

# DESIGN, Numerical contract. In float64 both are the truth: what is left is the order of summation.
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
    """Tokens `[T, d_in]`: ordinary, of large norm, with one massive dimension, far off centre, tiny, near b_dec."""
    x = torch.randn(T, D_IN, generator=torch.Generator().manual_seed(seed))
    x[:4] *= 30
    x[4:6, 7] = 200
    x[6:8] += 4
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
    assert (error <= allowed).all(), f"error up to {(error / allowed).max():.2f} of what is allowed"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind, subtracts", SUBTRACTIONS)
def test_activations_are_those_of_sae_lens(kind, subtracts, norm, dtype):
    sae = make_sae(kind, dtype, apply_b_dec_to_input=subtracts, normalize_activations=norm)
    assert_as_exact_as_sae_lens(SparseEncoder.from_sae_lens(sae), sae, make_x(sae))
